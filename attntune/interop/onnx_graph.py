"""A small builder of ONNX graphs: nodes, shared constants, shared subexpressions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

#: NumPy dtype name → ``onnx.TensorProto`` element type name.
ELEMENT_TYPES = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "float64": "DOUBLE",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}


def element_type(dtype: str) -> int:
    """The ``onnx.TensorProto`` element type of ``dtype``."""
    import onnx

    return int(getattr(onnx.TensorProto, ELEMENT_TYPES[dtype]))


class GraphBuilder:
    """Collects the nodes and initializers of one graph.

    Args:
        opset: of the default domain; emitters choose their operators by it.
        attention: ``"decomposed"``, ``"standard"`` or ``"onnxruntime"``; see :func:`attntune.interop.export_onnx`.
        weights: constants that calls refer to by name; each becomes an initializer when it is first used.
    """

    def __init__(self, opset: int, attention: str, weights: Mapping[str, np.ndarray]) -> None:
        self.opset = opset
        self.attention = attention
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray] = {}
        self._weights = weights
        self._written: dict[int, str] = {}
        self._shared: dict[tuple[Any, ...], str] = {}
        self._names = 0

    def fresh(self, hint: str) -> str:
        """A value name not used before."""
        self._names += 1
        return f"{hint}_{self._names}"

    def value(self, name: str) -> str:
        """``name`` itself; a weight of that name is added to the initializers."""
        if name in self._weights:
            # A weight under a second name, as a tied vocabulary projection has, is written once.
            name = self._written.setdefault(id(self._weights[name]), name)
            self.initializers.setdefault(name, self._weights[name])
        return name

    def has_weight(self, name: str) -> bool:
        """Whether ``name`` is a weight."""
        return name in self._weights

    def weight(self, name: str) -> np.ndarray:
        """The weight ``name``, for an operator that wants it in another layout."""
        return self._weights[name]

    def node(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the output's name."""
        return self.nodes_out(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def nodes_out(
        self, op_type: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """Append a node with several outputs and return their names."""
        from onnx import helper

        names = tuple(self.fresh(op_type.lower()) for _ in range(outputs))
        self.nodes.append(
            helper.make_node(op_type, [self.value(i) for i in inputs], list(names), name=names[0], domain=domain,
                             **attributes)
        )  # fmt: skip
        return names

    def constant(self, value: Any, dtype: str) -> str:
        """An initializer holding ``value``; equal constants share one."""
        from attntune.ops.workload import as_dtype

        array = as_dtype(np.asarray(value), dtype)

        def add() -> str:
            name = self.fresh("const")
            self.initializers[name] = array
            return name

        return self.shared(("constant", dtype, array.shape, array.tobytes()), add)

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.constant(list(values), "int64")

    def shared(self, key: tuple[Any, ...], make: Callable[[], str]) -> str:
        """The value that ``make`` gave for ``key`` the first time: a mask is prepared once for all layers."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def dim(self, name: str, axis: int) -> str:
        """Extent of one axis as an int64 tensor of shape (1,)."""
        return self.shared(("dim", name, axis), lambda: self.node("Shape", name, start=axis, end=axis + 1))

    def bind(self, value: str, result: str) -> None:
        """Rename ``value``, the output of the node added last, to ``result``; other values get an Identity."""
        last = self.nodes[-1] if self.nodes else None
        if last is not None and list(last.output) == [value] and value not in self._shared.values():
            last.output[0] = result
            return
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [value], [result], name=self.fresh("identity")))


def before_end(builder: GraphBuilder, lengths: str, count: str) -> str:
    """(batch, count) bool: positions before each of lengths (batch,); ``count`` is an int64 tensor of shape (1,)."""
    scalar = builder.node("Squeeze", count, builder.ints(0))
    positions = builder.node("Range", builder.constant(0, "int64"), scalar, builder.constant(1, "int64"))
    ends = builder.node("Unsqueeze", builder.node("Cast", lengths, to=element_type("int64")), builder.ints(1))
    return builder.node("Less", positions, ends)


def zero_past_end(builder: GraphBuilder, y: str, lengths: str, dtype: str) -> str:
    """Y (batch, seq, features) with zeros past lengths (batch,)."""

    def inside() -> str:
        return builder.node("Unsqueeze", before_end(builder, lengths, builder.dim(y, 1)), builder.ints(2))

    return builder.node("Where", builder.shared(("before end", lengths), inside), y, builder.constant(0.0, dtype))


def reduce(builder: GraphBuilder, op_type: str, x: str, axis: int, keepdims: int) -> str:
    """A reduction over one axis; its axes are an attribute before opset 18, except for ReduceSum."""
    if op_type == "ReduceSum" or builder.opset >= 18:
        return builder.node(op_type, x, builder.ints(axis), keepdims=keepdims)
    attributes: dict[str, Any] = {"axes": [axis], "keepdims": keepdims}
    return builder.node(op_type, x, **attributes)
