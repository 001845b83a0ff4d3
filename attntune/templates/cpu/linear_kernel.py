"""The linear kernel, written out in TIR; see :mod:`attntune.templates.cpu.linear` for its loop nest and its knobs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attntune.ops.grouped import WEIGHT_GROUP
from attntune.ops.linear import INT8_GROUP, INT8_MAX, Linear
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu import bf16
from attntune.templates.cpu.arithmetic import INT8_OFFSET, Arithmetic, Float32, Grouped
from attntune.templates.cpu.tasks import share_out
from attntune.templates.cpu.vectors import PREFETCH_IR, Vectors, chained

#: Up to so many rows, sums by group are not worth a parallel loop.
_SHARED_ROWS = 16


@dataclass(frozen=True)
class Panels:
    """The panels of one tile: every ``gap``-th from ``first`` on."""

    first: Any
    gap: int
    count: int

    def at(self, v: Any) -> Any:
        """The ``v``-th."""
        return self.first + v * self.gap


def reduction_steps(w: Linear, arithmetic: Arithmetic) -> int:
    """Vectors of a panel: of whole groups where the weight is quantised by them."""
    if w.grouped:
        return w.weight_groups * (WEIGHT_GROUP // arithmetic.group)
    return math.ceil(w.in_features / arithmetic.group)


class LinearKernel:
    """One linear kernel being written out, for any :class:`Arithmetic`.

    A gated tile holds twice as many accumulators: a panel of the gate, and the same columns of what it multiplies.
    """

    def __init__(self, w: Linear, target: Target, config: Config, arithmetic: Arithmetic) -> None:
        self.w = w
        self.arithmetic = arithmetic
        self.v = Vectors(target.lanes("float32"))
        self.lanes = self.v.lanes
        self.cores = target.cores
        self.rows = config.integer("tile_rows")
        self.vectors = config.integer("tile_vectors")
        self.unroll = config.integer("k_unroll")
        self.row_block = config.integer("row_block")
        self.chains = config.integer("chains")
        self.prefetch = int(config.get("prefetch", 0))
        self.apart = bool(config.get("apart", False))
        self.parts = 2 if w.gated else 1
        self.panels = math.ceil(w.out_features / self.lanes)
        self.steps = reduction_steps(w, arithmetic)
        self.widen = bool(config.get("widen", False))
        self.unpack = self.widen or bool(config.get("unpack", False))
        self.narrow = w.out_features % self.lanes
        # Unrolled over a whole tile, a polynomial's constants and temporaries push accumulators out of registers in the
        # inner loop, at half the speed; so under an activation the tile goes through the first-level cache.
        self.staged = w.activation not in ("", "relu") or bool(self.narrow)
        dtypes = {spec.dtype for spec in (*w.inputs(), *w.outputs())}
        code = (bf16.LLVM_IR if "bfloat16" in dtypes else "") + (PREFETCH_IR if self.prefetch else "")
        self.imports = {"pragma_import_llvm": code} if code else {}

    def function(self) -> Any:
        """``main(x, weight, …, y)``, constant operands packed as the template says."""
        from tvm.script.ir_builder import IRBuilder
        from tvm.tirx.script.builder import ir as T

        w, lanes, group = self.w, self.lanes, self.arithmetic.group
        columns = self.panels * self.parts * lanes
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            shapes = {spec.name: (spec.shape, spec.dtype) for spec in (*w.inputs(), *w.outputs())}
            stored = {"int8": "uint8"}.get(w.weight_dtype, w.dtype)
            shapes["weight"] = ((self.panels * self.parts, self.steps, lanes * group), stored)
            if w.grouped:
                shapes["weight"] = ((self.panels * self.parts, self.steps, lanes), "int32")
            for name in {"bias", "scale", "minimum"} & set(shapes):
                by_group = (self.panels * self.parts, w.weight_groups, lanes)
                shapes[name] = (by_group, "float16") if w.grouped and name != "bias" else ((columns,), "float32")
            operand = {name: T.arg(name, T.buffer(*shape)) for name, shape in shapes.items()}
            with T.sblock("root"):
                self._views(operand)
                if w.quantized:
                    self._quantize(operand["x"])
                if self.widen:
                    self._widen(operand["x"])
                elif w.grouped and not self.unpack:
                    self._sum_groups(operand["x"])
                self._tiles()
        return builder.get()

    def _views(self, operand: dict[str, Any]) -> None:
        """Every operand as the dtype it is read or written in; see :mod:`attntune.templates.cpu.bf16`."""
        from tvm.tirx.script.builder import ir as T

        w, word = self.w, self.arithmetic.word
        self.operand = dict(operand)
        for name in {"residual", "y"} & set(operand):
            if operand[name].dtype == "bfloat16":
                self.operand[name] = bf16.view(operand[name], "uint16")
        if word == "int32" and not w.grouped:
            shape = (self.panels * self.parts, self.steps, self.lanes)
            self.operand["weight"] = T.decl_buffer(shape, word, data=operand["weight"].data)
        if w.quantized:
            width = self.steps * self.arithmetic.group
            self.bytes = T.sblock_alloc_buffer((w.rows, width), "int8")
            self.step = T.sblock_alloc_buffer((w.rows, w.groups), "float32")
            self.start = T.sblock_alloc_buffer((w.rows, w.groups), "int32")
            self.operand["x"] = T.decl_buffer((w.rows, self.steps), word, data=self.bytes.data)
        elif self.widen:
            # A vector more than a row has: rows a multiple of 4 KiB apart would fight for the same lines of the cache.
            self.operand["x"] = T.sblock_alloc_buffer((w.rows, w.in_features + self.lanes), "float32")
        elif w.dtype == "bfloat16":
            self.operand["x"] = bf16.view(operand["x"], "int32")

    # -- bfloat16 as float32 -------------------------------------------------------------------------------------------

    def _widen(self, x: Any) -> None:
        """Every element of x as float32."""
        from tvm.tirx.script.builder import ir as T

        bits, wide = bf16.view(x, "uint16"), self.operand["x"]
        whole, left = divmod(self.w.in_features, self.lanes)

        def row(i: Any) -> None:
            with T.serial(whole) as n:
                at = [i, n * self.lanes]
                self.v.store(wide, at, bf16.from_bits(bits.vload(at, dtype=f"uint16x{self.lanes}"), self.lanes))
            if left:
                with T.serial(left) as k:
                    at = [i, whole * self.lanes + k]
                    T.buffer_store(wide, bf16.from_bits(bits[tuple(at)]), at)

        with T.parallel(self.w.rows, annotations=self.imports) as i, T.sblock("widen"):
            T.reads()
            T.writes()
            row(i)

    def _widened_panels(self, panels: Panels) -> Any:
        """A column's panels in float32: (panels, in_features, lanes)."""
        from tvm.tirx.script.builder import ir as T

        wide = panels.count * self.parts
        floats = T.sblock_alloc_buffer((wide, self.w.in_features, self.lanes), "float32")
        for v in range(wide):

            def step(n: Any, _: int, v: int = v) -> None:
                pairs = self.operand["weight"].vload([self._part(panels, v), n, 0], dtype=f"int32x{self.lanes}")
                low, high = bf16.from_pairs(T.bind(pairs), self.lanes)
                self.v.store(floats, [v, n * 2, 0], low)
                self.v.store(floats, [v, n * 2 + 1, 0], high)

            chained(self.steps, 4, 1, step)
        return floats

    # -- quantisation --------------------------------------------------------------------------------------------------

    def _quantize(self, x: Any) -> None:
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

    # -- weights quantised by groups -----------------------------------------------------------------------------------

    def _sum_groups(self, x: Any) -> None:
        """The sum of the elements of x (rows, in_features) by group of the weight: buffer ``totals`` (rows, groups)."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, lanes = self.w, self.lanes
        self.totals = T.sblock_alloc_buffer((w.rows, w.weight_groups), "float32")
        whole, left = divmod(w.in_features, WEIGHT_GROUP)
        parts = max(1, WEIGHT_GROUP // lanes)
        with T.parallel(w.rows) if w.rows > _SHARED_ROWS else T.serial(w.rows) as i, T.sblock("totals"):
            T.reads()
            T.writes()
            one = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
            with T.serial(whole) as g:
                value = self.v.load(x, [i, g * WEIGHT_GROUP])
                for part in range(1, parts):
                    value = value + self.v.load(x, [i, g * WEIGHT_GROUP + part * lanes])
                self.v.store(one, [0], self.v.fold(value, lambda a, b: a + b))
                T.buffer_store(self.totals, one[0], [i, g])
            if left:
                T.buffer_store(self.totals, tirx.const(0.0, "float32"), [i, whole])
                with T.serial(left) as k:
                    T.buffer_store(self.totals, self.totals[i, whole] + x[i, whole * WEIGHT_GROUP + k], [i, whole])

    def _scales(self, part: Any, g: Any) -> tuple[Any, Any]:
        """What 2**bits steps of group ``g`` are worth in a panel, and its minimum; vectors of float32."""
        from tvm import tirx

        assert isinstance(self.arithmetic, Grouped)

        def wide(name: str) -> Any:
            return tirx.Cast(self.v.dtype, self.operand[name].vload([part, g, 0], dtype=f"float16x{self.lanes}"))

        return wide("scale") * self.v.splat(float(1 << self.arithmetic.bits)), wide("minimum")

    def _group(self, first: Any, count: int, panels: Panels, element: Callable[[int, Any, Any], None]) -> None:
        """``element(v, k, value)`` for ``count`` elements of every panel from ``first`` on, value 1 + q / 2**bits."""
        arithmetic, weight = self.arithmetic, self.operand["weight"]
        assert isinstance(arithmetic, Grouped)

        def word(n: Any, elements: int) -> None:
            for v in range(panels.count * self.parts):
                words = weight.vload(
                    [self._part(panels, v), first // arithmetic.group + n, 0], dtype=f"int32x{self.lanes}"
                )
                for j in range(elements):
                    element(v, first + n * arithmetic.group + j, arithmetic.unpacked(words, j, self.lanes))

        whole, left = divmod(count, arithmetic.group)
        chained(whole, self.unroll, 1, lambda n, c: word(n, arithmetic.group))
        if left:
            word(whole, left)

    def _groups(self, body: Callable[[Any, int], None]) -> None:
        """``body(g, count)`` for every group; the last may have fewer elements."""
        from tvm.tirx.script.builder import ir as T

        whole, left = divmod(self.w.in_features, WEIGHT_GROUP)
        if whole:
            with T.serial(whole) as g:
                body(g, WEIGHT_GROUP)
        if left:
            body(whole, left)

    def _unpacked(self, panels: Panels) -> Any:
        """A column's panels in float32: (panels, in_features, lanes)."""
        from tvm.tirx.script.builder import ir as T

        wide = panels.count * self.parts
        floats = T.sblock_alloc_buffer((wide, self.w.in_features, self.lanes), "float32")

        def group(g: Any, count: int) -> None:
            scales = [tuple(map(T.bind, self._scales(self._part(panels, v), g))) for v in range(wide)]

            def element(v: int, k: Any, value: Any) -> None:
                scale, minimum = scales[v]
                self.v.store(floats, [v, k, 0], (value - self.v.splat(1.0)) * scale + minimum)

            self._group(g * WEIGHT_GROUP, count, panels, element)

        self._groups(group)
        return floats

    def _sums_of_groups(self, row: Any, rows: int, panels: Panels) -> Callable[[int, int], Any]:
        """The sums of a tile with a weight that is unpacked as it is multiplied.

        A group's sum of (1 + q / 2**bits) · x begins with minus the sum of x, which leaves that of q / 2**bits · x.
        """
        from tvm.tirx.script.builder import ir as T

        wide, x = panels.count * self.parts, self.operand["x"]
        acc = T.sblock_alloc_buffer((rows, wide, self.lanes), "float32", scope="local")
        total = T.sblock_alloc_buffer((rows, wide, self.lanes), "float32", scope="local")
        each = [(a, v) for a in range(rows) for v in range(wide)]

        def group(g: Any, count: int) -> None:
            for a, v in each:
                self.v.store(acc, [a, v, 0], self.v.splat(0.0) - self.v.broadcast(self.totals[row + a, g]))

            def element(v: int, k: Any, value: Any) -> None:
                for a in range(rows):
                    spread = self.v.broadcast(x[row + a, k])
                    self.v.store(acc, [a, v, 0], self.v.load(acc, [a, v, 0]) + spread * value)

            self._group(g * WEIGHT_GROUP, count, panels, element)
            for v in range(wide):
                scale, minimum = map(T.bind, self._scales(self._part(panels, v), g))
                for a in range(rows):
                    added = self.v.load(acc, [a, v, 0]) * scale + minimum * self.v.broadcast(self.totals[row + a, g])
                    self.v.store(total, [a, v, 0], self.v.load(total, [a, v, 0]) + added)

        for a, v in each:
            self.v.store(total, [a, v, 0], self.v.splat(0.0))
        self._groups(group)
        return lambda a, v: self.v.load(total, [a, v, 0])

    # -- tiles ---------------------------------------------------------------------------------------------------------

    def _tiles(self) -> None:
        """All row blocks and columns of tiles, in parallel; the last of either may be smaller."""
        height = self.row_block or self.w.rows
        blocks, last_height = divmod(self.w.rows, height)
        columns, last_vectors = divmod(self.panels, self.vectors)
        in_block = columns + bool(last_vectors)
        tasks = (blocks + bool(last_height)) * in_block

        def column_of_tiles(task: Any) -> None:
            block, column = task // in_block, task % in_block

            def in_column(vectors: int) -> None:
                first_row, spread = block * height, self.apart and vectors == self.vectors
                panels = Panels(column if spread else column * self.vectors, columns if spread else 1, vectors)
                _either(block, blocks, last_height, lambda: self._column(first_row, height, panels),
                        lambda: self._column(first_row, last_height, panels))  # fmt: skip

            _either(column, columns, last_vectors, lambda: in_column(self.vectors), lambda: in_column(last_vectors))

        share_out(tasks, self.cores, column_of_tiles, self.imports)

    def _column(self, first_row: Any, rows: int, panels: Panels) -> None:
        from tvm.tirx.script.builder import ir as T

        if self.unpack:
            self.floats = self._widened_panels(panels) if self.widen else self._unpacked(panels)
        if self.w.seq:
            with T.serial(rows // self.w.seq) as b:
                self._tiles_of(b * self.w.seq, self.w.seq, panels, self.operand["lengths"][b])
        else:
            self._tiles_of(first_row, rows, panels, None)

    def _tiles_of(self, first_row: Any, rows: int, panels: Panels, length: Any | None) -> None:
        """``rows`` rows; with ``length``, only so many are computed, and the rest is zero."""
        from tvm.tirx.script.builder import ir as T

        def tile(start: Any, height: int) -> None:
            if length is None:
                self._tile(first_row + start, height, panels, None)
                return
            with T.If(start < length):
                with T.Then():
                    self._tile(first_row + start, height, panels, length - start)
                with T.Else():
                    self._zeros(first_row + start, height, panels)

        tiles, tail = divmod(rows, self.rows)
        if tiles:
            with T.serial(tiles) as t:
                tile(t * self.rows, self.rows)
        if tail:
            tile(tiles * self.rows, tail)

    def _zeros(self, row: Any, rows: int, panels: Panels) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        y = self.operand["y"]
        zero = tirx.const(0, y.dtype)
        for a in range(rows):
            for v in range(panels.count):
                first = panels.at(v) * self.lanes
                if not self.narrow:
                    self.v.store(y, [row + a, first], tirx.Broadcast(zero, self.lanes))
                    continue
                with T.serial(self.lanes) as lane, T.If(first + lane < self.w.out_features), T.Then():
                    T.buffer_store(y, zero, [row + a, first + lane])

    def _tile(self, row: Any, rows: int, panels: Panels, valid: Any | None) -> None:
        """``rows`` × ``panels.count`` sums; ``valid``: of so many rows at most; the others become zero."""
        sums = self._sums
        if self.w.quantized:
            sums = self._sums_by_group
        elif self.w.grouped and not self.unpack:
            sums = self._sums_of_groups
        write = self._through_memory if self.staged else self._from_registers
        write(sums(row, rows, panels), row, rows, panels, valid)

    def _sums(self, row: Any, rows: int, panels: Panels) -> Callable[[int, int], Any]:
        """The sums of a tile, by row and panel; vectors of float32."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        kind = self.arithmetic.accumulator
        zero = tirx.Broadcast(tirx.const(0, kind), self.lanes)
        acc = T.sblock_alloc_buffer((self.chains, rows, panels.count * self.parts, self.lanes), kind, scope="local")
        steps = self.w.in_features if self.unpack else self.steps
        return self._reduce(acc, row, panels, 0, steps, lambda a: zero)

    def _sums_by_group(self, row: Any, rows: int, panels: Panels) -> Callable[[int, int], Any]:
        """The same of quantised x: exact int32 sums within a group, scaled and added in float32."""
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

    def _reduce(
        self, acc: Any, row: Any, panels: Panels, first: Any, steps: int, start: Callable[[int], Any]
    ) -> Callable[[int, int], Any]:
        """``steps`` reduction steps from ``first`` on, into ``acc`` (chains, rows, panels, lanes).

        The sums of row ``a`` begin with ``start(a)``; ``chains`` copies hide the latency of an addition.
        """
        from tvm import tirx

        chains, rows, wide, _ = (int(extent) for extent in acc.shape)
        x, weight, kind = self.operand["x"], self.operand["weight"], acc.dtype
        multiply_add = (Float32() if self.unpack else self.arithmetic).multiply_add
        zero = tirx.Broadcast(tirx.const(0, kind), self.lanes)
        each = [(a, v) for a in range(rows) for v in range(wide)]

        def held(c: int, a: int, v: int) -> Any:
            return acc.vload([c, a, v, 0], dtype=f"{kind}x{self.lanes}")

        for c in range(chains):
            for a, v in each:
                self.v.store(acc, [c, a, v, 0], zero if c else start(a))

        def step(n: Any, c: int) -> None:
            k = first + n
            if self.unpack:
                loaded = [self.v.load(self.floats, [v, k, 0]) for v in range(wide)]
            else:
                loaded = [weight.vload([self._part(panels, v), k, 0], dtype=f"{self.arithmetic.word}x{self.lanes}")
                          for v in range(wide)]  # fmt: skip
            if self.prefetch:
                for v in range(wide):
                    if self.unpack:
                        self.v.prefetch(self.floats, [v, k + self.prefetch, 0])
                    else:
                        self.v.prefetch(weight, [self._part(panels, v), k + self.prefetch, 0])
            for a, v in each:
                spread = self.v.broadcast(x[row + a, k])
                self.v.store(acc, [c, a, v, 0], multiply_add(held(c, a, v), spread, loaded[v]))

        chained(steps, self.unroll, chains, step)
        for c in range(1, chains):
            for a, v in each:
                self.v.store(acc, [0, a, v, 0], held(0, a, v) + held(c, a, v))
        return lambda a, v: held(0, a, v)

    def _part(self, panels: Panels, v: Any) -> Any:
        """Which of the weight's panels ``v`` is, counted over those of both parts."""
        return panels.at(v // self.parts) * self.parts + v % self.parts

    # -- epilogue ------------------------------------------------------------------------------------------------------

    def _value(self, held: Callable[[int, int], Any], a: int, panels: Panels, v: int) -> Any:
        """A vector of sums with its bias; ``v`` counts the panels of both parts."""
        at = self._part(panels, v) * self.lanes
        value = held(a, v)
        if self.w.quantized:
            value = value * self.v.load(self.operand["scale"], [at])
        return value + self.v.load(self.operand["bias"], [at]) if self.w.bias else value

    def _from_registers(
        self, held: Callable[[int, int], Any], row: Any, rows: int, panels: Panels, valid: Any | None
    ) -> None:
        from tvm.tirx.script.builder import ir as T

        for a in range(rows):
            for v in range(panels.count):
                value = self._value(held, a, panels, v * self.parts)
                if self.w.activation:
                    value = T.max(value, self.v.splat(0.0))
                if self.w.gated:
                    value = value * self._value(held, a, panels, v * 2 + 1)
                self._write(row + a, panels.at(v) * self.lanes, value, None if valid is None else a < valid)

    def _through_memory(
        self, held: Callable[[int, int], Any], row: Any, rows: int, panels: Panels, valid: Any | None
    ) -> None:
        from tvm.tirx.script.builder import ir as T

        stage = T.sblock_alloc_buffer((rows, panels.count * self.parts, self.lanes), "float32")
        for a in range(rows):
            for v in range(panels.count * self.parts):
                self.v.store(stage, [a, v, 0], self._value(held, a, panels, v))
        self._finish(stage, row, rows, panels, valid)

    def _finish(self, stage: Any, row: Any, rows: int, panels: Panels, valid: Any | None) -> None:
        """``stage`` (rows, panels of both parts, lanes), sums with their bias, to y."""
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        w, lanes = self.w, self.lanes
        with T.serial(rows) as a, T.unroll(panels.count) as v:
            at, inside = v * self.parts, None if valid is None else a < valid
            if w.activation:
                with T.vectorized(lanes) as lane:
                    T.buffer_store(stage, getattr(tmath, w.activation)(stage[a, at, lane]), [a, at, lane])
            value = self.v.load(stage, [a, at, 0])
            if w.gated:
                value = value * self.v.load(stage, [a, at + 1, 0])
            if not self.narrow:
                self._write(row + a, panels.at(v) * lanes, value, inside)
                return
            with T.If(panels.at(v) < self.panels - 1):
                with T.Then():
                    self._write(row + a, panels.at(v) * lanes, value, inside)
                with T.Else():
                    self.v.store(stage, [a, at, 0], value)
                    with T.serial(self.narrow) as lane:
                        self._write_one(row + a, panels.at(v) * lanes + lane, stage[a, at, lane], inside)

    def _write(self, i: Any, column: Any, value: Any, inside: Any | None) -> None:
        """One vector of y; zero unless ``inside``."""
        from tvm import tirx

        y = self.operand["y"]
        if self.w.residual:
            residual = self.operand["residual"]
            if residual.dtype == "uint16":
                value = value + bf16.from_bits(residual.vload([i, column], dtype=f"uint16x{self.lanes}"), self.lanes)
            else:
                value = value + self.v.load(residual, [i, column])
        if inside is not None:
            value = tirx.Select(inside, value, self.v.splat(0.0))
        self.v.store(y, [i, column], bf16.round_to_bits(value) if y.dtype == "uint16" else value)

    def _write_one(self, i: Any, column: Any, value: Any, inside: Any | None) -> None:
        """One element of y, of the last panel's few; zero unless ``inside``."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        y = self.operand["y"]
        if self.w.residual:
            residual = self.operand["residual"][i, column]
            value = value + (bf16.from_bits(residual) if residual.ty.dtype == "uint16" else residual)
        if inside is not None:
            value = tirx.Select(inside, value, tirx.const(0.0, "float32"))
        if y.dtype == "uint16":
            bits = T.sblock_alloc_buffer((self.lanes,), "uint16", scope="local")
            self.v.store(bits, [0], bf16.round_to_bits(tirx.Broadcast(value, self.lanes)))
            value = bits[0]
        T.buffer_store(y, value, [i, column])


def _either(index: Any, whole: int, last: int, body: Any, tail: Any) -> None:
    """``body`` for every index below ``whole``, ``tail`` for the one after them, if ``last`` says there is one."""
    from tvm.tirx.script.builder import ir as T

    if not last:
        body()
    elif not whole:
        tail()
    else:
        with T.If(index < whole):
            with T.Then():
                body()
            with T.Else():
                tail()
