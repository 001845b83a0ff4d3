"""The workloads by which kernels are judged: lists of cases, by suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from attntune.engines.kernel_comparison import KernelCase
from attntune.errors import WorkloadError
from attntune.ops import Attention, Linear, Workload
from attntune.target import Target
from attntune.templates import GENERIC, template_for

#: (out_features, in_features) of MiniLM, BERT-base, and a square one of a larger model.
LINEAR_SIZES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072), (2048, 2048))
LINEAR_ROWS = (64, 128, 512, 1024)
#: Also a language model's gated layer and its vocabulary.
GEMV_SIZES = (*LINEAR_SIZES, (8192, 2048), (32000, 768))
LENGTHS = (64, 128, 197, 256, 512, 777, 1024, 2048, 4096)
CACHE_LENGTHS = (512, 1024, 2048, 4096, 8192)
DTYPES = ("float32", "bfloat16", "int8", "int4", "w4a8")

#: Those of linear layers' weights alone, or also of x as kernels quantise it: fields of the workload.
_WEIGHTS: Mapping[str, Mapping[str, Any]] = {
    "int8": {"weight_dtype": "int8"}, "int4": {"weight_dtype": "uint4"},
    "w4a8": {"weight_dtype": "uint4", "x_dtype": "int8"},
}  # fmt: skip


def linear(target: Target, dtypes: Sequence[str]) -> Iterator[KernelCase]:
    """Linear layers with a bias and constant weights: rows × in_features → out_features; quantised on float32 x."""
    for dtype in dtypes:
        for rows in LINEAR_ROWS:
            for out_features, in_features in LINEAR_SIZES:
                yield _linear(dtype, rows, in_features, out_features)


def gemv(target: Target, dtypes: Sequence[str]) -> Iterator[KernelCase]:
    """One row, as in decoding: bound by memory."""
    for dtype in dtypes:
        for out_features, in_features in GEMV_SIZES:
            yield _linear(dtype, 1, in_features, out_features)


def attention(target: Target, dtypes: Sequence[str]) -> Iterator[KernelCase]:
    """12 heads of 64, batch 1 and 4, self-attention, causal or not: batch × length."""
    for dtype in _without_weights(dtypes):
        for causal in (False, True):
            for batch in (1, 4):
                for length in LENGTHS:
                    yield _case(
                        f"{dtype}{' causal' if causal else ''}", f"{batch}×{length}",
                        partial(_attention, target, batch, 12, 12, length, length, causal, dtype),
                    )  # fmt: skip


def decode(target: Target, dtypes: Sequence[str]) -> Iterator[KernelCase]:
    """One query over a cache of keys and values, heads of 64: bound by memory.

    In PyTorch's layout, which that of a cache is for one query (9/3 are SmolLM2-135M's), and with heads side by side,
    as cross-attention has them.
    """
    for dtype in _without_weights(dtypes):
        for layout, how, counts in (
            ("bhsd", "", ((12, 12), (32, 8), (9, 3))),
            ("bshd", " side by side", ((12, 12),)),
        ):
            for heads, kv_heads in counts:
                for length in CACHE_LENGTHS:
                    yield _case(
                        f"{dtype} {heads}/{kv_heads} heads{how}", f"kv {length}",
                        partial(_attention, target, 1, heads, kv_heads, 1, length, False, dtype, layout),
                    )  # fmt: skip


#: Suites of single kernels, by name: ``(target, dtypes) -> cases``.
KERNEL_SUITES: dict[str, Callable[[Target, Sequence[str]], Iterator[KernelCase]]] = {
    "linear": linear,
    "gemv": gemv,
    "attention": attention,
    "decode": decode,
}


def _without_weights(dtypes: Sequence[str]) -> list[str]:
    """Those that operands without a weight may have."""
    return [dtype for dtype in dtypes if dtype not in _WEIGHTS]


def _linear(dtype: str, rows: int, in_features: int, out_features: int) -> KernelCase:
    return _case(
        dtype, f"{rows}×{in_features}→{out_features}",
        lambda: Linear(
            rows, in_features, out_features, dtype="float32" if dtype in _WEIGHTS else dtype, **_WEIGHTS.get(dtype, {})
        ),
    )  # fmt: skip


def _attention(
    target: Target, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, causal: bool, dtype: str,
    layout: str = "bhsd",
) -> Attention:  # fmt: skip
    """In PyTorch's layout; in that of attntune's models if asked for, or where no template schedules the former."""
    found = Attention(batch, heads, q_len, kv_len, 64, kv_heads=kv_heads, causal=causal, dtype=dtype, layout=layout)
    return found if template_for(found, target) not in GENERIC.values() else found.replace(layout="bshd")


def _case(group: str, label: str, make: Callable[[], Workload]) -> KernelCase:
    try:
        return KernelCase(group, label, make())
    except WorkloadError as error:
        return KernelCase(group, label, None, str(error))
