"""The recurrent kernel, written out in TIR; see :mod:`attntune.templates.cpu.recurrent` for its loops and its knobs."""

from __future__ import annotations

import math
from typing import Any

from attntune.ops.recurrent import Recurrent
from attntune.ops.recurrent_expression import along, assign, constant, ending, row_of, updated
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu.vectors import Vectors, chained


class RecurrentKernel:
    """One recurrent layer being written out."""

    def __init__(self, w: Recurrent, target: Target, config: Config) -> None:
        self.w = w
        self.v = Vectors(target.lanes("float32"))
        self.lanes = self.v.lanes
        self.rows = config.integer("tile_rows")
        self.vectors = config.integer("tile_vectors")
        self.chains = config.integer("chains")
        self.unroll = config.integer("k_unroll")
        self.panels = math.ceil(w.hidden / self.lanes)

    def function(self) -> Any:
        """``main(projected, weight, …, outputs, state, …)``, constant operands packed as the template says."""
        from tvm.script.ir_builder import IRBuilder
        from tvm.tirx.script.builder import ir as T

        w, wide = self.w, self.w.gates * self.lanes
        shapes = {spec.name: (spec.shape, spec.dtype) for spec in (*w.inputs(), *w.outputs())}
        shapes["recurrent_weight"] = ((self.panels, w.hidden, wide), "float32")
        if w.bias:
            shapes["recurrent_bias"] = ((self.panels, wide), "float32")
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            self.operand = {name: T.arg(name, T.buffer(*shape)) for name, shape in shapes.items()}
            with T.sblock("root"):
                whole, left = divmod(w.batch, self.rows)
                if whole:
                    with T.parallel(whole) if whole > 1 else T.serial(1) as tile, T.sblock("tile"):
                        T.reads()
                        T.writes()
                        self._sequences(tile * self.rows, self.rows)
                if left:
                    with T.serial(1) as last, T.sblock("rest"):
                        T.reads()
                        T.writes()
                        self._sequences(whole * self.rows + last, left)
        return builder.get()

    def _sequences(self, first: Any, rows: int) -> None:
        """``rows`` sequences from their first position to their last, states in the first-level cache."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, width = self.w, self.panels * self.lanes
        zero = tirx.const(0.0, "float32")
        # Two of each: what a position reads, and what it writes for the next.
        states = [T.sblock_alloc_buffer((2, rows, width), "float32") for _ in w.states]
        sums = T.sblock_alloc_buffer((rows, w.gates, width), "float32")
        fresh = T.sblock_alloc_buffer((len(w.states), self.lanes), "float32", scope="local")
        for name, state in zip(w.states, states, strict=True):
            start = self.operand.get(f"initial_{name}")
            for a in range(rows):
                assign(state, [0, a], width, self.lanes, constant(zero))
                if start is not None:
                    assign(state, [0, a], w.hidden, self.lanes, row_of(start, first + a))
        with T.serial(w.seq) as s:
            now = s % 2
            self._products(states[0], now, sums, rows)
            for a in range(rows):
                self._row(first + a, a, s, states, sums, fresh)
        for name, state in zip(w.states, states, strict=True):
            for a in range(rows):
                last = row_of(state, w.seq % 2, a)
                assign(self.operand[name], [first + a], w.hidden, self.lanes, last)

    # -- products ------------------------------------------------------------------------------------------------------

    def _products(self, state: Any, now: Any, sums: Any, rows: int) -> None:
        """``state · weightᵀ + bias`` of every gate, tiles of ``tile_vectors`` panels."""
        from tvm.tirx.script.builder import ir as T

        tiles, left = divmod(self.panels, self.vectors)
        if tiles:
            with T.serial(tiles) as tile:
                self._tile(tile * self.vectors, self.vectors, state, now, sums, rows)
        if left:
            self._tile(tiles * self.vectors, left, state, now, sums, rows)

    def _tile(self, panel: Any, vectors: int, state: Any, now: Any, sums: Any, rows: int) -> None:
        from tvm.tirx.script.builder import ir as T

        w, lanes, chains = self.w, self.lanes, self.chains
        weight, wide = self.operand["recurrent_weight"], vectors * w.gates
        acc = T.sblock_alloc_buffer((chains, rows, wide, lanes), "float32", scope="local")
        each = [(a, v) for a in range(rows) for v in range(wide)]

        def held(c: int, a: int, v: int) -> Any:
            return self.v.load(acc, [c, a, v, 0])

        for c in range(chains):
            for a, v in each:
                start = self.v.splat(0.0)
                if w.bias and c == 0:
                    start = self.v.load(self.operand["recurrent_bias"], [panel + v // w.gates, v % w.gates * lanes])
                self.v.store(acc, [c, a, v, 0], start)

        def step(k: Any, c: int) -> None:
            columns = [self.v.load(weight, [panel + v // w.gates, k, v % w.gates * lanes]) for v in range(wide)]
            for a, v in each:
                spread = self.v.broadcast(state[now, a, k])
                self.v.store(acc, [c, a, v, 0], held(c, a, v) + spread * columns[v])

        chained(w.hidden, self.unroll, chains, step)
        for a, v in each:
            total = held(0, a, v)
            for c in range(1, chains):
                total = total + held(c, a, v)
            self.v.store(sums, [a, v % w.gates, (panel + v // w.gates) * lanes], total)

    # -- gates ---------------------------------------------------------------------------------------------------------

    def _row(self, b: Any, a: int, s: Any, states: list[Any], sums: Any, fresh: Any) -> None:
        """The new states of one sequence; those of one that has ended stay as they are."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        length = ending(w, self.operand, b)
        if not w.lengths:
            self._update(b, a, s, length, states, sums, fresh)
            return
        with T.If(s < length):
            with T.Then():
                self._update(b, a, s, length, states, sums, fresh)
            with T.Else():
                zero = tirx.const(0.0, "float32")
                assign(self.operand["outputs"], [b, s], w.hidden, self.lanes, constant(zero))
                for state in states:
                    assign(state, [(s + 1) % 2, a], w.hidden, self.lanes, row_of(state, s % 2, a))

    def _update(self, b: Any, a: int, s: Any, length: Any, states: list[Any], sums: Any, fresh: Any) -> None:
        from tvm.tirx.script.builder import ir as T

        w, x, outputs = self.w, self.operand["projected"], self.operand["outputs"]
        at = length - 1 - s if w.reverse else s

        def unit(j: Any) -> None:
            gates = [x[b, at, g * w.hidden + j] for g in range(w.gates)]
            values = updated(w, gates, [sums[a, g, j] for g in range(w.gates)], [y[s % 2, a, j] for y in states])
            for state, value in zip(states, values, strict=True):
                T.buffer_store(state, value, [(s + 1) % 2, a, j])
            T.buffer_store(outputs, states[0][(s + 1) % 2, a, j], [b, at, j])

        along(w.hidden, self.lanes, unit)
