"""Linear kernels of x quantised by groups as the kernel runs, exact sums within a group; weights of 4 and 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attntune.ops.int8 import INT8_MAX
from attntune.templates.cpu import bf16
from attntune.templates.cpu.arithmetic import INT8_OFFSET, GroupedBytes
from attntune.templates.cpu.linear_kernel import LinearKernel, Panels


class QuantizedRowsKernel(LinearKernel):
    """All cores share the rows, which are quantised first."""

    def _multiplied(self, operand: dict[str, Any]) -> None:
        from tvm.tirx.script.builder import ir as T

        w, width = self.w, self.steps * self.arithmetic.group
        self.bytes = T.sblock_alloc_buffer((w.rows, width), "int8")
        self.step = T.sblock_alloc_buffer((w.rows, w.groups), "float32")
        self.operand["x"] = T.decl_buffer((w.rows, width // 4), self.arithmetic.word, data=self.bytes.data)

    def _keep_sum(self, i: Any, g: Any, total: Any) -> None:
        """Keep what is needed of the sum of the integers of a group of x."""

    # -- quantisation --------------------------------------------------------------------------------------------------

    def _prepare(self, x: Any) -> None:
        """Every group of every row of x as int8, what a unit of it is worth, and what is kept of its sum."""
        from tvm.tirx.script.builder import ir as T

        w = self.w
        source = bf16.view(x, "uint16") if w.dtype == "bfloat16" else x
        whole, left = divmod(w.in_features, w.x_group)
        loop = T.parallel(w.rows, annotations=self.imports) if w.rows > 1 else T.serial(1)
        with loop as i, T.sblock("quantize"):
            T.reads()
            T.writes()
            with T.serial(whole) as g:
                self._quantize_group(source, i, g, w.x_group)
            if left:
                self._quantize_group(source, i, whole, left)

    def _quantize_group(self, source: Any, i: Any, g: Any, width: int) -> None:
        """Group ``g`` of row ``i``, ``width`` values of ``source`` (rows, in_features); zeros up to a whole word."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        lanes, first = self.lanes, g * self.w.x_group
        whole, left = divmod(width, lanes)
        ints = f"int32x{lanes}"

        def rounded(value: Any, factor: Any) -> Any:
            return tirx.Cast(ints, tirx.nearbyint(value * factor))

        values = []
        for k in range(whole):
            if source.dtype == "uint16":
                bits = source.vload([i, first + k * lanes], dtype=f"uint16x{lanes}")
                values.append(T.bind(bf16.from_bits(bits, lanes)))
            else:
                values.append(T.bind(self.v.load(source, [i, first + k * lanes])))
        if left:
            tail = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
            self.v.store(tail, [0], self.v.splat(0.0))
            with T.serial(left) as k:
                value = source[i, first + whole * lanes + k]
                T.buffer_store(tail, bf16.from_bits(value) if source.dtype == "uint16" else value, [k])
            values.append(T.bind(self.v.load(tail, [0])))
        top = self.v.splat(1e-30)
        for value in values:
            top = T.max(top, tirx.abs(value))
        # Through memory: TVM's simplifier writes a bound maximum out wherever it is used, each use of a use again, and
        # takes seconds for it.
        steps = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
        self.v.store(steps, [0], self.v.fold(top, T.max))
        factor = T.bind(self.v.splat(float(INT8_MAX)) / self.v.load(steps, [0]))
        total: Any = tirx.Broadcast(tirx.const(0, "int32"), lanes)
        for k, value in enumerate(values):
            whole_numbers = T.bind(rounded(value, factor))
            total = total + whole_numbers
            narrow = tirx.Cast(f"int8x{lanes}", whole_numbers)
            if k < whole:
                self.v.store(self.bytes, [i, first + k * lanes], narrow)
                continue
            last = T.sblock_alloc_buffer((lanes,), "int8", scope="local")
            self.v.store(last, [0], narrow)
            for lane in range(math.ceil(left / self.arithmetic.group) * self.arithmetic.group):
                T.buffer_store(self.bytes, last[lane], [i, first + whole * lanes + lane])
        sums = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
        self.v.store(sums, [0], self.v.fold(total, lambda a, b: a + b))
        T.buffer_store(self.step, steps[0] * tirx.const(1.0 / INT8_MAX, "float32"), [i, g])
        self._keep_sum(i, g, sums[0])


class Int8LinearKernel(QuantizedRowsKernel):
    """Quadruples of int8 weights (``vpdpbusd``)."""

    def _multiplied(self, operand: dict[str, Any]) -> None:
        from tvm.tirx.script.builder import ir as T

        super()._multiplied(operand)
        self.operand["weight"] = self._words(operand["weight"])
        self.start = T.sblock_alloc_buffer((self.w.rows, self.w.groups), "int32")

    def _keep_sum(self, i: Any, g: Any, total: Any) -> None:
        """What sums with unsigned weights start from."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        T.buffer_store(self.start, total * tirx.const(-INT8_OFFSET, "int32"), [i, g])

    # -- tiles ---------------------------------------------------------------------------------------------------------

    def _sums(self, row: Any, rows: int, panels: Panels) -> Callable[[int, int], Any]:
        """As of the base class: exact int32 sums within a group, scaled and added in float32."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        wide = panels.count * self.parts
        exact = T.sblock_alloc_buffer((self.chains, rows, wide, self.lanes), "int32", scope="local")
        total = T.sblock_alloc_buffer((rows, wide, self.lanes), "float32", scope="local")
        each = [(a, v) for a in range(rows) for v in range(wide)]

        def held(a: int, v: int) -> Any:
            return self.v.load(total, [a, v, 0])

        def group(g: Any, steps: int) -> None:
            sums = self._reduce(
                exact, row, panels, g * per_group, steps, lambda a: self.v.broadcast(self.start[row + a, g])
            )
            for a, v in each:
                scaled = tirx.Cast(self.v.dtype, sums(a, v)) * self.v.broadcast(self.step[row + a, g])
                self.v.store(total, [a, v, 0], held(a, v) + scaled)

        for a, v in each:
            self.v.store(total, [a, v, 0], self.v.splat(0.0))
        per_group = self.w.x_group // self.arithmetic.group
        whole, left = divmod(self.steps, per_group)
        if whole:
            with T.serial(whole) as g:
                group(g, per_group)
        if left:
            group(whole, left)
        return held

    def _scaled(self, value: Any, at: Any) -> Any:
        return value * self.v.load(self.operand["scale"], [at])


class GroupedBytesLinearKernel(QuantizedRowsKernel):
    """Quadruples of 4 or 8 bit weights; x and the weight share their groups."""

    def _multiplied(self, operand: dict[str, Any]) -> None:
        from tvm.tirx.script.builder import ir as T

        super()._multiplied(operand)
        #: Sums of x by group, once it is quantised.
        self.totals = T.sblock_alloc_buffer((self.w.rows, self.w.groups), "float32")

    def _prepare(self, x: Any) -> None:
        """Zeros, too, past the end of a row whose last group is short."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        if w.in_features % w.x_group:
            with T.serial(w.rows) as i, T.serial(w.x_group) as k:
                T.buffer_store(self.bytes, tirx.const(0, "int8"), [i, (w.groups - 1) * w.x_group + k])
        super()._prepare(x)

    def _keep_sum(self, i: Any, g: Any, total: Any) -> None:
        """What a minimum is multiplied by."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        T.buffer_store(self.totals, tirx.Cast("float32", total) * self.step[i, g], [i, g])

    def _sums(self, row: Any, rows: int, panels: Panels) -> Callable[[int, int], Any]:
        """As of the base class: exact int32 sums within a group, then scales and minima in float32."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        stored, w, lanes = self.arithmetic, self.w, self.lanes
        assert isinstance(stored, GroupedBytes), f"expected weights quantised by groups, got {w}"
        wide, words = panels.count * self.parts, w.x_group // stored.group
        exact = T.sblock_alloc_buffer((rows, wide, lanes), "int32", scope="local")
        total = T.sblock_alloc_buffer((rows, wide, lanes), "float32", scope="local")
        each = [(a, v) for a in range(rows) for v in range(wide)]
        weight, x = self.operand["weight"], self.operand["x"]

        def whole(a: int, v: int) -> Any:
            return exact.vload([a, v, 0], dtype=f"int32x{lanes}")

        def stored_scale(name: str, v: int, g: Any) -> Any:
            return T.bind(
                tirx.Cast(
                    self.v.dtype, self.operand[name].vload([self._part(panels, v), g, 0], dtype=f"float16x{lanes}")
                )
            )

        for a, v in each:
            self.v.store(total, [a, v, 0], self.v.splat(0.0))
        with T.serial(w.groups) as g:
            for a, v in each:
                self.v.store(exact, [a, v, 0], tirx.Broadcast(tirx.const(0, "int32"), lanes))
            for n in range(words):
                for v in range(wide):
                    at = [self._part(panels, v), g * words + n, 0]
                    if self.prefetch:
                        self.v.prefetch(weight, [at[0], at[1] + self.prefetch, 0], self.prefetch_level)
                    quadruples = stored.quadruples(T.bind(weight.vload(at, dtype=f"int32x{lanes}")), lanes)
                    for q, four in enumerate(map(T.bind, quadruples)):
                        for a in range(rows):
                            spread = self.v.broadcast(x[row + a, (g * words + n) * len(quadruples) + q])
                            self.v.store(exact, [a, v, 0], stored.multiply_add(whole(a, v), spread, four))
            for v in range(wide):
                scale, minimum = (stored_scale(name, v, g) for name in ("scale", "minimum"))
                for a in range(rows):
                    worth = scale * self.v.broadcast(self.step[row + a, g])
                    value = self.v.load(total, [a, v, 0]) + minimum * self.v.broadcast(self.totals[row + a, g])
                    self.v.store(total, [a, v, 0], value + tirx.Cast(self.v.dtype, whole(a, v)) * worth)
        return lambda a, v: self.v.load(total, [a, v, 0])
