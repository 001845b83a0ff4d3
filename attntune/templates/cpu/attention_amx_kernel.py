"""The bfloat16 attention kernel on AMX: both products by tiles, softmax and all else as inherited."""

from __future__ import annotations

import math
from typing import Any

from attntune.ops.attention import Attention
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu import amx, bf16
from attntune.templates.cpu.attention_bf16_kernel import AttentionBf16Kernel

#: Vectors of the head whose sums have registers, beside weights and values.
_MOST_DIMS = 6
#: Keys whose weights are one tile.
_TILE_KEYS = 2 * amx.PAIRS


def supports(w: Attention, target: Target) -> bool:
    """Whether the head is whole tiles and ``target`` has AMX."""
    return amx.available(target) and w.head_dim % (2 * amx.PAIRS) == 0


class AttentionAmxKernel(AttentionBf16Kernel):
    """Scores of 16 keys, read as they lie, by vectors of transposed queries; results of 16 queries by pairs of values.

    Weights lie by pairs of keys, one query a lane: they are transposed, 32 keys at a time, to be the left factor. Past
    the last key of a tile, weights and values are zero.
    """

    tallest = amx.ROWS

    def __init__(self, w: Attention, target: Target, config: Config) -> None:
        super().__init__(w, target, config)
        self.value_rows = math.ceil(self.key_block / _TILE_KEYS) * amx.PAIRS
        passes = math.ceil(self.dim_vectors / _MOST_DIMS)
        self.pass_dims = math.ceil(self.dim_vectors / passes)
        last = self.dim_vectors % self.pass_dims
        widths = {*range(1, self.vectors + 1), self.pass_dims, *([last] if last else [])}
        self.code = bf16.LLVM_IR + amx.llvm_ir(amx.Tiles(amx.ROWS, width) for width in widths)

    def _tile_keys(self, vectors: int) -> int:
        return amx.ROWS

    def _block(self) -> None:
        from tvm.tirx.script.builder import ir as T

        lanes = self.lanes
        self.edge_keys = T.sblock_alloc_buffer((amx.ROWS, self.pairs), "int32")
        self.products = T.sblock_alloc_buffer((amx.ROWS, self.vectors, lanes), "float32")
        self.turned = T.sblock_alloc_buffer((self.value_rows // amx.PAIRS, lanes, lanes), "float32")
        # All tiles here have all their rows, so one description of the registers serves them all.
        amx.Tiles(amx.ROWS, self.vectors).begin()
        super()._block()
        amx.end()

    # -- one block of keys ---------------------------------------------------------------------------------------------

    def _key_block(self, start: Any, keys: Any, first: bool) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        paired = (keys + 1) // 2
        missing = (amx.PAIRS - paired % amx.PAIRS) % amx.PAIRS
        zeros = tirx.Broadcast(tirx.const(0, "int32"), self.lanes)
        with T.serial(missing) as n:
            for dim in range(self.dim_vectors):
                self.v.store(self.value_pairs, [paired + n, dim * self.lanes], zeros)
        super()._key_block(start, keys, first)

    def _score_tile(self, at: Any, height: int, g: Any, vectors: int, best: Any, edge: bool) -> None:
        from tvm.tirx.script.builder import ir as T

        v, lanes = self.v, self.lanes
        at = at if isinstance(at, int) else T.bind(at)
        tiles = amx.Tiles(amx.ROWS, vectors)
        if edge:
            # Copied, since the last row may be the operand's last.
            with T.serial(amx.ROWS) as a:
                row = T.bind(self.start + T.min(at + a, self.keys - 1))
                for part in range(self.pairs // lanes):
                    index = self._pair_at(self.kv_head, row, part * lanes, self.key_column)
                    v.store(self.edge_keys, [a, part * lanes], self.key.vload(index, dtype="int32x16"))
        tiles.zero()
        for n in range(self.pairs // amx.PAIRS):
            pair = n * amx.PAIRS
            if edge:
                tiles.load(tiles.left(0), self.edge_keys[0, pair], 4 * self.pairs)
            else:
                index = self._pair_at(self.kv_head, self.start + at, pair, self.key_column)
                tiles.load(tiles.left(0), self.key[tuple(index)], 4 * self._row_pairs())
            for k in range(vectors):
                tiles.load(tiles.right(k), self.query_pairs[g + k, pair, 0], 4 * lanes)
                tiles.dot(0, k)
        for k in range(vectors):
            tiles.store(tiles.sums(0, k), self.products[0, k, 0], 4 * lanes * self.vectors)
        with T.serial(amx.ROWS) as a:
            for k in range(vectors):
                self._finish_score(v.load(self.products, [a, k, 0]), at + a, g, k, best, edge)

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
        from tvm.tirx.script.builder import ir as T

        v, lanes = self.v, self.lanes
        with T.serial(self.count) as g:
            low, high = self._within(g * lanes, lanes)
            begin = self._known(low // _TILE_KEYS) if self.w.window else 0
            tiles = (high + (_TILE_KEYS - 1)) // _TILE_KEYS - begin
            tiles = tiles if isinstance(tiles, int) else self._known(T.max(tiles, 0))
            with T.serial(tiles) as n:

                def load(row: int) -> Any:
                    return v.load(self.p, self._s(g, (begin + n) * amx.PAIRS + row))

                def store(column: int, vector: Any) -> None:
                    v.store(self.turned, [n, column, 0], vector)

                v.transpose(load, store)
            for e in range(0, self.dim_vectors, self.pass_dims):
                self._weigh(g, begin, tiles, range(e, min(e + self.pass_dims, self.dim_vectors)), first)

    def _weigh(self, g: Any, begin: Any, count: Any, dims: range, first: bool) -> None:
        """``dims`` vectors of the results of a vector of queries: ``count`` tiles of keys from the ``begin``-th on."""
        from tvm.tirx.script.builder import ir as T

        v, lanes = self.v, self.lanes
        row_bytes = 4 * self.padded_dim
        tiles = amx.Tiles(amx.ROWS, len(dims))
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
        with T.serial(count) as n:
            tiles.load(tiles.left(0), self.turned[n, 0, 0], 4 * lanes)
            for e, dim in enumerate(dims):
                tiles.load(tiles.right(e), self.value_pairs[(begin + n) * amx.PAIRS, dim * lanes], row_bytes)
                tiles.dot(0, e)
        for e, dim in enumerate(dims):
            tiles.store(tiles.sums(0, e), self.out[g * lanes, dim * lanes], row_bytes)
