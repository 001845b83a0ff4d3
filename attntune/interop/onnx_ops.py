"""How each model-level operator is written in ONNX: one emitter per operator, in a registry.

A new operator adds one function here, decorated with its name. An emitter appends nodes to the builder and returns the
name of its result. Activations keep their leading axes, as in the model's calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attntune.errors import ExportError
from attntune.interop.onnx_attention import attention
from attntune.interop.onnx_graph import GraphBuilder, element_type
from attntune.interop.onnx_recurrent import additive_attention, recurrent
from attntune.ops.mean_pool import NORM_FLOOR

if TYPE_CHECKING:
    from attntune.models.model import OpCall

Emitter = Callable[[GraphBuilder, "OpCall"], str | tuple[str, ...]]

#: Emitters by operator name.
EMITTERS: dict[str, Emitter] = {
    "attention": attention,
    "additive_attention": additive_attention,
    "gru_sequence": recurrent,
    "lstm_sequence": recurrent,
}


def emits(op: str) -> Callable[[Emitter], Emitter]:
    """Register the decorated function as the emitter of ``op``."""

    def register(emitter: Emitter) -> Emitter:
        EMITTERS[op] = emitter
        return emitter

    return register


def emit(builder: GraphBuilder, call: OpCall) -> None:
    """Append the nodes of one call.

    Raises:
        ExportError: naming the operator and those that can be exported.
    """
    if call.op not in EMITTERS:
        raise ExportError(
            f"operator {call.op!r} (result {call.result!r}) has no ONNX emitter; expected one of {sorted(EMITTERS)}"
        )
    names = EMITTERS[call.op](builder, call)
    for name, result in zip((names,) if isinstance(names, str) else names, call.results, strict=True):
        builder.bind(name, result)


@emits("linear")
def linear(builder: GraphBuilder, call: OpCall) -> str:
    """``activation(x·Wᵀ + bias) + residual``; W keeps its (out_features, in_features) layout in the file."""
    x, weight, *rest = call.args
    extra = iter(rest)
    transposed = builder.shared(("transposed", weight), lambda: builder.node("Transpose", weight, perm=[1, 0]))
    if call.attrs.get("squeeze"):
        x = builder.node("Squeeze", x, builder.ints(1))
    y = builder.node("MatMul", x, transposed)
    if call.attrs.get("bias"):
        y = builder.node("Add", y, next(extra))
    y = activation(builder, call.attrs.get("activation", ""), y, call.result_dtype)
    if call.attrs.get("residual"):
        y = builder.node("Add", y, next(extra))
    return y


def activation(builder: GraphBuilder, name: str, x: str, dtype: str) -> str:
    """Relu, Gelu (exact and tanh) or SiLU; Gelu is decomposed below opset 20, where the operator first exists."""

    def scalar(value: float) -> str:
        return builder.constant(value, dtype)

    if name == "":
        return x
    if name == "relu":
        return builder.node("Relu", x)
    if name == "silu":
        return builder.node("Mul", x, builder.node("Sigmoid", x))
    if name in ("gelu", "gelu_tanh") and builder.opset >= 20:
        return builder.node("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")
    if name == "gelu":
        cdf = builder.node("Add", builder.node("Erf", builder.node("Div", x, scalar(math.sqrt(2.0)))), scalar(1.0))
        return builder.node("Mul", builder.node("Mul", x, cdf), scalar(0.5))
    if name == "gelu_tanh":
        cubic = builder.node("Mul", builder.node("Mul", builder.node("Mul", x, x), x), scalar(0.044715))
        inner = builder.node("Mul", builder.node("Add", x, cubic), scalar(math.sqrt(2.0 / math.pi)))
        cdf = builder.node("Add", builder.node("Tanh", inner), scalar(1.0))
        return builder.node("Mul", builder.node("Mul", x, cdf), scalar(0.5))
    raise ExportError(f"activation {name!r} has no ONNX emitter; expected '', 'relu', 'gelu', 'gelu_tanh' or 'silu'")


@emits("layer_norm")
def layer_norm(builder: GraphBuilder, call: OpCall) -> str:
    """``LN(x + residual)`` over the last axis."""
    x, *rest = call.args
    if call.attrs.get("residual"):
        x = builder.node("Add", x, rest.pop(0))
    weight, bias = rest
    return builder.node("LayerNormalization", x, weight, bias, axis=-1, epsilon=float(call.attrs["eps"]))


@emits("softmax")
def softmax(builder: GraphBuilder, call: OpCall) -> str:
    """Softmax over the last axis."""
    return builder.node("Softmax", call.args[0], axis=-1)


@emits("embedding_norm")
def embedding_norm(builder: GraphBuilder, call: OpCall) -> str:
    """``LN(word[ids] + position[0..seq) + type[types])``."""
    ids, types, word, position, kind, weight, bias = call.args
    end = builder.dim(ids, 1)
    positions = builder.node("Slice", position, builder.ints(0), end, builder.ints(0))
    total = builder.node("Add", builder.node("Gather", word, ids, axis=0), builder.node("Gather", kind, types, axis=0))
    total = builder.node("Add", total, positions)
    return builder.node("LayerNormalization", total, weight, bias, axis=-1, epsilon=float(call.attrs["eps"]))


@emits("embedding")
def embedding(builder: GraphBuilder, call: OpCall) -> str:
    """``scale · table[ids] + position[p]``; positions count from the start, or back from ``lengths``."""
    ids, table, *rest = call.args
    extra = iter(rest)
    rows = builder.node("Gather", table, ids, axis=0)
    scale = float(call.attrs.get("scale", 1.0))
    if scale != 1.0:
        rows = builder.node("Mul", rows, builder.constant(scale, call.result_dtype))
    if not call.attrs.get("position"):
        return rows
    position = next(extra)
    count = builder.node("Squeeze", builder.dim(ids, 1), builder.ints(0))
    at = builder.node("Range", builder.constant(0, "int64"), count, builder.constant(1, "int64"))
    if call.attrs.get("lengths"):
        lengths = builder.node("Cast", next(extra), to=element_type("int64"))
        first = builder.node("Sub", builder.node("Unsqueeze", lengths, builder.ints(1)), builder.dim(ids, 1))
        at = builder.node("Add", first, at)
    at = builder.node("Add", at, builder.constant(int(call.attrs.get("position_offset", 0)), "int64"))
    last = builder.constant(int(call.arg_shapes[2][0]) - 1, "int64")
    at = builder.node("Max", builder.node("Min", at, last), builder.constant(0, "int64"))
    return builder.node("Add", rows, builder.node("Gather", position, at, axis=0))


@emits("mean_pool")
def mean_pool(builder: GraphBuilder, call: OpCall) -> str:
    """Mean over unmasked positions, then unit L2 norm."""
    x, mask = call.args
    dtype, floor = call.result_dtype, float(call.attrs.get("eps", 1e-9))

    def scalar(value: float) -> str:
        return builder.constant(value, dtype)

    keep = builder.shared(("keep2", mask), lambda: builder.node("Cast", mask, to=element_type("bool")))
    kept = builder.node("Cast", keep, to=element_type(dtype))
    # Where, not Mul: a masked position may hold inf or NaN.
    x = builder.node("Where", builder.node("Unsqueeze", keep, builder.ints(-1)), x, scalar(0.0))
    total = reduce(builder, "ReduceSum", x, 1, keepdims=0)
    count = builder.node("Max", reduce(builder, "ReduceSum", kept, 1, keepdims=1), scalar(floor))
    mean = builder.node("Div", total, count)
    if not call.attrs.get("normalize", True):
        return mean
    norm = reduce(builder, "ReduceL2", mean, -1, keepdims=1)
    return builder.node("Div", mean, builder.node("Max", norm, scalar(NORM_FLOOR)))


@emits("patchify")
def patchify(builder: GraphBuilder, call: OpCall) -> str:
    """(batch, channels, height, width) → (batch, patches, channels·patch²)."""
    channels, height, width = (int(dim) for dim in call.arg_shapes[0][1:])
    patch = call.attrs["patch"]
    down, across = height // patch, width // patch
    cut = builder.node("Reshape", call.args[0], builder.ints(0, channels, down, patch, across, patch))
    rows = builder.node("Transpose", cut, perm=[0, 2, 4, 1, 3, 5])
    return builder.node("Reshape", rows, builder.ints(0, down * across, channels * patch * patch))


@emits("prepend_token")
def prepend_token(builder: GraphBuilder, call: OpCall) -> str:
    """``concat(token, x) + position``."""
    x, token, position = call.args
    shape = builder.node("Concat", builder.dim(x, 0), builder.ints(1), builder.dim(x, 2), axis=0)
    return builder.node("Add", builder.node("Concat", builder.node("Expand", token, shape), x, axis=1), position)


@emits("select_rows")
def select_rows(builder: GraphBuilder, call: OpCall) -> str:
    """``x[b, index[b]]``, or the same row of all; an index outside the sequence is clamped."""
    x, *index = call.args
    if not index:
        return builder.node("Gather", x, builder.constant(call.attrs["row"], "int64"), axis=1)
    last = builder.node("Sub", builder.dim(x, 1), builder.ints(1))
    inside = builder.node("Max", builder.node("Min", index[0], last), builder.ints(0))
    return builder.node("GatherND", x, builder.node("Unsqueeze", inside, builder.ints(1)), batch_dims=1)


def reduce(builder: GraphBuilder, op_type: str, x: str, axis: int, keepdims: int) -> str:
    """A reduction over one axis; its axes are an attribute before opset 18, except for ReduceSum."""
    if op_type == "ReduceSum" or builder.opset >= 18:
        return builder.node(op_type, x, builder.ints(axis), keepdims=keepdims)
    attributes: dict[str, Any] = {"axes": [axis], "keepdims": keepdims}
    return builder.node(op_type, x, **attributes)
