"""The attention kernel, written out in TIR: online softmax over blocks of keys, with the scores kept transposed."""

from __future__ import annotations

import math
from typing import Any

from attntune.ops.attention import FLOOR, MASKED, Attention
from attntune.ops.attention_expression import modified
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu.tasks import share_out
from attntune.templates.cpu.vectors import Vectors

_LOG2_E = math.log2(math.e)
#: Rows of the tallest score tile.
TALLEST = 14


def held_dims(head_dim: int, target: Target) -> int:
    """Vectors of the head that one pass over the values accumulates; wide heads take several equal passes."""
    dims = math.ceil(head_dim / target.lanes("float32"))
    return math.ceil(dims / math.ceil(dims / max(1, target.vector_registers // 8)))


def tile_for(vectors: int, key_tile: int, whole: int) -> int:
    """Keys in a score tile of ``vectors`` query vectors, where one of ``whole`` vectors has ``key_tile``."""
    return min(TALLEST, key_tile * whole // vectors)


def _odd(value: int) -> int:
    return value | 1


class AttentionKernel:
    """One attention kernel being written out, statement by statement."""

    def __init__(self, w: Attention, target: Target, config: Config) -> None:
        self.w = w
        self.v = Vectors(target.lanes("float32"))
        self.lanes = self.v.lanes
        self.cores = target.cores
        self.vectors = config.integer("query_vectors")
        self.block_vectors = self.vectors * config.integer("query_tiles")
        self.key_block = min(config.integer("key_block"), w.kv_len)
        self.key_tile = config.integer("key_tile")
        self.out_rows = config.integer("out_rows")
        self.heads_inner = bool(config["heads_inner"])
        self.dims_held = held_dims(w.head_dim, target)
        self.dim_vectors = math.ceil(w.head_dim / self.lanes)
        #: From one query vector to the next, in elements; an odd number of vectors, so not a multiple of 4 KiB.
        self.qt_stride = (w.head_dim + 1) * self.lanes
        self.p_stride = _odd(self.key_block + TALLEST) * self.lanes
        #: Scores that are more than a sum of the product, a term for each key and one for each pair.
        self.general = bool(w.softcap or w.score_mod)
        self.key_terms = not self.general and (w.mask or w.alibi or bool(w.bias_heads and w.bias_q == 1))
        self.pair_terms = not self.general and bool(w.bias_heads and w.bias_q != 1)
        #: Whether the queries of a sequence are fewer than the rows of its operands.
        self.short = w.ragged or w.lengths == "qkv"
        self.whole_vectors = math.ceil(w.q_len / self.lanes)
        self.blocks = math.ceil(self.whole_vectors / self.block_vectors)

    def function(self) -> Any:
        """The ``PrimFunc``."""
        from tvm.script.ir_builder import IRBuilder
        from tvm.tirx.script.builder import ir as T

        w = self.w
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            self.operand = {
                spec.name: T.arg(spec.name, T.buffer(spec.shape, spec.dtype)) for spec in (*w.inputs(), *w.outputs())
            }
            with T.sblock("root"):
                if w.ragged:
                    # Each sequence rounds up to whole blocks, and so do the rows past the last.
                    blocks = self.blocks + w.batch + 1
                    share_out(
                        w.heads * blocks, self.cores, lambda task: self._ragged_block(task // blocks, task % blocks)
                    )
                else:
                    share_out(w.batch * w.heads * self.blocks, self.cores, self._padded_task)
        return builder.get()

    def _padded_task(self, task: Any) -> None:
        w = self.w
        if w.lengths == "qkv":
            # Cores share heads: every core then has the same part of each sequence.
            head, b, block = task // (w.batch * self.blocks), task // self.blocks % w.batch, None
        elif self.heads_inner:
            head, b, block = task % w.heads, task // (w.heads * self.blocks), task // w.heads
        else:
            head, b, block = task // self.blocks % w.heads, task // (w.heads * self.blocks), None
        self._padded_block(b, head, (task if block is None else block) % self.blocks)

    # -- which queries and keys a block has ----------------------------------------------------------------------------

    def _padded_block(self, b: Any, h: Any, block: Any) -> None:
        """Block ``block`` of a sequence of at most ``q_len`` queries."""
        from tvm.tirx.script.builder import ir as T

        w, total = self.w, self.whole_vectors
        # Vectors are shared out evenly: no block is left with one that fills no tile.
        start = self._known(block * total // self.blocks)
        if total % self.blocks:
            count = self._known((block + 1) * total // self.blocks - start)
            counts = {total // self.blocks, total // self.blocks + 1}
        else:
            count = total // self.blocks
            counts = {count}
        first = self._known(start * self.lanes)
        self.counts = counts
        length = self._known(self.operand["lengths"][b]) if w.lengths else w.kv_len
        if w.lengths == "qkv":
            rows = (
                self._known(T.min(count * self.lanes, w.q_len - first)) if w.q_len % self.lanes else count * self.lanes
            )
            queries = self._known(T.max(T.min(rows, length - first), 0))
            count = self._known((queries + (self.lanes - 1)) // self.lanes)
            self.counts = set(range(self.block_vectors + 1))
        else:
            queries = (
                self._known(T.min(count * self.lanes, w.q_len - first)) if w.q_len % self.lanes else count * self.lanes
            )
        offset = w.causal_offset
        if w.lengths == "kv":
            offset = self._known(length + (w.causal_offset - w.q_len))
        self._place(b, h, first, queries, count, length, offset, 0)
        self._block()
        if w.lengths == "qkv":
            with T.serial(self._known(rows - queries)) as i:
                self._zero_row(queries + i)

    def _ragged_block(self, h: Any, block: Any) -> None:
        """Block ``block`` of a head, counted over all sequences; past the last sequence, rows of zeros."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, size = self.w, self.block_vectors * self.lanes
        offsets = self.operand["offsets"]
        # Filled in by a scan of the sequences: which one, where it begins and ends, and the block within it.
        found = T.sblock_alloc_buffer((5,), "int32", scope="local")
        for at in range(5):
            T.buffer_store(found, tirx.const(0, "int32"), [at])
        T.buffer_store(found, block, [4])
        with T.serial(w.batch + 1) as b:
            start = self._known(tirx.Select(b < w.batch, offsets[T.min(b, w.batch)], offsets[w.batch]))
            end = self._known(tirx.Select(b < w.batch, offsets[T.min(b + 1, w.batch)], tirx.const(w.q_len, "int32")))
            blocks = self._known((end - start + (size - 1)) // size)
            with T.If(tirx.all(found[4] >= 0, found[4] < blocks)), T.Then():
                for at, value in enumerate((b, start, end, found[4])):
                    T.buffer_store(found, value, [at])
            T.buffer_store(found, found[4] - blocks, [4])
        b, row, end, within = (self._known(found[at]) for at in range(4))
        first = self._known(within * size)
        rows = self._known(T.max(T.min(end - row - first, size), 0))
        with T.If(b < w.batch):
            with T.Then():
                self.counts = set(range(self.block_vectors + 1))
                count = self._known((rows + (self.lanes - 1)) // self.lanes)
                self._place(b, h, first, rows, count, self._known(end - row), 0, row)
                self._block()
            with T.Else():
                self._place(0, h, first, 0, 0, 0, 0, row)
                with T.serial(rows) as i:
                    self._zero_row(i)

    def _place(self, b: Any, h: Any, first: Any, queries: Any, count: Any, length: Any, offset: Any, row: Any) -> None:
        """Remember the block's sequence ``b`` (from ``row`` on, ``length`` keys), head, and ``queries`` from ``first``.

        ``count`` is the number of query vectors, ``offset`` the position of query 0 among the keys.
        """
        w = self.w
        self.b, self.h, self.first, self.row = b, h, first, row
        self.queries, self.count, self.length, self.offset = queries, count, length, offset
        names = ("qkv",) * 3 if w.packed else ("query", "key", "value")
        self.query, self.key, self.value = (self.operand[name] for name in names)
        q_width, kv_width = w.heads * w.head_dim, w.kv_heads * w.head_dim
        self.kv_head = h // (w.heads // w.kv_heads)
        self.key_column, self.value_column = (q_width, q_width + kv_width) if w.packed else (0, 0)

    def _q(self, vector: Any, d: Any, lane: Any = 0) -> list[Any]:
        """Where component ``d`` of a vector of transposed queries is."""
        return [vector * self.qt_stride + d * self.lanes + lane]

    def _s(self, vector: Any, j: Any, lane: Any = 0) -> list[Any]:
        """Where the score of key ``j`` of the block is, for a vector of queries."""
        return [vector * self.p_stride + j * self.lanes + lane]

    def _at(self, head: Any, row: Any, d: Any, column: int = 0) -> list[Any]:
        """Index of an element of a query, key, value or result of this block's sequence."""
        w = self.w
        if w.layout == "bhsd":
            return [self.b, head, row, d]
        at = head * w.head_dim + column + d
        return [self.row + row, at] if w.ragged else [self.b, row, at]

    # -- one block of queries ------------------------------------------------------------------------------------------

    def _block(self) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        size, padded = self.block_vectors * lanes, self.dim_vectors * lanes
        key_rows = self.key_block + TALLEST
        self.qt = T.sblock_alloc_buffer((self.block_vectors * self.qt_stride,), "float32")
        self.p = T.sblock_alloc_buffer((self.block_vectors * self.p_stride,), "float32")
        self.out = T.sblock_alloc_buffer((size + self.out_rows, padded), "float32")
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
            with T.serial(self.count * lanes) as i:
                for e in range(self.dim_vectors):
                    v.store(self.out, [i, e * lanes], v.splat(0.0))
            with T.serial((T.max(high - low, 0) + (self.key_block - 1)) // self.key_block) as kb:
                start = self._known(low + kb * self.key_block)
                exact = isinstance(high, int) and high % self.key_block == 0
                keys = self.key_block if exact else self._known(T.min(self.key_block, high - start))
                self._key_block(start, keys, first=False)
        self._finish()
        if w.weights:
            self._finish_weights(tirx.const(1e-30, "float32"))

    def _seen(self, query: Any, count: Any) -> tuple[Any, Any]:
        """Keys from and up to which any of ``count`` queries of the block, from ``query`` on, may attend to."""
        from tvm.tirx.script.builder import ir as T

        w = self.w
        if not w.causal:
            return 0, self.length
        at = self.first + query + self.offset
        high = T.min(at + count, self.length)
        return (T.max(at + (1 - w.window), 0) if w.window else 0), high

    def _transpose_queries(self) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        factor = w.scaling * (1.0 if self.general else _LOG2_E)
        whole = w.head_dim // lanes * lanes
        with T.serial(self.count) as g:
            # Lanes past the last query repeat it: their results are never written.
            rows = [T.bind(self.first + T.min(g * lanes + lane, self.queries - 1)) for lane in range(lanes)]
            if whole:
                with T.serial(whole // lanes) as part:

                    def load(row: int) -> Any:
                        return v.load(self.query, self._at(self.h, rows[row], part * lanes))

                    def store(column: int, vector: Any) -> None:
                        v.store(self.qt, self._q(g, part * lanes + column), vector * v.splat(factor))

                    v.transpose(load, store)
            if whole < w.head_dim:
                with T.serial(w.head_dim - whole) as d:
                    for lane in range(lanes):
                        element = self.query[tuple(self._at(self.h, rows[lane], whole + d))]
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
        with T.serial((self.queries + (self.out_rows - 1)) // self.out_rows) as t:
            low, high = self._within(t * self.out_rows, self.out_rows)
            low, high = (x if isinstance(x, int) else self._known(x) for x in (low, high))
            for e in range(0, self.dim_vectors, self.dims_held):
                dims = range(e, min(e + self.dims_held, self.dim_vectors))
                self._out_tile(low, high, t, dims, first)

    def _within(self, query: Any, count: Any) -> tuple[Any, Any]:
        """As ``_seen``, counted from the start of the block of keys and kept inside it."""
        from tvm.tirx.script.builder import ir as T

        if not self.w.causal:
            return 0, self.keys
        low, high = self._seen(query, count)
        high = T.max(T.min(high - self.start, self.keys), 0)
        return (T.max(low - self.start, 0) if self.w.window else 0), high

    def _fill_terms(self) -> None:
        """What every query adds to a key's score: -inf for a masked key, the bias, the distance (ALiBi).

        ALiBi's distances count from the block's first query: what differs between queries cancels in their softmax.
        """
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        log2e = tirx.const(_LOG2_E, "float32")

        def term(j: Any) -> Any:
            value = tirx.const(0.0, "float32")
            if w.bias_heads and w.bias_q == 1:
                bias = self.operand["bias"]
                b, h = (self.b if w.bias_batch > 1 else 0), (self.h if w.bias_heads > 1 else 0)
                value = T.max(bias[b, h, 0, j], tirx.const(MASKED / 2, "float32")) * log2e
            if w.alibi:
                distance = tirx.Cast("float32", j - (self.first + self.offset))
                value = value + self.operand["slopes"][self.h] * log2e * distance
            if w.mask:
                value = tirx.Select(self.operand["mask"][self.b, j] != 0, value, tirx.const(MASKED, "float32"))
            return value

        with T.serial(self.keys) as j:
            T.buffer_store(self.terms, term(self.start + j), [j])
        with T.serial(T.min(self.keys, 1) * TALLEST) as j:
            T.buffer_store(self.terms, self.terms[self.keys - 1], [self.keys + j])

    def _known(self, value: Any) -> Any:
        """An int32 ``value`` computed once, and kept where TVM's simplifier cannot see it.

        It expands nested names: with the bounds of padded sequences or of windows among them that took minutes. LLVM
        sees through the cell, which is on the stack.
        """
        from tvm.tirx.script.builder import ir as T

        cell = T.sblock_alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(cell, value, [0])
        return cell[0]

    def _group(self, g: Any, vectors: int, first: bool) -> None:
        """Scores and exponentials of the query vectors ``g`` to ``g + vectors`` against the block of keys."""
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        tile = tile_for(vectors, self.key_tile, self.vectors)
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

    def _fill_pairs(self, g: Any, vectors: int) -> None:
        """The block's bias, transposed into the scores' place, in the units of scores."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        bias = self.operand["bias"]
        b, h = (self.b if w.bias_batch > 1 else 0), (self.h if w.bias_heads > 1 else 0)
        floor, log2e = tirx.const(MASKED / 2, "float32"), tirx.const(_LOG2_E, "float32")
        with T.serial(vectors) as k:
            rows = [T.bind(self.first + T.min((g + k) * lanes + lane, self.queries - 1)) for lane in range(lanes)]
            with T.serial(self.keys // lanes) as part:
                at = part * lanes

                def load(row: int) -> Any:
                    return v.load(bias, [b, h, rows[row], self.start + at])

                def store(column: int, vector: Any) -> None:
                    kept = T.max(vector, v.broadcast(floor)) * v.broadcast(log2e)
                    v.store(self.p, self._s(g + k, at + column), kept)

                v.transpose(load, store)
            done = self.keys // lanes * lanes
            # Past the last key its bias is repeated, as the key itself is by a tile that reaches past it.
            with T.serial(T.min(self.keys, 1) * (self.keys - done + (TALLEST - 1))) as j:
                for lane in range(lanes):
                    value = bias[b, h, rows[lane], self.start + T.min(done + j, self.keys - 1)]
                    T.buffer_store(self.p, T.max(value, floor) * log2e, self._s(g + k, done + j, lane))

    def _score_tile(self, at: Any, height: int, g: Any, vectors: int, best: Any, edge: bool) -> None:
        """Scores of ``height`` keys from ``start + at``; a tile at an ``edge`` is masked and may reach past the keys.

        A tile that does repeats the last key: its score changes no maximum, and is not summed.
        """
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        acc = T.sblock_alloc_buffer((height, vectors, lanes), "float32", scope="local")
        at = at if isinstance(at, int) else T.bind(at)
        row = [T.bind(self.start + T.min(at + a, self.keys - 1)) if edge else self.start + at + a
               for a in range(height)]  # fmt: skip
        for a in range(height):
            for k in range(vectors):
                initial = v.splat(0.0)
                if self.pair_terms:
                    initial = v.load(self.p, self._s(g + k, at + a))
                if self.key_terms:
                    term = v.broadcast(self.terms[at + a])
                    initial = initial + term if self.pair_terms else term
                v.store(acc, [a, k, 0], initial)
        with T.serial(w.head_dim) as d:
            for a in range(height):
                key = v.broadcast(self._key(row[a], d))
                for k in range(vectors):
                    v.store(acc, [a, k, 0], v.load(acc, [a, k, 0]) + key * v.load(self.qt, self._q(g + k, d)))
        for a in range(height):
            for k in range(vectors):
                score = v.load(acc, [a, k, 0])
                if edge and w.causal and not self.general:
                    for allowed in self._visible(g + k, v.broadcast(self.start + at + a)):
                        score = tirx.Select(allowed, score, v.splat(MASKED))
                    v.store(acc, [a, k, 0], score)
                    score = v.load(acc, [a, k, 0])
                v.store(self.p, self._s(g + k, at + a), score)
                if not self.general:
                    v.store(best, [k, 0], T.max(v.load(best, [k, 0]), score))

    def _visible(self, vector: Any, j: Any) -> list[Any]:
        """What must hold, lane by lane, for queries to see key ``j``, for causal workloads."""
        from tvm import tirx

        v = self.v
        position = v.broadcast(self.first + vector * self.lanes + self.offset) + v.index()
        seen = [j <= position]
        if self.w.window:
            seen.append(j > position - v.broadcast(tirx.const(self.w.window, "int32")))
        return seen

    def _modify(self, low: Any, high: Any, g: Any, vectors: int, best: Any) -> None:
        """Whatever the workload does to scaled scores, lane by lane; then to base-2 units, masks and maxima."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        modify = w.modification() if w.score_mod else None

        def read(name: str, *at: Any) -> Any:
            return self.operand[name][at]

        with T.serial(high - low) as n:
            j = T.bind(low + n)
            for k in range(vectors):
                with T.vectorized(lanes) as lane:
                    i = self.first + T.min((g + k) * lanes + lane, self.queries - 1)
                    value = modified(
                        w, self.p[tuple(self._s(g + k, j, lane))], read, modify, self.b, self.h, i, self.start + j
                    )
                    value = value * tirx.const(_LOG2_E, "float32")
                    if w.mask:
                        kept = self.operand["mask"][self.b, self.start + j] != 0
                        value = tirx.Select(kept, value, tirx.const(MASKED, "float32"))
                    T.buffer_store(self.p, value, self._s(g + k, j, lane))
                score = v.load(self.p, self._s(g + k, j))
                if w.causal:
                    for allowed in self._visible(g + k, v.broadcast(self.start + j)):
                        score = tirx.Select(allowed, score, v.splat(MASKED))
                    v.store(self.p, self._s(g + k, j), score)
                v.store(best, [k, 0], T.max(v.load(best, [k, 0]), v.load(self.p, self._s(g + k, j))))

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
        with T.serial(high - low) as n:
            j = low + n
            for k in range(vectors):
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
                    product = v.broadcast(weight) * self._value(self.start + j, dim)
                    v.store(acc, [a, e, 0], v.load(acc, [a, e, 0]) + product)
        for a in range(rows):
            for e, dim in enumerate(dims):
                v.store(self.out, [t * rows + a, dim * lanes], v.load(acc, [a, e, 0]))

    def _key(self, j: Any, d: Any) -> Any:
        """One element of key row ``j``."""
        return self.key[tuple(self._at(self.kv_head, j, d, self.key_column))]

    def _value(self, j: Any, dim: int) -> Any:
        """One vector of value row ``j``; the head's last vector may be partial."""
        from tvm import tirx

        w, lanes = self.w, self.lanes
        if (dim + 1) * lanes <= w.head_dim:
            return self.v.load(self.value, self._at(self.kv_head, j, dim * lanes, self.value_column))
        parts = [
            self.value[tuple(self._at(self.kv_head, j, min(dim * lanes + lane, w.head_dim - 1), self.value_column))]
            for lane in range(lanes)
        ]
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
                    v.store(target, self._at(self.h, self.first + i, at), scaled)
                else:
                    with T.serial(w.head_dim - at) as e:
                        T.buffer_store(
                            target, self.out[i, at + e] * inverse, self._at(self.h, self.first + i, at + e)
                        )  # fmt: skip

    def _zero_row(self, i: Any) -> None:
        """Row ``i`` of the block is past the end of its sequence."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        zero = tirx.const(0.0, "float32")
        with T.serial(self.w.head_dim) as e:
            T.buffer_store(self.operand["out"], zero, self._at(self.h, self.first + i, e))
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
