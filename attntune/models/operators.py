"""Operator calls in a model: Relax calls named ``attntune.<op>`` that the compiler later raises to workloads.

Each function takes and returns ``tvm.relax.frontend.nn.Tensor``; shapes may be symbolic. Semantics: ``attntune/ops``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

PREFIX = "attntune."


def emit(op: str, attrs: dict[str, Any], args: Sequence[Any], shape: Sequence[Any], dtype: str) -> Any:
    """Emit a call of operator ``op``; ``attrs`` travel as JSON beside the tensor arguments."""
    return _call(op, attrs, args, [(shape, dtype)])


def emit_many(
    op: str, attrs: dict[str, Any], args: Sequence[Any], results: Sequence[tuple[Sequence[Any], str]]
) -> tuple[Any, ...]:
    """Emit a call of an operator with several results, each given by shape and dtype."""
    return tuple(_call(op, attrs, args, results))


def _call(op: str, attrs: dict[str, Any], args: Sequence[Any], results: Sequence[tuple[Sequence[Any], str]]) -> Any:
    import tvm
    from tvm import relax
    from tvm.relax.frontend import nn

    types = [relax.TensorType(tuple(shape), dtype) for shape, dtype in results]
    call = relax.op.call_pure_packed(
        PREFIX + op,
        *(arg._expr for arg in args),
        tvm.ir.StringImm(json.dumps(attrs, sort_keys=True)),
        ty_args=types[0] if len(types) == 1 else relax.TupleType(types),
    )
    return nn.op.wrap_nested(call, op)


def linear(
    x: Any,
    weight: Any,
    bias: Any | None = None,
    *,
    activation: str = "",
    residual: Any | None = None,
    gated: bool = False,
    squeeze: bool = False,
    lengths: Any | None = None,
) -> Any:
    """X (…, in), weight (out, in), bias (out,), residual (…, out) → (…, out).

    ``gated``: weight and bias have 2·out rows. ``squeeze``: axis 1, of extent 1, is not in the result. ``lengths``
    (batch,) int32, with x (batch, seq, in): rows past them are not computed but zero.
    """
    attrs = {"bias": bias is not None, "activation": activation, "residual": residual is not None}
    variants = (("gated", gated), ("squeeze", squeeze), ("lengths", lengths is not None))
    attrs |= {name: True for name, on in variants if on}
    args = [arg for arg in (x, weight, bias, residual, lengths) if arg is not None]
    lead = (x.shape[0], *x.shape[2:-1]) if squeeze else x.shape[:-1]
    return emit("linear", attrs, args, (*lead, weight.shape[0] // 2 if gated else weight.shape[0]), x.dtype)


def attention(
    *operands: Any,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    mask: Any | None = None,
    bias: Any | None = None,
    causal: bool = False,
    scale: float | None = None,
    lengths: Any | None = None,
    length_kind: str = "kv",
    weights: bool = False,
    window: int = 0,
) -> Any:
    """One operand: packed qkv (batch, seq, (heads + 2·kv_heads)·head_dim); three: query, key, value.

    Key and value may be caches, (batch, kv_heads, kv_len, head_dim).

    mask (batch, kv_len) int64, bias (1|batch, 1|heads, q_len, kv_len), lengths (batch,) int32, of the keys or with
    ``length_kind="qkv"`` of the queries too → (batch, q_len, heads·head_dim); with ``weights`` also the softmax
    (batch, heads, q_len, kv_len) float32. With a ``window`` a causal query sees the last so many keys up to its own.
    """
    attrs: dict[str, Any] = {
        "heads": heads, "kv_heads": kv_heads or heads, "head_dim": head_dim, "packed": len(operands) == 1,
        "causal": causal, "mask": mask is not None, "bias": bias is not None, "scale": scale,
    }  # fmt: skip
    keys = operands[min(1, len(operands) - 1)]
    cached = len(keys.shape) == 4
    if cached:
        attrs["kv_layout"] = "bhsd"
    if lengths is not None:
        attrs["lengths"] = length_kind
    if weights:
        attrs["weights"] = True
    if window:
        attrs["window"] = window
    args = [*operands, *(arg for arg in (mask, bias, lengths) if arg is not None)]
    first = operands[0]
    out = ((first.shape[0], first.shape[1], heads * head_dim), first.dtype)
    if not weights:
        return emit("attention", attrs, args, *out)
    shape = (first.shape[0], heads, first.shape[1], keys.shape[2 if cached else 1])
    return emit_many("attention", attrs, args, [out, (shape, "float32")])


def layer_norm(
    x: Any, weight: Any, bias: Any, *, eps: float, residual: Any | None = None, lengths: Any | None = None
) -> Any:
    """LN(x + residual) over the last axis; x (…, features), zero past ``lengths`` (batch,) int32 of (batch, seq, …)."""
    args = [arg for arg in (x, residual, weight, bias, lengths) if arg is not None]
    attrs = {"eps": eps, "residual": residual is not None} | ({"lengths": True} if lengths is not None else {})
    return emit("layer_norm", attrs, args, x.shape, x.dtype)


def softmax(x: Any) -> Any:
    """Softmax over the last axis; x (…, features)."""
    return emit("softmax", {}, [x], x.shape, x.dtype)


def embedding_norm(
    input_ids: Any, token_type_ids: Any, word: Any, position: Any, type_: Any, weight: Any, bias: Any, *, eps: float
) -> Any:
    """LN(word[ids] + position[0…seq) + type[token types]) → (batch, seq, features)."""
    args = [input_ids, token_type_ids, word, position, type_, weight, bias]
    return emit("embedding_norm", {"eps": eps}, args, (*input_ids.shape, word.shape[1]), word.dtype)


def mean_pool(x: Any, mask: Any, *, eps: float = 1e-9, normalize: bool = True) -> Any:
    """Mean of x (batch, seq, features) over positions where mask (batch, seq) is nonzero → (batch, features)."""
    return emit("mean_pool", {"eps": eps, "normalize": normalize}, [x, mask], (x.shape[0], x.shape[2]), x.dtype)


def rms_norm(x: Any, weight: Any, *, eps: float, residual: Any | None = None) -> Any:
    """X + residual over its root mean square along the last axis, times weight; x (…, features)."""
    args = [x, *([residual] if residual is not None else []), weight]
    return emit("rms_norm", {"eps": eps, "residual": residual is not None}, args, x.shape, x.dtype)


def embedding(
    ids: Any,
    table: Any,
    position: Any | None = None,
    *,
    lengths: Any | None = None,
    scale: float = 1.0,
    position_offset: int = 0,
) -> Any:
    """Scale · table[ids] + position[p], p counted from the start or back from lengths → (batch, seq, features)."""
    attrs = {
        "scale": scale, "position": position is not None, "lengths": lengths is not None,
        "position_offset": position_offset,
    }  # fmt: skip
    args = [arg for arg in (ids, table, position, lengths) if arg is not None]
    return emit("embedding", attrs, args, (*ids.shape, table.shape[1]), table.dtype)


def head_norm(qkv: Any, weight: Any, *, heads: int, kv_heads: int, head_dim: int, eps: float) -> Any:
    """Queries and keys of qkv (…, (heads + 2·kv_heads)·head_dim) over their root mean square, head by head."""
    attrs = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "eps": eps}
    return emit("head_norm", attrs, [qkv, weight], qkv.shape, qkv.dtype)


def rope(qkv: Any, cos: Any, sin: Any, *, heads: int, kv_heads: int, head_dim: int, style: str = "half") -> Any:
    """Queries and keys of packed qkv (batch, seq, (heads + 2·kv_heads)·head_dim) rotated → the same shape."""
    attrs = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "style": style}
    return emit("rope", attrs, [qkv, cos, sin], qkv.shape, qkv.dtype)


def kv_append(
    qkv: Any,
    lengths: Any,
    key_cache: Any,
    value_cache: Any,
    cos: Any | None = None,
    sin: Any | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    style: str = "",
) -> tuple[Any, Any, Any]:
    """Keys and values of packed qkv (batch, q_len, …) into caches (batch, kv_heads, context, head_dim), in place.

    → query (batch, q_len, heads·head_dim), key_cache, value_cache; queries and keys are rotated if there is a style.
    """
    attrs = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "style": style}
    args = [arg for arg in (qkv, lengths, key_cache, value_cache, cos, sin) if arg is not None]
    query = ((qkv.shape[0], qkv.shape[1], heads * head_dim), qkv.dtype)
    caches = [(cache.shape, cache.dtype) for cache in (key_cache, value_cache)]
    query_, keys, values = emit_many("kv_append", attrs, args, [query, *caches])
    return query_, keys, values


def select_rows(x: Any, index: Any) -> Any:
    """Row index[b], index (batch,) int64, or one row, an int, of x (batch, seq, features) → (batch, features)."""
    attrs, args = ({"row": index}, [x]) if isinstance(index, int) else ({}, [x, index])
    return emit("select_rows", attrs, args, (x.shape[0], x.shape[2]), x.dtype)


def patchify(x: Any, *, patch: int) -> Any:
    """Images (batch, channels, height, width) → their patches (batch, patches, channels·patch²)."""
    batch, channels, height, width = x.shape
    shape = (batch, height // patch * (width // patch), channels * patch * patch)
    return emit("patchify", {"patch": patch}, [x], shape, x.dtype)


def unfold(x: Any, *, kernel: int, stride: int = 1, padding: int = 0, layout: str = "blc") -> Any:
    """Windows of x (batch, length, channels), "bcl": (batch, channels, length) → (batch, steps, kernel·channels)."""
    batch, length, channels = x.shape if layout == "blc" else (x.shape[0], x.shape[2], x.shape[1])
    attrs = {"kernel": kernel, "stride": stride, "padding": padding, "layout": layout}
    shape = (batch, (length + 2 * padding - kernel) // stride + 1, kernel * channels)
    return emit("unfold", attrs, [x], shape, x.dtype)


def add_positions(x: Any, position: Any) -> Any:
    """X (batch, seq, features) plus the first seq rows of position (positions, features)."""
    return emit("add_positions", {}, [x, position], x.shape, x.dtype)


def relative_bias(rows: Any, table: Any, lengths: Any | None = None, keys: Any | None = None, *, zero: int) -> Any:
    """Table (heads, distances) by the distance from query to key → bias (1|batch, heads, q_len, kv_len).

    Rows (batch, q_len) int64 give the number of queries and, without ``keys``, of keys. ``lengths`` (batch,) int32
    and ``keys`` (batch, heads, kv_len, head_dim): the queries are the last ones of their sequences, as over a cache.
    ``zero``: the column of distance 0.
    """
    args = [arg for arg in (rows, table, lengths, keys) if arg is not None]
    attrs = {"zero": zero, "lengths": lengths is not None}
    batch, kv_len = (1, rows.shape[1]) if keys is None else (rows.shape[0], keys.shape[2])
    return emit("relative_bias", attrs, args, (batch, table.shape[0], rows.shape[1], kv_len), table.dtype)


def prepend_token(x: Any, token: Any, position: Any) -> Any:
    """Token (features,) before each x (batch, seq, features), plus position (1 + seq, features)."""
    batch, seq, features = x.shape
    return emit("prepend_token", {}, [x, token, position], (batch, seq + 1, features), x.dtype)


def argmax(x: Any) -> Any:
    """Where each row of x (rows, features) is largest → (rows,) int64."""
    return emit("argmax", {}, [x], (x.shape[0],), "int64")


def top_k(x: Any, k: int) -> tuple[Any, Any]:
    """The k largest of each row of x (rows, features) → values (rows, k), indices (rows, k) int64."""
    shape = (x.shape[0], k)
    values, indices = emit_many("top_k", {"k": k}, [x], [(shape, x.dtype), (shape, "int64")])
    return values, indices


def gru_sequence(
    projected: Any,
    weight: Any,
    bias: Any | None = None,
    *,
    state: Any | None = None,
    lengths: Any | None = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """Projected (batch, seq, 3·hidden), initial state (batch, hidden) → outputs (batch, seq, hidden), last state."""
    outputs, last = _recurrent("gru_sequence", projected, weight, bias, (state,), lengths, reverse)
    return outputs, last


def gru_cell(projected: Any, weight: Any, bias: Any | None, state: Any) -> Any:
    """Projected (batch, 3·hidden), state (batch, hidden) → the next state."""
    return _recurrent("gru_sequence", projected, weight, bias, (state,), None, False)[1]


def lstm_sequence(
    projected: Any,
    weight: Any,
    bias: Any | None = None,
    *,
    state: tuple[Any, Any] | None = None,
    lengths: Any | None = None,
    reverse: bool = False,
) -> tuple[Any, Any, Any]:
    """Projected (batch, seq, 4·hidden), initial state and cell (batch, hidden) → outputs, last state, last cell."""
    states = (None, None) if state is None else state
    outputs, last, cell = _recurrent("lstm_sequence", projected, weight, bias, states, lengths, reverse)
    return outputs, last, cell


def lstm_cell(projected: Any, weight: Any, bias: Any | None, state: Any, cell: Any) -> tuple[Any, Any]:
    """Projected (batch, 4·hidden), state and cell (batch, hidden) → the next state and cell."""
    _, next_state, next_cell = _recurrent("lstm_sequence", projected, weight, bias, (state, cell), None, False)
    return next_state, next_cell


def _recurrent(
    op: str, projected: Any, weight: Any, bias: Any | None, states: Sequence[Any], lengths: Any | None, reverse: bool
) -> tuple[Any, ...]:
    initial = states[0] is not None
    attrs = {"reverse": reverse, "lengths": lengths is not None, "initial": initial, "bias": bias is not None}
    args = [arg for arg in (projected, weight, bias, *states, lengths) if arg is not None]
    batch, hidden = projected.shape[0], weight.shape[1]
    outputs = ((*projected.shape[:-1], hidden), projected.dtype)
    return emit_many(op, attrs, args, [outputs, *(((batch, hidden), projected.dtype) for _ in states)])


def additive_attention(
    query: Any,
    key: Any,
    value: Any,
    scale: Any | None = None,
    *,
    mask: Any | None = None,
    lengths: Any | None = None,
) -> tuple[Any, Any]:
    """Bahdanau's attention: query (batch, q_len, dim), key (batch, kv_len, dim), value (batch, kv_len, features).

    scale (dim,), mask (batch, kv_len) int64, lengths (batch,) int32 → context (batch, q_len, features) and weights
    (batch, 1, q_len, kv_len) float32, as of one head. A query (batch, dim) gives context (batch, features).
    """
    attrs = {"scale": scale is not None, "mask": mask is not None, "lengths": lengths is not None}
    args = [arg for arg in (query, key, value, scale, mask, lengths) if arg is not None]
    queries = query.shape[1] if len(query.shape) == 3 else 1
    context, weights = emit_many(
        "additive_attention",
        attrs,
        args,
        [
            ((*query.shape[:-1], value.shape[2]), query.dtype),
            ((query.shape[0], 1, queries, key.shape[1]), "float32"),
        ],
    )
    return context, weights
