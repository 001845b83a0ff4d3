"""Native bfloat16: attention and linear layers against float64, as products of pairs and as float32.

Attention: every variant and odd length, to the error that its template states.
"""

import numpy as np
import pytest

from attntune.measure.buffers import GuardedArray, as_tensor, numpy_dtype
from attntune.ops import Attention, Linear
from attntune.target import native
from attntune.templates import template_for
from attntune.templates.cpu import bf16
from attntune.templates.cpu.attention_bf16 import AttentionBf16CPU
from attntune.templates.cpu.attention_decode import AttentionDecodeCPU
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


@pytest.mark.parametrize("widen", [False, True])
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
    ],
    ids=str,
)
def test_native_attention_is_within_its_stated_error(workload, widen):
    workload = workload.replace(dtype="bfloat16")
    template = template_for(workload, TARGET)
    assert isinstance(template, AttentionBf16CPU | AttentionDecodeCPU)
    config = template.default(workload, TARGET)
    if isinstance(template, AttentionBf16CPU):
        config = config.replace(widen=widen)
    elif widen:
        pytest.skip("decoding multiplies pairs only")
    found, expected = run(workload, template, config)
    # 1.1 · 2^-8 · Σ w |v - out|, with normal values at most about 4 from their mean; and the result's own rounding.
    np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=4 * 1.1 * 2.0**-8)


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize(
    "workload",
    [
        Linear(17, 6, 5),
        Linear(70, 34, 83, activation="gelu", residual=True),
        Linear(33, 70, 40, activation="silu", gated=True, bias=False),
        Linear(150, 96, 48, out_dtype="float32"),
        Linear(36, 40, 33, activation="relu", seq=12),
    ],
    ids=str,
)
def test_linear_layers_either_way(workload, widen):
    workload = workload.replace(dtype="bfloat16")
    template = template_for(workload, TARGET)
    for prefetch in (0, 16) if widen else (0,):
        config = template.default(workload, TARGET).replace(widen=widen, prefetch=prefetch)
        found, expected = run(workload, template, config)
        rtol, atol = workload.tolerance()
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def test_an_odd_head_is_refused():
    assert not AttentionBf16CPU().supports(Attention(1, 1, 4, 4, 17, dtype="bfloat16"), TARGET)
