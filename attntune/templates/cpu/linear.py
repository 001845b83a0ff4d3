"""Linear on CPUs: a register tile over a weight packed into vector-wide panels.

The weight is packed once to (out_features/lanes, in_features, lanes). A panel as wide as one vector register serves
every tile width, so all kernels that share a weight share one copy of it.

Loop nest, outermost first:

    parallel  column tiles          tile_vectors wide; each core streams its own panels (row_block = 0), or
              row blocks × columns  each core keeps its own rows (row_block > 0)
    serial    row tiles             tile_rows high, split into a main part and a tail by loop partition
    serial    in_features           k_unroll at a time
    unrolled  tile_rows × tile_vectors accumulators, in registers
    epilogue  on the registers; under an activation, on a copy of the tile in the first-level cache

Ladder (rows 128, in 384, out 1536, float32; 2 cores of Zen 4, measured peak 215 GFLOP/s):

    plain TE, parallel + vectorised                          about  20 GFLOP/s
    + weight packed to the tile's width, 8×32 register tile        205
    + panels one vector wide (shared by all tiles)                 205   (no loss, so layouts never conflict)
    + row tail by loop partition, rows 197: 200 → 213
    with GELU in the epilogue, unrolled over the tile              105   (accumulators spilled; 0.6 s to compile)
    + polynomials that share intermediate values, tile staged      203   (0.07 s)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from attntune.ops.linear import Linear
from attntune.ops.workload import TensorSpec, Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.template import Packing, ScheduleTemplate

_ROW_TILES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16)
_COLUMN_VECTORS = (1, 2, 3, 4, 5, 6)


class LinearCPU(ScheduleTemplate):
    """Register-tiled matrix product with the epilogue applied while the tile is in registers."""

    op: ClassVar[str] = "linear"
    kind: ClassVar[str] = "cpu"

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Tile height and width in registers, reduction unrolling, and which loop is parallel."""
        w = _linear(workload)
        lanes = target.lanes(w.dtype)
        vectors = math.ceil(w.out_features / lanes)
        rows = tuple(t for t in _ROW_TILES if t <= w.rows) or (1,)
        columns = tuple(v for v in _COLUMN_VECTORS if vectors % v == 0)
        blocks = tuple(b for b in (0, 32, 64, 128, 256) if b == 0 or b < w.rows)
        knobs = [
            Knob("tile_rows", rows),
            Knob("tile_vectors", columns),
            Knob("k_unroll", (1, 2, 4, 8)),
            Knob("row_block", blocks),
        ]

        def fits(config: Config) -> bool:
            tile_rows, tile_vectors = config.integer("tile_rows"), config.integer("tile_vectors")
            # One register is left for what is broadcast; a tile that fills them all spills in the inner loop.
            in_registers = tile_rows * tile_vectors + tile_vectors < target.vector_registers
            block = config.integer("row_block")
            unrolled = tile_rows * tile_vectors * config.integer("k_unroll") <= 256
            return in_registers and unrolled and (block == 0 or block >= tile_rows)

        return ConfigSpace(knobs, [fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """The tile with the best ratio of multiply-adds to loads, then the least waste in tails."""
        w = _linear(workload)
        lanes = target.lanes(w.dtype)
        space = self.space(workload, target)

        def cost(config: Config) -> tuple[float, str]:
            rows, vectors = config.integer("tile_rows"), config.integer("tile_vectors")
            tiles = math.ceil(w.out_features / (vectors * lanes))
            column_waste = tiles * vectors * lanes / w.out_features
            imbalance = math.ceil(tiles / target.cores) * target.cores / tiles
            if config.integer("row_block"):
                row_blocks = math.ceil(w.rows / config.integer("row_block"))
                work = tiles * row_blocks
                imbalance = math.ceil(work / target.cores) * target.cores / work
            full, tail = divmod(w.rows, rows)
            heights = [(rows, full), (tail, 1)] if tail else [(rows, full)]
            per_row = sum(_step_cost(height, vectors, target) * times for height, times in heights) / w.rows
            per_element = per_row / vectors * column_waste * imbalance * (1.02 if tail else 1.0)
            unrolling = 1 + 0.01 * abs(config.integer("k_unroll") - 4)
            if _staged(w) and vectors < 4:
                # Short rows leave the activation's loop few vectors to overlap: 8×3 was 7 % slower than 4×4 and 4×6.
                unrolling *= 1.1
            return per_element * unrolling * _row_order_cost(w, config, target), config.key()

        return min(space, key=cost)

    def pack(self, workload: Workload, target: Target) -> Mapping[str, Packing]:
        """Weight to (ceil(out_features/lanes), in_features, lanes), zero in the columns past out_features."""
        w = _linear(workload)
        lanes = target.lanes(w.dtype)
        panels = math.ceil(w.out_features / lanes)

        def apply(weight: np.ndarray) -> np.ndarray:
            padded = np.zeros((panels * lanes, w.in_features), weight.dtype)
            padded[: w.out_features] = weight
            return np.ascontiguousarray(padded.reshape(panels, lanes, w.in_features).transpose(0, 2, 1))

        return {"weight": Packing(TensorSpec("weight", (panels, w.in_features, lanes), w.dtype, constant=True), apply)}

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description of the loop nest."""
        import tvm
        from tvm import te
        from tvm.s_tir import Schedule

        w = _linear(workload)
        lanes = target.lanes(w.dtype)
        tile_rows, vectors = config.integer("tile_rows"), config.integer("tile_vectors")
        panels = math.ceil(w.out_features / lanes)
        weight = te.placeholder((panels, w.in_features, lanes), w.dtype, "weight")
        tensors = w.expression(weight, lambda j, k: weight[j // lanes, k, j % lanes], columns=panels * lanes)
        function = te.create_prim_func(tensors).with_attr("global_symbol", "main")
        sch = Schedule(tvm.IRModule({"main": function}))
        matmul, y = sch.get_sblock("matmul"), sch.get_sblock("y")
        # Under an activation the tile leaves the registers first: unrolled over a whole tile, a polynomial's constants
        # and temporaries push accumulators out of registers in the inner loop, at half the speed.
        copy = sch.cache_write(matmul, 0, "local") if _staged(w) else None
        if copy is None:
            sch.set_scope(matmul, 0, "local")

        i, j, k = sch.get_loops(matmul)
        column, vector, lane = sch.split(j, [None, vectors, lanes])
        k_outer, k_inner = sch.split(k, [None, config.integer("k_unroll")])
        if config.integer("row_block"):
            # Blocks are a multiple of the tile, so that only the last block of all has a tail.
            tiles = math.ceil(config.integer("row_block") / tile_rows)
            block, tile, row = sch.split(i, [None, tiles, tile_rows])
            sch.reorder(block, column, tile, k_outer, k_inner, row, vector, lane)
            outer = sch.fuse(block, column)
        else:
            tile, row = sch.split(i, [None, tile_rows])
            sch.reorder(column, tile, k_outer, k_inner, row, vector, lane)
            outer = column
        writer = y if copy is None else copy
        sch.reverse_compute_at(writer, tile, preserve_unit_loops=True)
        if copy is not None:
            sch.reverse_compute_at(y, tile, preserve_unit_loops=True)
            sch.vectorize(sch.split(sch.get_loops(y)[-1], [None, lanes])[1])
        w_row, w_column = sch.get_loops(writer)[-2:]
        w_vector, w_lane = sch.split(w_column, [None, lanes])
        sch.vectorize(w_lane)
        sch.unroll(w_vector)
        sch.unroll(w_row)
        sch.vectorize(lane)
        for loop in (k_inner, row, vector):
            sch.unroll(loop)
        sch.parallel(outer)
        for loop, extent, factor in ((tile, w.rows, tile_rows), (k_outer, w.in_features, config.integer("k_unroll"))):
            if extent % factor:
                sch.annotate(loop, "pragma_loop_partition_hint", 1)
        init = sch.decompose_reduction(matmul, k_outer)
        *_, i_row, i_vector, i_lane = sch.get_loops(init)
        sch.vectorize(i_lane)
        sch.unroll(i_vector)
        sch.unroll(i_row)
        return sch.mod

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, registers in use, footprints per cache level, arithmetic intensity, tail waste and balance."""
        w = _linear(workload)
        lanes = target.lanes(w.dtype)
        item = 4.0 if w.dtype == "float32" else 2.0
        rows, vectors = config.integer("tile_rows"), config.integer("tile_vectors")
        tiles = math.ceil(w.out_features / (vectors * lanes))
        block = config.integer("row_block")
        work = tiles * (math.ceil(w.rows / block) if block else 1)
        panel = w.in_features * vectors * lanes * item
        block_bytes = min(w.rows, block or w.rows) * w.in_features * item
        return {
            **super().features(workload, target, config),
            "registers": (rows * vectors + vectors) / target.vector_registers,
            "chains": float(rows * vectors),
            "intensity": rows * vectors / (rows + vectors),
            "panel_in_l1": panel / target.l1d_bytes,
            "panel_in_l2": panel / target.l2_bytes,
            "rows_in_l2": block_bytes / target.l2_bytes,
            "row_tail": (w.rows % rows) / rows,
            "column_waste": tiles * vectors * lanes / w.out_features,
            "imbalance": math.ceil(work / target.cores) * target.cores / work,
            "log_rows": math.log2(w.rows),
            "log_in": math.log2(w.in_features),
            "log_out": math.log2(w.out_features),
        }


def _staged(w: Linear) -> bool:
    """Whether the tile goes through memory before its epilogue."""
    return bool(w.activation) and w.activation != "relu"


def _row_order_cost(w: Linear, config: Config, target: Target) -> float:
    """How much worse than the best order of rows and columns, a little.

    Column by column, each core streams its own part of the weight, which comes from memory in a model of many layers.
    Blocks of rows shared out evenly leave each row on the core whose cache holds it before and after; they pay once
    there is more to read of the rows than of the weight. (Rows 128, in 1536, out 384, weights cold: 811 µs by columns,
    870 by rows.)
    """
    block = config.integer("row_block")
    by_columns = w.rows * (w.in_features + w.out_features) <= 3 * w.in_features * w.out_features
    if block == 0 or by_columns:
        return 1.0 if block == 0 and by_columns else 1.03
    blocks = math.ceil(w.rows / block)
    even = blocks % target.cores == 0 and w.rows % block == 0
    whole_tiles = block % config.integer("tile_rows") == 0
    if not (even and whole_tiles) or block < 8 * config.integer("tile_rows"):
        return 1.03
    return 1.0 + 0.001 * abs(math.log2(block / 128))


def _step_cost(rows: int, vectors: int, target: Target) -> float:
    """Cycles, relative, of one reduction step of a tile.

    A tile issues rows·vectors multiply-adds for rows + vectors loads, of which two hide behind one multiply-add; fewer
    than eight independent chains leave the multiply-add's latency bare, and a tile that nearly fills the registers
    leaves the compiler none to schedule with.
    """
    multiply_adds, loads = rows * vectors, rows + vectors
    crowded = (multiply_adds + vectors) / target.vector_registers > 0.86
    return (max(multiply_adds, 0.75 * loads, 8.0) + 0.05 * loads) * (1.15 if crowded else 1.0)


def _linear(workload: Workload) -> Linear:
    assert isinstance(workload, Linear), f"expected a Linear workload, got {workload}"
    return workload
