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
#: (in_features, out_features, bias): a square one; BERT-base's; Llama 3 8B's.
LINEARS = (
    (4096, 4096, False),
    (768, 2304, True), (768, 768, True), (768, 3072, True), (3072, 768, True),
    (4096, 6144, False), (4096, 14336, False), (14336, 4096, False),
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Cases that are compared together, and with what."""

    name: str
    cases: tuple[KernelCase, ...]
    engines: tuple[str, ...]


def parts() -> tuple[Part, ...]:
    """Linear layers, then attention by dtype, head_dim and mask; head_dim 128 in bfloat16 first."""
    found = [
        Part(f"linear-{dtype}", tuple(_linear(dtype)), ("cublas",)) for dtype in ("bfloat16", "float16")
    ]  # fmt: skip
    for dtype in ("bfloat16", "float16"):
        for head_dim in (128, 64):
            for causal in (False, True):
                name = f"attention-{dtype}-{head_dim}{'-causal' if causal else ''}"
                found.append(Part(name, tuple(_attention(dtype, head_dim, causal)), ("flash", "cudnn", "flex")))
    return tuple(found)


def _linear(dtype: str) -> Iterator[KernelCase]:
    for in_features, out_features, bias in LINEARS:
        workload = Linear(ROWS, in_features, out_features, bias=bias, dtype=dtype)
        yield KernelCase(dtype, f"{ROWS}×{in_features}→{out_features}", workload)


def _attention(dtype: str, head_dim: int, causal: bool) -> Iterator[KernelCase]:
    heads = WIDTH // head_dim
    for length in LENGTHS:
        batch = TOKENS // length
        workload = Attention(
            batch, heads, length, length, head_dim, causal=causal, dtype=dtype, layout="bhsd"
        )  # fmt: skip
        group = f"{dtype} head_dim {head_dim}{' causal' if causal else ''}"
        yield KernelCase(group, f"{batch}×{heads}×{length}", workload)
