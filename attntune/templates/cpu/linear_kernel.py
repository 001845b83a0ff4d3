"""The linear kernel, written out in TIR; see :mod:`attntune.templates.cpu.linear` for its loop nest and its knobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from attntune.ops.linear import Linear
from attntune.ops.workload import TensorSpec
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu import bf16
from attntune.templates.cpu.arithmetic import Arithmetic
from attntune.templates.cpu.tasks import share_out
from attntune.templates.cpu.vectors import PREFETCH_IR, Vectors, chained

#: Up to so many rows a product may run at the memory's speed.
FEW_ROWS = 16


@dataclass(frozen=True)
class Panels:
    """The panels of one tile: every ``gap``-th from ``first`` on."""

    first: Any
    gap: int
    count: int

    def at(self, v: Any) -> Any:
        """The ``v``-th."""
        return self.first + v * self.gap


class LinearKernel:
    """One linear kernel being written out: float32, or pairs of bfloat16; what other weights take derives from it.

    A gated tile holds twice as many accumulators: a panel of the gate, and the same columns of what it multiplies.

    Args:
        w: the layer.
        target: the machine.
        config: of the template's space.
        arithmetic: how the stored weight is multiplied.
        packed: constant operands as the template packs them.
    """

    def __init__(
        self, w: Linear, target: Target, config: Config, arithmetic: Arithmetic, packed: Mapping[str, TensorSpec]
    ) -> None:
        self.w = w
        self.arithmetic = arithmetic
        self.packed = packed
        self.v = Vectors(target.lanes("float32"))
        self.lanes = self.v.lanes
        self.cores = target.cores
        self.rows = config.integer("tile_rows")
        self.vectors = config.integer("tile_vectors")
        self.unroll = config.integer("k_unroll")
        self.row_block = config.integer("row_block")
        self.chains = config.integer("chains")
        self.prefetch = config.integer("prefetch")
        self.prefetch_level = 2 if w.rows <= FEW_ROWS else 1
        self.apart = bool(config.get("apart", False))
        self.parts = 2 if w.gated else 1
        self.panels = math.ceil(w.out_features / self.lanes)
        self.steps = arithmetic.steps(w)
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

        w = self.w
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            stored = {spec.name: self.packed.get(spec.name, spec) for spec in (*w.inputs(), *w.outputs())}
            operand = {name: T.arg(name, T.buffer(spec.shape, spec.dtype)) for name, spec in stored.items()}
            with T.sblock("root"):
                self._views(operand)
                self._prepare(operand["x"])
                self._tiles()
        return builder.get()

    def _views(self, operand: dict[str, Any]) -> None:
        """Every operand as the dtype it is read or written in; see :mod:`attntune.templates.cpu.bf16`."""
        self.operand = dict(operand)
        for name in ("residual", "y"):
            if name in operand and operand[name].dtype == "bfloat16":
                self.operand[name] = bf16.view(operand[name], "uint16")
        self._multiplied(operand)

    def _multiplied(self, operand: dict[str, Any]) -> None:
        """Views of what is multiplied, ``x`` and ``weight``."""
        if self.arithmetic.word == "int32":
            self.operand["weight"] = self._words(operand["weight"])
            self.operand["x"] = bf16.view(operand["x"], "int32")

    def _words(self, weight: Any) -> Any:
        """The packed weight as vectors of 32-bit words, each with a group."""
        from tvm.tirx.script.builder import ir as T

        columns, steps, _ = weight.shape
        return T.decl_buffer((columns, steps, self.lanes), "int32", data=weight.data)

    def _prepare(self, x: Any) -> None:
        """What is made of ``x`` (rows, in_features) before its tiles are multiplied."""

    def _prepare_column(self, panels: Panels) -> None:
        """What is made of a column's panels before its tiles are multiplied."""

    def _prepare_tiles(self, rows: int, panels: Panels) -> None:
        """What goes before tiles of so many rows."""

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

        self._prepare_column(panels)
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
            self._prepare_tiles(self.rows, panels)
            with T.serial(tiles) as t:
                tile(t * self.rows, self.rows)
        if tail:
            self._prepare_tiles(tail, panels)
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
        write = self._through_memory if self.staged else self._from_registers
        write(self._sums(row, rows, panels), row, rows, panels, valid)

    def _sums(self, row: Any, rows: int, panels: Panels) -> Callable[[int, int], Any]:
        """The sums of a tile, by row and panel; vectors of float32."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        kind = self.arithmetic.accumulator
        zero = tirx.Broadcast(tirx.const(0, kind), self.lanes)
        acc = T.sblock_alloc_buffer((self.chains, rows, panels.count * self.parts, self.lanes), kind, scope="local")
        return self._reduce(acc, row, panels, 0, self.steps, lambda a: zero)

    def _reduce(
        self, acc: Any, row: Any, panels: Panels, first: Any, steps: int, start: Callable[[int], Any]
    ) -> Callable[[int, int], Any]:
        """``steps`` reduction steps from ``first`` on, into ``acc`` (chains, rows, panels, lanes).

        The sums of row ``a`` begin with ``start(a)``; ``chains`` copies hide the latency of an addition.
        """
        from tvm import tirx

        chains, rows, wide, _ = (int(extent) for extent in acc.shape)
        x, kind = self.operand["x"], acc.dtype
        zero = tirx.Broadcast(tirx.const(0, kind), self.lanes)
        each = [(a, v) for a in range(rows) for v in range(wide)]

        def held(c: int, a: int, v: int) -> Any:
            return acc.vload([c, a, v, 0], dtype=f"{kind}x{self.lanes}")

        for c in range(chains):
            for a, v in each:
                self.v.store(acc, [c, a, v, 0], zero if c else start(a))

        def step(n: Any, c: int) -> None:
            k = first + n
            panel = [self._panel(panels, v) for v in range(wide)]
            loaded = [source.vload([*at, k, 0], dtype=f"{self.arithmetic.word}x{self.lanes}") for source, at in panel]
            for source, at in panel if self.prefetch else ():
                self.v.prefetch(source, [*at, k + self.prefetch, 0], self.prefetch_level)
            for a, v in each:
                spread = self.v.broadcast(x[row + a, k])
                self.v.store(acc, [c, a, v, 0], self.arithmetic.multiply_add(held(c, a, v), spread, loaded[v]))

        chained(steps, self.unroll, chains, step)
        for c in range(1, chains):
            for a, v in each:
                self.v.store(acc, [0, a, v, 0], held(0, a, v) + held(c, a, v))
        return lambda a, v: held(0, a, v)

    def _panel(self, panels: Panels, v: int) -> tuple[Any, list[Any]]:
        """Where panel ``v`` is read: a buffer, and its index before the reduction step and the lane."""
        return self.operand["weight"], [self._part(panels, v)]

    def _part(self, panels: Panels, v: Any) -> Any:
        """Which of the weight's panels ``v`` is, counted over those of both parts."""
        return v % self.parts * self.panels + panels.at(v // self.parts)

    # -- epilogue ------------------------------------------------------------------------------------------------------

    def _value(self, held: Callable[[Any, int], Any], a: Any, panels: Panels, v: int) -> Any:
        """A vector of sums with its bias; ``v`` counts the panels of both parts."""
        at = self._part(panels, v) * self.lanes
        value = self._scaled(held(a, v), at)
        return value + self.v.load(self.operand["bias"], [at]) if self.w.bias else value

    def _scaled(self, value: Any, at: Any) -> Any:
        """A vector of sums in the units of y; ``at`` is its first column among the packed ones."""
        return value

    def _from_registers(
        self, held: Callable[[int, int], Any], row: Any, rows: int, panels: Panels, valid: Any | None
    ) -> None:
        for a in range(rows):
            self._write_row(held, a, row, panels, None if valid is None else a < valid)

    def _write_row(self, held: Callable[[Any, int], Any], a: Any, row: Any, panels: Panels, inside: Any | None) -> None:
        """Row ``a`` of y from its sums, with no activation that needs memory."""
        from tvm.tirx.script.builder import ir as T

        for v in range(panels.count):
            value = self._value(held, a, panels, v * self.parts)
            if self.w.activation:
                value = T.max(value, self.v.splat(0.0))
            if self.w.gated:
                value = value * self._value(held, a, panels, v * 2 + 1)
            self._write(row + a, panels.at(v) * self.lanes, value, inside)

    def _through_memory(
        self, held: Callable[[int, int], Any], row: Any, rows: int, panels: Panels, valid: Any | None
    ) -> None:
        from tvm.tirx.script.builder import ir as T

        stage = T.sblock_alloc_buffer((rows, panels.count * self.parts, self.lanes), "float32")
        for a in range(rows):
            for v in range(panels.count * self.parts):
                self.v.store(stage, [a, v, 0], self._value(held, a, panels, v))
        with T.serial(rows) as a:
            self._finish_row(stage, a, row, panels, None if valid is None else a < valid)

    def _finish_row(self, stage: Any, a: Any, row: Any, panels: Panels, inside: Any | None) -> None:
        """Row ``a`` of y from its sums with their bias, in ``stage`` (rows, panels of both parts, lanes)."""
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        w, lanes = self.w, self.lanes
        with T.unroll(panels.count) as v:
            at = v * self.parts
            rounded = self.operand["y"].dtype == "uint16" and w.activation in bf16.ACTIVATIONS
            if w.activation and not rounded:
                with T.vectorized(lanes) as lane:
                    T.buffer_store(stage, getattr(tmath, w.activation)(stage[a, at, lane]), [a, at, lane])
            value = self.v.load(stage, [a, at, 0])
            if rounded:
                value = T.bind(bf16.activation(w.activation, value))
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
