"""The bfloat16 attention kernels on AMX: both products by tiles, softmax and all else as inherited."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from attntune.ops.attention import Attention
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu import amx, bf16
from attntune.templates.cpu.attention_bf16_kernel import ONES, AttentionBf16Kernel

#: Keys whose weights are one tile.
TILE_KEYS = 2 * amx.PAIRS


def supports(w: Attention, target: Target) -> bool:
    """Whether the head is whole tiles and ``target`` has AMX."""
    return amx.available(target) and w.head_dim % (2 * amx.PAIRS) == 0


class AttentionAmxKernel(AttentionBf16Kernel):
    """Scores of 16 keys, read as they lie, by vectors of transposed queries; then, at once, the results of those.

    Weights lie by pairs of keys, one query a lane. Past the last key of a tile, weights and values are zero. A tile of
    ones adds the weights up.
    """

    tallest = amx.ROWS
    adds_weights = False
    totals: str
    """What the tile of ones is multiplied with, see :class:`amx.Tiles`."""

    def __init__(self, w: Attention, target: Target, config: Config) -> None:
        super().__init__(w, target, config)
        self.value_rows = math.ceil(self.key_block / TILE_KEYS) * amx.PAIRS
        self.p_vectors = self.vectors
        widths = {len(dims) for dims in self._passes()}
        tiles = {*map(self._score_tiles, range(1, self.vectors + 1)), *map(self._result_tiles, widths)}
        self.code = bf16.LLVM_IR + amx.llvm_ir(tiles)

    def _score_tiles(self, vectors: int) -> amx.Tiles:
        return amx.Tiles(amx.ROWS, vectors, self.totals)

    @abstractmethod
    def _result_tiles(self, dims: int) -> amx.Tiles:
        """The tiles of ``dims`` vectors of the results of a vector of queries."""

    def _tile_keys(self, vectors: int) -> int:
        return amx.ROWS

    def _s(self, vector: Any, j: Any, lane: Any = 0) -> list[Any]:
        return super()._s(vector - self.group, j, lane)

    def _block(self) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        lanes = self.lanes
        self.edge_keys = T.sblock_alloc_buffer((amx.ROWS, self.pairs), "int32")
        self.products = T.sblock_alloc_buffer((amx.ROWS, self.vectors, lanes), "float32")
        self.ones = T.sblock_alloc_buffer((lanes,), "int32")
        self.v.store(self.ones, [0], self.v.broadcast(tirx.const(ONES, "int32")))
        # All tiles but those of totals have all their rows, so one description of the registers serves them all.
        self._score_tiles(self.vectors).begin()
        super()._block()
        amx.end()

    # -- one block of keys ---------------------------------------------------------------------------------------------

    def _arrange_values(self, keys: Any) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        paired = (keys + 1) // 2
        zeros = tirx.Broadcast(tirx.const(0, "int32"), self.lanes)
        with T.serial((amx.PAIRS - paired % amx.PAIRS) % amx.PAIRS) as n:
            for dim in range(self.dim_vectors):
                self.v.store(self.value_pairs, [paired + n, dim * self.lanes], zeros)

    def _group(self, g: Any, vectors: int, first: bool) -> None:
        from tvm.tirx.script.builder import ir as T

        self.group = g
        super()._group(g, vectors, first)
        with T.serial(vectors) as k:
            low, high = self._within((g + k) * self.lanes, self.lanes)
            begin = self._known(low // TILE_KEYS) if self.w.window else 0
            tiles = (high + (TILE_KEYS - 1)) // TILE_KEYS - begin
            self._weigh(g + k, begin, tiles if isinstance(tiles, int) else self._known(T.max(tiles, 0)), first)

    def _score_tile(self, at: Any, height: int, g: Any, vectors: int, best: Any, edge: bool) -> None:
        from tvm.tirx.script.builder import ir as T

        v, lanes = self.v, self.lanes
        at = at if isinstance(at, int) else T.bind(at)
        tiles = self._score_tiles(vectors)
        if edge:
            # Copied, since the last row may be the operand's last.
            with T.serial(amx.ROWS) as a:
                row = T.bind(self.start + T.min(at + a, self.keys - 1))
                for part in range(self.pairs // lanes):
                    index = self._key_pair(row, part * lanes)
                    v.store(self.edge_keys, [a, part * lanes], self.key.vload(index, dtype="int32x16"))
        tiles.zero()
        for n in range(self.pairs // amx.PAIRS):
            pair = n * amx.PAIRS
            if edge:
                tiles.load(tiles.left(0), self.edge_keys[0, pair], 4 * self.pairs)
            else:
                index = self._key_pair(self.start + at, pair)
                tiles.load(tiles.left(0), self.key[tuple(index)], 4 * self._row_pairs())
            for k in range(vectors):
                tiles.load(tiles.right(k), self.query_pairs[g + k, pair, 0], 4 * lanes)
                tiles.dot(0, k)
        if not self.scaled_late:
            for k in range(vectors):
                tiles.store(tiles.sums(0, k), self.products[0, k, 0], 4 * lanes * self.vectors)
            with T.serial(amx.ROWS) as a:
                for k in range(vectors):
                    self._finish_score(v.load(self.products, [a, k, 0]), at + a, g, k, best, edge)
            return
        # Nothing is added: scores are where they belong.
        for k in range(vectors):
            tiles.store(tiles.sums(0, k), self.p[tuple(self._s(g + k, at))], 4 * lanes)
        with T.serial(amx.ROWS) as a:
            for k in range(vectors):
                place = self._s(g + k, at + a)
                if edge and self.w.causal:
                    self._finish_score(v.load(self.p, place), at + a, g, k, best, edge)
                else:
                    v.store(best, [k, 0], T.max(v.load(best, [k, 0]), v.load(self.p, place)))

    def _row_pairs(self) -> int:
        """Pairs from one key to the next."""
        return int(self.key.shape[-1])

    def _softmax(self, low: Any, high: Any, g: Any, vectors: int, best: Any, first: bool) -> None:
        super()._softmax(low, high, g, vectors, best, first)
        low, high = low // 2, (high + 1) // 2
        if self.w.window:
            self._no_weights(low // amx.PAIRS * amx.PAIRS, low % amx.PAIRS, g, vectors)
        self._no_weights(high, (amx.PAIRS - high % amx.PAIRS) % amx.PAIRS, g, vectors)

    def _no_weights(self, pair: Any, count: Any, g: Any, vectors: int) -> None:
        """Zeros for ``count`` pairs of keys from ``pair`` on."""
        from tvm.tirx.script.builder import ir as T

        with T.serial(count) as n:
            for k in range(vectors):
                self.v.store(self.p, self._s(g + k, pair + n), self.v.splat(0.0))

    def _results(self, first: bool) -> None:
        """Nothing: every group of queries has its own already."""

    @abstractmethod
    def _weigh(self, g: Any, begin: Any, count: Any, first: bool) -> None:
        """The results of a vector of queries: ``count`` tiles of keys from the ``begin``-th on."""


class TurnedWeightsKernel(AttentionAmxKernel):
    """Weights are transposed, 32 keys at a time, to be the left factor; pairs of values are the right one."""

    totals = "rows"

    def _result_tiles(self, dims: int) -> amx.Tiles:
        return amx.Tiles(amx.ROWS, dims, self.totals)

    def _block(self) -> None:
        from tvm.tirx.script.builder import ir as T

        lanes = self.lanes
        self.turned = T.sblock_alloc_buffer((self.value_rows // amx.PAIRS, lanes, lanes), "float32")
        super()._block()

    def _weigh(self, g: Any, begin: Any, count: Any, first: bool) -> None:
        from tvm.tirx.script.builder import ir as T

        v = self.v
        with T.serial(count) as n:

            def load(row: int) -> Any:
                return v.load(self.p, self._s(g, (begin + n) * amx.PAIRS + row))

            def store(column: int, vector: Any) -> None:
                v.store(self.turned, [n, column, 0], vector)

            v.transpose(load, store)
        for dims in self._passes():
            self._weigh_pass(g, begin, count, dims, first)

    def _weigh_pass(self, g: Any, begin: Any, count: Any, dims: range, first: bool) -> None:
        from tvm.tirx.script.builder import ir as T

        v, lanes = self.v, self.lanes
        row_bytes, summed = 4 * self.padded_dim, dims[0] == 0
        tiles = self._result_tiles(len(dims))
        if first:
            tiles.zero()
        else:
            with T.serial(lanes) as a:
                shrink = T.bind(v.broadcast(self.alpha[g * lanes + a]))
                for dim in dims:
                    place = [g * lanes + a, dim * lanes]
                    v.store(self.out, place, v.load(self.out, place) * shrink)
            for e, dim in enumerate(dims):
                tiles.load(tiles.sums(0, e), self.out[g * lanes, dim * lanes], row_bytes)
        if summed:
            tiles.load(tiles.ones, self.ones[0], 4)
            tiles.load(tiles.total, self.total[g * lanes], 4)
        with T.serial(count) as n:
            tiles.load(tiles.left(0), self.turned[n, 0, 0], 4 * lanes)
            for e, dim in enumerate(dims):
                tiles.load(tiles.right(e), self.value_pairs[(begin + n) * amx.PAIRS, dim * lanes], row_bytes)
                tiles.dot(0, e)
            if summed:
                tiles.add_up(tiles.left(0))
        for e, dim in enumerate(dims):
            tiles.store(tiles.sums(0, e), self.out[g * lanes, dim * lanes], row_bytes)
        if summed:
            tiles.store(tiles.total, self.total[g * lanes], 4)


class TurnedValuesKernel(AttentionAmxKernel):
    """Values are transposed, once for a block of queries, to be the left factor, and results at its end.

    This pays where there are many queries in a block and many keys in all: transposing takes as long as the weights'
    of as many queries as the head is wide.
    """

    totals = "panels"

    def _result_tiles(self, dims: int) -> amx.Tiles:
        return amx.Tiles(dims * amx.ROWS, 1, self.totals)

    def _block(self) -> None:
        from tvm.tirx.script.builder import ir as T

        lanes = self.lanes
        shape = (self.value_rows // amx.PAIRS, self.dim_vectors, lanes, lanes)
        self.turned_values = T.sblock_alloc_buffer(shape, "int32")
        self.rounded = T.sblock_alloc_buffer((lanes, self.padded_dim), "uint16")
        super()._block()

    def _arrange_values(self, keys: Any) -> None:
        from tvm.tirx.script.builder import ir as T

        super()._arrange_values(keys)
        v = self.v
        with T.serial((keys + (TILE_KEYS - 1)) // TILE_KEYS) as n, T.serial(self.dim_vectors) as dim:

            def load(row: int) -> Any:
                return self.value_pairs.vload([n * amx.PAIRS + row, dim * self.lanes], dtype="int32x16")

            def store(column: int, vector: Any) -> None:
                v.store(self.turned_values, [n, dim, column, 0], vector)

            v.transpose(load, store)

    def _out_shape(self) -> tuple[int, ...]:
        return (self.block_vectors, self.padded_dim, self.lanes)

    def _clear_out(self) -> None:
        from tvm.tirx.script.builder import ir as T

        with T.serial(self.count) as g, T.serial(self.padded_dim) as e:
            self.v.store(self.out, [g, e, 0], self.v.splat(0.0))

    def _weigh(self, g: Any, begin: Any, count: Any, first: bool) -> None:
        from tvm.tirx.script.builder import ir as T

        v, lanes = self.v, self.lanes
        line = 4 * lanes
        if not first:
            shrink = T.bind(v.load(self.alpha, [g * lanes]))
            with T.serial(self.padded_dim) as e:
                v.store(self.out, [g, e, 0], v.load(self.out, [g, e, 0]) * shrink)
        for dims in self._passes():
            summed = dims[0] == 0
            tiles = self._result_tiles(len(dims))
            if first:
                tiles.zero()
            else:
                for i, dim in enumerate(dims):
                    tiles.load(tiles.sums(i, 0), self.out[g, dim * lanes, 0], line)
            if summed:
                tiles.load(tiles.ones, self.ones[0], line)
                tiles.load(tiles.total, self.total[g * lanes], line)
            with T.serial(count) as n:
                tiles.load(tiles.right(0), self.p[tuple(self._s(g, (begin + n) * amx.PAIRS))], line)
                for i, dim in enumerate(dims):
                    tiles.load(tiles.left(i), self.turned_values[begin + n, dim, 0, 0], line)
                    tiles.dot(i, 0)
                if summed:
                    tiles.add_up(tiles.right(0))
            for i, dim in enumerate(dims):
                tiles.store(tiles.sums(i, 0), self.out[g, dim * lanes, 0], line)
            if summed:
                tiles.store(tiles.total, self.total[g * lanes], line)

    def _finish(self) -> None:
        from tvm.tirx.script.builder import ir as T

        v, lanes = self.v, self.lanes
        with T.serial(self.count) as g:
            at = g * lanes
            tiny = v.splat(1e-30)
            inverse = T.bind(v.splat(1.0) / T.max(v.load(self.total, [at]), tiny))
            with T.serial(self.dim_vectors) as dim:

                def load(row: int) -> Any:
                    return v.load(self.out, [g, dim * lanes + row, 0]) * inverse

                def store(column: int, vector: Any) -> None:
                    v.store(self.rounded, [column, dim * lanes], bf16.round_to_bits(vector))

                v.transpose(load, store)
            with T.serial(T.min(lanes, self.queries - at)) as i:
                for dim in range(self.dim_vectors):
                    bits = self.rounded.vload([i, dim * lanes], dtype="uint16x16")
                    v.store(self.result, self._at(self.first + at + i, dim * lanes), bits)
