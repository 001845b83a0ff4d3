"""Attention in ONNX, three ways: elementary operators, the standard ``Attention``, ONNX Runtime's fused operator.

A query whose keys are all masked gives zeros, in all three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attntune.interop.onnx_decoder import counted, long
from attntune.interop.onnx_graph import GraphBuilder, element_type
from attntune.ops.attention import FLOOR

if TYPE_CHECKING:
    from attntune.models.model import OpCall

_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class _Operands:
    """The names of one call's operands; ``query`` is (batch, q_len, heads·head_dim), ``mask`` (batch, kv_len).

    Key and value are (batch, kv_len, kv_heads·head_dim), or with ``heads_apart`` (batch, kv_heads, kv_len, head_dim).
    """

    query: str
    key: str
    value: str
    mask: str | None
    bias: str | None
    lengths: str | None
    heads_apart: bool
    q_source: str
    """A value whose axis 1 is q_len."""
    kv_source: str
    """A value with an axis of kv_len, of packed operands the same one, so that masks are shared between layers."""
    kv_axis: int


def attention(builder: GraphBuilder, call: OpCall) -> str | tuple[str, str]:
    """Scaled dot-product attention, in the builder's style; in elementary operators where its weights are asked for."""
    operands = _operands(builder, call)
    if call.attrs.get("weights"):
        return _decomposed(builder, call, operands)
    if builder.attention == "standard":
        return _standard(builder, call, operands)
    if builder.attention == "onnxruntime" and call.attrs["heads"] == call.attrs["kv_heads"]:
        return _onnxruntime(builder, call, operands)
    return _decomposed(builder, call, operands)[0]


def _operands(builder: GraphBuilder, call: OpCall) -> _Operands:
    attrs, args = call.attrs, list(call.args)
    if attrs["packed"]:
        packed = args.pop(0)
        kv = attrs["kv_heads"] * attrs["head_dim"]
        sizes = builder.ints(attrs["heads"] * attrs["head_dim"], kv, kv)
        query, key, value = builder.nodes_out("Split", packed, sizes, outputs=3, axis=-1)
        sources = (packed, packed)
    else:
        query, key, value = args.pop(0), args.pop(0), args.pop(0)
        sources = (query, key)
    mask = args.pop(0) if attrs["mask"] else None
    bias = args.pop(0) if attrs["bias"] else None
    lengths = args.pop(0) if attrs.get("lengths") else None
    heads_apart = attrs.get("kv_layout") == "bhsd"
    kv_axis = 2 if heads_apart and mask is None else 1
    if mask is not None:
        sources = (mask if attrs["packed"] else sources[0], mask)
    return _Operands(query, key, value, mask, bias, lengths, heads_apart, *sources, kv_axis)


def _allowed(builder: GraphBuilder, call: OpCall, operands: _Operands) -> str | None:
    """Bool, broadcastable to (batch, 1, q_len, kv_len): which keys a query may attend; None when all."""
    parts: list[str] = []
    if (mask := operands.mask) is not None:

        def keep() -> str:
            return builder.node("Unsqueeze", builder.node("Cast", mask, to=element_type("bool")), builder.ints(1, 2))

        parts.append(builder.shared(("keep", mask), keep))
    if operands.lengths is not None:
        parts += _within_lengths(builder, operands, operands.lengths, call.attrs["lengths"])
    if call.attrs["causal"]:
        first = operands.lengths if call.attrs.get("lengths") == "kv" else None
        parts += _past(builder, operands, first, int(call.attrs.get("window", 0)))
    if not parts:
        return None

    def all_of() -> str:
        allowed = parts[0]
        for part in parts[1:]:
            allowed = builder.node("And", allowed, part)
        return allowed

    return builder.shared(("allowed", *parts), all_of)


def _within_lengths(builder: GraphBuilder, operands: _Operands, lengths: str, kind: str) -> list[str]:
    """Bools (batch, 1, q_len|1, kv_len|1): keys that exist; with "qkv" queries too."""

    def column(x: str) -> str:
        return builder.node("Unsqueeze", x, builder.ints(1, 2, 3))

    def keys() -> str:
        return builder.node(
            "Less", counted(builder, operands.kv_source, operands.kv_axis), column(long(builder, lengths))
        )

    def index() -> str:
        return builder.node("Unsqueeze", counted(builder, operands.q_source), builder.ints(1))

    parts = [builder.shared(("keys exist", lengths, operands.kv_source), keys)]
    if kind == "qkv":

        def queries() -> str:
            return builder.node("Less", index(), column(long(builder, lengths)))

        parts.append(builder.shared(("queries exist", lengths, operands.q_source), queries))
    return parts


def _past(builder: GraphBuilder, operands: _Operands, lengths: str | None, window: int) -> list[str]:
    """Bools ([batch, 1,] q_len, kv_len): keys j up to a query's position p; with a ``window`` those after p - window.

    Query i has position i, or lengths[b] - q_len + i where ``lengths`` are given.
    """
    queries, keys, axis = operands.q_source, operands.kv_source, operands.kv_axis

    def position() -> str:
        index = builder.node("Unsqueeze", counted(builder, queries), builder.ints(1))
        if lengths is None:
            return index
        first = builder.node("Sub", long(builder, lengths), builder.dim(queries, 1))
        return builder.node("Add", builder.node("Unsqueeze", first, builder.ints(1, 2, 3)), index)

    at = builder.shared(("position", lengths, queries), position)

    def before() -> str:
        return builder.node("LessOrEqual", counted(builder, keys, axis), at)

    def inside() -> str:
        outside = builder.node("Sub", at, builder.constant(window, "int64"))
        return builder.node("Greater", counted(builder, keys, axis), outside)

    parts = [builder.shared(("before", at, keys), before)]
    if window:
        parts.append(builder.shared(("inside", at, keys, window), inside))
    return parts


def _additive(builder: GraphBuilder, allowed: str, dtype: str) -> str:
    """0 where allowed, the lowest finite number elsewhere (minus infinity would make NaN of an all-masked row)."""
    zero, low = builder.constant(0.0, dtype), builder.constant(_LOWEST, dtype)
    return builder.shared(("additive", allowed, dtype), lambda: builder.node("Where", allowed, zero, low))


def _attends_any(builder: GraphBuilder, allowed: str) -> str:
    """Bool (batch|1, heads|1, q_len|1, 1): whether a query may attend any key."""

    def make() -> str:
        numbers = builder.node("Cast", allowed, to=element_type("int32"))
        if builder.opset < 18:
            most = builder.node("ReduceMax", numbers, axes=[-1], keepdims=1)
        else:
            most = builder.node("ReduceMax", numbers, builder.ints(-1), keepdims=1)
        return builder.node("Cast", most, to=element_type("bool"))

    return builder.shared(("attends", allowed), make)


def _finite_bias(builder: GraphBuilder, call: OpCall, allowed: str | None, bias: str) -> str:
    """``allowed``, less the keys that the bias masks: minus infinity, or so low that the definition gives them 0."""
    floor = builder.constant(FLOOR, call.result_dtype)
    finite = builder.shared(("finite", bias), lambda: builder.node("Greater", bias, floor))
    if allowed is None:
        return finite
    return builder.shared(("allowed", allowed, finite), lambda: builder.node("And", allowed, finite))


def _scale(call: OpCall) -> float:
    scale = call.attrs.get("scale")
    return float(scale) if scale is not None else 1.0 / math.sqrt(call.attrs["head_dim"])


def _decomposed(builder: GraphBuilder, call: OpCall, operands: _Operands) -> tuple[str, str]:
    """The result, and the weights."""
    attrs, dtype = call.attrs, call.result_dtype
    heads, kv_heads, head_dim = attrs["heads"], attrs["kv_heads"], attrs["head_dim"]

    query = _split_heads(builder, operands.query, heads, head_dim, [0, 2, 1, 3])
    if operands.heads_apart:
        key, value = builder.node("Transpose", operands.key, perm=[0, 1, 3, 2]), operands.value
    else:
        key = _split_heads(builder, operands.key, kv_heads, head_dim, [0, 2, 3, 1])
        value = _split_heads(builder, operands.value, kv_heads, head_dim, [0, 2, 1, 3])
    if heads != kv_heads:
        key = _repeat_heads(builder, key, heads, kv_heads, (0, heads, head_dim, -1))
        value = _repeat_heads(builder, value, heads, kv_heads, (0, heads, -1, head_dim))
    scores = builder.node("Mul", builder.node("MatMul", query, key), builder.constant(_scale(call), dtype))
    allowed = _allowed(builder, call, operands)
    if operands.bias is not None:
        allowed = _finite_bias(builder, call, allowed, operands.bias)
        scores = builder.node("Add", scores, operands.bias)
        scores = builder.node("Where", allowed, scores, builder.constant(_LOWEST, dtype))
    elif allowed is not None:
        scores = builder.node("Add", scores, _additive(builder, allowed, dtype))
    weights = builder.node("Softmax", scores, axis=-1)
    if allowed is not None and _may_attend_none(operands):
        weights = builder.node("Where", _attends_any(builder, allowed), weights, builder.constant(0.0, dtype))
    return _merged_heads(builder, builder.node("MatMul", weights, value), heads * head_dim), weights


def _split_heads(builder: GraphBuilder, x: str, count: int, head_dim: int, perm: list[int]) -> str:
    """X (batch, len, count·head_dim) as (batch, len, count, head_dim), its axes in the order ``perm``."""
    return builder.node("Transpose", builder.node("Reshape", x, builder.ints(0, 0, count, head_dim)), perm=perm)


def _merged_heads(builder: GraphBuilder, x: str, width: int) -> str:
    """X (batch, heads, len, head_dim) as (batch, len, width)."""
    return builder.node("Reshape", builder.node("Transpose", x, perm=[0, 2, 1, 3]), builder.ints(0, 0, width))


def _may_attend_none(operands: _Operands) -> bool:
    """Whether there may be queries without a key."""
    return any(given is not None for given in (operands.mask, operands.bias, operands.lengths))


def _repeat_heads(builder: GraphBuilder, x: str, heads: int, kv_heads: int, shape: tuple[int, ...]) -> str:
    """(batch, kv_heads, …) → (batch, heads, …): each head repeated for its group of query heads."""
    grouped = builder.node("Unsqueeze", x, builder.ints(2))
    grouped = builder.node("Expand", grouped, builder.ints(1, 1, heads // kv_heads, 1, 1))
    return builder.node("Reshape", grouped, builder.ints(*shape))


def _standard(builder: GraphBuilder, call: OpCall, operands: _Operands) -> str:
    attrs, dtype = call.attrs, call.result_dtype
    allowed = _allowed(builder, call, operands)
    inputs = [operands.query, operands.key, operands.value]

    def full(mask: str) -> str:
        """ONNX Runtime wants the last two axes spelled out, where the standard lets them broadcast."""
        lengths = [builder.dim(operands.q_source, 1), builder.dim(operands.kv_source, operands.kv_axis)]
        shape = builder.node("Concat", builder.ints(1, 1), *lengths, axis=0)
        return builder.node("Expand", mask, shape)

    if operands.bias is not None:
        bias = operands.bias
        if allowed is not None:
            minus_infinity = builder.constant(-math.inf, dtype)
            bias = builder.node("Where", allowed, bias, minus_infinity)
        inputs.append(full(bias))
    elif allowed is not None:
        mask = allowed
        inputs.append(builder.shared(("full", mask), lambda: full(mask)))
    if operands.heads_apart:
        # Then the operator wants an axis of heads in all of them.
        heads, head_dim = attrs["heads"], attrs["head_dim"]
        inputs[0] = _split_heads(builder, operands.query, heads, head_dim, [0, 2, 1, 3])
        return _merged_heads(builder, builder.node("Attention", *inputs, scale=_scale(call)), heads * head_dim)
    attributes: dict[str, Any] = {"q_num_heads": attrs["heads"], "kv_num_heads": attrs["kv_heads"]}
    return builder.node("Attention", *inputs, scale=_scale(call), **attributes)


def _onnxruntime(builder: GraphBuilder, call: OpCall, operands: _Operands) -> str:
    attrs, dtype = call.attrs, call.result_dtype
    allowed = _allowed(builder, call, operands)
    padding, bias = "", ""
    if operands.bias is not None:
        allowed = _finite_bias(builder, call, allowed, operands.bias)
        bias = builder.node("Where", allowed, operands.bias, builder.constant(_LOWEST, dtype))
    elif allowed is not None and (attrs["causal"] or operands.lengths is not None):
        bias = _additive(builder, allowed, dtype)
    elif (mask := operands.mask) is not None:

        def as_int32() -> str:
            kept = builder.node("Cast", mask, to=element_type("bool"))
            return builder.node("Cast", kept, to=element_type("int32"))

        padding = builder.shared(("padding", mask), as_int32)
    if bias:
        lengths = [builder.dim(operands.q_source, 1), builder.dim(operands.kv_source, operands.kv_axis)]
        bias = builder.node("Expand", bias, builder.node("Concat", builder.ints(1, 1), *lengths, axis=0))
    out = builder.node(
        "MultiHeadAttention", operands.query, operands.key, operands.value, "", padding, bias,
        domain="com.microsoft", num_heads=attrs["heads"], scale=_scale(call), mask_filter_value=_LOWEST,
    )  # fmt: skip
    if allowed is None or not _may_attend_none(operands):
        return out
    any_key = _attends_any(builder, allowed)
    if operands.bias is None:
        any_key = builder.node("Squeeze", any_key, builder.ints(1))
        return builder.node("Where", any_key, out, builder.constant(0.0, dtype))
    shape = builder.ints(0, 0, attrs["heads"], attrs["head_dim"])
    per_head = builder.node("Transpose", any_key, perm=[0, 2, 1, 3])
    by_head = builder.node("Where", per_head, builder.node("Reshape", out, shape), builder.constant(0.0, dtype))
    return builder.node("Reshape", by_head, builder.ints(0, 0, attrs["heads"] * attrs["head_dim"]))
