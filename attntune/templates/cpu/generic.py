"""Any operator on CPUs: a parallel and vectorised schedule derived from its tensor expression alone.

Every stage becomes one loop nest, after elementwise producers of elementwise stages are inlined:

    parallel  outer spatial loops, fused
    then, where a reduction runs along the contiguous axis of all it reads (a row sum, a dot product):
        serial, vectorised   partial results in lanes (rfactor), then their combination
    or, where lanes can run along the stage's own last axis (a matrix product, a sum over positions):
        serial    reduction, around ``vectors`` registers of lanes, unrolled
    or, where there is no reduction:
        vectorised over the last axis, tail by loop partition

It is the floor under every operator without a template of its own, and the baseline that those templates have to beat.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.common import (
    PARTITION_HINT,
    lanes_within,
    only_read_elementwise,
    reduces_contiguously,
    reductions_of,
    stages_of,
    vectorize_inner,
)
from attntune.templates.template import ScheduleTemplate


class GenericCPU(ScheduleTemplate):
    """Schedules any workload; not in the registry, used where the registry has nothing."""

    op: ClassVar[str] = "generic"
    kind: ClassVar[str] = "cpu"

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Registers kept busy by a reduction, and whether to use more than one core."""
        widest = max(1, min(8, target.vector_registers // 4))
        return ConfigSpace(
            [Knob("vectors", tuple(v for v in (1, 2, 4, 8) if v <= widest)), Knob("parallel", (False, True))]
        )

    def default(self, workload: Workload, target: Target) -> Config:
        """Four registers; several cores unless the work is done before they have started."""
        operations = max(workload.flops(), workload.bytes_moved())
        space = self.space(workload, target)
        return min(
            space,
            key=lambda config: (
                config["parallel"] != (target.cores > 1 and operations > 256 * 1024),
                abs(config.integer("vectors") - 4),
            ),
        )

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description; raises nothing of its own, whatever the expression."""
        import tvm
        from tvm import te
        from tvm.s_tir import Schedule

        function = te.create_prim_func(workload.compute()).with_attr("global_symbol", "main")
        sch = Schedule(tvm.IRModule({"main": function}))
        for block in stages_of(sch):
            if not reductions_of(sch, block) and only_read_elementwise(sch, block):
                sch.compute_inline(block)
        lanes, vectors, parallel = target.lanes("float32"), config.integer("vectors"), bool(config["parallel"])
        stages = [block for block in stages_of(sch) if sch.get_loops(block)]
        for block in stages:
            if reductions_of(sch, block) and reduces_contiguously(sch, block):
                _reduce_in_lanes(sch, block, lanes, vectors, parallel)
            elif reductions_of(sch, block):
                _reduce_around_lanes(sch, block, lanes, vectors, parallel)
        # Last, for a partitioned loop lets no other stage be moved.
        for block in stages:
            if not reductions_of(sch, block):
                _elementwise(sch, block, lanes, parallel)
        return sch.mod

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, footprint and arithmetic intensity."""
        moved = workload.bytes_moved()
        return {
            **super().features(workload, target, config),
            "in_l2": moved / target.l2_bytes,
            "in_l3": moved / max(target.l3_bytes, 1),
            "intensity": workload.flops() / moved,
            "log_flops": math.log2(max(workload.flops(), 1)),
        }


def _has_index_conditions(sch: Any, block: Any) -> bool:
    """Whether ``block`` selects by its indices, as a causal mask does: the compiler's loop partition misjudges those.

    A condition on data holds a load, which prints with brackets; one without is a condition on indices.
    """
    text = sch.get(block).script()
    conditions = [_first_argument(text[found.end() :]) for found in re.finditer(r"(?:Select|if_then_else)\(", text)]
    return any("[" not in part for condition in conditions for part in re.split(r" and | or ", condition))


def _first_argument(text: str) -> str:
    """``text`` up to the comma that ends the first argument of a call."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth < 0 or (depth == 0 and character == ","):
            return text[:at]
    return text


def _elementwise(sch: Any, block: Any, lanes: int, parallel: bool) -> None:
    """``for i: for j: b`` → ``for i parallel: for j_outer: for lane vectorised: b``."""
    loops = sch.get_loops(block)
    if len(loops) > 1:
        outer = sch.fuse(*loops[:-1]) if len(loops) > 2 else loops[0]
        if parallel:
            sch.parallel(outer)
    vectorize_inner(sch, block, lanes)


def _reduce_in_lanes(sch: Any, block: Any, lanes: int, vectors: int, parallel: bool) -> None:
    """Partial results in lanes, combined while they are at hand.

    ::

        for i: for k: s[i]
        →
        for i parallel:
            for step: for v unrolled: for lane vectorised: part[v, lane]
            for quarter: for lane vectorised: fold[lane] from part      repeated down to 4 lanes
            for lane: s[i] from fold
    """
    outer, *rest = _outer_and_reductions(sch, block)
    extent = int(sch.get(rest[-1]).extent)
    width = lanes_within(lanes, extent)
    vectors = max(v for v in (1, 2, 4, 8) if v == 1 or (v <= vectors and v * width <= extent))
    if extent % (vectors * width) and _has_index_conditions(sch, block):
        vectors, width = 1, math.gcd(width, extent)
    if width == 1:
        if parallel:
            sch.parallel(outer)
        sch.decompose_reduction(block, rest[0])
        return
    step, inner = sch.split(rest[-1], [None, vectors * width])
    axis = len(sch.get(block).iter_vars) - len(rest)
    part = sch.rfactor(inner, axis)
    folds = []
    held = vectors * width
    while held > 4:
        held = max(held // 4, 4)
        folds.append(sch.rfactor(sch.split(sch.get_loops(block)[-1], [None, held])[1], axis))
    outer, *serial, step, inner = sch.get_loops(part)
    vector, lane = sch.split(inner, [None, width])
    sch.reorder(*serial, step, vector, lane)
    if parallel:
        sch.parallel(outer)
    # The combination moves, not the part: moving a stage drops the condition that guards its last step.
    for stage in (*folds, block):
        sch.reverse_compute_at(stage, outer, preserve_unit_loops=True)
    sch.vectorize(lane)
    if extent % (vectors * width):
        sch.annotate(step, PARTITION_HINT, 1)
        sch.annotate(vector, PARTITION_HINT, 1)
    else:
        sch.unroll(vector)
    init = sch.decompose_reduction(part, (serial or [step])[0])
    sch.vectorize(sch.get_loops(init)[-1])
    for fold in folds:
        # rfactor orders a stage's axes: its new lanes, its reduction, then what was outer (here of extent 1).
        _, fold_lane, quarter, *units = sch.get_loops(fold)
        sch.reorder(*units, quarter, fold_lane)
        sch.vectorize(fold_lane)
        sch.vectorize(sch.get_loops(sch.decompose_reduction(fold, quarter))[-1])
    sch.decompose_reduction(block, sch.get_loops(block)[1])


def _outer_and_reductions(sch: Any, block: Any) -> list[Any]:
    """One loop over all spatial axes of ``block`` (of extent 1 where there are none), then its reduction loops."""
    loops = list(sch.get_loops(block))
    count = len(reductions_of(sch, block))
    spatial = loops[:-count]
    if not spatial:
        return [sch.add_unit_loop(loops[0]), *loops]
    return [sch.fuse(*spatial) if len(spatial) > 1 else spatial[0], *loops[-count:]]


def _reduce_around_lanes(sch: Any, block: Any, lanes: int, vectors: int, parallel: bool) -> None:
    """``for i: for j: for k: c`` → ``for i, j_outer parallel: for k: for v unrolled: for lane vectorised: c``."""
    loops = list(sch.get_loops(block))
    count = len(reductions_of(sch, block))
    spatial, reductions = loops[:-count], loops[-count:]
    if not spatial:
        return
    extent = int(sch.get(spatial[-1]).extent)
    width = lanes_within(lanes, extent)
    vectors = max(v for v in (1, 2, 4, 8) if v == 1 or (v <= vectors and v * width <= extent))
    if extent % (vectors * width) and _has_index_conditions(sch, block):
        vectors, width = 1, math.gcd(width, extent)
    tile, vector, lane = sch.split(spatial[-1], [None, vectors, width])
    sch.reorder(*spatial[:-1], tile, *reductions, vector, lane)
    outer = sch.fuse(*spatial[:-1], tile) if len(spatial) > 1 else tile
    if parallel:
        sch.parallel(outer)
    sch.vectorize(lane)
    init = sch.decompose_reduction(block, reductions[0])
    sch.vectorize(sch.get_loops(init)[-1])
    if extent % (vectors * width):
        sch.annotate(vector, PARTITION_HINT, 1)
