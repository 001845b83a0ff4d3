"""Whole vectors in hand-written TIR: loads, stores, broadcasts, and transposes by shuffles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attntune.target import Target

#: LLVM IR for :meth:`Vectors.prefetch`, for a ``pragma_import_llvm`` on a loop of the kernel.
PREFETCH_IR = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define linkonce_odr i32 @attntune_prefetch_1(ptr %line) alwaysinline {
  call void @llvm.prefetch.p0(ptr %line, i32 0, i32 3, i32 1)
  ret i32 0
}

define linkonce_odr i32 @attntune_prefetch_2(ptr %line) alwaysinline {
  call void @llvm.prefetch.p0(ptr %line, i32 0, i32 2, i32 1)
  ret i32 0
}
"""


def asks_ahead(target: Target) -> bool:
    """Whether kernels ask for what they read before they read it, as long as nothing was measured.

    It pays on Emerald Rapids; on Zen 4 and Zen 3 it cost more than it brought, but for decoding with grouped heads on
    the latter. See the ladders in ``linear.py`` and ``attention_decode.py``. A vector of 512 bits is a line of the
    cache, asked for once.
    """
    return target.fmas_per_cycle >= 2 and target.vector_bits == 512


class Vectors:
    """Float32 vectors of ``lanes`` elements."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.dtype = f"float32x{lanes}"

    def load(self, buffer: Any, at: list[Any]) -> Any:
        """``lanes`` elements from ``at`` on, along the last axis."""
        return buffer.vload(at, dtype=self.dtype)

    def store(self, buffer: Any, at: list[Any], value: Any) -> None:
        """Write ``value`` from ``at`` on, along the last axis."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        T.buffer_store(buffer, value, [*at[:-1], tirx.Ramp(at[-1], 1, self.lanes)])

    def prefetch(self, buffer: Any, at: list[Any], level: int = 1) -> None:
        """Ask for the cache line of ``buffer`` at ``at``, which may lie past its end; needs :data:`PREFETCH_IR`.

        ``level``: of the cache it is to come to. To the second more lines can be under way at a time than to the first.
        """
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        T.evaluate(tirx.call_extern("int32", f"attntune_prefetch_{level}", tirx.address_of(buffer[tuple(at)])))

    def broadcast(self, value: Any) -> Any:
        """A scalar expression in every lane."""
        from tvm import tirx

        return tirx.Broadcast(value, self.lanes)

    def splat(self, value: float) -> Any:
        """A constant in every lane."""
        from tvm import tirx

        return self.broadcast(tirx.const(value, "float32"))

    def index(self) -> Any:
        """0, 1, 2, …, as int32."""
        from tvm import tirx

        return tirx.Ramp(tirx.const(0, "int32"), 1, self.lanes)

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Lanes picked from ``a`` followed by ``b``."""
        from tvm import tirx

        return tirx.Shuffle([a, b], lanes)

    def transpose(self, load: Callable[[int], Any], store: Callable[[int, Any], None]) -> None:
        """A block of ``lanes`` × ``lanes``: ``load(row)`` gives its rows, ``store(column, vector)`` takes its columns.

        log2(lanes) rounds of two-vector shuffles: lanes² scalar moves become lanes · log2(lanes) shuffles.
        """
        from tvm.tirx.script.builder import ir as T

        lanes = self.lanes
        rows = [T.bind(load(row)) for row in range(lanes)]
        # After the round of width ``step``, row r holds elements of the rows that differ from r in the bits so far.
        step = 1
        while step < lanes:
            low = [k if k & step == 0 else lanes + k - step for k in range(lanes)]
            high = [k + step if k & step == 0 else lanes + k for k in range(lanes)]
            done = list(rows)
            for row in range(lanes):
                if row & step == 0:
                    done[row] = T.bind(self.shuffle(rows[row], rows[row + step], low))
                    done[row + step] = T.bind(self.shuffle(rows[row], rows[row + step], high))
            rows = done
            step *= 2
        for column in range(lanes):
            store(column, rows[column])

    def sums(self, rows: list[Any]) -> Any:
        """A vector whose lane k is the sum of the elements of ``rows[k]``: lanes - 1 pairs of shuffles and adds."""
        from tvm.tirx.script.builder import ir as T

        lanes, step = self.lanes, 1
        while step < lanes:
            low = [k if k & step == 0 else lanes + k - step for k in range(lanes)]
            high = [k + step if k & step == 0 else lanes + k for k in range(lanes)]
            rows = [
                T.bind(self.shuffle(a, b, low) + self.shuffle(a, b, high))
                for a, b in zip(rows[0::2], rows[1::2], strict=True)
            ]
            step *= 2
        return rows[0]

    def fold(self, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """``combine`` of all lanes (a maximum, a sum), in every lane."""
        from tvm.tirx.script.builder import ir as T

        step = 1
        while step < self.lanes:
            value = T.bind(value)
            value = combine(value, self.shuffle(value, value, [k ^ step for k in range(self.lanes)]))
            step *= 2
        return T.bind(value)


def chained(steps: int, unroll: int, chains: int, step: Callable[[Any, int], None]) -> None:
    """``step(k, c)`` for every k below ``steps``, ``unroll`` · ``chains`` at a time written out.

    ``c`` counts 0 … chains - 1 again and again: sums that are kept by c do not wait for each other's additions.
    """
    from tvm.tirx.script.builder import ir as T

    together = unroll * chains
    whole, left = divmod(steps, together)
    if whole:
        with T.serial(whole) as k:
            for u in range(together):
                step(k * together + u, u % chains)
    for u in range(left):
        step(whole * together + u, u % chains)
