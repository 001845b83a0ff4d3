"""WHAT: every operator's definition as a tensor expression, with its float64 reference and its cost."""

from __future__ import annotations

import json

from attntune.errors import WorkloadError
from attntune.ops.add_positions import AddPositions
from attntune.ops.additive_attention import AdditiveAttention
from attntune.ops.attention import Attention
from attntune.ops.embedding import Embedding
from attntune.ops.embedding_norm import EmbeddingNorm
from attntune.ops.head_norm import HeadNorm
from attntune.ops.kv_append import KVAppend
from attntune.ops.layer_norm import LayerNorm
from attntune.ops.linear import Linear
from attntune.ops.mean_pool import MeanPool
from attntune.ops.patchify import Patchify
from attntune.ops.prepend_token import PrependToken
from attntune.ops.recurrent import GRUSequence, LSTMSequence
from attntune.ops.relative_bias import RelativeBias
from attntune.ops.rms_norm import RMSNorm
from attntune.ops.rope import Rope
from attntune.ops.select_rows import SelectRows
from attntune.ops.softmax import Softmax
from attntune.ops.top_k import ArgMax, TopK
from attntune.ops.unfold import Unfold
from attntune.ops.workload import TensorSpec, Workload

#: Operators by name. A new operator adds one line here.
REGISTRY: dict[str, type[Workload]] = {
    cls.op: cls
    for cls in (
        AdditiveAttention,
        AddPositions,
        ArgMax,
        Attention,
        Embedding,
        EmbeddingNorm,
        GRUSequence,
        HeadNorm,
        KVAppend,
        LSTMSequence,
        LayerNorm,
        Linear,
        MeanPool,
        Patchify,
        PrependToken,
        RMSNorm,
        RelativeBias,
        Rope,
        SelectRows,
        Softmax,
        TopK,
        Unfold,
    )
}

__all__ = [
    "REGISTRY",
    "AddPositions",
    "AdditiveAttention",
    "ArgMax",
    "Attention",
    "Embedding",
    "EmbeddingNorm",
    "GRUSequence",
    "HeadNorm",
    "KVAppend",
    "LSTMSequence",
    "LayerNorm",
    "Linear",
    "MeanPool",
    "Patchify",
    "PrependToken",
    "RMSNorm",
    "RelativeBias",
    "Rope",
    "SelectRows",
    "Softmax",
    "TensorSpec",
    "TopK",
    "Unfold",
    "Workload",
    "operator",
    "workload_from_key",
]


def operator(name: str) -> type[Workload]:
    """The operator called ``name``; raises :class:`WorkloadError` naming those there are."""
    try:
        return REGISTRY[name]
    except KeyError:
        raise WorkloadError(f"unknown operator {name!r}; expected one of {sorted(REGISTRY)}") from None


def workload_from_key(key: str) -> Workload:
    """Inverse of :meth:`Workload.key`."""
    try:
        fields = json.loads(key)
        cls = operator(fields.pop("op"))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise WorkloadError(f"malformed workload key {key!r}: expected JSON with an 'op' field ({error})") from None
    try:
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
    except TypeError as error:
        raise WorkloadError(f"workload key {key!r} does not fit operator {cls.op!r}: {error}") from None
