"""Native bfloat16: attention and linear layers against float64, as products of pairs and as float32.

Attention: every variant and odd length, to the error that its template states.
"""

import numpy as np
import pytest
from scipy.special import erfc, expit

from attntune.measure.buffers import GuardedArray, as_tensor, numpy_dtype
from attntune.ops import Attention, Linear
from attntune.target import native
from attntune.templates import template_for
from attntune.templates.cpu import amx, bf16
from attntune.templates.cpu.attention_bf16 import AttentionBf16CPU
from attntune.templates.cpu.attention_decode import AttentionDecodeCPU
from attntune.templates.cpu.vectors import Vectors
from attntune.templates.lowering import build

TARGET = native().with_cores(2)

pytestmark = pytest.mark.skipif(not bf16.available(native()), reason="this CPU lacks AVX512-BF16")


def run(workload, template, config):
    """What the kernel writes and its reference, float64; nothing else is written."""
    assert config in template.space(workload, TARGET)
    kernel = build(template.schedule(workload, TARGET, config), TARGET)
    inputs = workload.example_inputs(seed=1)
    packings = template.pack(workload, TARGET)
    given = (
        packings[spec.name].apply(values) if spec.name in packings else values
        for spec, values in zip(workload.inputs(), inputs, strict=True)
    )  # fmt: skip
    operands = [GuardedArray.holding(np.ascontiguousarray(values)) for values in given]
    (out,) = (GuardedArray(spec.shape, numpy_dtype(spec.dtype)) for spec in workload.outputs())
    kernel["main"](*(as_tensor(operand.array) for operand in (*operands, out)))
    assert all(operand.guards_intact() for operand in (*operands, out))
    return out.array.astype(np.float64), workload.reference(*inputs)[0]


#: The ways to multiply, by the knobs that choose them.
WAYS = {
    "pairs": {},
    "widened": {"widen": True},
    "tiles": {"amx": True},
    "tiles, values turned": {"amx": True, "turn_values": True},
}


def chosen(template, workload, way):
    """The config most like the default that multiplies this way; skips where there is none."""
    if "amx" in WAYS[way] and not amx.available(native()):
        pytest.skip("this CPU lacks AMX")
    wanted = {"widen": False, "amx": False, "turn_values": False, **WAYS[way]}
    default = template.default(workload, TARGET)
    space = [
        config
        for config in template.space(workload, TARGET)
        if all(config.get(name, False) == value for name, value in wanted.items())
    ]
    if not space:
        pytest.skip(f"{workload} has no {way}")
    return max(space, key=lambda config: (sum(config[name] == default[name] for name in config), config.key()))


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(
    "workload",
    [
        Attention(2, 3, 17, 17, 32, packed=True, mask=True),
        Attention(1, 4, 5, 29, 8, kv_heads=2, mask=True),
        Attention(3, 2, 33, 33, 16, packed=True, causal=True, mask=True),
        Attention(2, 2, 7, 31, 20, causal=True, causal_offset=24),
        Attention(1, 2, 19, 13, 80, bias_batch=1, bias_heads=2, scale=0.25),
        Attention(1, 2, 1, 1, 2),
        Attention(1, 3, 131, 197, 64, layout="bhsd"),
        Attention(3, 2, 67, 67, 16, packed=True, lengths="qkv", causal=True),
        Attention(3, 4, 1, 151, 64, kv_heads=2, lengths="kv"),
        Attention(2, 6, 1, 77, 64, kv_heads=1, lengths="kv"),
        Attention(1, 10, 2, 45, 32, kv_heads=2, causal=True, layout="bhsd", softcap=5.0),
        Attention(4, 2, 131, 131, 16, packed=True, ragged=True),
        Attention(3, 2, 67, 67, 64, packed=True, lengths="qkv", causal=True, mask=True),
        Attention(1, 2, 300, 300, 128, causal=True, window=50),
        Attention(1, 2, 19, 140, 96, bias_batch=1, bias_heads=2, scale=0.25, layout="bhsd"),
        Attention(2, 4, 40, 40, 32, kv_heads=2, causal=True, softcap=5.0, alibi=True),
        Attention(4, 2, 131, 131, 32, packed=True, ragged=True),
        Attention(1, 1, 33, 700, 256),
    ],
    ids=str,
)
def test_native_attention_is_within_its_stated_error(workload, way):
    workload = workload.replace(dtype="bfloat16")
    template = template_for(workload, TARGET)
    assert isinstance(template, AttentionBf16CPU | AttentionDecodeCPU)
    if isinstance(template, AttentionDecodeCPU) and way != "pairs":
        pytest.skip("decoding multiplies pairs only")
    config = chosen(template, workload, way)
    found, expected = run(workload, template, config)
    # 1.1 · 2^-8 · Σ w |v - out|, with normal values at most about 4 from their mean; and the result's own rounding.
    np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=4 * 1.1 * 2.0**-8)


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(
    "workload",
    [
        Linear(17, 6, 5),
        Linear(70, 34, 83, activation="gelu", residual=True),
        Linear(33, 70, 40, activation="silu", gated=True, bias=False),
        Linear(150, 96, 48, out_dtype="float32"),
        Linear(36, 40, 33, activation="relu", seq=12),
        Linear(70, 64, 83, activation="gelu", residual=True),
        Linear(37, 96, 40, activation="silu", gated=True, bias=False),
        Linear(36, 64, 33, activation="relu", seq=12),
        Linear(7, 32, 20),
    ],
    ids=str,
)
def test_linear_layers_either_way(workload, way):
    workload = workload.replace(dtype="bfloat16")
    template = template_for(workload, TARGET)
    config = chosen(template, workload, way)
    for prefetch in (0, 16) if way == "widened" else (0,):
        found, expected = run(workload, template, config.replace(prefetch=prefetch) if "prefetch" in config else config)
        rtol, atol = workload.tolerance()
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


@pytest.mark.skipif(not amx.available(native()), reason="this CPU lacks AMX")
@pytest.mark.parametrize(("rows", "vectors"), [(16, 1), (16, 5), (32, 2), (48, 1)])
def test_every_block_of_tiles(rows, vectors):
    """Whole blocks, and the lower and narrower ones at the ends."""
    workload = Linear(101, 64, 16 * 11 + 3, dtype="bfloat16", residual=True)
    template = template_for(workload, TARGET)
    config = template.default(workload, TARGET).replace(tile_rows=rows, tile_vectors=vectors, row_block=0)
    found, expected = run(workload, template, config)
    rtol, atol = workload.tolerance()
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", bf16.ACTIVATIONS)
def test_activations_are_as_accurate_as_stated(name):
    x = np.concatenate([np.linspace(-30, 30, 1 << 15), np.geomspace(1e-30, 1e30, 1 << 10)]).astype(np.float32)
    x = np.concatenate([x, -x[-(1 << 9) :], np.float32([0.0, np.inf, np.nan])])
    x = np.concatenate([x, np.zeros(-len(x) % 16, np.float32)])
    y = activation_of(name, x)
    with np.errstate(over="ignore", invalid="ignore"):
        wide = x.astype(np.float64)
        share = {
            "gelu": 0.5 * erfc(-wide * np.sqrt(0.5)),
            "gelu_tanh": expit(np.sqrt(8.0 / np.pi) * (wide + 0.044715 * wide**3)),
            "silu": expit(wide),
        }[name]
        expected = wide * share
    np.testing.assert_allclose(y, expected, rtol=3e-4, atol=1e-6)


def activation_of(name, x):
    """``bf16.activation`` of float32 ``x``, whose length is a multiple of 16."""
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    v = Vectors(bf16.LANES)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        source, result = (T.arg(name, T.buffer(x.shape, "float32")) for name in ("x", "y"))
        with T.sblock("root"), T.serial(len(x) // bf16.LANES, annotations=dict(bf16.IMPORT)) as i:
            v.store(result, [i * bf16.LANES], bf16.activation(name, v.load(source, [i * bf16.LANES])))
    operands = GuardedArray.holding(x), GuardedArray(x.shape, x.dtype)
    build(tvm.IRModule({"main": builder.get()}), TARGET)["main"](*(as_tensor(operand.array) for operand in operands))
    return operands[1].array


def test_an_odd_head_is_refused():
    assert not AttentionBf16CPU().supports(Attention(1, 1, 4, 4, 17, dtype="bfloat16"), TARGET)
