"""The decoding kernel, written out in TIR; see :mod:`attntune.templates.cpu.attention_decode`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attntune.ops.attention import FLOOR, MASKED, Attention
from attntune.ops.attention_expression import conditions, modified
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu import bf16
from attntune.templates.cpu.attention_blocks import LOG2_E
from attntune.templates.cpu.vectors import PREFETCH_IR, Vectors


class DecodeKernel:
    """One decoding kernel being written out."""

    task: Any
    """Where what is found goes: the sequence's, head's and split's number."""
    head: Any
    """Of keys and values."""
    base: Any
    """Row of its first scaled query."""

    def __init__(self, w: Attention, target: Target, config: Config) -> None:
        self.w = w
        self.v = Vectors(target.lanes("float32"))
        self.lanes = self.v.lanes
        self.splits = config.integer("splits")
        self.key_block = config.integer("key_vectors") * self.lanes
        self.score_rows = config.integer("score_rows")
        self.out_rows = config.integer("out_rows")
        self.prefetch = config.integer("prefetch")
        self.heads_inside = bool(config.get("heads_inside", False))
        self.group = w.heads // w.kv_heads
        self.rows = w.q_len * self.group
        self.padded_rows = math.ceil(self.rows / self.out_rows) * self.out_rows
        self.dims = math.ceil(w.head_dim / self.lanes)
        #: Whether a vector of bfloat16 pairs is read at a time: its lower values, then its higher ones, are two vectors
        #: of float32, and lie in this order wherever this kernel keeps them.
        self.halved = w.dtype == "bfloat16" and bf16.available(target) and w.head_dim % (2 * self.lanes) == 0
        #: Whether scores multiply pairs as they lie. Widened, they are multiplied faster if that is done once for
        #: several rows where a product of pairs takes as long as two of float32.
        self.paired = self.halved and (self.rows == 1 or not bf16.slower_than_float32(target))
        held = max(1, (target.vector_registers - 2) // (self.out_rows + (self.out_rows > 1)))
        # Passes of the same width, as near as may be.
        held = math.ceil(self.dims / math.ceil(self.dims / held))
        self.dims_held = held + held % 2 if self.halved else held
        #: Whether weighted sums lie beside the scores, in a buffer that is written all the time. Where registers do not
        #: hold those of all rows, LLVM must not try to keep them there from block to block.
        self.beside = self.padded_rows * self.dims > target.vector_registers and not self.heads_inside
        self.modify = w.modification() if w.score_mod else None
        #: Whether scores are more than scaled products.
        self.general = bool(w.softcap or w.bias_heads or w.alibi or w.score_mod)
        self.factor = w.scaling * (1.0 if self.general else LOG2_E)

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
                code = (bf16.LLVM_IR if self.halved else "") + (PREFETCH_IR if self.prefetch else "")
                imports = {"pragma_import_llvm": code} if code else {}
                heads = w.kv_heads if self.heads_inside else 1
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

    def _at(self, b: Any, head: Any, row: Any, d: Any) -> list[Any]:
        if self.w.layout == "bhsd":
            return [b, head, row, d]
        return [b, row, head * self.w.head_dim + d]

    def _pair(self, name: str, head: Any, row: Any, part: int) -> Any:
        """One vector of bfloat16 pairs of a row of a head."""
        *lead, at = self._at(self.b, head, row, 2 * part * self.lanes)
        return self.pairs[name].vload([*lead, at // 2], dtype=f"int32x{self.lanes}")

    def _vectors(self, name: str, row: Any, low: Any, count: int) -> list[Any]:
        """``count`` vectors of a row of the key or value head, from vector ``low`` on.

        Lanes past the head's end repeat its last element; ``low`` is then a number, else it may be an expression.
        """
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        lanes, buffer = self.lanes, self.operand[name]
        vectors: list[Any] = []
        for dim in (low + e for e in range(count)):
            if self.halved:
                if len(vectors) % 2 == 0:
                    pairs = bf16.from_pairs(T.bind(self._pair(name, self.head, row, dim // 2)), lanes)
                vectors.append(pairs[len(vectors) % 2])
            elif not isinstance(dim, int) or (dim + 1) * lanes <= self.w.head_dim:
                vectors.append(self.v.load(buffer, self._at(self.b, self.head, row, dim * lanes)))
            else:
                columns = [min(dim * lanes + lane, self.w.head_dim - 1) for lane in range(lanes)]
                elements = [buffer[tuple(self._at(self.b, self.head, row, c))] for c in columns]
                vectors.append(tirx.Shuffle(elements, list(range(lanes))))
        return vectors

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
        start = T.bind(low + task % self.splits * blocks * self.key_block)
        end = T.bind(T.min(start + blocks * self.key_block, high))
        self.end = end

        self.p = T.sblock_alloc_buffer((self.padded_rows, self.key_block + self.beside * self.dims * lanes), "float32")
        self.alpha = T.sblock_alloc_buffer((self.padded_rows,), "float32")
        if not self.paired:
            self.q = T.sblock_alloc_buffer(
                (self.rows * (w.kv_heads if self.heads_inside else 1), self.dims * lanes), "float32"
            )

        def begin() -> None:
            if not self.paired:
                self._scale_queries()
            with T.serial(self.padded_rows) as r:
                T.buffer_store(self.top, tirx.const(FLOOR, "float32"), [self.task, r])
                T.buffer_store(self.total, tirx.const(0.0, "float32"), [self.task, r])
                for dim in range(self.dims):
                    v.store(*self._sum(r, dim), v.splat(0.0))

        self._each_head(task, begin)
        with T.serial((T.max(end - start, 0) + (self.key_block - 1)) // self.key_block) as kb:
            first = T.bind(start + kb * self.key_block)
            self._each_head(task, lambda: self._block(first))
        if self.beside:
            with T.serial(self.padded_rows) as r:
                for dim in range(self.dims):
                    v.store(self.part, [self.task, r, dim * lanes], v.load(*self._sum(r, dim)))

    def _each_head(self, task: Any, body: Callable[[], None]) -> None:
        """``body`` for every head of the task; its scaled queries begin at row ``base`` of ``q``."""
        from tvm.tirx.script.builder import ir as T

        w, splits = self.w, self.splits
        if not self.heads_inside:
            self.task, self.head, self.base = task, task // splits % w.kv_heads, 0
            body()
            return
        with T.serial(w.kv_heads) as head:
            self.task = T.bind((task // splits * w.kv_heads + head) * splits + task % splits)
            self.head, self.base = head, head * self.rows
            body()

    def _sum(self, r: Any, dim: Any) -> tuple[Any, list[Any]]:
        """Buffer and place of a vector of row ``r``'s weighted sums, as long as the split is at work."""
        at = dim * self.lanes
        return (self.p, [r, self.key_block + at]) if self.beside else (self.part, [self.task, r, at])

    def _scale_queries(self) -> None:
        """All rows' queries of a head in the units of scores, zeros past the head's end."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        with T.serial(self.rows) as r:
            head, i = self.head * self.group + r // w.q_len, r % w.q_len
            if self.halved:
                for part in range(self.dims // 2):
                    for half, values in enumerate(bf16.from_pairs(T.bind(self._pair("query", head, i, part)), lanes)):
                        v.store(self.q, [self.base + r, (2 * part + half) * lanes], values * v.splat(self.factor))
                return
            for dim in range(self.dims):
                v.store(self.q, [self.base + r, dim * lanes], v.splat(0.0))
            with T.serial(w.head_dim) as d:
                element = self.operand["query"][tuple(self._at(self.b, head, i, d))]
                T.buffer_store(self.q, element * tirx.const(self.factor, "float32"), [self.base + r, d])

    def _block(self, start: Any) -> None:
        """One block of keys: scores, softmax and weighted sums of all rows."""
        from tvm.tirx.script.builder import ir as T

        keys = T.bind(T.min(self.key_block, self.end - start))
        tiles = T.bind((keys + (self.lanes - 1)) // self.lanes)
        together, left = divmod(self.rows, self.score_rows)
        with T.serial(tiles) as t:
            with T.serial(together) as rt:
                self._score_tile(start, t, rt * self.score_rows, self.score_rows)
            if left:
                with T.serial(left) as r:
                    self._score_tile(start, t, together * self.score_rows + r, 1)
        with T.serial(self.rows) as r:
            self._softmax(r, tiles)
        with T.serial(self.padded_rows // self.out_rows) as rt:
            for low in range(0, self.dims, self.dims_held):
                self._out_tile(start, keys, rt, low, min(self.dims_held, self.dims - low))

    def _ask_for(self, j: Any) -> None:
        """A key and its value, to the second-level cache."""
        from tvm.tirx.script.builder import ir as T

        row = T.bind(T.min(j, self.end - 1))
        for name in ("key", "value"):
            line = 16 if self.w.dtype == "float32" else 32
            for d in range(0, self.w.head_dim, line):
                self.v.prefetch(self.lines[name], self._at(self.b, self.head, row, d), 2)

    def _score_tile(self, start: Any, t: Any, first_row: Any, rows: int) -> None:
        """Scores of ``rows`` rows (a power of two) against a vector of keys, each key read and widened once for all.

        A key past the end is read as the last one, and masked.
        """
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        first = T.bind(start + t * lanes)
        together = lanes // rows

        def query(r: int, part: int) -> Any:
            if not self.paired:
                return v.load(self.q, [self.base + first_row + r, part * lanes])
            head = self.head * self.group + (first_row + r) // w.q_len
            return self._pair("query", head, (first_row + r) % w.q_len, part)

        count = w.head_dim // (2 * lanes) if self.paired else self.dims
        shared = 2 if self.halved and not self.paired else 1

        def key(j: Any, parts: range) -> list[Any]:
            if self.paired:
                return [self._pair("key", self.head, j, part) for part in parts]
            return self._vectors("key", j, parts.start, len(parts))

        products = T.sblock_alloc_buffer((lanes, lanes), "float32", scope="local")
        sums = []
        for part in range(rows):
            keys = [T.bind(T.min(first + part * together + a, self.end - 1)) for a in range(together)]
            for low in range(0, count, shared):
                dims = range(low, low + shared)
                queries = {(r, dim): query(r, dim) for r in range(rows) for dim in dims}
                for a in range(together):
                    for dim, loaded in zip(dims, key(keys[a], dims), strict=True):
                        components = T.bind(loaded) if rows > 1 else loaded
                        for r in range(rows):
                            at = [r * together + a, 0]
                            before = v.load(products, at) if dim else v.splat(0.0)
                            if self.paired:
                                value = bf16.dot(before, components, queries[r, dim])
                            else:
                                product = components * queries[r, dim]
                                value = before + product if dim else product
                            v.store(products, at, value)
            sums.append(T.bind(v.sums([v.load(products, [a, 0]) for a in range(lanes)])))
            if self.paired:
                sums[-1] = T.bind(sums[-1] * v.splat(self.factor))
        for r in range(rows):
            # Of each part's sums, those of this row.
            picked = [part * lanes + r * together + a for part in range(rows) for a in range(together)]
            scores = sums[0] if rows == 1 else tirx.Shuffle(sums, picked)
            self._masked_scores(scores, first, t, first_row + r)

    def _masked_scores(self, scores: Any, first: Any, t: Any, r: Any) -> None:
        """Store one row's vector of scores after whatever the workload does to it."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, lanes = self.w, self.lanes
        self.v.store(self.p, [r, t * lanes], scores)
        masked = tirx.const(MASKED, "float32")
        head, i = T.bind(self.head * self.group + r // w.q_len), T.bind(r % w.q_len)

        def read(name: str, *at: Any) -> Any:
            return self.operand[name][at]

        with T.vectorized(lanes) as lane:
            j = T.min(first + lane, self.end - 1)
            value = self.p[r, t * lanes + lane]
            if self.general:
                value = modified(w, value, read, self.modify, self.b, head, i, j)
                value = value * tirx.const(LOG2_E, "float32")
            for allowed in conditions(w, read, self.b, i, j):
                value = tirx.Select(allowed, value, masked)
            T.buffer_store(self.p, tirx.Select(first + lane < self.end, value, masked), [r, t * lanes + lane])

    def _softmax(self, r: Any, tiles: Any) -> None:
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        v, lanes, task = self.v, self.lanes, self.task
        best = T.sblock_alloc_buffer((1, lanes), "float32", scope="local")
        added = T.sblock_alloc_buffer((1, lanes), "float32", scope="local")
        v.store(best, [0, 0], v.broadcast(self.top[task, r]))
        v.store(added, [0, 0], v.splat(0.0))
        with T.serial(tiles) as t:
            v.store(best, [0, 0], T.max(v.load(best, [0, 0]), v.load(self.p, [r, t * lanes])))
        v.store(best, [0, 0], v.fold(v.load(best, [0, 0]), T.max))
        with T.serial(tiles) as t:
            with T.vectorized(lanes) as lane:
                power = tmath.exp2_nonpositive(self.p[r, t * lanes + lane] - best[0, lane])
                T.buffer_store(self.p, power, [r, t * lanes + lane])
            v.store(added, [0, 0], v.load(added, [0, 0]) + v.load(self.p, [r, t * lanes]))
        v.store(added, [0, 0], v.fold(v.load(added, [0, 0]), lambda a, b: a + b))
        T.buffer_store(self.alpha, tmath.exp2_nonpositive(self.top[task, r] - best[0, 0]), [r])
        T.buffer_store(self.top, best[0, 0], [task, r])
        T.buffer_store(self.total, self.total[task, r] * self.alpha[r] + added[0, 0], [task, r])

    def _out_tile(self, start: Any, keys: Any, rt: Any, low: Any, count: int) -> None:
        """Weighted sums of ``out_rows`` rows over ``count`` vectors of the head, from vector ``low`` on."""
        from tvm.tirx.script.builder import ir as T

        v, lanes, rows = self.v, self.lanes, self.out_rows
        acc = T.sblock_alloc_buffer((rows, count, lanes), "float32", scope="local")
        row = [T.bind(T.min(rt * rows + a, self.rows - 1)) for a in range(rows)]
        for a in range(rows):
            for e in range(count):
                kept = v.load(*self._sum(rt * rows + a, low + e))
                v.store(acc, [a, e, 0], kept * v.broadcast(self.alpha[row[a]]))
        with T.serial(keys) as j:
            if self.prefetch:
                self._ask_once(start + j + self.prefetch, rt, low)
            values = self._vectors("value", start + j, low, count)
            if rows > 1:
                values = [T.bind(value) for value in values]
            for a in range(rows):
                for e, value in enumerate(values):
                    product = v.broadcast(self.p[row[a], j]) * value
                    v.store(acc, [a, e, 0], v.load(acc, [a, e, 0]) + product)
        for a in range(rows):
            for e in range(count):
                v.store(*self._sum(rt * rows + a, low + e), v.load(acc, [a, e, 0]))

    def _ask_once(self, j: Any, rt: Any, low: Any) -> None:
        """Of all tiles of a key's weighted sums, the first asks for key ``j``."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        first = [rt == 0] if self.padded_rows > self.out_rows else []
        if not isinstance(low, int):
            first.append(low == 0)
        elif low:
            return
        if not first:
            self._ask_for(j)
            return
        with T.If(tirx.all(*first)), T.Then():
            self._ask_for(j)

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
                    *lead, at = self._at(b, head, i, part * 2 * lanes)
                    v.store(self.pairs["out"], [*lead, at // 2], bf16.round_to_pairs(low, high))
                return
            with T.serial(w.head_dim) as d:
                element = acc[0, d] * inverse
                if w.dtype != "float32":
                    element = tirx.Cast(w.dtype, element)
                T.buffer_store(self.operand["out"], element, self._at(b, head, i, d))
