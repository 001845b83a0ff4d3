"""Linear on tensor cores of sm_80 and later: mma.sync over tiles that cp.async brings into shared memory.

Loop nest, outermost first:

    blockIdx.x    tiles of ``block_m`` rows × ``block_n`` columns, ``group`` rows of tiles at a time
    serial        slices of ``block_k`` of in_features; while one is multiplied, ``stages - 1`` are on their way
    warps         ``warps_m`` × ``warps_n``, each with its part of the tile as sums in registers
    unrolled      16 × 16 fragments by ldmatrix, m16n8k16 products with float32 sums
    epilogue      bias, activation, gate, residual on the registers; two columns a store

Both operands are read as they lie; a gated tile holds the same columns of the gate and of what it multiplies. Tiles at
the edges read zeros, for rows, columns and in_features alike.

Ladder: none yet, for this kernel never ran on a GPU. Open: split in_features for few rows; store whole rows through
shared memory. On sm_90a ``linear_hopper.py`` comes first.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.linear import Linear
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cuda.linear_kernel import LinearKernel
from attntune.templates.cuda.tiles import CHUNK
from attntune.templates.template import ScheduleTemplate

_WARP = 32
#: Sums of a thread at most: with fragments, addresses and the epilogue's values they fit into 255 registers.
_MAX_SUMS = 128


class LinearCUDA(ScheduleTemplate):
    """float16 and bfloat16 with float32 sums, every epilogue."""

    op: ClassVar[str] = "linear"
    kind: ClassVar[str] = "cuda"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Whether the target has the instructions, and rows of the operands begin at multiples of 16 bytes."""
        w = _linear(workload)
        half = w.dtype in ("float16", "bfloat16") and not w.quantized and not w.grouped
        return half and w.in_features % CHUNK == 0 and target.has("mma.sync", "ldmatrix", "cp.async")

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Tile of a block, its warps, length and number of slices in flight, and the order of tiles."""
        w = _linear(workload)
        parts = 2 if w.gated else 1
        knobs = [
            Knob("block_m", tuple(m for m in (16, 32, 64, 128, 256) if m == 16 or m < 2 * w.rows)),
            Knob("block_n", tuple(n for n in (32, 64, 128, 256) if n == 32 or n < 2 * w.out_features)),
            Knob("block_k", tuple(k for k in (32, 64) if k == 32 or k < 2 * w.in_features)),
            Knob("stages", (2, 3, 4, 5)),
            Knob("warps_m", (1, 2, 4)),
            Knob("warps_n", (1, 2, 4)),
            Knob("group", (1, 4, 8)),
        ]

        def fits(config: Config) -> bool:
            m, n, k, stages = (config.integer(name) for name in ("block_m", "block_n", "block_k", "stages"))
            warps_m, warps_n = config.integer("warps_m"), config.integer("warps_n")
            warps = warps_m * warps_n
            if m % (16 * warps_m) or n % (16 * warps_n) or not 2 <= warps <= 8:
                return False
            sums = parts * m * n // (warps * _WARP)
            whole_copies = m * k % (CHUNK * warps * _WARP) == 0 and n * k % (CHUNK * warps * _WARP) == 0
            shared = stages * shared_bytes(m, parts * n, k)
            return sums <= _MAX_SUMS and whole_copies and shared <= target.shared_memory_bytes

        return ConfigSpace(knobs, [fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """The tile with the fewest bytes a product, with SMs that have equally many."""
        w = _linear(workload)
        parts = 2 if w.gated else 1

        def cost(config: Config) -> tuple[float, str]:
            m, n, k, stages = (config.integer(name) for name in ("block_m", "block_n", "block_k", "stages"))
            warps = config.integer("warps_m") * config.integer("warps_n")
            blocks = math.ceil(w.rows / m) * math.ceil(w.out_features / n)
            held = max(1, target.shared_memory_per_sm_bytes // (stages * shared_bytes(m, parts * n, k) + 1024))
            most = math.ceil(blocks / target.sm_count)
            waiting = 1.0 + 0.1 * (min(held, most) * warps < 8)
            warp_m, warp_n = m / config.integer("warps_m"), n / config.integer("warps_n")
            # Of a warp's tile, what ldmatrix reads for a product; of a block's, what crosses to shared memory.
            reads = 1.0 + 8.0 * (1 / warp_m + 1 / warp_n) + 16.0 * (1 / m + 1 / n)
            hidden = 1.0 + 0.05 * abs(stages - 4) + 0.02 * (k != 64) + 0.02 * abs(math.log2(warps / 4))
            order = 1.0 + 0.001 * (config["group"] != (8 if blocks > target.sm_count else 1))
            return most * m * n * reads * hidden * waiting * order, config.key()

        return min(self.space(workload, target), key=cost)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        return tvm.IRModule({"main": LinearKernel(_linear(workload), config).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, sums of a thread, shared memory, waves, padding and intensity of the tiles."""
        w = _linear(workload)
        m, n, k, stages = (config.integer(name) for name in ("block_m", "block_n", "block_k", "stages"))
        warps = config.integer("warps_m") * config.integer("warps_n")
        parts = 2 if w.gated else 1
        blocks = math.ceil(w.rows / m) * math.ceil(w.out_features / n)
        shared = stages * shared_bytes(m, parts * n, k)
        return {
            **super().features(workload, target, config),
            "sums": parts * m * n / (warps * _WARP),
            "warps": float(warps),
            "shared": shared / target.shared_memory_bytes,
            "blocks_per_sm": float(target.shared_memory_per_sm_bytes // (shared + 1024)),
            "waves": blocks / target.sm_count,
            "padding": blocks * m * n / (w.rows * w.out_features),
            "intensity": m * n / (m + n),
            "warp_intensity": m * n / (m * config.integer("warps_n") + n * config.integer("warps_m")),
            "slices": math.ceil(w.in_features / k),
            "log_flops": math.log2(w.flops()),
        }


def shared_bytes(m: int, n: int, k: int) -> int:
    """Bytes of one stage: ``m`` rows of x and ``n`` of the weight, ``k`` long."""
    return 2 * (m + n) * k


def _linear(workload: Workload) -> Linear:
    assert isinstance(workload, Linear), f"expected a Linear workload, got {workload}"
    return workload
