"""How each model-level operator is written in ONNX: one emitter per operator, in a registry.

A new operator adds one function here, decorated with its name. An emitter appends nodes to the builder and returns the
name of its result. Activations keep their leading axes, as in the model's calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from attntune.errors import ExportError
from attntune.interop.onnx_attention import attention
from attntune.interop.onnx_decoder import EMITTERS as DECODER_EMITTERS
from attntune.interop.onnx_decoder import clamped, counted, positions
from attntune.interop.onnx_graph import GraphBuilder, element_type, reduce, zero_past_end
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
    **DECODER_EMITTERS,
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
    """``activation(x·Wᵀ + bias) + residual``, gated or not; W keeps its (out_features, in_features) layout."""
    x, weight, *rest = call.args
    extra = iter(rest)
    transposed = builder.shared(("transposed", weight), lambda: builder.node("Transpose", weight, perm=[1, 0]))
    y = builder.node("MatMul", x, transposed)
    if call.attrs.get("bias"):
        y = builder.node("Add", y, next(extra))
    gate, up = y, ""
    if call.attrs.get("gated"):
        half = int(call.arg_shapes[1][0]) // 2
        gate, up = builder.nodes_out("Split", y, builder.ints(half, half), outputs=2, axis=-1)
    y = activation(builder, call.attrs.get("activation", ""), gate, call.result_dtype)
    if up:
        y = builder.node("Mul", y, up)
    if call.attrs.get("residual"):
        y = builder.node("Add", y, next(extra))
    if call.attrs.get("squeeze"):
        y = builder.node("Squeeze", y, builder.ints(1))
    if call.attrs.get("lengths"):
        y = zero_past_end(builder, y, next(extra), call.result_dtype)
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
    weight, bias, *lengths = rest
    y = builder.node("LayerNormalization", x, weight, bias, axis=-1, epsilon=float(call.attrs["eps"]))
    return zero_past_end(builder, y, lengths[0], call.result_dtype) if lengths else y


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


@emits("unfold")
def unfold(builder: GraphBuilder, call: OpCall) -> str:
    """Windows of a padded sequence: one slice for each step of the kernel, side by side."""
    kernel, stride, padding = (int(call.attrs[name]) for name in ("kernel", "stride", "padding"))
    x = call.args[0]
    if call.attrs["layout"] == "bcl":
        x = builder.node("Transpose", x, perm=[0, 2, 1])
    if padding:
        x = builder.node("Pad", x, builder.ints(0, padding, 0, 0, padding, 0))
    length = builder.dim(x, 1)
    slices = []
    for step in range(kernel):
        # The last window that fits begins kernel - 1 before the end.
        stop = builder.node("Sub", length, builder.ints(kernel - 1 - step))
        slices.append(builder.node("Slice", x, builder.ints(step), stop, builder.ints(1), builder.ints(stride)))
    return builder.node("Concat", *slices, axis=-1)


@emits("add_positions")
def add_positions(builder: GraphBuilder, call: OpCall) -> str:
    """``x + position[0..seq)``."""
    x, position = call.args
    rows = builder.node("Slice", position, builder.ints(0), builder.dim(x, 1), builder.ints(0))
    return builder.node("Add", x, rows)


@emits("relative_bias")
def relative_bias(builder: GraphBuilder, call: OpCall) -> str:
    """``table[:, j - p + zero]``, the index clamped; p counted from the start or back from ``lengths``."""
    rows, table, *rest = call.args
    keys = counted(builder, rest[1], 2) if rest else counted(builder, rows)
    at = builder.node("Unsqueeze", positions(builder, rows, rest[0] if rest else None), builder.ints(-1))
    distance = builder.node("Add", builder.node("Sub", keys, at), builder.constant(int(call.attrs["zero"]), "int64"))
    columns = clamped(builder, distance, int(call.arg_shapes[1][1]))
    found = builder.node("Gather", table, columns, axis=1)
    if rest:
        return builder.node("Transpose", found, perm=[1, 0, 2, 3])
    return builder.node("Unsqueeze", found, builder.ints(0))


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
