"""Elements of any float dtype as float32 vectors, in hand-written TIR, and walks along a row in whole vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attntune.templates.common import lanes_within, powers_of_two_below


class Elements:
    """Reads and writes ``width`` neighbouring elements as float32; ``width`` 1 is a scalar.

    bfloat16 is widened and rounded by integer arithmetic on a view of the bits, which any CPU has: TVM has no bfloat16
    vectors (see ``bf16.py``).
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes

    def of(self, argument: Any) -> Any:
        """What to load from and store to: the argument, or a view of its bits where it is bfloat16."""
        from tvm.tirx.script.builder import ir as T

        if str(argument.dtype) != "bfloat16":
            return argument
        return T.decl_buffer(tuple(int(extent) for extent in argument.shape), "uint16", data=argument.data)

    def load(self, buffer: Any, at: list[Any], width: int) -> Any:
        """``width`` elements from ``at`` on, along the last axis, as float32."""
        from tvm import tirx

        from attntune.templates.cpu import bf16

        dtype = str(buffer.dtype)
        value = buffer[tuple(at)] if width == 1 else buffer.vload(at, dtype=f"{dtype}x{width}")
        if dtype == "uint16":
            return bf16.from_bits(value, width)
        return value if dtype == "float32" else tirx.Cast(vector("float32", width), value)

    def store(self, buffer: Any, at: list[Any], value: Any, width: int) -> None:
        """Write ``width`` float32 elements from ``at`` on, along the last axis, in the buffer's dtype."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        dtype = str(buffer.dtype)
        if dtype == "uint16":
            value = rounded_to_bits(value, width)
        elif dtype != "float32":
            value = tirx.Cast(vector(dtype, width), value)
        last = at[-1] if width == 1 else tirx.Ramp(at[-1], 1, width)
        T.buffer_store(buffer, value, [*at[:-1], last])

    def along(self, extent: int, body: Callable[[Any, int], None]) -> None:
        """``body(at, width)`` over [0, extent): whole vectors in a loop, then a tail of distinct powers of two."""
        from tvm.tirx.script.builder import ir as T

        lanes = lanes_within(self.lanes, extent)
        whole = extent // lanes
        if whole <= 4:
            for step in range(whole):
                body(step * lanes, lanes)
        else:
            with T.serial(whole) as step:
                body(step * lanes, lanes)
        at = whole * lanes
        for width in powers_of_two_below(lanes):
            if (extent - at) & width:
                body(at, width)
                at += width

    def splat(self, value: float, width: int) -> Any:
        """A constant, ``width`` times."""
        from tvm import tirx

        constant = tirx.const(value, "float32")
        return constant if width == 1 else tirx.Broadcast(constant, width)


def vector(dtype: str, width: int) -> str:
    """The name of a vector type, or of the scalar's."""
    return dtype if width == 1 else f"{dtype}x{width}"


def rounded_to_bits(x: Any, width: int) -> Any:
    """Float32 to the bits of bfloat16, to nearest even; NaN stays NaN."""
    from tvm import tirx

    def const(value: int) -> Any:
        constant = tirx.const(value, "uint32")
        return constant if width == 1 else tirx.Broadcast(constant, width)

    bits = tirx.reinterpret(vector("uint32", width), x)
    half = const(16)
    rounded = (bits + const(0x7FFF) + ((bits >> half) & const(1))) >> half
    # Past infinity's exponent lies NaN, whose payload the addition would carry away.
    is_nan = (bits & const(0x7FFFFFFF)) > const(0x7F800000)
    return tirx.Cast(vector("uint16", width), tirx.Select(is_nan, const(0x7FC0), rounded))
