"""Attention kernels on CPUs: the scores of a tile of keys, their masks, biases and whatever else changes them."""

from __future__ import annotations

from typing import Any

from attntune.ops.attention import MASKED
from attntune.ops.attention_expression import modified
from attntune.templates.cpu.attention_blocks import LOG2_E, AttentionBlocks

#: Components of the head that a pass of a tile's loop multiplies.
_UNROLL = 4


class AttentionScores(AttentionBlocks):
    """Scores of one block of queries against one block of keys, key by key, in base-2 units."""

    def _fill_terms(self) -> None:
        """What every query adds to a key's score: -inf for a masked key, the bias, the distance (ALiBi).

        ALiBi's distances count from the block's first query: what differs between queries cancels in their softmax.
        """
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        log2e = tirx.const(LOG2_E, "float32")

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
        with T.serial(T.min(self.keys, 1) * self.tallest) as j:
            T.buffer_store(self.terms, self.terms[self.keys - 1], [self.keys + j])

    def _fill_pairs(self, g: Any, vectors: int) -> None:
        """The block's bias, transposed into the scores' place, in the units of scores."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        bias = self.operand["bias"]
        b, h = (self.b if w.bias_batch > 1 else 0), (self.h if w.bias_heads > 1 else 0)
        floor, log2e = tirx.const(MASKED / 2, "float32"), tirx.const(LOG2_E, "float32")
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
            with T.serial(T.min(self.keys, 1) * (self.keys - done + (self.tallest - 1))) as j:
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
        terms = self.key_terms or self.pair_terms

        def term(a: int, k: int) -> Any:
            found = []
            if self.pair_terms:
                found.append(v.load(self.p, self._s(g + k, at + a)))
            if self.key_terms:
                found.append(v.broadcast(self.terms[at + a]))
            return sum(found[1:], found[0])

        # Where registers are few a term comes last, and the sum begins with a product: see the ladder.
        begins_with_term = terms and not self.few_registers
        if begins_with_term:
            for a in range(height):
                for k in range(vectors):
                    v.store(acc, [a, k, 0], term(a, k))

        def step(d: Any, begins: bool) -> None:
            for a in range(height):
                key = v.broadcast(self._key(row[a], d))
                for k in range(vectors):
                    product = key * v.load(self.qt, self._q(g + k, d))
                    v.store(acc, [a, k, 0], product if begins else v.load(acc, [a, k, 0]) + product)

        peeled = w.head_dim % _UNROLL or min(_UNROLL, w.head_dim)
        for d in range(peeled):
            step(d, begins=d == 0 and not begins_with_term)
        with T.serial((w.head_dim - peeled) // _UNROLL) as part:
            for d in range(_UNROLL):
                step(peeled + part * _UNROLL + d, begins=False)
        for a in range(height):
            for k in range(vectors):
                score = v.load(acc, [a, k, 0])
                if terms and not begins_with_term:
                    v.store(acc, [a, k, 0], score + term(a, k))
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
                    value = value * tirx.const(LOG2_E, "float32")
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

    def _key(self, j: Any, d: Any) -> Any:
        """One element of key row ``j``."""
        return self.key[tuple(self._key_at(j, d))]
