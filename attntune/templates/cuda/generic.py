"""Any operator on CUDA: a thread-bound schedule derived from its tensor expression alone.

Every stage becomes one kernel, after elementwise producers of elementwise stages are inlined:

    no reduction             blocks × threads over all elements, ``vector`` neighbours a thread
    a contiguous reduction   ``reduce_threads`` threads for each result, partial sums combined by shuffles
    any other                blocks × threads, one result each, the reduction serial

It is the floor under every operator without a template of its own. What an elementwise operator moves crosses memory
once; intermediate stages with reductions cross it once more each.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.recurrent import Recurrent
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.common import only_read_elementwise, reduces_contiguously, reductions_of, stages_of
from attntune.templates.template import ScheduleTemplate

#: Neighbouring elements of a thread. Arithmetic is float32, of which TVM's CUDA C++ has vectors of up to four.
VECTORS = (1, 2, 4)


class GenericCUDA(ScheduleTemplate):
    """Schedules any workload of stages that update nothing in place; used where the registry has nothing."""

    op: ClassVar[str] = "generic"
    kind: ClassVar[str] = "cuda"

    def supports(self, workload: Workload, target: Target) -> bool:
        """All but those that update their operands, which an expression cannot say, and recurrences, a single stage.

        Both have templates of their own.
        """
        return not workload.updated and not isinstance(workload, Recurrent)

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Threads of a block, neighbouring elements of a thread, and threads that share one reduction."""
        return ConfigSpace(
            [
                Knob("threads", tuple(t for t in (64, 128, 256, 512) if t <= target.threads_per_block)),
                Knob("vector", VECTORS),
                Knob("reduce_threads", (32, 128)),
            ]
        )

    def default(self, workload: Workload, target: Target) -> Config:
        """256 threads, the widest loads that leave every SM a block, a warp for each reduction."""
        elements = max(math.prod(spec.shape) for spec in workload.outputs())
        space = self.space(workload, target)
        enough = [c for c in space if elements // c.integer("vector") >= 256 * target.sm_count]
        vector = max((c.integer("vector") for c in enough), default=1)
        return space.check({"threads": 256, "vector": vector, "reduce_threads": 32})

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm
        from tvm import te
        from tvm.s_tir import Schedule

        function = te.create_prim_func(workload.compute()).with_attr("global_symbol", "main")
        sch = Schedule(tvm.IRModule({"main": function}))
        for block in stages_of(sch):
            if not reductions_of(sch, block) and only_read_elementwise(sch, block):
                sch.compute_inline(block)
        threads, vector = config.integer("threads"), config.integer("vector")
        stages = stages_of(sch)
        for block in stages:
            if not reductions_of(sch, block):
                bind_elements(sch, block, threads, vector)
            elif reduces_contiguously(sch, block):
                _reduce_by_threads(sch, block, threads, config.integer("reduce_threads"))
            else:
                _reduce_serially(sch, block, threads)
        return sch.mod

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, waves of blocks and arithmetic intensity."""
        moved = workload.bytes_moved()
        elements = max(math.prod(spec.shape) for spec in workload.outputs())
        blocks = elements / (config.integer("threads") * config.integer("vector"))
        return {
            **super().features(workload, target, config),
            "waves": blocks / target.sm_count,
            "in_l2": moved / target.l2_bytes,
            "intensity": workload.flops() / moved,
            "log_flops": math.log2(max(workload.flops(), 1)),
        }


def bind_elements(sch: Any, block: Any, threads: int, vector: int) -> None:
    """``for i: for j: b`` → ``for ij_outer blockIdx.x: for ij_inner threadIdx.x: for j_inner vectorised: b``."""
    loops = list(sch.get_loops(block)) or [sch.add_unit_loop(block)]
    extent = int(sch.get(loops[-1]).extent)
    # TVM writes a vector of conditions as integers, which CUDA C++ does not convert to floats.
    width = 1 if "T.Select(" in sch.get(block).script() else math.gcd(vector, extent)
    if width > 1:
        outer, inner = sch.split(loops.pop(), [None, width])
        loops.append(outer)
        sch.vectorize(inner)
    _bind_spatial(sch, loops, threads)


def _bind_spatial(sch: Any, loops: list[Any], threads: int) -> None:
    fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    blocks, lanes = sch.split(fused, [None, min(threads, int(sch.get(fused).extent))])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(lanes, "threadIdx.x")


def _reduce_by_threads(sch: Any, block: Any, threads: int, reduce_threads: int) -> None:
    """``for i: for k: s[i]`` → ``for i_outer blockIdx.x: for i threadIdx.y: for k_outer: for k threadIdx.x: s[i]``."""
    count = len(reductions_of(sch, block))
    loops = list(sch.get_loops(block))
    spatial = loops[:-count] or [sch.add_unit_loop(loops[0])]
    reduction = sch.fuse(*loops[-count:]) if count > 1 else loops[-1]
    rows = sch.fuse(*spatial) if len(spatial) > 1 else spatial[0]
    blocks, row = sch.split(rows, [None, max(1, min(threads // reduce_threads, int(sch.get(rows).extent)))])
    _, lane = sch.split(reduction, [None, reduce_threads])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(row, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")


def _reduce_serially(sch: Any, block: Any, threads: int) -> None:
    """``for i: for k: s[i]`` → ``for i_outer blockIdx.x: for i_inner threadIdx.x: for k: s[i]``."""
    count = len(reductions_of(sch, block))
    loops = list(sch.get_loops(block))
    _bind_spatial(sch, loops[:-count] or [sch.add_unit_loop(loops[0])], threads)
