"""Linear kernels of x quantised by groups as the kernel runs, exact sums within a group; weights of 4 and 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from attntune.ops.int8 import INT8_MAX
from attntune.ops.linear import Linear
from attntune.ops.workload import TensorSpec
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu import bf16
from attntune.templates.cpu.arithmetic import INT8_OFFSET, Arithmetic, GroupedBytes, Int8
from attntune.templates.cpu.linear_kernel import LinearKernel, Panels
from attntune.templates.cpu.vectors import chained

#: Products of so many instructions are written out for a whole group; longer ones are looped over, or LLVM takes all
#: of a group's weights first, which 16 registers do not hold. (512×576→960, 8 bits, tiles of 4×2, Zen 3, GFLOP/s: 176,
#: 193.)
_WRITTEN_OUT = 2
_LOCAL = {"scope": "local"}


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
    """Quadruples of int8 weights."""

    def _multiplied(self, operand: dict[str, Any]) -> None:
        from tvm.tirx.script.builder import ir as T

        super()._multiplied(operand)
        self.operand["weight"] = self._words(operand["weight"])
        assert isinstance(self.arithmetic, Int8), f"expected an int8 weight, got {self.w}"
        #: What is left in a sum, for each unit of x, of what made weights unsigned.
        self.excess = INT8_OFFSET - self.arithmetic.product.offset
        if self.excess:
            self.start = T.sblock_alloc_buffer((self.w.rows, self.w.groups), "int32")

    def _keep_sum(self, i: Any, g: Any, total: Any) -> None:
        """What sums start from."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        if self.excess:
            T.buffer_store(self.start, total * tirx.const(-self.excess, "int32"), [i, g])

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

        def first(i: Any, g: Any) -> Any:
            return self.v.broadcast(self.start[i, g] if self.excess else tirx.const(0, "int32"))

        def group(g: Any, steps: int) -> None:
            sums = self._reduce(exact, row, panels, g * per_group, steps, lambda a: first(row + a, g))
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

    def __init__(
        self, w: Linear, target: Target, config: Config, arithmetic: Arithmetic, packed: Mapping[str, TensorSpec]
    ) -> None:
        super().__init__(w, target, config, arithmetic, packed)
        assert isinstance(arithmetic, GroupedBytes), f"expected weights quantised by groups, got {w}"
        self.stored = arithmetic
        self.product = arithmetic.product
        self.words = w.x_group // arithmetic.group
        self.row_loop = bool(config["row_loop"])

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
        """As of the base class: exact sums within a group, then scales and minima in float32."""
        from tvm.tirx.script.builder import ir as T

        wide = panels.count * self.parts
        assert self.w.x_group // 4 <= self.product.most, f"expected groups of at most {4 * self.product.most} values"
        total = T.sblock_alloc_buffer((rows, wide, self.lanes), "float32", **({} if self.row_loop else _LOCAL))

        def held(a: Any, v: int) -> Any:
            return self.v.load(total, [a, v, 0])

        def clear(a: Any) -> None:
            for v in range(wide):
                self.v.store(total, [a, v, 0], self.v.splat(0.0))

        def add(a: Any, v: int, g: Any, sums: Any, scale: Any, minimum: Any) -> None:
            """A group's sums of integers, in the units of y."""
            from tvm import tirx

            worth = scale * self.v.broadcast(self.step[row + a, g])
            value = held(a, v) + minimum * self.v.broadcast(self.totals[row + a, g])
            self.v.store(total, [a, v, 0], value + tirx.Cast(self.v.dtype, self.product.total(sums)) * worth)

        if self.row_loop:
            with T.serial(rows) as a:
                clear(a)
            with T.serial(self.w.groups) as g:
                for v in range(wide):
                    self._rows_of_group(g, row, rows, panels, v, add)
            return held
        for a in range(rows):
            clear(a)
        with T.serial(self.w.groups) as g:
            self._tile_of_group(g, row, rows, panels, add)
        return held

    def _rows_of_group(self, g: Any, row: Any, rows: int, panels: Panels, v: int, add: Callable[..., None]) -> None:
        """One row after another, times a panel's weights of a group, which are unpacked once and stay in registers."""
        from tvm.tirx.script.builder import ir as T

        words = range(self.words)
        fours = [T.bind(four) for n in words for four in self._quadruples(panels, v, g, n)]
        scale, minimum = self._units(panels, v, g)

        def one(a: Any, _: int) -> None:
            sums = self._no_sums()
            for q, four in enumerate(fours):
                spread = self.v.broadcast(self.operand["x"][row + a, g * len(fours) + q])
                sums = T.bind(self.arithmetic.multiply_add(sums, spread, four))
            add(a, v, g, sums, scale, minimum)

        chained(rows, 2, 1, one)

    def _tile_of_group(self, g: Any, row: Any, rows: int, panels: Panels, add: Callable[..., None]) -> None:
        """All rows of a tile side by side."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        kind, width = self.product.sums.split("x")
        wide, sums_of = panels.count * self.parts, tirx.Ramp(0, 1, int(width))
        exact = T.sblock_alloc_buffer((rows, wide, int(width)), kind, **_LOCAL)

        def sums(a: int, v: int) -> Any:
            return exact.vload([a, v, 0], dtype=self.product.sums)

        def word(n: Any) -> None:
            for v in range(wide):
                quadruples = self._quadruples(panels, v, g, n)
                for q, four in enumerate(map(T.bind, quadruples)):
                    for a in range(rows):
                        at = (g * self.words + n) * len(quadruples) + q
                        spread = self.v.broadcast(self.operand["x"][row + a, at])
                        added = self.arithmetic.multiply_add(sums(a, v), spread, four)
                        T.buffer_store(exact, added, [a, v, sums_of])

        for a in range(rows):
            for v in range(wide):
                T.buffer_store(exact, self._no_sums(), [a, v, sums_of])
        if self.product.instructions > _WRITTEN_OUT:
            with T.serial(self.words) as n:
                word(n)
        else:
            for n in range(self.words):
                word(n)
        for v in range(wide):
            scale, minimum = self._units(panels, v, g)
            for a in range(rows):
                add(a, v, g, sums(a, v), scale, minimum)

    def _no_sums(self) -> Any:
        from tvm import tirx

        kind, width = self.product.sums.split("x")
        return tirx.Broadcast(tirx.const(0, kind), int(width))

    def _quadruples(self, panels: Panels, v: int, g: Any, n: Any) -> list[Any]:
        """Vectors of four bytes a lane: word ``n`` of group ``g`` of a panel, unpacked."""
        from tvm.tirx.script.builder import ir as T

        weight, at = self.operand["weight"], [self._part(panels, v), g * self.words + n, 0]
        if self.prefetch:
            self.v.prefetch(weight, [at[0], at[1] + self.prefetch, 0], self.prefetch_level)
        return self.stored.quadruples(T.bind(weight.vload(at, dtype=self.product.words)), self.lanes)

    def _units(self, panels: Panels, v: int, g: Any) -> tuple[Any, Any]:
        """What a unit of the weights of group ``g`` is worth in a panel, and what every weight is at least."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        at, narrow = [self._part(panels, v), g, 0], f"float16x{self.lanes}"
        scale, minimum = (
            T.bind(tirx.Cast(self.v.dtype, self.operand[name].vload(at, dtype=narrow))) for name in ("scale", "minimum")
        )
        if self.product.offset:
            minimum = T.bind(minimum + scale * self.v.splat(float(self.product.offset)))
        return scale, minimum
