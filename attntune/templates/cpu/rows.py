"""What layer norm, embedding norm and softmax have in common on CPUs: every row is reduced, then rewritten.

Loop nest, outermost first:

    parallel  tasks of ``rows_per_task`` rows; one task is no parallel loop at all, which saves the launch
    serial    rows of a task; a row stays in the first-level cache from one pass to the next
              reductions    in ``vectors`` registers of ``lanes`` elements, folded by halves (templates/common.py)
              row stage     stored for the row (``store_row``), or computed again by every pass that reads it
              result        lanes wide, tail by loop partition

Ladder (layer norm, rows 1024, features 384, float32, µs; 2 cores of Zen 4, shared with other work):

    generic template: every pass over all rows             64
    one core, one accumulator                              105
    one core, four accumulators                             88
    two cores                                               46   (30 with the machine to itself)
    features 383 instead, tail folded with the halves       45

Accumulators keep the ``global`` scope: below 1 KiB TVM puts those on the stack, and LLVM into registers, while
``local`` ones are taken from TVM's workspace by call (128 rows on one core: 11.2 µs; on the stack 6.8).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

from attntune.ops.reduction import Reduction
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.common import LaneReduction, compute_reduction_at, fuse_outer, lanes_within, vectorize_inner
from attntune.templates.template import ScheduleTemplate

#: Operands smaller than this are left to one core, which is done before a second has been launched (about 1 µs).
SERIAL_BYTES = 64 * 1024


class RowTemplate(ScheduleTemplate):
    """Base of the templates that reduce and rewrite rows of contiguous float32-computed features."""

    kind: ClassVar[str] = "cpu"
    stages: ClassVar[tuple[str, ...]]
    """Stages before ``y``, in the order they are computed; a variant may lack some."""
    row_stage: ClassVar[str]
    """The stage as large as the row itself."""
    row_stage_is_cheap: ClassVar[bool]
    """Whether computing the row stage again may beat storing it: then ``store_row`` is a choice."""

    @abstractmethod
    def expression(self, workload: Workload, reduction: Reduction) -> list[Any]:
        """The operator's definition over ``reduction``."""

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Rows of a task, register width and accumulators, and whether the row stage is stored."""
        rows, features = row_shape(workload)
        widest = target.lanes("float32")
        lanes = sorted({lanes_within(width, features) for width in (max(widest // 2, 4), widest)})
        chunks = [chunk for chunk in (1, 2, 4, 8, 16, 32, 64, 128) if rows % chunk == 0 and chunk < rows]
        knobs = [
            Knob("rows_per_task", (*chunks, rows)),
            Knob("lanes", tuple(lanes)),
            Knob("vectors", (1, 2, 4, 8)),
            Knob("store_row", (False, True) if self.row_stage_is_cheap else (True,)),
        ]

        def fits(config: Config) -> bool:
            vectors = config.integer("vectors")
            enough = vectors == 1 or vectors * config.integer("lanes") <= features
            return enough and vectors + 4 <= target.vector_registers

        return ConfigSpace(knobs, [fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """Widest registers, four accumulators, and as many tasks as balance the cores."""
        rows, _ = row_shape(workload)
        space = self.space(workload, target)
        serial = workload.bytes_moved() < SERIAL_BYTES or target.cores == 1

        def cost(config: Config) -> tuple[float, ...]:
            tasks = rows // config.integer("rows_per_task")
            rounds = math.ceil(tasks / target.cores) * config.integer("rows_per_task")
            return (
                rows // tasks != rows if serial else rounds,
                -config.integer("lanes"),
                abs(config.integer("vectors") - 4),
                config["store_row"] != self.stores_by_default(workload),
                -config.integer("rows_per_task"),
            )

        return min(space, key=cost)

    def stores_by_default(self, workload: Workload) -> bool:
        """Whether ``store_row`` is on in the default config, where it is a choice."""
        return True

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description of the loop nest."""
        import tvm
        from tvm import te
        from tvm.s_tir import Schedule

        lanes = config.integer("lanes")
        reduction = LaneReduction(lanes, config.integer("vectors"))
        function = te.create_prim_func(self.expression(workload, reduction)).with_attr("global_symbol", "main")
        sch = Schedule(tvm.IRModule({"main": function}))
        stored = bool(config["store_row"])
        if not stored:
            sch.compute_inline(sch.get_sblock(self.row_stage))

        y = sch.get_sblock("y")
        rows = fuse_outer(sch, y, len(sch.get_loops(y)) - 1)
        task, row = sch.split(rows, [None, config.integer("rows_per_task")])
        if int(sch.get(task).extent) > 1:
            sch.parallel(task)
        rank = len(workload.outputs()[0].shape)
        present = {sch.get(block).name_hint: block for block in sch.get_child_blocks(sch.get_sblock("root"))}
        stages = [name for name in self.stages if name in present]
        for name in reversed(stages):
            if name in reduction.stages:
                compute_reduction_at(sch, reduction.stages[name], row)
            else:
                sch.compute_at(present[name], row, preserve_unit_loops=True)
        for name in (*stages, "y"):
            if len(sch.get(present[name]).writes[0].region) == rank:
                vectorize_inner(sch, present[name], lanes)
        return sch.mod

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, registers in use, row and task footprints per cache level, tail, balance and intensity."""
        rows, features = row_shape(workload)
        lanes, vectors = config.integer("lanes"), config.integer("vectors")
        tasks = rows // config.integer("rows_per_task")
        row_bytes = workload.bytes_moved() / rows
        return {
            **super().features(workload, target, config),
            "registers": (vectors + 4) / target.vector_registers,
            "row_in_l1": row_bytes / target.l1d_bytes,
            "task_in_l2": row_bytes * config.integer("rows_per_task") / target.l2_bytes,
            "whole_in_l3": workload.bytes_moved() / max(target.l3_bytes, 1),
            "steps": features / (lanes * vectors),
            "tail": features % lanes / lanes,
            "tasks_per_core": tasks / target.cores,
            "imbalance": math.ceil(tasks / target.cores) * target.cores / tasks,
            "intensity": workload.flops() / workload.bytes_moved(),
            "log_rows": math.log2(rows),
            "log_features": math.log2(features),
        }


def row_shape(workload: Workload) -> tuple[int, int]:
    """Rows (all axes of the result but the last) and features (the last) of a workload with one result."""
    *lead, features = workload.outputs()[0].shape
    return math.prod(lead), features
