"""The plain loops of a recurrent layer: position by position, unit by unit, lanes along the units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attntune.ops.recurrent import Recurrent

_LANES = 16


def recurrence(w: Recurrent, operand: Mapping[str, Any]) -> Any:
    """The body of a TE ``extern`` stage over buffers by name; states live in the results."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    zero = tirx.const(0.0, "float32")
    outputs, weight, x = operand["outputs"], operand["recurrent_weight"], operand["projected"]
    states = [operand[name] for name in w.states]
    with IRBuilder() as builder, T.sblock("recurrence"):
        T.reads()
        T.writes()
        sums = T.sblock_alloc_buffer((w.gates, w.hidden), "float32")
        with T.serial(w.batch) as b:
            for name, state in zip(w.states, states, strict=True):
                start = operand.get(f"initial_{name}")
                assign(state, [b], w.hidden, _LANES, constant(zero) if start is None else row_of(start, b))
            length = ending(w, operand, b)

            def step(s: Any, b: Any = b, length: Any = length) -> None:
                at = length - 1 - s if w.reverse else s
                for gate in range(w.gates):
                    _products(w, sums, gate, weight, states[0], b, operand.get("recurrent_bias"))

                def unit(j: Any) -> None:
                    gates = [x[b, at, g * w.hidden + j] for g in range(w.gates)]
                    before = [state[b, j] for state in states]
                    fresh = updated(w, gates, [sums[g, j] for g in range(w.gates)], before)
                    # The output first: its expression still reads the cell's old value.
                    for state, value in zip(states, fresh, strict=True):
                        T.buffer_store(state, value, [b, j])
                    T.buffer_store(outputs, states[0][b, j], [b, at, j])

                along(w.hidden, _LANES, unit)

            with T.serial(w.seq) as s:
                if not w.lengths:
                    step(s)
                else:
                    with T.If(s < length):
                        with T.Then():
                            step(s)
                        with T.Else():
                            assign(outputs, [b, s], w.hidden, _LANES, constant(zero))
    return builder.get()


def ending(w: Recurrent, operand: Mapping[str, Any], row: Any) -> Any:
    """How many positions sequence ``row`` has, int32."""
    from tvm import tirx

    if not w.lengths:
        return tirx.const(w.seq, "int32")
    return tirx.max(tirx.min(operand["lengths"][row], tirx.const(w.seq, "int32")), tirx.const(0, "int32"))


def updated(w: Recurrent, gates: list[Any], sums: list[Any], states: list[Any]) -> list[Any]:
    """:meth:`Recurrent.update` on scalar expressions."""
    return w.update(gates, sums, states, _Bound)


class _Bound:
    """Functions whose results are variables: an expression that stands in two places would define its own twice."""

    @staticmethod
    def sigmoid(x: Any) -> Any:
        """Logistic function."""
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        return T.bind(tmath.sigmoid(x))

    @staticmethod
    def tanh(x: Any) -> Any:
        """Hyperbolic tangent."""
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        return T.bind(tmath.tanh(x))


def along(extent: int, lanes: int, body: Callable[[Any], None]) -> None:
    """``body(j)`` for each j below ``extent``: whole vectors of ``lanes``, then vectors of the powers of two left."""
    from tvm.tirx.script.builder import ir as T

    start, width = 0, lanes
    while start < extent:
        count = (extent - start) // width
        if count and width == 1:
            body(start)
        elif count:
            with T.serial(count) as outer, T.vectorized(width) as lane:
                body(start + outer * width + lane)
        start += count * width
        width //= 2


def assign(buffer: Any, lead: list[Any], extent: int, lanes: int, value: Callable[[Any], Any]) -> None:
    """``buffer[*lead, j] = value(j)`` for each j below ``extent``."""
    from tvm.tirx.script.builder import ir as T

    along(extent, lanes, lambda j: T.buffer_store(buffer, value(j), [*lead, j]))


def row_of(buffer: Any, *lead: Any) -> Callable[[Any], Any]:
    """``j → buffer[*lead, j]``."""
    return lambda j: buffer[(*lead, j)]


def constant(value: Any) -> Callable[[Any], Any]:
    """``j → value``."""
    return lambda j: value


def _products(w: Recurrent, sums: Any, gate: int, weight: Any, state: Any, b: Any, bias: Any) -> None:
    from tvm import tirx
    from tvm.tirx.script.builder import ir as T

    row = gate * w.hidden
    zero = tirx.const(0.0, "float32")
    assign(sums, [gate], w.hidden, _LANES, constant(zero) if bias is None else lambda j: bias[row + j])
    with T.serial(w.hidden) as k:
        assign(sums, [gate], w.hidden, _LANES, lambda j: sums[gate, j] + weight[row + j, k] * state[b, k])
