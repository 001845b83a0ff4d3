"""Recurrent layers and additive attention in ONNX: its own GRU and LSTM operators, and plain nodes for one position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from attntune.interop.onnx_graph import GraphBuilder, before_end, element_type
from attntune.ops.additive_attention import LOWEST

if TYPE_CHECKING:
    from attntune.models.model import OpCall

#: By operator: ONNX's name, its order of gates as indices of ours, and attributes.
_LAYERS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "gru_sequence": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "lstm_sequence": ("LSTM", (0, 3, 1, 2), {}),
}


def recurrent(builder: GraphBuilder, call: OpCall) -> tuple[str, ...]:
    """Outputs and last states of a GRU or LSTM."""
    projected, weight, *rest = call.args
    extra = iter(rest)
    bias = next(extra) if call.attrs.get("bias") else None
    count = 2 if call.op == "lstm_sequence" else 1
    states = [next(extra) for _ in range(count)] if call.attrs.get("initial") else []
    lengths = next(extra) if call.attrs.get("lengths") else None
    if len(call.arg_shapes[0]) == 2 and states:
        return _cell(builder, call, projected, weight, bias, states)
    return _sequence(builder, call, projected, weight, bias, states, lengths)


def _cell(
    builder: GraphBuilder, call: OpCall, projected: str, weight: str, bias: str | None, states: list[str]
) -> tuple[str, ...]:
    """One position by plain nodes: projected (batch, gates·hidden)."""
    gates = len(_LAYERS[call.op][1])
    transposed = builder.shared(("transposed", weight), lambda: builder.node("Transpose", weight, perm=[1, 0]))
    sums = builder.node("MatMul", states[0], transposed)
    if bias is not None:
        sums = builder.node("Add", sums, bias)
    width = int(call.arg_shapes[1][1])
    sizes = builder.ints(*[width] * gates)
    x = builder.nodes_out("Split", projected, sizes, outputs=gates, axis=-1)
    s = builder.nodes_out("Split", sums, sizes, outputs=gates, axis=-1)

    def gate(index: int, function: str = "Sigmoid") -> str:
        return builder.node(function, builder.node("Add", x[index], s[index]))

    if call.op == "gru_sequence":
        reset, update = gate(0), gate(1)
        new = builder.node("Tanh", builder.node("Add", x[2], builder.node("Mul", reset, s[2])))
        kept = builder.node("Mul", update, builder.node("Sub", states[0], new))
        following = builder.node("Add", new, kept)
        return following, builder.node("Identity", following)
    kept = builder.node("Mul", gate(1), states[1])
    cell = builder.node("Add", kept, builder.node("Mul", gate(0), gate(2, "Tanh")))
    following = builder.node("Mul", gate(3), builder.node("Tanh", cell))
    return following, builder.node("Identity", following), cell


def _sequence(
    builder: GraphBuilder,
    call: OpCall,
    projected: str,
    weight: str,
    bias: str | None,
    states: list[str],
    lengths: str | None,
) -> tuple[str, ...]:
    kind, order, attributes = _LAYERS[call.op]
    width = int(call.arg_shapes[1][1])

    def ordered(values: np.ndarray) -> np.ndarray:
        parts = np.split(values, len(order))
        return np.concatenate([parts[index] for index in order])

    def constant(values: np.ndarray) -> str:
        return builder.constant(ordered(values)[None], call.arg_dtypes[0])

    x, input_weight, input_bias = _undo_linear(builder, projected, len(order) * width)
    if len(call.arg_shapes[0]) == 2:
        x = builder.node("Unsqueeze", x, builder.ints(1))
    biases = [ordered(input_bias), ordered(builder.weight(bias) if bias is not None else np.zeros_like(input_bias))]
    whole = builder.constant(np.concatenate(biases)[None], call.arg_dtypes[0])
    # Lengths of 0 are not allowed there: such sequences run one position, and then get what they began with.
    ends = "" if lengths is None else builder.node("Max", lengths, builder.constant(1, "int32"))
    starts = [builder.node("Unsqueeze", state, builder.ints(0)) for state in states]
    direction = "reverse" if call.attrs.get("reverse") else "forward"
    count = 2 if kind == "LSTM" else 1
    y, *last = builder.nodes_out(
        kind, builder.node("Transpose", x, perm=[1, 0, 2]), constant(input_weight), constant(builder.weight(weight)),
        whole, ends, *starts, outputs=1 + count, hidden_size=width, direction=direction, **attributes,
    )  # fmt: skip
    outputs = builder.node("Transpose", builder.node("Squeeze", y, builder.ints(1)), perm=[1, 0, 2])
    last = [builder.node("Squeeze", value, builder.ints(0)) for value in last]
    if lengths is not None:
        zero = builder.constant(0.0, call.arg_dtypes[0])
        inside = builder.node("Unsqueeze", before_end(builder, lengths, builder.dim(outputs, 1)), builder.ints(2))
        outputs = builder.node("Where", inside, outputs, zero)
        some = builder.node("Unsqueeze", builder.node("Greater", lengths, builder.constant(0, "int32")),
                            builder.ints(1))  # fmt: skip
        last = [builder.node("Where", some, value, start)
                for value, start in zip(last, states or [zero] * count, strict=True)]  # fmt: skip
    if len(call.arg_shapes[0]) == 2:
        outputs = builder.node("Squeeze", outputs, builder.ints(1))
    return (outputs, *last)


def _undo_linear(builder: GraphBuilder, projected: str, wide: int) -> tuple[str, np.ndarray, np.ndarray]:
    """The input, weight and bias of the linear layer that made ``projected``, whose nodes go: ONNX's layers do both.

    Where it was made otherwise, ``projected`` itself with an identity.
    """
    made = {output: node for node in builder.nodes for output in node.output}
    add = made.get(projected)
    product = made.get(add.input[0]) if add is not None and add.op_type == "Add" else None
    transpose = made.get(product.input[1]) if product is not None and product.op_type == "MatMul" else None
    if transpose is None or transpose.op_type != "Transpose" or not builder.has_weight(transpose.input[0]):
        return projected, np.eye(wide, dtype=np.float32), np.zeros(wide, np.float32)
    assert add is not None
    assert product is not None
    for node in (add, product):
        builder.nodes.remove(node)
    return product.input[0], builder.weight(transpose.input[0]), builder.weight(add.input[1])


def additive_attention(builder: GraphBuilder, call: OpCall) -> tuple[str, str]:
    """Scores by a tanh of sums, softmax, weighted sum; the weights with an axis for their one head."""
    query, key, value, *rest = call.args
    extra = iter(rest)
    single = len(call.arg_shapes[0]) == 2
    if single:
        query = builder.node("Unsqueeze", query, builder.ints(1))
    pairs = builder.node(
        "Add", builder.node("Unsqueeze", query, builder.ints(2)), builder.node("Unsqueeze", key, builder.ints(1))
    )
    energy = builder.node("Tanh", pairs)
    if call.attrs.get("scale"):
        energy = builder.node("Mul", energy, next(extra))
    scores = builder.node("ReduceSum", energy, builder.ints(-1), keepdims=0)
    seen = None
    if call.attrs.get("mask"):
        seen = builder.node("Cast", next(extra), to=element_type("bool"))
    if call.attrs.get("lengths"):
        inside = before_end(builder, next(extra), builder.dim(key, 1))
        seen = inside if seen is None else builder.node("And", seen, inside)
    if seen is not None:
        zero = builder.constant(0.0, call.arg_dtypes[0])
        row = builder.node("Unsqueeze", seen, builder.ints(1))
        scores = builder.node("Where", row, scores, builder.constant(LOWEST, call.arg_dtypes[0]))
        weights = builder.node("Where", row, builder.node("Softmax", scores, axis=-1), zero)
        value = builder.node("Where", builder.node("Unsqueeze", seen, builder.ints(2)), value, zero)
    else:
        weights = builder.node("Softmax", scores, axis=-1)
    context = builder.node("MatMul", weights, value)
    if single:
        context = builder.node("Squeeze", context, builder.ints(1))
    return context, builder.node("Unsqueeze", weights, builder.ints(1))
