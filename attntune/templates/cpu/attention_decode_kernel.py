"""The decoding kernel, written out in TIR; see :mod:`attntune.templates.cpu.attention_decode`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attntune.ops.attention import FLOOR
from attntune.templates.cpu import bf16
from attntune.templates.cpu.attention_decode_scores import DecodeScores
from attntune.templates.cpu.vectors import PREFETCH_IR


class DecodeKernel(DecodeScores):
    """One decoding kernel being written out."""

    def function(self) -> Any:
        """The ``PrimFunc``."""
        from tvm.script.ir_builder import IRBuilder
        from tvm.tirx.script.builder import ir as T

        w, splits = self.w, self.splits
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            self.operand = {
                spec.name: T.arg(spec.name, T.buffer(spec.shape, spec.dtype)) for spec in (*w.inputs(), *w.outputs())
            }
            with T.sblock("root"):
                if self.halved:
                    names = ("query", "key", "value", "out")
                    self.pairs = {name: bf16.view(self.operand[name], "int32") for name in names}
                self.lines = dict(self.operand)
                for spec in w.inputs():
                    if spec.dtype == "bfloat16":
                        self.operand[spec.name] = bf16.Widened(self.operand[spec.name])
                pairs = w.batch * w.kv_heads
                # What each split found: weighted sums, and (maximum, sum) of each row.
                self.part = T.sblock_alloc_buffer((pairs * splits, self.padded_rows, self.dims * self.lanes), "float32")
                self.top = T.sblock_alloc_buffer((pairs * splits, self.padded_rows), "float32")
                self.total = T.sblock_alloc_buffer((pairs * splits, self.padded_rows), "float32")
                code = (bf16.LLVM_IR if self.halved else "") + (PREFETCH_IR if self.prefetch or self.in_turn else "")
                imports = {"pragma_import_llvm": code} if code else {}
                heads = self.task_heads
                with T.parallel(pairs * splits // heads, annotations=imports) as task, T.sblock("split"):
                    T.reads()
                    T.writes()
                    self._split(task)
                    if splits == 1:
                        with T.serial(heads) as head:
                            self._combine(task * heads + head)
                if splits > 1:
                    with T.parallel(pairs) as pair, T.sblock("combine"):
                        T.reads()
                        T.writes()
                        self._combine(pair)
        return builder.get()

    # -- one split of the keys of one head -----------------------------------------------------------------------------

    def _split(self, task: Any) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        one = task // self.splits
        self.b = one if self.heads_inside else one // w.kv_heads
        length = T.bind(self.operand["lengths"][self.b]) if w.lengths else w.kv_len
        offset = length + (w.causal_offset - w.q_len) if w.lengths == "kv" else w.causal_offset
        low: Any = 0
        high: Any = length
        if w.causal:
            high = T.max(T.min(offset + w.q_len, length), 0)
        if w.window:
            low = T.max(offset + (1 - w.window), 0)
        # Splits of whole blocks, so that only the last has a block that is not full.
        blocks = (T.max(high - low, 0) + (self.key_block - 1)) // self.key_block
        blocks = T.bind((blocks + (self.splits - 1)) // self.splits)
        self.start = T.bind(low + task % self.splits * blocks * self.key_block)
        self.end = T.bind(T.min(self.start + blocks * self.key_block, high))
        count = T.max(self.end - self.start, 0)
        if self.streams > 1:
            self.apart = T.bind((count + (self.streams - 1)) // self.streams)
            count = self.apart * self.streams
        self.count = count = T.bind(count)

        heads = self.task_heads
        beside = self.dims * lanes if self.beside else 0
        self.p = T.sblock_alloc_buffer((heads * self.padded_rows, self.key_block + beside), "float32")
        self.alpha = T.sblock_alloc_buffer((heads * self.padded_rows,), "float32")
        if not self.paired:
            self.q = T.sblock_alloc_buffer((heads * self.rows, self.dims * lanes), "float32")

        def begin() -> None:
            if not self.paired:
                self._scale_queries()
            with T.serial(self.padded_rows) as r:
                T.buffer_store(self.top, tirx.const(FLOOR, "float32"), [self.task, r])
                T.buffer_store(self.total, tirx.const(0.0, "float32"), [self.task, r])
                for dim in range(self.dims):
                    v.store(*self._sum(r, dim), v.splat(0.0))

        self._each_head(task, begin)
        with T.serial((count + (self.key_block - 1)) // self.key_block) as kb:
            first = T.bind(kb * self.key_block)
            self._block(task, first, T.bind(T.min(self.key_block, count - first)))
        if self.beside:
            with T.serial(self.padded_rows) as r:
                for dim in range(self.dims):
                    v.store(self.part, [self.task, r, dim * lanes], v.load(*self._sum(r, dim)))

    def _each_head(self, task: Any, body: Callable[[], None]) -> None:
        """``body`` for every head of the task."""
        from tvm.tirx.script.builder import ir as T

        w, splits = self.w, self.splits
        if not self.heads_inside:
            self.task, self.head, self.base, self.at = task, task // splits % w.kv_heads, 0, 0
            body()
            return
        with T.serial(w.kv_heads) as head:
            self.task = T.bind((task // splits * w.kv_heads + head) * splits + task % splits)
            self.head, self.base, self.at = head, head * self.rows, head * self.padded_rows
            body()

    def _sum(self, r: Any, dim: Any) -> tuple[Any, list[Any]]:
        """Buffer and place of a vector of row ``r``'s weighted sums, as long as the split is at work."""
        at = dim * self.lanes
        return (self.p, [r, self.key_block + at]) if self.beside else (self.part, [self.task, r, at])

    def _block(self, task: Any, first: Any, keys: Any) -> None:
        """One block of ``keys`` keys, counted from the split's: scores, softmax and weighted sums of all rows.

        Heads that lie side by side take turns with every vector of keys, so that memory is met in one piece.
        """
        from tvm.tirx.script.builder import ir as T

        tiles = T.bind((keys + (self.lanes - 1)) // self.lanes)

        def rest() -> None:
            with T.serial(self.rows) as r:
                self._softmax(r, tiles)
            with T.serial(self.padded_rows // self.out_rows) as rt:
                for low in range(0, self.dims, self.dims_held):
                    self._out_tile(first, keys, rt, low, min(self.dims_held, self.dims - low))

        with T.serial(tiles) as t:
            self._each_head(task, lambda: self._scores(first, t))
        self._each_head(task, rest)

    def _softmax(self, r: Any, tiles: Any) -> None:
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        v, lanes, task, at = self.v, self.lanes, self.task, self.at + r
        best = T.sblock_alloc_buffer((1, lanes), "float32", scope="local")
        added = T.sblock_alloc_buffer((1, lanes), "float32", scope="local")
        v.store(best, [0, 0], v.broadcast(self.top[task, r]))
        v.store(added, [0, 0], v.splat(0.0))
        with T.serial(tiles) as t:
            v.store(best, [0, 0], T.max(v.load(best, [0, 0]), v.load(self.p, [at, t * lanes])))
        v.store(best, [0, 0], v.fold(v.load(best, [0, 0]), T.max))
        with T.serial(tiles) as t:
            with T.vectorized(lanes) as lane:
                power = tmath.exp2_nonpositive(self.p[at, t * lanes + lane] - best[0, lane])
                T.buffer_store(self.p, power, [at, t * lanes + lane])
            v.store(added, [0, 0], v.load(added, [0, 0]) + v.load(self.p, [at, t * lanes]))
        v.store(added, [0, 0], v.fold(v.load(added, [0, 0]), lambda a, b: a + b))
        T.buffer_store(self.alpha, tmath.exp2_nonpositive(self.top[task, r] - best[0, 0]), [at])
        T.buffer_store(self.top, best[0, 0], [task, r])
        T.buffer_store(self.total, self.total[task, r] * self.alpha[at] + added[0, 0], [task, r])

    def _out_tile(self, first: Any, keys: Any, rt: Any, low: int, count: int) -> None:
        """Weighted sums of ``out_rows`` rows over ``count`` vectors of the head, from vector ``low`` on."""
        from tvm.tirx.script.builder import ir as T

        v, lanes, rows = self.v, self.lanes, self.out_rows
        acc = T.sblock_alloc_buffer((rows, count, lanes), "float32", scope="local")
        # Each pass over the head asks for some lines of keys, or the first for all of keys and values.
        asked, ahead = self._lines(), self.prefetch if low == 0 else 0
        if self.in_turn:
            passes = math.ceil(self.dims / self.dims_held)
            asked = [d for n, d in enumerate(asked) if n * passes // len(asked) == low // self.dims_held]
            ahead = self.key_block if asked else 0

        def ask(key: Any) -> None:
            for name in ("key",) if self.in_turn else ("key", "value"):
                self._ask_for(name, key + ahead // self.streams, asked)

        row = [T.bind(self.at + T.min(rt * rows + a, self.rows - 1)) for a in range(rows)]
        for a in range(rows):
            for e in range(count):
                kept = v.load(*self._sum(rt * rows + a, low + e))
                v.store(acc, [a, e, 0], kept * v.broadcast(self.alpha[row[a]]))
        with T.serial(keys // self.streams) as n:
            for stream in range(self.streams):
                j = n * self.streams + stream
                key = T.bind(self._key_row(first + n * self.streams, stream))
                # Of all rows' tiles, the first asks.
                if ahead and self.padded_rows == rows:
                    ask(key)
                elif ahead:
                    with T.If(rt == 0), T.Then():
                        ask(key)
                values = self._vectors("value", key if self.streams == 1 else T.min(key, self.end - 1), low, count)
                if rows > 1:
                    values = [T.bind(value) for value in values]
                for a in range(rows):
                    for e, value in enumerate(values):
                        product = v.broadcast(self.p[row[a], j]) * value
                        v.store(acc, [a, e, 0], v.load(acc, [a, e, 0]) + product)
        for a in range(rows):
            for e in range(count):
                v.store(*self._sum(rt * rows + a, low + e), v.load(acc, [a, e, 0]))

    # -- results -------------------------------------------------------------------------------------------------------

    def _combine(self, pair: Any) -> None:
        """Weighted sums of all splits of one sequence and key head, divided by the whole sum."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        w, v, lanes = self.w, self.v, self.lanes
        b, kv_head = pair // w.kv_heads, pair % w.kv_heads
        acc = T.sblock_alloc_buffer((1, self.dims * lanes), "float32")
        best = T.sblock_alloc_buffer((2,), "float32", scope="local")
        with T.serial(self.rows) as r:
            T.buffer_store(best, tirx.const(FLOOR, "float32"), [0])
            T.buffer_store(best, tirx.const(0.0, "float32"), [1])
            for dim in range(self.dims):
                v.store(acc, [0, dim * lanes], v.splat(0.0))
            with T.serial(self.splits) as s:
                T.buffer_store(best, T.max(best[0], self.top[pair * self.splits + s, r]), [0])
            with T.serial(self.splits) as s:
                at = pair * self.splits + s
                share = T.bind(tmath.exp2_nonpositive(self.top[at, r] - best[0]))
                T.buffer_store(best, best[1] + share * self.total[at, r], [1])
                for dim in range(self.dims):
                    scaled = v.load(self.part, [at, r, dim * lanes]) * v.broadcast(share)
                    v.store(acc, [0, dim * lanes], v.load(acc, [0, dim * lanes]) + scaled)
            inverse = T.bind(tirx.const(1.0, "float32") / T.max(best[1], tirx.const(1e-30, "float32")))
            head, i = kv_head * self.group + r // w.q_len, r % w.q_len
            if self.halved:
                for part in range(self.dims // 2):
                    low, high = (v.load(acc, [0, (2 * part + half) * lanes]) * v.broadcast(inverse) for half in (0, 1))
                    *lead, at = self._at("out", b, head, i, part * 2 * lanes)
                    v.store(self.pairs["out"], [*lead, at // 2], bf16.round_to_pairs(low, high))
                return
            with T.serial(w.head_dim) as d:
                element = acc[0, d] * inverse
                if w.dtype != "float32":
                    element = tirx.Cast(w.dtype, element)
                T.buffer_store(self.operand["out"], element, self._at("out", b, head, i, d))
