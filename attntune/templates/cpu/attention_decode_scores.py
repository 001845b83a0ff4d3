"""Decoding kernels on CPUs: what a block of keys is read from, and its scores."""

from __future__ import annotations

import math
from typing import Any

from attntune.ops.attention import MASKED, Attention
from attntune.ops.attention_expression import conditions, modified
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu import bf16
from attntune.templates.cpu.attention_blocks import LOG2_E
from attntune.templates.cpu.vectors import Vectors


class DecodeScores:
    """A decoding kernel being written out, up to the scores of a block of keys."""

    operand: dict[str, Any]
    """Operands by name, of bfloat16 as float32."""
    lines: dict[str, Any]
    """Operands by name, as they lie in memory."""
    pairs: dict[str, Any]
    """Operands of bfloat16 as pairs, where :attr:`halved`."""
    p: Any
    """Scores, then their exponentials: (rows, keys), those of a head from row :attr:`at` on."""
    q: Any
    """Scaled queries: (rows, head_dim), those of a head from row :attr:`base` on."""
    start: Any
    """The first key of the split."""
    end: Any
    """After its last."""
    apart: Any
    """Keys of each stream of it."""
    count: Any
    """Of all streams together."""
    b: Any
    """The sequence."""
    task: Any
    """Where what is found goes: the sequence's, head's and split's number."""
    head: Any
    """Of keys and values."""
    base: Any
    at: Any

    def __init__(self, w: Attention, target: Target, config: Config) -> None:
        self.w = w
        self.v = Vectors(target.lanes("float32"))
        self.lanes = self.v.lanes
        self.splits = config.integer("splits")
        self.key_block = config.integer("key_vectors") * self.lanes
        self.score_rows = config.integer("score_rows")
        self.out_rows = config.integer("out_rows")
        self.prefetch = config.integer("prefetch")
        #: Whether values are asked for while their keys are scored, and the next block's keys while values are summed.
        self.in_turn = bool(config.get("prefetch_in_turn", False))
        self.streams = config.integer("streams")
        self.heads_inside = bool(config["heads_inside"])
        #: Heads of keys and values that a task has.
        self.task_heads = w.kv_heads if self.heads_inside else 1
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

    def _at(self, name: str, b: Any, head: Any, row: Any, d: Any) -> list[Any]:
        if self.w.heads_apart(name):
            return [b, head, row, d]
        return [b, row, head * self.w.head_dim + d]

    def _key_row(self, n: Any, more: Any) -> Any:
        """The key that is number ``n`` + ``more`` of the split, streams taking turns; ``n`` is a multiple of them.

        Of the last numbers some are past the split's end.
        """
        if self.streams == 1:
            return self.start + n + more
        return self.start + more % self.streams * self.apart + n // self.streams + more // self.streams

    def _pair(self, name: str, head: Any, row: Any, part: int) -> Any:
        """One vector of bfloat16 pairs of a row of a head."""
        *lead, at = self._at(name, self.b, head, row, 2 * part * self.lanes)
        return self.pairs[name].vload([*lead, at // 2], dtype=f"int32x{self.lanes}")

    def _vectors(self, name: str, row: Any, low: int, count: int) -> list[Any]:
        """``count`` vectors of a row of the key or value head, from vector ``low`` on.

        Lanes past the head's end repeat its last element. Where pairs are read, ``low`` is even.
        """
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        lanes, buffer = self.lanes, self.operand[name]
        vectors: list[Any] = []
        for dim in range(low, low + count):
            if self.halved:
                if len(vectors) % 2 == 0:
                    pairs = bf16.from_pairs(T.bind(self._pair(name, self.head, row, dim // 2)), lanes)
                vectors.append(pairs[len(vectors) % 2])
            elif (dim + 1) * lanes <= self.w.head_dim:
                vectors.append(self.v.load(buffer, self._at(name, self.b, self.head, row, dim * lanes)))
            else:
                columns = [min(dim * lanes + lane, self.w.head_dim - 1) for lane in range(lanes)]
                elements = [buffer[tuple(self._at(name, self.b, self.head, row, c))] for c in columns]
                vectors.append(tirx.Shuffle(elements, list(range(lanes))))
        return vectors

    def _lines(self) -> list[int]:
        """Where in a row of a head its cache lines begin."""
        return list(range(0, self.w.head_dim, 16 if self.w.dtype == "float32" else 32))

    def _ask_for(self, name: str, j: Any, lines: list[int]) -> None:
        """``lines`` of row ``j`` of keys or values, to the second-level cache."""
        from tvm.tirx.script.builder import ir as T

        row = T.bind(T.min(j, self.end - 1))
        for d in lines:
            self.v.prefetch(self.lines[name], self._at(name, self.b, self.head, row, d), 2)

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
                element = self.operand["query"][tuple(self._at("query", self.b, head, i, d))]
                T.buffer_store(self.q, element * tirx.const(self.factor, "float32"), [self.base + r, d])

    def _scores(self, first: Any, t: Any) -> None:
        """Scores of all rows of a head against a vector of keys."""
        from tvm.tirx.script.builder import ir as T

        if self.in_turn:
            at = T.bind(first + t * self.lanes)
            for a in range(self.lanes):
                self._ask_for("value", self._key_row(at, a), self._lines())
        together, left = divmod(self.rows, self.score_rows)
        with T.serial(together) as rt:
            self._score_tile(first, t, rt * self.score_rows, self.score_rows)
        if left:
            with T.serial(left) as r:
                self._score_tile(first, t, together * self.score_rows + r, 1)

    def _score_tile(self, first: Any, t: Any, first_row: Any, rows: int) -> None:
        """Scores of ``rows`` rows (a power of two) against a vector of keys, each key read and widened once for all.

        A key past the end is read as the last one, and masked.
        """
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        first = T.bind(first + t * lanes)
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
            keys = [T.bind(T.min(self._key_row(first, part * together + a), self.end - 1)) for a in range(together)]
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
        at = self.at + r
        self.v.store(self.p, [at, t * lanes], scores)
        masked = tirx.const(MASKED, "float32")
        head, i = T.bind(self.head * self.group + r // w.q_len), T.bind(r % w.q_len)

        def read(name: str, *at: Any) -> Any:
            return self.operand[name][at]

        with T.vectorized(lanes) as lane:
            key = self._key_row(first, lane)
            j = T.min(key, self.end - 1)
            # What a vector has past the last number would be keys of the streams once more.
            exists = key < self.end
            if self.streams > 1:
                exists = tirx.And(exists, first + lane < self.count)
            value = self.p[at, t * lanes + lane]
            if self.general:
                value = modified(w, value, read, self.modify, self.b, head, i, j)
                value = value * tirx.const(LOG2_E, "float32")
            for allowed in conditions(w, read, self.b, i, j):
                value = tirx.Select(allowed, value, masked)
            T.buffer_store(self.p, tirx.Select(exists, value, masked), [at, t * lanes + lane])
