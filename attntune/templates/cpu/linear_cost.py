"""What a linear kernel is estimated to cost: the model behind the template's default; ``linear.py`` has the ladders."""

from __future__ import annotations

import math

from attntune.ops.linear import Linear
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu import amx
from attntune.templates.cpu.linear_kernel import FEW_ROWS
from attntune.templates.cpu.products import byte_product

#: Sums that run side by side before an addition's latency is hidden.
LATENCY = 8
#: Up to so many in_features small blocks of AMX tiles are faster than large ones.
_SHORT_FEATURES = 768


def pieces(extent: int, size: int) -> list[tuple[int, int]]:
    """Pieces of ``extent`` and how many there are of each: whole ones, and the tail."""
    whole, tail = divmod(extent, size)
    return [(size, whole)] * bool(whole) + [(tail, 1)] * bool(tail)


def row_order_cost(w: Linear, config: Config, target: Target) -> float:
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
    if not even or block < 8 * config.integer("tile_rows"):
        return 1.03
    return 1.0 + 0.001 * abs(math.log2(block / 128))


def step_cost(rows: int, vectors: int, chains: int, target: Target) -> float:
    """Cycles, relative, of one reduction step of a tile.

    A tile issues rows·vectors multiply-adds for rows + vectors loads, of which two hide behind one multiply-add; fewer
    than eight sums side by side leave the addition's latency bare, and a tile that nearly fills the registers leaves
    the compiler none to schedule with. A panel comes from the second-level cache, whose speed does not double where
    multiply-adds do.
    """
    multiply_adds, loads = rows * vectors, rows + vectors
    panel = 0.25 * vectors * (target.fmas_per_cycle - 1)
    started = 0.75 * loads
    crowded = (multiply_adds * chains + vectors) / target.vector_registers > 0.86
    if target.vector_registers < 32:
        # AVX2: a broadcast counts twice, no register is too many. (2 cores of Zen 3, 240×384→1152, GFLOP/s: 170 with
        # 4×3, 164 with 6×2, 117 with 8×1, 98 with 12×1.)
        started, crowded = 0.9 * (2 * rows + vectors), False
    return (max(multiply_adds, started, LATENCY / chains) + 0.05 * loads + panel) * (1.15 if crowded else 1.0)


def loops_over_rows(target: Target, bits: int) -> bool:
    """Whether a group's weights, unpacked, stay in registers for one row after another."""
    return target.vector_registers < 32 and byte_product(target, bits).instructions <= 2


def bytes_step_cost(rows: int, vectors: int, target: Target, bits: int, row_loop: bool) -> float:
    """Instructions, relative, of one word of 4-bit weights a lane or two of 8, x in 8 bits.

    Two products an element of the tile, and its share of what a group's sums take in float32; unpacking and the group's
    scales, once a vector; loads of x. Both sums, as integers and in float32, stay in 32 registers; of 16 the latter go
    to the stack. (512×576→960, GFLOP/s. 2 cores of Emerald Rapids, 4 bits: 519 with 5×2, 505 with 6×3, 497 with 6×2,
    408 with 8×1. Of Zen 3: 320 with 5×2, 317 with 6×2, 300 with 8×1; 8 bits: 208 with 4×2, 201 with 5×2, 196 with 8×1,
    189 with 4×3.)
    """
    product = byte_product(target, bits)
    each = 1.0 + 2.0 * product.instructions
    if row_loop:  # x is loaded for each vector; of few or many vectors more or less in the second-level cache
        return (each + 1.5) * rows * vectors * (1.0 + 0.01 * abs(math.log2(vectors / 4))) + 4.5 * vectors
    if target.vector_registers < 32:
        crowded = rows * vectors + 2 * vectors > 12
    else:
        crowded = (2 * rows * vectors + vectors) / target.vector_registers > 0.75
    return (each * rows * vectors + 4.5 * vectors + 1.5 * rows) * (1.15 if crowded else 1.0)


def amx_step_cost(rows: int, panels: int) -> float:
    """Cycles, relative, of one reduction step of a block of AMX tiles: a product takes 16, loading a tile 8."""
    across = math.ceil(rows / amx.ROWS)
    return max(16.0 * across * panels, 8.0 * (across + panels)) + 0.5 * (across + panels)


def amx_order_cost(w: Linear, config: Config, target: Target) -> float:
    """How much worse than the best block of tiles and order of rows, a little.

    A wide block reads less of x, but while its sums are written no product begins; a small one's epilogue overlaps with
    the next one's products. What that is worth depends on how long products take: in_features. Rows are read once a
    column, from the second-level cache as long as they take a part of it.
    """
    wide = 2 if w.activation not in ("", "relu") or w.in_features <= _SHORT_FEATURES or w.rows <= FEW_ROWS else 4
    panels = config.integer("tile_vectors") * (2 if w.gated else 1)
    shape = 1.0 + 0.1 * abs(math.log2(panels / wide)) + 0.1 * (config.integer("tile_rows") > amx.ROWS)
    block = config.integer("row_block")
    read = 2 * w.in_features * (block or w.rows)
    return (
        shape * (1.2 if read > target.l2_bytes // 4 else 1.0) * (1.01 + 0.001 * math.log2(256 / block) if block else 1)
    )


def stream_cost(panels: int, config: Config) -> float:
    """How much longer than with many streams the weight takes to come from memory.

    A core that reads several panels at a time, each from where it ended before, keeps more of the hardware's
    prefetchers busy. (Rows 1, in 576, out 1536, float32, GB/s: 24 with one panel, 29 with four side by side.)
    """
    few_or_many = {1: 1.15, 2: 1.04}.get(panels, 1.0 if panels <= LATENCY else 1.2)
    return few_or_many * (1.0 if config.get("apart", False) or panels == 1 else 1.01)
