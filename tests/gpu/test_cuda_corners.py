"""Every CUDA template over its corner workloads and configs: nvcc takes them, nothing spills, and what multiplies on
tensor cores does so by the instruction that the template claims. Kernels of one target are one translation unit."""

import math
import random
import re
import subprocess

import pytest
from corners import ATTENTIONS, CORNERS, DECODING, FEW_ROWS, HOPPER_ATTENTIONS, HOPPER_LINEARS, LINEARS
from gpu import binaries_kept, disassembler, needs_nvcc

from attntune.ops import Attention, Linear
from attntune.target import PRESETS
from attntune.templates import GENERIC, REGISTRY, template_for
from attntune.templates.lowering import build_with_resources

#: By template: instructions that its main kernel is to have, by the disassembler's names; {BF16}: where that is dtype.
MMA_SYNC = (r"HMMA\.16816\.F32{BF16}", r"LDSM\.16", "LDGSTS")
WGMMA = (r"HGMMA\.64x\d+x16\.F32{BF16}", r"UTMALDG\.\dD", "SYNCS")
CLAIMS = {
    "LinearCUDA": MMA_SYNC, "LinearSplitCUDA": MMA_SYNC, "AttentionCUDA": MMA_SYNC, "AttentionDecodeCUDA": MMA_SYNC,
    "LinearHopper": WGMMA, "AttentionHopper": WGMMA, "AdditiveAttentionCUDA": ("SHFL",), "EmbeddingNormCUDA": ("SHFL",),
    "GRUSequenceCUDA": ("FFMA",), "KVAppendCUDA": (), "LSTMSequenceCUDA": ("FFMA",), "LayerNormCUDA": ("SHFL",),
    "RMSNormCUDA": ("SHFL",), "SoftmaxCUDA": ("SHFL",), "GenericCUDA": (),
}  # fmt: skip
DTYPES = ("bfloat16", "float16")


def of_head_dims(dims, first=0, **options):
    """Attention of each head_dim, dtypes in turn from ``first`` on."""
    return [
        Attention(1, 4, 200, 200, dim, dtype=DTYPES[(first + i) % 2], causal=i % 2 == 0, **options)
        for i, dim in enumerate(dims)
    ]


#: (target, workload): each dtype and epilogue or variant on one target at least, each head_dim in both dtypes.
CASES = [
    *(("sm_80", w) for w in (*LINEARS[::2], *FEW_ROWS[::2], *ATTENTIONS[3::2], *DECODING[::3])),
    *(("sm_86", w) for w in of_head_dims((32, 64, 96, 128, 256), kv_heads=2)),
    *(("sm_89", w) for w in of_head_dims((32, 64, 96, 128, 256), 1, layout="bhsd", lengths="kv")),
    *(("sm_90a", w) for w in (*HOPPER_LINEARS[::2], *HOPPER_ATTENTIONS[2::2])),
    *(("sm_90a", w) for w in of_head_dims((64, 128, 128, 64), kv_heads=1)),
    *(("sm_100", Linear(64, 128, 64, dtype=dtype)) for dtype in DTYPES),
    *(
        ("sm_86", workload.replace(dtype=dtype))
        for op in ("layer_norm", "rms_norm", "softmax", "embedding_norm", "kv_append")
        for workload, dtype in zip(CORNERS[op], ("float32", *DTYPES), strict=False)
    ),
    *(("sm_86", w) for op in ("gru_sequence", "lstm_sequence", "additive_attention") for w in CORNERS[op][:3]),
    *(("sm_86", rows[0]) for rows in CORNERS.values() if template_for(rows[0], PRESETS["sm_86"]) is GENERIC["cuda"]),
]


def corner_config(template, workload, target):
    """The smallest of some that are drawn: large tiles are unrolled to code that takes the compiler seconds."""
    rng, space = random.Random(workload.key()), template.space(workload, target)

    def size(config):
        return math.prod(value for _, value in config.items() if not isinstance(value, bool | str) and value)

    return min((space.sample(rng) for _ in range(6)), key=size)


def compiled_together(monkeypatch, target, workloads):
    """Resources by kernel, the cubin, and (name of its first kernel, template, workload, config) of each workload."""
    import tvm

    binaries, rows, functions = binaries_kept(monkeypatch), [], {}
    for i, workload in enumerate(workloads):
        template = template_for(workload, target)
        config = corner_config(template, workload, target)
        scheduled = template.schedule(workload, target, config)["main"]
        functions[f"corner_{i}"] = scheduled.with_attr("global_symbol", f"corner_{i}")
        rows.append((f"corner_{i}_kernel", template, workload, config))
    _, resources = build_with_resources(tvm.IRModule(functions), target)  # refuses spills, and names the kernel
    (cubin,) = binaries
    return resources, cubin, rows


def listing(cubin, tmp_path):
    """Instructions by kernel; None where there is no disassembler."""
    tool = disassembler()
    if tool is None:
        return None
    path = tmp_path / "kernels.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([tool, str(path)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+)", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@needs_nvcc
@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_corners_compile_without_spills_to_the_instructions_claimed(monkeypatch, tmp_path, name):
    workloads = list(dict.fromkeys(workload for target, workload in CASES if target == name))
    resources, cubin, rows = compiled_together(monkeypatch, PRESETS[name], workloads)
    assert {kernel for kernel, *_ in rows} <= resources.keys()
    assert all(kernel["registers"] > 0 and kernel["threads"] > 0 for kernel in resources.values())
    code = listing(cubin, tmp_path)
    if code is None:
        pytest.skip("nvdisasm is not installed (pip install nvidia-cuda-nvdisasm): instructions are not counted")
    for kernel, template, workload, config in rows:
        suffix = r"\.BF16" if getattr(workload, "dtype", "") == "bfloat16" else r"(?!\.BF16)"
        for pattern in CLAIMS[type(template).__name__]:
            found = re.findall(pattern.replace("{BF16}", suffix), code[kernel])
            assert found, f"{workload} {config} on {name}: no instruction {pattern}"


def test_every_template_is_among_them():
    templates = {type(template).__name__ for template in REGISTRY if template.kind == "cuda"}
    templates.add(type(GENERIC["cuda"]).__name__)
    assert templates == CLAIMS.keys()
    used = {type(template_for(workload, PRESETS[name])).__name__ for name, workload in CASES}
    assert used == templates
    for kind, dims in (("AttentionCUDA", {32, 64, 96, 128, 256}), ("AttentionHopper", {64, 128})):
        found = {
            (w.head_dim, w.dtype) for name, w in CASES if type(template_for(w, PRESETS[name])).__name__ == kind
        }  # fmt: skip
        assert {(dim, dtype) for dim in dims for dtype in DTYPES} <= found
