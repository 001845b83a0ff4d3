"""The linear kernel of int8 weights: x quantised by groups as the kernel runs, exact sums within a group."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attntune.ops.linear import INT8_GROUP, INT8_MAX
from attntune.templates.cpu import bf16
from attntune.templates.cpu.arithmetic import INT8_OFFSET
from attntune.templates.cpu.linear_kernel import LinearKernel, Panels


class Int8LinearKernel(LinearKernel):
    """Quadruples of int8 (``vpdpbusd``); all cores share the rows that are quantised first."""

    def _multiplied(self, operand: dict[str, Any]) -> None:
        from tvm.tirx.script.builder import ir as T

        w = self.w
        self.operand["weight"] = self._words(operand["weight"])
        self.bytes = T.sblock_alloc_buffer((w.rows, self.steps * self.arithmetic.group), "int8")
        self.step = T.sblock_alloc_buffer((w.rows, w.groups), "float32")
        self.start = T.sblock_alloc_buffer((w.rows, w.groups), "int32")
        self.operand["x"] = T.decl_buffer((w.rows, self.steps), self.arithmetic.word, data=self.bytes.data)

    # -- quantisation --------------------------------------------------------------------------------------------------

    def _prepare(self, x: Any) -> None:
        """Every group of every row of x as int8, what a unit of it is worth, and what its sums start from."""
        from tvm.tirx.script.builder import ir as T

        w = self.w
        source = bf16.view(x, "uint16") if w.dtype == "bfloat16" else x
        whole, left = divmod(w.in_features, INT8_GROUP)
        loop = T.parallel(w.rows, annotations=self.imports) if w.rows > 1 else T.serial(1)
        with loop as i, T.sblock("quantize"):
            T.reads()
            T.writes()
            with T.serial(whole) as g:
                self._quantize_group(source, i, g, INT8_GROUP)
            if left:
                self._quantize_group(source, i, whole, left)

    def _quantize_group(self, source: Any, i: Any, g: Any, width: int) -> None:
        """Group ``g`` of row ``i``, ``width`` values of ``source`` (rows, in_features); zeros up to a whole word."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        lanes, first = self.lanes, g * INT8_GROUP
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
        T.buffer_store(self.start, sums[0] * tirx.const(-INT8_OFFSET, "int32"), [i, g])
        T.buffer_store(self.step, steps[0] * tirx.const(1.0 / INT8_MAX, "float32"), [i, g])

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
        per_group = INT8_GROUP // self.arithmetic.group
        whole, left = divmod(self.steps, per_group)
        if whole:
            with T.serial(whole) as g:
                group(g, per_group)
        if left:
            group(whole, left)
        return held

    def _scaled(self, value: Any, at: Any) -> Any:
        return value * self.v.load(self.operand["scale"], [at])
