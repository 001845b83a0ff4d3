"""Linear on Hopper's tensor cores: wgmma over tiles that TMA brings into shared memory; warps with roles of their own.

    blockIdx.x    tiles of ``block_m`` × ``block_n``, ``group`` rows of tiles at a time: one each, or (``persistent``)
                  one block an SM, each with every so many-th tile
    warpgroup 0   one thread of it, the producer: slices of 64 of in_features into the next of ``stages`` stages, tile
                  after tile, while there is a stage that all consumers have released
    the others    ``consumers`` warpgroups, each ``block_m / consumers`` rows of the tile: m64nNk16 products from shared
                  memory, one slice's still computed while the next is begun; then the epilogue on registers, meanwhile
                  the producer fills the stages for the next tile

Registers are split unequally (``setmaxnreg``, ``producer_registers``): the producer needs none for sums. A stage has
two mbarriers: *full* counts the bytes that have come, *empty* the warps that are done with it. Tiles at the edges read
zeros.

Sources: NVIDIA, "PTX ISA"; the warp-specialised persistent design of CUTLASS 3 (Thakkar et al.).

Ladder, what each step is for; none has run on a GPU:
    1  TMA, wgmma, one warpgroup     copies take no registers and no instructions; operands are read from shared memory
    2  producer warpgroup, stages    copies run ahead of products by as many slices as shared memory holds
    3  more consumers, setmaxnreg    larger tiles: fewer bytes from L2 a product; sums of all in registers
    4  persistent grid               the next tile's copies pass behind this tile's epilogue
Open: store whole rows through shared memory by TMA; two blocks that share copies (clusters); consumers on tiles of
their own, the epilogue of one behind the products of the other.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.linear import Linear
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cuda import hopper
from attntune.templates.cuda.linear_hopper_kernel import LinearHopperKernel
from attntune.templates.cuda.tiles import CHUNK
from attntune.templates.template import ScheduleTemplate

#: Sums of a thread at most, and registers beside them: the epilogue's values, addresses.
_MAX_SUMS, _OTHER_REGISTERS = 128, 64
#: Fewest rows: half of the least tile is padding.
_MIN_ROWS = 33


class LinearHopper(ScheduleTemplate):
    """float16 and bfloat16 with float32 sums, every epilogue; from 33 rows on."""

    op: ClassVar[str] = "linear"
    kind: ClassVar[str] = "cuda"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Whether the target has wgmma and TMA, rows begin at multiples of 16 bytes, and pairs of y at their own."""
        w = _linear(workload)
        half = w.dtype in ("float16", "bfloat16") and not w.quantized and not w.grouped and not w.seq
        shape = w.in_features % CHUNK == 0 and w.out_features % 2 == 0 and w.rows >= _MIN_ROWS
        return half and shape and hopper.available(target)

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Tile, slices in flight, consumer warpgroups, whether blocks stay for more tiles, their order, registers."""
        w = _linear(workload)
        knobs = [
            Knob("block_m", tuple(m for m in (64, 128, 192, 256) if m == 64 or m < 2 * w.rows)),
            Knob("block_n", tuple(n for n in (32, 64, 96, 128, 192, 256) if n == 32 or n < 2 * w.out_features)),
            Knob("stages", (2, 3, 4, 5, 6, 8)),
            Knob("consumers", (1, 2, 3)),
            Knob("persistent", (False, True)),
            Knob("group", (1, 4, 8)),
            Knob("producer_registers", hopper.PRODUCER_REGISTERS),
        ]

        def fits(config: Config) -> bool:
            m, consumers, producer = map(config.integer, ("block_m", "consumers", "producer_registers"))
            if m % (64 * consumers) or not hopper.split_is_legal(consumers, producer):
                return False
            if _sums(w, config) > min(_MAX_SUMS, hopper.consumer_registers(consumers, producer) - _OTHER_REGISTERS):
                return False
            return shared_bytes(w, config) <= target.shared_memory_bytes

        return ConfigSpace(knobs, [fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """The tile with the fewest bytes a product, with SMs that have equally many; four slices in flight."""
        w = _linear(workload)
        parts = 2 if w.gated else 1

        def cost(config: Config) -> tuple[float, str]:
            m, n, consumers = (config.integer(name) for name in ("block_m", "block_n", "consumers"))
            tiles = math.ceil(w.rows / m) * math.ceil(w.out_features / n)
            most = math.ceil(tiles / target.sm_count)
            reads = 1.0 + 16.0 * (1 / m + 1 / (parts * n))
            # Each wgmma reads its part of both operands from shared memory.
            issue = 1.0 + 8.0 / n + 0.1 * (consumers != 2)
            hidden = 1.0 + 0.05 * abs(config.integer("stages") - 4)
            order = 1.0 + 0.001 * (config["group"] != (8 if tiles > target.sm_count else 1))
            order += 0.001 * (config.integer("producer_registers") != (24 if consumers > 1 else 0))
            order += 0.01 * (bool(config["persistent"]) != (tiles > target.sm_count))
            return most * m * n * reads * issue * hidden * order, config.key()

        return min(self.space(workload, target), key=cost)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        return tvm.IRModule({"main": LinearHopperKernel(_linear(workload), config, target.sm_count).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, sums of a thread, shared memory, waves, padding and intensity of the tiles."""
        w = _linear(workload)
        m, n = config.integer("block_m"), config.integer("block_n")
        tiles = math.ceil(w.rows / m) * math.ceil(w.out_features / n)
        return {
            **super().features(workload, target, config),
            "sums": float(_sums(w, config)),
            "shared": shared_bytes(w, config) / target.shared_memory_bytes,
            "waves": tiles / target.sm_count,
            "longest": float(math.ceil(tiles / target.sm_count)),
            "padding": tiles * m * n / (w.rows * w.out_features),
            "intensity": m * n / (m + n),
            "slices": math.ceil(w.in_features / hopper.ROW),
            "log_flops": math.log2(w.flops()),
        }


def _sums(w: Linear, config: Config) -> int:
    """Float32 registers of a consumer's thread that hold sums."""
    parts = 2 if w.gated else 1
    return parts * config.integer("block_m") * config.integer("block_n") // (config.integer("consumers") * 128)


def shared_bytes(w: Linear, config: Config) -> int:
    """Shared memory of a block: stages, mbarriers, and what aligning the first may take."""
    rows = config.integer("block_m") + (2 if w.gated else 1) * config.integer("block_n")
    return config.integer("stages") * (rows * hopper.ROW_BYTES + 16) + hopper.PATTERN_BYTES


def _linear(workload: Workload) -> Linear:
    assert isinstance(workload, Linear), f"expected a Linear workload, got {workload}"
    return workload
