"""The attention kernel, written out in TIR: online softmax over blocks of keys, with the scores kept transposed."""

from __future__ import annotations

from typing import Any

from attntune.ops.attention import FLOOR
from attntune.templates.cpu.attention_blocks import LOG2_E, tile_for
from attntune.templates.cpu.attention_scores import AttentionScores


class AttentionKernel(AttentionScores):
    """One attention kernel being written out, statement by statement."""

    # -- one block of queries ------------------------------------------------------------------------------------------

    def _block(self) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        size = self.block_vectors * lanes
        key_rows = self.key_block + self.tallest
        self.qt = T.sblock_alloc_buffer((self.block_vectors * self.qt_stride,), "float32")
        self.p = T.sblock_alloc_buffer((self.p_vectors * self.p_stride,), "float32")
        self.out = T.sblock_alloc_buffer(self._out_shape(), "float32")
        self.top = T.sblock_alloc_buffer((size,), "float32")
        self.total = T.sblock_alloc_buffer((size,), "float32")
        self.alpha = T.sblock_alloc_buffer((size + self.out_rows,), "float32")
        if self.key_terms:
            self.terms = T.sblock_alloc_buffer((key_rows,), "float32")
        self._transpose_queries()
        with T.serial(self.count) as g:
            v.store(self.top, [g * lanes], v.splat(FLOOR))
            v.store(self.total, [g * lanes], v.splat(0.0))
        low, high = self._seen(0, self.queries)
        low, high = self._known(low) if w.window else low, self._known(high) if w.causal else high
        one_pass = self.key_block >= w.kv_len
        if one_pass:
            keys = self._known(T.max(high - low, 0)) if w.causal else high
            self._key_block(low, keys, first=True)
        else:
            self._clear_out()
            with T.serial((T.max(high - low, 0) + (self.key_block - 1)) // self.key_block) as kb:
                start = self._known(low + kb * self.key_block)
                exact = isinstance(high, int) and high % self.key_block == 0
                keys = self.key_block if exact else self._known(T.min(self.key_block, high - start))
                self._key_block(start, keys, first=False)
        self._finish()
        if w.weights:
            self._finish_weights(tirx.const(1e-30, "float32"))

    def _out_shape(self) -> tuple[int, ...]:
        """Of the block's weighted sums of values."""
        return (self.block_vectors * self.lanes + self.out_rows, self.dim_vectors * self.lanes)

    def _clear_out(self) -> None:
        from tvm.tirx.script.builder import ir as T

        with T.serial(self.count * self.lanes) as i:
            for e in range(self.dim_vectors):
                self.v.store(self.out, [i, e * self.lanes], self.v.splat(0.0))

    def _transpose_queries(self) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        factor = w.scaling * (1.0 if self.general else LOG2_E)
        whole = w.head_dim // lanes * lanes
        with T.serial(self.count) as g:
            # Lanes past the last query repeat it: their results are never written.
            rows = [T.bind(self.first + T.min(g * lanes + lane, self.queries - 1)) for lane in range(lanes)]
            if whole:
                with T.serial(whole // lanes) as part:

                    def load(row: int) -> Any:
                        return v.load(self.query, self._at(rows[row], part * lanes))

                    def store(column: int, vector: Any) -> None:
                        v.store(self.qt, self._q(g, part * lanes + column), vector * v.splat(factor))

                    v.transpose(load, store)
            if whole < w.head_dim:
                with T.serial(w.head_dim - whole) as d:
                    for lane in range(lanes):
                        element = self.query[tuple(self._at(rows[lane], whole + d))]
                        T.buffer_store(self.qt, element * tirx.const(factor, "float32"), self._q(g, whole + d, lane))

    # -- one block of keys ---------------------------------------------------------------------------------------------

    def _key_block(self, start: Any, keys: Any, first: bool) -> None:
        from tvm.tirx.script.builder import ir as T

        self.start, self.keys = start, keys
        if self.key_terms:
            self._fill_terms()
        whole = self.vectors
        if isinstance(self.count, int):
            with T.serial(self.count // whole) as g:
                self._group(g * whole, whole, first)
            if self.count % whole:
                self._group(self.count // whole * whole, self.count % whole, first)
        else:
            with T.serial(self.count // whole) as g:
                self._group(g * whole, whole, first)
            for left in sorted({count % whole for count in self.counts} - {0}):
                with T.If(self.count % whole == left), T.Then():
                    self._group(self.count // whole * whole, left, first)
        self._results(first)

    def _results(self, first: bool) -> None:
        """The block's weighted sums of values; ``first``: of its only block of keys."""
        from tvm.tirx.script.builder import ir as T

        passes = self._passes()
        # Copied columns stay in the first-level cache for all queries; else a row's passes follow one another.
        for together in [[dims] for dims in passes] if self.copy_values else [passes]:
            if self.copy_values:
                self._copy_columns(together[0])
            with T.serial((self.queries + (self.out_rows - 1)) // self.out_rows) as t:
                low, high = self._within(t * self.out_rows, self.out_rows)
                low, high = (x if isinstance(x, int) else self._known(x) for x in (low, high))
                for dims in together:
                    self._out_tile(low, high, t, dims, first)

    def _passes(self) -> list[range]:
        """Vectors of the head that are summed together."""
        return [range(e, min(e + self.dims_held, self.dim_vectors)) for e in range(0, self.dim_vectors, self.dims_held)]

    def _copy_columns(self, dims: range) -> None:
        """The block's values in ``dims`` vectors of the head, side by side: ``columns`` (keys, dims, lanes)."""
        from tvm.tirx.script.builder import ir as T

        self.columns = T.sblock_alloc_buffer((self.key_block, len(dims), self.lanes), "float32")
        with T.serial(self.keys) as j:
            for e, dim in enumerate(dims):
                self.v.store(self.columns, [j, e, 0], self._value(self.start + j, dim))

    def _group(self, g: Any, vectors: int, first: bool) -> None:
        """Scores and exponentials of the query vectors ``g`` to ``g + vectors`` against the block of keys."""
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        tile = self._tile_keys(vectors)
        best = T.sblock_alloc_buffer((vectors, lanes), "float32", scope="local")
        for k in range(vectors):
            v.store(best, [k, 0], v.load(self.top, [(g + k) * lanes]))
        if self.pair_terms:
            self._fill_pairs(g, vectors)
        low, high = self._within(g * lanes, vectors * lanes)
        if not w.causal:
            with T.serial(self.keys // tile) as t:
                self._score_tile(t * tile, tile, g, vectors, best, edge=False)
            if isinstance(self.keys, int):
                if self.keys % tile:
                    self._score_tile(self.keys // tile * tile, tile, g, vectors, best, edge=True)
            else:
                with T.If(self.keys % tile != 0), T.Then():
                    self._score_tile(self.keys // tile * tile, tile, g, vectors, best, edge=True)
        else:
            low, high = self._known(low) if w.window else low, self._known(high)
            # Tiles that any query sees, and of those the ones that all see: only the rest are masked.
            tile_low, tile_high = self._known(low // tile) if w.window else 0, self._known((high + (tile - 1)) // tile)
            reach = self.first + g * lanes + self.offset - self.start
            full_high = T.min(reach + 1, self.keys)
            full_high = self._known(T.min(T.max(T.max(full_high, 0) // tile, tile_low), tile_high))
            full_low = tile_low
            if w.window:
                last = reach + (vectors * lanes - w.window)
                full_low = self._known(T.min(T.max((T.max(last, 0) + (tile - 1)) // tile, tile_low), full_high))
            with T.serial(full_high - full_low) as t:
                self._score_tile((full_low + t) * tile, tile, g, vectors, best, edge=False)
            left = full_low - tile_low
            with T.serial(left + tile_high - full_high) as t:
                at = full_high + t
                if w.window:
                    at = self._known(T.Select(t < left, tile_low + t, full_high + (t - left)))
                self._score_tile(at * tile, tile, g, vectors, best, edge=True)
        if self.general:
            self._modify(low, high, g, vectors, best)
        if w.weights:
            self._copy_scores(g, vectors)
        self._softmax(low, high, g, vectors, best, first)

    def _tile_keys(self, vectors: int) -> int:
        """Keys of a score tile of so many query vectors."""
        return tile_for(vectors, self.key_tile, self.vectors)

    def _softmax(self, low: Any, high: Any, g: Any, vectors: int, best: Any, first: bool) -> None:
        """Exponentials of the keys ``low`` to ``high``; new maximum, sum, and ``alpha``: what old sums shrink by."""
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        v, lanes = self.v, self.lanes
        added = T.sblock_alloc_buffer((vectors, lanes), "float32", scope="local")
        for k in range(vectors):
            at = (g + k) * lanes
            if not first:
                with T.vectorized(lanes) as lane:
                    shrink = tmath.exp2_nonpositive(self.top[at + lane] - best[k, lane])
                    T.buffer_store(self.alpha, shrink, [at + lane])
            v.store(self.top, [at], v.load(best, [k, 0]))
            v.store(added, [k, 0], v.splat(0.0))
        # One vector after another leaves few registers to the polynomial's constants.
        together = 1 if self.few_registers else vectors
        for part in range(0, vectors, together):
            with T.serial(high - low) as n:
                j = low + n
                for k in range(part, part + together):
                    with T.vectorized(lanes) as lane:
                        power = tmath.exp2_nonpositive(self.p[tuple(self._s(g + k, j, lane))] - best[k, lane])
                        T.buffer_store(self.p, power, self._s(g + k, j, lane))
                    v.store(added, [k, 0], v.load(added, [k, 0]) + v.load(self.p, self._s(g + k, j)))
        for k in range(vectors):
            at = (g + k) * lanes
            total = v.load(added, [k, 0])
            if not first:
                total = total + v.load(self.total, [at]) * v.load(self.alpha, [at])
            v.store(self.total, [at], total)

    def _out_tile(self, low: Any, high: Any, t: Any, dims: range, first: bool) -> None:
        """``out_rows`` rows of the result over ``dims`` vectors of the head."""
        from tvm.tirx.script.builder import ir as T

        v, lanes, rows = self.v, self.lanes, self.out_rows
        acc = T.sblock_alloc_buffer((rows, len(dims), lanes), "float32", scope="local")
        for a in range(rows):
            for e, dim in enumerate(dims):
                if first:
                    v.store(acc, [a, e, 0], v.splat(0.0))
                else:
                    shrink = v.broadcast(self.alpha[t * rows + a])
                    v.store(acc, [a, e, 0], v.load(self.out, [t * rows + a, dim * lanes]) * shrink)
        with T.serial(high - low) as n:
            j = low + n
            for a in range(rows):
                if lanes % rows == 0:
                    weight = self.p[tuple(self._s(t // (lanes // rows), j, t % (lanes // rows) * rows + a))]
                else:
                    row = T.min(t * rows + a, self.block_vectors * lanes - 1)
                    weight = self.p[tuple(self._s(row // lanes, j, row % lanes))]
                for e, dim in enumerate(dims):
                    value = v.load(self.columns, [j, e, 0]) if self.copy_values else self._value(self.start + j, dim)
                    product = v.broadcast(weight) * value
                    v.store(acc, [a, e, 0], v.load(acc, [a, e, 0]) + product)
        for a in range(rows):
            for e, dim in enumerate(dims):
                v.store(self.out, [t * rows + a, dim * lanes], v.load(acc, [a, e, 0]))

    def _value(self, j: Any, dim: int) -> Any:
        """One vector of value row ``j``; the head's last vector may be partial."""
        from tvm import tirx

        w, lanes = self.w, self.lanes
        if (dim + 1) * lanes <= w.head_dim:
            return self.v.load(self.value, self._value_at(j, dim * lanes))
        parts = [self.value[tuple(self._value_at(j, min(dim * lanes + lane, w.head_dim - 1)))] for lane in range(lanes)]
        return tirx.Shuffle(parts, list(range(lanes)))

    # -- results -------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Divide by the sums and write the rows that exist."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        target = self.operand["out"]
        with T.serial(self.queries) as i:
            inverse = T.bind(tirx.const(1.0, "float32") / T.max(self.total[i], tirx.const(1e-30, "float32")))
            for dim in range(self.dim_vectors):
                at = dim * lanes
                if at + lanes <= w.head_dim:
                    scaled = v.load(self.out, [i, at]) * v.broadcast(inverse)
                    v.store(target, self._at(self.first + i, at), scaled)
                else:
                    with T.serial(w.head_dim - at) as e:
                        T.buffer_store(
                            target, self.out[i, at + e] * inverse, self._at(self.first + i, at + e)
                        )  # fmt: skip

    def _zero_row(self, i: Any) -> None:
        """Row ``i`` of the block is past the end of its sequence."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        zero = tirx.const(0.0, "float32")
        with T.serial(self.w.head_dim) as e:
            T.buffer_store(self.operand["out"], zero, self._at(self.first + i, e))
        if self.w.weights:
            with T.serial(self.w.kv_len) as j:
                T.buffer_store(self.operand["weights"], zero, [self.b, self.h, self.first + i, j])

    def _copy_scores(self, g: Any, vectors: int) -> None:
        """Scores of this block of keys to where the weights go, before they are relative to a maximum."""
        from tvm.tirx.script.builder import ir as T

        lanes = self.lanes
        with T.serial(vectors * lanes) as i, T.If(g * lanes + i < self.queries), T.Then(), T.serial(self.keys) as j:
            place = [self.b, self.h, self.first + g * lanes + i, self.start + j]
            T.buffer_store(self.operand["weights"], self.p[tuple(self._s(g + i // lanes, j, i % lanes))], place)

    def _finish_weights(self, tiny: Any) -> None:
        """Scores to weights: the maximum and the sum of a row are known only after its last block of keys."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        weights, zero = self.operand["weights"], tirx.const(0.0, "float32")
        with T.serial(self.queries) as i:
            inverse = T.bind(tirx.const(1.0, "float32") / T.max(self.total[i], tiny))
            low, high = self._seen(i, 1)
            low, high = (T.bind(tirx.const(x, "int32") if isinstance(x, int) else x) for x in (low, high))
            with T.serial(self.w.kv_len) as j:
                at = [self.b, self.h, self.first + i, j]
                with T.If(tirx.all(j >= low, j < high)):
                    with T.Then():
                        T.buffer_store(weights, tmath.exp2_nonpositive(weights[tuple(at)] - self.top[i]) * inverse, at)
                    with T.Else():
                        T.buffer_store(weights, zero, at)
