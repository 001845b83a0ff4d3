"""The workloads by which kernels for CUDA devices are judged, in parts that take a few minutes each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attntune.engines.kernel_comparison import KernelCase
from attntune.ops import Attention, Linear

#: Batch × length of every attention, and heads × head_dim, as in the FlashAttention papers.
TOKENS, WIDTH = 16384, 2048
LENGTHS = (1024, 2048, 4096, 8192, 16384)
#: Rows of every linear layer.
ROWS = 4096
#: Rows of the same layers where a model writes: one sequence, and some at once.
FEW_ROWS = (1, 16, 64)
#: (batch, keys) of attention in decoding, as of Llama 3 8B: 32 heads over 8 of head_dim 128.
DECODING = ((1, 1024), (1, 8192), (1, 32768), (16, 2048), (16, 8192))
#: (in_features, out_features, bias): a square one; BERT-base's; Llama 3 8B's.
LINEARS = (
    (4096, 4096, False),
    (768, 2304, True), (768, 768, True), (768, 3072, True), (3072, 768, True),
    (4096, 6144, False), (4096, 14336, False), (14336, 4096, False),
)  # fmt: skip
#: Layers with what follows them: BERT-base's first and second of the feed-forward network, and its attention's output;
#: Llama 3 8B's gated one, and the one after it.
FUSED = (
    {"in_features": 768, "out_features": 3072, "activation": "gelu"},
    {"in_features": 3072, "out_features": 768, "residual": True},
    {"in_features": 768, "out_features": 768, "residual": True},
    {"in_features": 4096, "out_features": 14336, "activation": "silu", "gated": True, "bias": False},
    {"in_features": 14336, "out_features": 4096, "residual": True, "bias": False},
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Cases that are compared together, and with what."""

    name: str
    cases: tuple[KernelCase, ...]
    engines: tuple[str, ...]


def parts() -> tuple[Part, ...]:
    """Linear; attention by dtype, head_dim (128 in bfloat16 first) and mask; fused layers; few rows; decoding."""
    found = [
        Part(f"linear-{dtype}", tuple(_linear(dtype, (ROWS,))), ("cublas",)) for dtype in ("bfloat16", "float16")
    ]  # fmt: skip
    for dtype in ("bfloat16", "float16"):
        for head_dim in (128, 64):
            for causal in (False, True):
                name = f"attention-{dtype}-{head_dim}{'-causal' if causal else ''}"
                found.append(Part(name, tuple(_attention(dtype, head_dim, causal)), ("flash", "cudnn", "flex")))
    found.append(Part("fused-linear-bfloat16", tuple(_fused("bfloat16")), ("compiled",)))
    found.append(Part("few-rows-bfloat16", tuple(_linear("bfloat16", FEW_ROWS)), ("cublas",)))
    found.append(Part("decode-bfloat16", tuple(_decoding("bfloat16")), ("flash", "cudnn")))
    return tuple(found)


def _linear(dtype: str, every_rows: tuple[int, ...]) -> Iterator[KernelCase]:
    for rows in every_rows:
        for in_features, out_features, bias in LINEARS:
            workload = Linear(rows, in_features, out_features, bias=bias, dtype=dtype)
            yield KernelCase(dtype, f"{rows}×{in_features}→{out_features}", workload)


def _fused(dtype: str) -> Iterator[KernelCase]:
    for layer in FUSED:
        workload = Linear(ROWS, dtype=dtype, **layer)  # type: ignore[arg-type]
        ends = [workload.activation, "gated" * workload.gated, "residual" * workload.residual]
        label = f"{ROWS}×{workload.in_features}→{workload.out_features} {' '.join(end for end in ends if end)}"
        yield KernelCase(f"{dtype} fused", label, workload)


def _decoding(dtype: str) -> Iterator[KernelCase]:
    for batch, keys in DECODING:
        workload = Attention(batch, 32, 1, keys, 128, kv_heads=8, dtype=dtype, layout="bhsd")
        yield KernelCase(f"{dtype} one query", f"{batch}×32 over {keys}", workload)


def _attention(dtype: str, head_dim: int, causal: bool) -> Iterator[KernelCase]:
    heads = WIDTH // head_dim
    for length in LENGTHS:
        batch = TOKENS // length
        workload = Attention(
            batch, heads, length, length, head_dim, causal=causal, dtype=dtype, layout="bhsd"
        )  # fmt: skip
        group = f"{dtype} head_dim {head_dim}{' causal' if causal else ''}"
        yield KernelCase(group, f"{batch}×{heads}×{length}", workload)
