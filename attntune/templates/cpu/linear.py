"""Linear on CPUs: a register tile over a weight packed into vector-wide panels, in float32, bfloat16, int8 or 4 bits.

The weight is packed once to (out_features/lanes, in_features/group, lanes·group), see ``arithmetic.py``. A panel as
wide as one vector register serves every tile width, so all kernels that share a weight share one copy of it.

Loop nest, outermost first:

    parallel  column tiles          tile_vectors wide; each core streams its own panels (row_block = 0), or
              row blocks × columns  each core keeps its own rows (row_block > 0)
    serial    row tiles             tile_rows high; the last lower; of padded sequences those with rows in them
    serial    in_features           k_unroll · chains groups at a time
    unrolled  chains × tile_rows × tile_vectors accumulators, in registers
    epilogue  on the registers; under an activation, on a copy of the tile in the first-level cache

A tile of few rows (decoding) has too few accumulators to hide an addition's latency: ``chains`` sums run side by side.
Its panels may lie ``apart``, each in a part of the weight of its own, so that memory is read in several long streams.
With int8 weights, x is quantised first, all cores sharing its rows. In bfloat16, where a CPU multiplies float32 faster
than pairs (``widen``), x is made float32 first, and a column's panels before its tiles; with AMX (``amx``) a block of
rows and panels is multiplied in tile registers, and its sums go to the epilogue through the first-level cache.
Weights quantised by groups are unpacked in registers as they are multiplied, or (``unpack``) once a column of tiles
into float32 panels in the second-level cache, which pays from some rows on. Sums of the elements of x, by group, come
first: with them a group's minimum is one multiply-add. Where x is quantised too, it has the weight's groups: integers
are added up within a group, eight elements of 4 bits by three instructions and two products. Sums of a tile of rows
stay in registers; or (``row_loop``) a group's unpacked weights do, and rows come one after another.

Ladder (rows 128, in 384, out 1536, float32; 2 cores of Zen 4, measured peak 230 GFLOP/s, weights from memory):

    plain TE, parallel + vectorised                          about  20 GFLOP/s
    + weight packed to the tile's width, 8×32 register tile        205
    + weight packed to one vector, so that all kernels share it    205  (no loss)
    + GELU on the registers                                        105  (spills: 1.7 million loads of temporaries)
    + GELU on a copy of the tile in cache                          205
    machine to itself: 207 with GELU, 222 without; 231 hot
    prefetch of the next column's panels in the inner loop         174  (address arithmetic)

The same on 2 cores of Emerald Rapids, measured peak 344 GFLOP/s, on a shared host whose cores were seen at 118 or 160
GFLOP/s each from one moment to the next; ratios of times in turns, rows 128 to 1024:

    Zen 4's default under GELU, 4×4                               1
    8×3, so that panels ask half as much of the second cache      1.05-1.11
    + cores take each other's tasks when their own are done       1.00-1.05
    + sums on the stack, panels prefetched 16 steps ahead         1.00-1.06
    bfloat16 multiplied as float32 instead of as pairs            1.5-1.65
    bfloat16 in tiles of AMX instead of as float32                1.5-3
    Strassen's algorithm on pairs of tiles: 0.72-1.00, left out (sums of blocks and of tiles take what a product saves)
Tiles of AMX reach 4,600 GFLOP/s on the same two cores where all operands are in the first-level cache, but most of the
time the host lets them run at 1,100, and less dense code then loses less. Medians of 12 samples of 30 ms in turns,
GFLOP/s:

    rows × in → out                 16 × 4, the default until then     16 × 2   32 × 2
    128 × 384 → 384                                           1200       1550     1230
    128 × 384 → 1536                                     1380-1670       2000     1280
    1024 × 384 → 1152                                         1030       1580     1090
    128 × 1536 → 384                                          1970       1680     2100
    512 × 2048 → 2048, blocks of 128 rows                     1870       1640     1900

The epilogue of a small block overlaps with the next one's products. Up to 16 rows, panels asked for 32 steps ahead,
into the second-level cache, come from memory 10 % faster in bfloat16 (one row: 25 GB/s), 8 to 18 % in 4 and 8 bits and
15 to 30 % where AMX multiplies them. Tried without gain: in_features in parts of 256 to 512 (a prototype in C was 3 to
11 % slower: sums come and go), x packed by tiles (the same to 25 % slower), the next column's panels asked for ahead
(no clear difference, from the second-level cache or from the third). Products whose panels stay in the first-level
cache (480 × 128 → 1536) reach 0.92 to 1.03 of the multiply-adds that the same cores do in registers in the same moment,
those with 2,048 in_features 0.92 to 0.97: nothing is to be gained by parts of in_features. (Nor by tiles of 9×3, 10×2,
12×2, 14×2, or other blocks of rows: 0.97 to 1.01 in the mean of nine shapes.)

Weights of 4 bits on the same cores, layers of SmolLM2-135M, the least of times from memory (one row, µs) and GFLOP/s:

    in → out                           576 → 960   576 → 2 × 1536   1536 → 576
    rows                               1    512      1     512       1    512
    x in float32                      22.6           70.6            37.0
    x in 8 bits, tiles of 8×1                408           514              426
    tiles of 5×2                      21.3   561     54.3  527       32.9   440

One row of 4 bits on 2 cores of Zen 3, µs from a cache and from memory (SmolLM2-135M's layers; 8 bits: its head):

    in → out                         576 → 960   576 → 2 × 1536   1536 → 576   576 → 49152, 8 bits
    shift, and, or                    20    28      55    83        27    43       1070    1380
    and, conversion to float          15    26      43    75        22    40        890    1180

512 rows of x in 8 bits on 2 cores of Zen 3, GFLOP/s, the least of times (float32: 180-188, its peak 205):

                                                              576 → 960   576 → 2 × 1536   1536 → 576
    4 bits, sums of four products, tiles of 5×1, 2×1                217              240          215
    + sums of 16 bits within a group                                255              281          259
    + tiles of 5×2, sums in float32 on the stack                    263              292          298
    + a row after another under a group's unpacked weights          299              333          315
    8 bits by groups, weights split in two, tiles of 5×1            122              118          124
    + products with signs moved to x                                160              148          159
    + tiles of 4×2, words of a group in a loop                      197
    int8, signs moved, tiles of 4×3                                 189              230          179
    + tiles of 4×2, two steps written out                           255                           248

Loops of nothing but these instructions and their loads, in the first-level cache, on one core: 281 (4 bits), 200 with
what a group's sums take in float32, 131 (8 bits), 99 (float32).
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
from attntune.templates.cpu import amx, bf16
from attntune.templates.cpu.arithmetic import Arithmetic, arithmetic_for
from attntune.templates.cpu.linear_amx_kernel import AmxLinearKernel
from attntune.templates.cpu.linear_cost import (
    LATENCY,
    amx_order_cost,
    amx_step_cost,
    bytes_step_cost,
    loops_over_rows,
    pieces,
    row_order_cost,
    step_cost,
    stream_cost,
)
from attntune.templates.cpu.linear_grouped_kernel import (
    ConvertedLinearKernel,
    GroupedLinearKernel,
    UnpackedLinearKernel,
)
from attntune.templates.cpu.linear_int8_kernel import GroupedBytesLinearKernel, Int8LinearKernel
from attntune.templates.cpu.linear_kernel import FEW_ROWS, LinearKernel
from attntune.templates.cpu.linear_widened_kernel import WidenedLinearKernel
from attntune.templates.cpu.vectors import asks_ahead
from attntune.templates.template import Packing, ScheduleTemplate

_ROW_TILES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16)
#: Of whole registers of AMX as well.
_AMX_ROW_TILES = (*_ROW_TILES, 32, 48)
_COLUMN_VECTORS = (1, 2, 3, 4, 5, 6)
#: From so many rows on, tiles of AMX are multiplied faster than vectors.
_AMX_ROWS = 5
#: Steps that a panel is asked for before it is multiplied: from the second-level cache, and from memory.
_AHEAD, _FAR_AHEAD = 16, 32
#: Above so many rows a weight quantised by groups is unpacked once for all of them.
_UNPACKED_ROWS = 8


class LinearCPU(ScheduleTemplate):
    """Register-tiled matrix product with the epilogue applied while the tile is at hand."""

    op: ClassVar[str] = "linear"
    kind: ClassVar[str] = "cpu"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Whether there is an arithmetic for the dtypes, and the result is one that kernels write."""
        w = _linear(workload)
        written = w.outputs()[0].dtype == "float32" or (w.out_dtype or w.dtype) == "bfloat16"
        return arithmetic_for(w, target) is not None and written

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Tile height and width in registers, sums side by side, unrolling, and which loop is parallel."""
        w = _linear(workload)
        panels = math.ceil(w.out_features / target.lanes("float32"))
        parts = 2 if w.gated else 1
        tiled = _in_amx_tiles(w, target)
        knobs = [
            Knob("tile_rows", tuple(t for t in (_AMX_ROW_TILES if tiled else _ROW_TILES) if t <= w.rows)),
            Knob("tile_vectors", tuple(v for v in _COLUMN_VECTORS if v <= panels)),
            Knob("chains", (1,) if w.grouped else (1, 2, 4, 8)),
            Knob("k_unroll", (1,) if w.x_dtype else (1, 2, 4, 8)),
            Knob("row_block", tuple(b for b in (0, 32, 64, 128, 256) if b == 0 or b < w.rows)),
        ]
        if w.rows <= FEW_ROWS:
            knobs.append(Knob("apart", (False, True)))
        if w.grouped:
            knobs.append(Knob("unpack", (False, True) if w.rows > 1 and not w.x_dtype else (False,)))
            if w.x_dtype:
                knobs.append(Knob("row_loop", (False, True) if w.rows > 1 else (False,)))
        elif w.dtype == "bfloat16" and not w.quantized:
            knobs.append(Knob("widen", (False, True) if w.rows > FEW_ROWS else (False,)))
        knobs.append(Knob("prefetch", (0, _AHEAD if w.rows > FEW_ROWS else _FAR_AHEAD)))
        if tiled:
            knobs.append(Knob("amx", (False, True)))

        def fits(config: Config) -> bool:
            rows, vectors, chains = (config.integer(n) for n in ("tile_rows", "tile_vectors", "chains"))
            vectors *= parts
            sums = rows * vectors * chains
            if config.get("amx", False):
                plain = chains == 1 and not config["widen"] and not (config["prefetch"] and w.rows > FEW_ROWS)
                block = config.integer("row_block")
                whole = (rows % amx.ROWS == 0 or rows == w.rows) and block % rows == 0 and not (w.seq and block)
                apart = vectors > parts or not config.get("apart", False)
                return plain and whole and apart and amx.fits(rows, vectors)
            # One register is left for what is broadcast; a tile that fills them all spills in the inner loop. Groups of
            # 32 are added up as integers, then in float32, often enough that both sums are held, if there is room. A
            # loop over rows keeps weights in registers, and pays where they serve several rows.
            looped = bool(config.get("row_loop", False))
            held = sums * (2 if w.x_dtype and target.vector_registers >= 32 else 1)
            in_registers = looped or held + vectors < target.vector_registers
            useful = chains == 1 or rows * vectors * chains <= 2 * LATENCY
            block = config.integer("row_block")
            whole_tiles = (
                block % rows == 0 and not (w.seq and block) and (vectors > 1 or not config.get("apart", False))
            )
            # Many rows fill a tile: one with fewer sums than an addition's latency is never the best.
            filled = w.rows <= FEW_ROWS or held >= LATENCY or rows == w.rows
            if looped and (rows == 1 or (rows < LATENCY and rows < w.rows)):
                return False
            widened = w.dtype != "bfloat16" or w.quantized or bool(config.get("widen", False)) or w.rows <= FEW_ROWS
            if not filled or (config["prefetch"] and not widened):
                return False
            return in_registers and useful and sums * config.integer("k_unroll") <= 256 and whole_tiles

        return ConfigSpace(knobs, [fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """The tile with the best ratio of multiply-adds to loads, then the least waste in tails."""
        w = _linear(workload)
        lanes = target.lanes("float32")
        parts = 2 if w.gated else 1
        panels = math.ceil(w.out_features / lanes)
        group, bits = _arithmetic(w, target).group, _arithmetic(w, target).bits

        def cost(config: Config) -> tuple[float, str]:
            rows, vectors, chains = (config.integer(n) for n in ("tile_rows", "tile_vectors", "chains"))
            block = config.integer("row_block")
            height = block or w.rows
            tasks = math.ceil(panels / vectors) * math.ceil(w.rows / height)
            imbalance = math.ceil(tasks / target.cores) * target.cores / tasks
            tiles = [
                (h, width * parts, times * count)
                for h, times in pieces(w.rows, rows)
                for width, count in pieces(panels, vectors)
            ]
            tails = 1.0 + 0.02 * bool(w.rows % rows) + 0.01 * bool(panels % vectors)
            unrolled = config.integer("k_unroll") * chains * (group if w.grouped else 1)
            streams = stream_cost(vectors * parts, config) if w.rows <= FEW_ROWS else 1.0
            if "amx" in config and config["amx"] != (w.rows >= _AMX_ROWS):
                return math.inf, config.key()
            if config.get("amx", False):
                column = sum(amx_step_cost(h, width) * times for h, width, times in tiles)
                unrolling = 1.0 + 0.01 * abs(unrolled - 1)
                order = amx_order_cost(w, config, target)
                return column * imbalance * tails * unrolling * streams * order, config.key()
            if w.x_dtype or (w.quantized and target.vector_registers < 32):
                looped = bool(config.get("row_loop", False))
                column = sum(bytes_step_cost(h, width, target, bits, looped) * times for h, width, times in tiles)
            else:
                column = sum(step_cost(h, width, chains, target) * times for h, width, times in tiles)
            wanted = 8 if w.rows == 1 else 2 if w.quantized and target.vector_registers < 32 else 4
            unrolling = 1.0 + 0.01 * abs(unrolled - wanted)
            if w.activation not in ("", "relu") and vectors < 4 and w.rows > LATENCY and target.fmas_per_cycle < 2:
                # Short rows leave the activation's loop few vectors to overlap: on Zen 4, 8×3 was 7 % slower than 4×4
                # and 4×6. On Emerald Rapids it is 5 to 10 % faster.
                unrolling *= 1.1
            order = row_order_cost(w, config, target)
            if "widen" in config and config["widen"] != (w.rows > FEW_ROWS and bf16.slower_than_float32(target)):
                order *= 2.0
            if bool(config["prefetch"]) != _asks_ahead(w, target):
                order *= 1.01
            if "row_loop" in config and config["row_loop"] != (w.rows > 1 and loops_over_rows(target, bits)):
                order *= 2.0
            if w.grouped and config["unpack"] != (w.rows > _UNPACKED_ROWS and not w.x_dtype):
                order *= 2.0
            return column * imbalance * tails * unrolling * streams * order, config.key()

        return min(self.space(workload, target), key=cost)

    def pack(self, workload: Workload, target: Target) -> Mapping[str, Packing]:
        """Weight to panels (see :class:`Arithmetic`), those of a gate before those of what it multiplies.

        In turns each would be read with gaps. (One row of 576 → 2 × 1536 from memory, 2 cores of Zen 3: 40 µs at
        w4a8, in turns 51; with int8 weights 57, 72; in float32 199, 208.) Bias and scale become float32 in the same
        order. Columns past out_features hold zeros.
        """
        w = _linear(workload)
        arithmetic = _arithmetic(w, target)
        lanes, group, parts = target.lanes("float32"), arithmetic.group, 2 if w.gated else 1
        panels = math.ceil(w.out_features / lanes)
        steps = arithmetic.steps(w)

        def in_panels(values: np.ndarray) -> np.ndarray:
            """(weight_rows, …) → (parts·panels, lanes, …)."""
            rest = values.shape[1:]
            padded = np.zeros((parts, panels * lanes, *rest), values.dtype)
            padded[:, : w.out_features] = values.reshape(parts, w.out_features, *rest)
            return padded.reshape(parts * panels, lanes, *rest)

        def weight(values: np.ndarray) -> np.ndarray:
            widened = np.zeros((values.shape[0], steps * group), values.dtype)
            widened[:, : w.in_features] = values
            return arithmetic.pack(in_panels(widened))

        def row(values: np.ndarray) -> np.ndarray:
            return in_panels(np.asarray(values, np.float32)).reshape(-1)

        def by_group(values: np.ndarray) -> np.ndarray:
            """(weight_rows, groups) → (parts·panels, groups, lanes)."""
            return np.ascontiguousarray(in_panels(values).transpose(0, 2, 1))

        stored = "uint8" if w.quantized else "int32" if w.grouped else w.dtype
        shape = (panels * parts, steps, lanes if w.grouped else lanes * group)
        packings = {"weight": Packing(TensorSpec("weight", shape, stored, constant=True), weight)}
        if w.grouped:
            for name in ("scale", "minimum"):
                packed = TensorSpec(name, (panels * parts, w.weight_groups, lanes), "float16", constant=True)
                packings[name] = Packing(packed, by_group)
        for spec in w.inputs():
            if spec.name == "bias" or (spec.name == "scale" and w.quantized):
                packed = TensorSpec(spec.name, (panels * parts * lanes,), "float32", constant=True)
                packings[spec.name] = Packing(packed, row)
        return packings

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description of the loop nest."""
        import tvm

        w = _linear(workload)
        packed = {name: packing.spec for name, packing in self.pack(w, target).items()}
        kernel = _kernel(w, target, config)(w, target, config, _arithmetic(w, target), packed)
        return tvm.IRModule({"main": kernel.function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, registers in use, footprints per cache level, arithmetic intensity, tail waste and balance."""
        w = _linear(workload)
        lanes, bits = target.lanes("float32"), _arithmetic(w, target).bits
        rows, vectors = config.integer("tile_rows"), config.integer("tile_vectors") * (2 if w.gated else 1)
        panels = math.ceil(w.out_features / lanes)
        tiles = math.ceil(panels / config.integer("tile_vectors"))
        block = config.integer("row_block")
        work = tiles * (math.ceil(w.rows / block) if block else 1)
        panel = w.in_features * vectors * lanes * bits / 8
        block_bytes = min(w.rows, block or w.rows) * w.in_features * bits / 8
        return {
            **super().features(workload, target, config),
            # Knobs of some layers only; one model learns from all.
            "apart": float(config.get("apart", False)),
            "unpack": float(config.get("unpack", False)),
            "row_loop": float(config.get("row_loop", False)),
            "widen": float(config.get("widen", False)),
            "prefetch": float(config["prefetch"]),
            "amx": float(config.get("amx", False)),
            "registers": (rows * vectors * config.integer("chains") + vectors) / target.vector_registers,
            "sums": float(rows * vectors * config.integer("chains")),
            "intensity": rows * vectors / (rows + vectors),
            "panel_in_l1": panel / target.l1d_bytes,
            "panel_in_l2": panel / target.l2_bytes,
            "rows_in_l2": block_bytes / target.l2_bytes,
            "row_tail": (w.rows % rows) / rows,
            "column_tail": (panels % config.integer("tile_vectors")) / config.integer("tile_vectors"),
            "imbalance": math.ceil(work / target.cores) * target.cores / work,
            "log_rows": math.log2(w.rows),
            "log_in": math.log2(w.in_features),
            "log_out": math.log2(w.out_features),
        }


def _kernel(w: Linear, target: Target, config: Config) -> type[LinearKernel]:
    """What writes a layer's kernel."""
    if w.quantized:
        return Int8LinearKernel
    if w.x_dtype:
        return GroupedBytesLinearKernel
    if w.grouped:
        if config["unpack"]:
            return UnpackedLinearKernel
        return (
            ConvertedLinearKernel
            if ConvertedLinearKernel.pays(w, target, _arithmetic(w, target))
            else GroupedLinearKernel
        )
    if config.get("amx", False):
        return AmxLinearKernel
    return WidenedLinearKernel if config.get("widen", False) else LinearKernel


def _in_amx_tiles(w: Linear, target: Target) -> bool:
    """Whether AMX multiplies ``w``: bfloat16, its in_features whole tiles."""
    return w.dtype == "bfloat16" and not w.quantized and w.in_features % (2 * amx.PAIRS) == 0 and amx.available(target)


def _asks_ahead(w: Linear, target: Target) -> bool:
    """Whether panels are asked for before they are multiplied.

    One row of float32 is read as fast without, and many of 8 bits wait for nothing.
    """
    if w.x_dtype and w.rows > FEW_ROWS:
        return False
    return asks_ahead(target) and (w.rows > 1 or _arithmetic(w, target).bits < 32)


def _arithmetic(w: Linear, target: Target) -> Arithmetic:
    arithmetic = arithmetic_for(w, target)
    assert arithmetic is not None, f"expected {target.name} to have the instructions for {w}"
    return arithmetic


def _linear(workload: Workload) -> Linear:
    assert isinstance(workload, Linear), f"expected a Linear workload, got {workload}"
    return workload
