"""The bfloat16 attention kernel: the float32 kernel with its two products replaced by products of pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attntune.ops.attention import MASKED, Attention
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu import bf16
from attntune.templates.cpu.attention_blocks import LOG2_E
from attntune.templates.cpu.attention_kernel import AttentionKernel

#: A pair of ones.
ONES = 0x3F803F80


class _RoundedResults(AttentionKernel):
    """Operands and results are bfloat16; what is kept between them is float32."""

    code = bf16.LLVM_IR
    """LLVM IR that the kernel imports."""

    def _place(self, b: Any, h: Any, *rest: Any) -> None:
        super()._place(b, h, *rest)
        self.result = bf16.view(self.operand["out"], "uint16")
        if self.w.bias_heads and not isinstance(self.operand["bias"], bf16.Widened):
            self.operand["bias"] = bf16.Widened(self.operand["bias"])

    def _block(self) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        with T.attr(tirx.const(0, "int32"), "pragma_import_llvm", self.code):
            super()._block()

    def _finish(self) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        tail: Any = T.sblock_alloc_buffer((lanes,), "uint16", scope="local") if w.head_dim % lanes else None
        with T.serial(self.queries) as i:
            inverse = T.bind(tirx.const(1.0, "float32") / T.max(self.total[i], tirx.const(1e-30, "float32")))
            for dim in range(self.dim_vectors):
                at = dim * lanes
                bits = bf16.round_to_bits(v.load(self.out, [i, at]) * v.broadcast(inverse))
                if at + lanes <= w.head_dim:
                    v.store(self.result, self._at(self.first + i, at), bits)
                else:
                    v.store(tail, [0], bits)
                    with T.serial(w.head_dim - at) as e:
                        T.buffer_store(self.result, tail[e], self._at(self.first + i, at + e))

    def _zero_row(self, i: Any) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        with T.serial(self.w.head_dim) as e:
            T.buffer_store(self.result, tirx.const(0, "uint16"), self._at(self.first + i, e))
        if self.w.weights:
            with T.serial(self.w.kv_len) as j:
                place = [self.b, self.h, self.first + i, j]
                T.buffer_store(self.operand["weights"], tirx.const(0.0, "float32"), place)


class AttentionBf16Kernel(_RoundedResults):
    """Scores over pairs of the head's elements, results over pairs of keys; blocks, masks and lengths as inherited.

    A pair of keys begins at an even distance from the block's first key. Ranges of keys round outwards to pairs: what
    a range has too much is masked, or has a value of zero.
    """

    adds_weights = True
    """Whether the softmax adds up its weights, rather than whoever multiplies them."""

    def __init__(self, w: Attention, target: Target, config: Config) -> None:
        super().__init__(w, target, config)
        self.pairs = w.head_dim // 2
        self.padded_dim = self.dim_vectors * self.lanes
        #: Rows of values in pairs.
        self.value_rows = self.key_block // 2 + 1
        self.factor = w.scaling * (1.0 if self.general else LOG2_E)
        plain = not (self.general or self.key_terms or self.pair_terms or w.weights)
        #: Whether scores are scaled where they are exponentiated, which is free.
        self.scaled_late = plain and 2.0**-20 <= self.factor <= 2.0**20

    def _place(self, b: Any, h: Any, *rest: Any) -> None:
        super()._place(b, h, *rest)
        names = ("qkv",) * 3 if self.w.packed else ("query", "key", "value")
        self.query, self.key = (bf16.view(self.operand[name], "int32") for name in names[:2])
        self.value = bf16.view(self.operand[names[2]], "uint16")

    def _query_pair(self, row: Any, pair: Any) -> list[Any]:
        """Index of a pair of elements of a query."""
        *lead, at = self._at(row, 0)
        return [*lead, at // 2 + pair]

    def _key_pair(self, row: Any, pair: Any) -> list[Any]:
        """Index of a pair of elements of a key."""
        *lead, at = self._key_at(row, 0)
        return [*lead, at // 2 + pair]

    def _block(self) -> None:
        from tvm.tirx.script.builder import ir as T

        self.query_pairs = T.sblock_alloc_buffer((self.block_vectors, self.pairs, self.lanes), "int32")
        self.value_pairs = T.sblock_alloc_buffer((self.value_rows, self.padded_dim), "int32")
        super()._block()

    def _transpose_queries(self) -> None:
        from tvm.tirx.script.builder import ir as T

        v, lanes = self.v, self.lanes
        whole = self.pairs // lanes * lanes
        with T.serial(self.count) as g:
            rows = [T.bind(self.first + T.min(g * lanes + lane, self.queries - 1)) for lane in range(lanes)]
            if whole:
                with T.serial(whole // lanes) as part:

                    def load(row: int) -> Any:
                        return self.query.vload(self._query_pair(rows[row], part * lanes), dtype="int32x16")

                    def store(column: int, vector: Any) -> None:
                        v.store(self.query_pairs, [g, part * lanes + column, 0], vector)

                    v.transpose(load, store)
            if whole < self.pairs:
                with T.serial(self.pairs - whole) as d:
                    for lane in range(lanes):
                        pair = self.query[tuple(self._query_pair(rows[lane], whole + d))]
                        T.buffer_store(self.query_pairs, pair, [g, whole + d, lane])

    # -- one block of keys ---------------------------------------------------------------------------------------------

    def _key_block(self, start: Any, keys: Any, first: bool) -> None:
        from tvm.tirx.script.builder import ir as T

        with T.serial(keys // 2) as n:
            self._pair_values(n, start + n * 2, paired=True)
        if not isinstance(keys, int):
            with T.If(keys % 2 == 1), T.Then():
                self._pair_values(keys // 2, start + (keys - 1), paired=False)
        elif keys % 2:
            self._pair_values(keys // 2, start + (keys - 1), paired=False)
        self._arrange_values(keys)
        super()._key_block(start, keys, first)

    def _arrange_values(self, keys: Any) -> None:
        """What else is made of the pairs of a block's values."""

    def _pair_values(self, n: Any, row: Any, paired: bool) -> None:
        """Value rows ``row`` and, if ``paired``, the next, element by element; else zeros for the second."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v, lanes = self.w, self.v, self.lanes
        whole = w.head_dim // lanes
        for dim in range(whole):
            low, high = (
                self.value.vload(self._value_at(j, dim * lanes), dtype="uint16x16")
                for j in (row, row + 1 if paired else row)
            )
            pair = bf16.pairs_of_bits(low, high) if paired else tirx.Cast("int32x16", low)
            v.store(self.value_pairs, [n, dim * lanes], pair)
        if whole * lanes < w.head_dim:
            with T.serial(w.head_dim - whole * lanes) as e:
                pair = tirx.Cast("int32", self.value[tuple(self._value_at(row, whole * lanes + e))])
                if paired:
                    upper = self.value[tuple(self._value_at(row + 1, whole * lanes + e))]
                    pair = pair | (tirx.Cast("int32", upper) << 16)
                T.buffer_store(self.value_pairs, pair, [n, whole * lanes + e])

    def _score_tile(self, at: Any, height: int, g: Any, vectors: int, best: Any, edge: bool) -> None:
        from tvm.tirx.script.builder import ir as T

        v, lanes = self.v, self.lanes
        acc = T.sblock_alloc_buffer((height, vectors, lanes), "float32", scope="local")
        at = at if isinstance(at, int) else T.bind(at)
        row = [T.bind(self.start + T.min(at + a, self.keys - 1)) if edge else self.start + at + a
               for a in range(height)]  # fmt: skip
        for a in range(height):
            for k in range(vectors):
                v.store(acc, [a, k, 0], v.splat(0.0))
        with T.serial(self.pairs) as d:
            for a in range(height):
                key = v.broadcast(self.key[tuple(self._key_pair(row[a], d))])
                for k in range(vectors):
                    query = self.query_pairs.vload([g + k, d, 0], dtype="int32x16")
                    v.store(acc, [a, k, 0], bf16.dot(v.load(acc, [a, k, 0]), query, key))
        for a in range(height):
            for k in range(vectors):
                self._finish_score(v.load(acc, [a, k, 0]), at + a, g, k, best, edge)

    def _finish_score(self, score: Any, j: Any, g: Any, k: int, best: Any, edge: bool) -> None:
        """Store the scores of key ``j`` of the block from their products: scaled, with what is added, masked."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, v = self.w, self.v
        if not self.scaled_late:
            score = score * v.splat(self.factor)
        if self.pair_terms:
            score = score + v.load(self.p, self._s(g + k, j))
        if self.key_terms:
            score = score + v.broadcast(self.terms[j])
        if edge and w.causal and not self.general:
            for allowed in self._visible(g + k, v.broadcast(self.start + j)):
                score = tirx.Select(allowed, score, v.splat(MASKED))
        score = T.bind(score)
        v.store(self.p, self._s(g + k, j), score)
        if not self.general:
            v.store(best, [k, 0], T.max(v.load(best, [k, 0]), score))

    def _softmax(self, low: Any, high: Any, g: Any, vectors: int, best: Any, first: bool) -> None:
        """As inherited, in pairs: the exponentials of keys 2n and 2n + 1 go where the score of key n was."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        v, lanes = self.v, self.lanes
        scale = v.splat(self.factor if self.scaled_late else 1.0)
        if self.adds_weights:
            added = T.sblock_alloc_buffer((vectors, lanes), "float32", scope="local")
        if not isinstance(self.keys, int):
            with T.If(self.keys % 2 == 1), T.Then():
                for k in range(vectors):
                    v.store(self.p, self._s(g + k, self.keys), v.splat(MASKED))
        elif self.keys % 2:
            for k in range(vectors):
                v.store(self.p, self._s(g + k, self.keys), v.splat(MASKED))
        tops = []
        for k in range(vectors):
            at = (g + k) * lanes
            if not first:
                factor = tirx.const(self.factor if self.scaled_late else 1.0, "float32")
                with T.vectorized(lanes) as lane:
                    shrink = tmath.exp2_nonpositive((self.top[at + lane] - best[k, lane]) * factor)
                    T.buffer_store(self.alpha, shrink, [at + lane])
            v.store(self.top, [at], v.load(best, [k, 0]))
            if self.adds_weights:
                v.store(added, [k, 0], v.splat(0.0))
            tops.append(T.bind(v.load(best, [k, 0]) * scale))
        low, high = low // 2, (high + 1) // 2
        with T.serial(high - low) as n:
            j = low + n
            for k in range(vectors):
                # Sums are of the rounded weights: what rounding does to all of them alike cancels.
                powers = [bf16.exp2(v.load(self.p, self._s(g + k, j * 2 + i)) * scale - tops[k]) for i in range(2)]
                pair = T.bind(bf16.round_to_pairs(*powers))
                v.store(self.p, self._s(g + k, j), tirx.reinterpret("float32x16", pair))
                if self.adds_weights:
                    ones = v.broadcast(tirx.const(ONES, "int32"))
                    v.store(added, [k, 0], bf16.dot(v.load(added, [k, 0]), pair, ones))
        for k in range(vectors):
            at = (g + k) * lanes
            total = v.load(added, [k, 0]) if self.adds_weights else v.splat(0.0)
            if not first:
                total = total + v.load(self.total, [at]) * v.load(self.alpha, [at])
            if self.adds_weights or not first:
                v.store(self.total, [at], total)

    def _out_tile(self, low: Any, high: Any, t: Any, dims: range, first: bool) -> None:
        from tvm import tirx
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
        low, high = low // 2, (high + 1) // 2
        with T.serial(high - low) as n:
            j = low + n
            for a in range(rows):
                weight = self.p[tuple(self._s(t // (lanes // rows), j, t % (lanes // rows) * rows + a))]
                pair = v.broadcast(tirx.reinterpret("int32", weight))
                for e, dim in enumerate(dims):
                    value = self.value_pairs.vload([j, dim * lanes], dtype="int32x16")
                    v.store(acc, [a, e, 0], bf16.dot(v.load(acc, [a, e, 0]), value, pair))
        for a in range(rows):
            for e, dim in enumerate(dims):
                v.store(self.out, [t * rows + a, dim * lanes], v.load(acc, [a, e, 0]))


class AttentionWidenedKernel(_RoundedResults):
    """The float32 kernel on bfloat16 operands: each block of keys and values is made float32 before it is used.

    For CPUs whose multiply-adds are faster than their products of pairs. The copies are read once for each vector of
    queries, so they cost little, and lie side by side whatever the operands' strides.
    """

    def _place(self, b: Any, h: Any, *rest: Any) -> None:
        super()._place(b, h, *rest)
        names = ("qkv",) * 3 if self.w.packed else ("query", "key", "value")
        self.query, self.key, self.value = (bf16.Widened(self.operand[name]) for name in names)

    def _block(self) -> None:
        from tvm.tirx.script.builder import ir as T

        # A vector more than a row has: rows a multiple of 4 KiB apart would fight for the same lines of the cache.
        shape = (self.key_block, (self.dim_vectors | 1) * self.lanes)
        self.wide_keys, self.wide_values = (T.sblock_alloc_buffer(shape, "float32") for _ in range(2))
        super()._block()

    def _key_block(self, start: Any, keys: Any, first: bool) -> None:
        from tvm.tirx.script.builder import ir as T

        with T.serial(keys) as j:
            self._widen(self.key, self._key_at, self.wide_keys, start + j, j)
            self._widen(self.value, self._value_at, self.wide_values, start + j, j)
        super()._key_block(start, keys, first)

    def _widen(self, source: Any, place: Callable[[Any, Any], list[Any]], wide: Any, row: Any, j: Any) -> None:
        """Row ``row`` of what lies at ``place`` to row ``j`` of its block; zeros past the head's end."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        v, lanes = self.v, self.lanes
        whole, left = divmod(self.w.head_dim, lanes)
        for dim in range(whole):
            v.store(wide, [j, dim * lanes], v.load(source, place(row, dim * lanes)))
        for lane in range(lanes if left else 0):
            e = whole * lanes + lane
            value = source[tuple(place(row, e))] if lane < left else tirx.const(0.0, "float32")
            T.buffer_store(wide, value, [j, e])

    def _key(self, j: Any, d: Any) -> Any:
        return self.wide_keys[j - self.start, d]

    def _value(self, j: Any, dim: int) -> Any:
        return self.v.load(self.wide_values, [j - self.start, dim * self.lanes])
