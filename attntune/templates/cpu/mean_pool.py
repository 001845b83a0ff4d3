"""Mean pooling and L2 normalisation on CPUs.

Loop nest, outermost first:

    parallel  sequences, or tiles of features of every sequence, or nothing (``parallel``)
    serial    feature tiles, ``tile_vectors`` registers wide
    serial    positions: the tile's slice of one position, added where the mask is set
              accumulators stay in registers over all positions
    then, for each sequence: the mean's norm, and the result

Splitting over features serves a batch smaller than the cores; the norms are then computed after a second pass over
the means, which are small.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.mean_pool import MeanPool
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.common import (
    PARTITION_HINT,
    LaneReduction,
    compute_reduction_at,
    fuse_outer,
    lanes_within,
    vectorize_inner,
)
from attntune.templates.cpu.rows import SERIAL_BYTES
from attntune.templates.template import ScheduleTemplate


class MeanPoolCPU(ScheduleTemplate):
    """Streams x once, accumulating a tile of features in registers."""

    op: ClassVar[str] = "mean_pool"
    kind: ClassVar[str] = "cpu"

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Width of the feature tile, positions unrolled, and what is spread over cores."""
        w = _mean_pool(workload)
        vectors = w.features // lanes_within(target.lanes("float32"), w.features)
        widest = target.vector_registers // 2
        return ConfigSpace(
            [
                Knob("tile_vectors", tuple(v for v in (1, 2, 3, 4, 6, 8, 12, 16) if v <= min(vectors, widest))),
                Knob("seq_unroll", tuple(u for u in (1, 2, 4) if w.seq % u == 0)),
                Knob("parallel", ("none", "batch", "features")),
            ]
        )

    def default(self, workload: Workload, target: Target) -> Config:
        """About eight accumulators; whole sequences to cores where there are enough."""
        w = _mean_pool(workload)
        vectors = w.features // lanes_within(target.lanes("float32"), w.features)
        parallel = "batch" if w.batch % target.cores == 0 or w.batch >= 4 * target.cores else "features"
        if workload.bytes_moved() < SERIAL_BYTES or target.cores == 1:
            parallel = "none"

        def cost(config: Config) -> tuple[float, ...]:
            tile = config.integer("tile_vectors")
            starved = parallel == "features" and w.batch * math.ceil(vectors / tile) < target.cores
            return config["parallel"] != parallel, starved, abs(tile - 8), config.integer("seq_unroll")

        return min(self.space(workload, target), key=cost)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description of the loop nest."""
        import tvm
        from tvm import te
        from tvm.s_tir import Schedule

        w = _mean_pool(workload)
        lanes = target.lanes("float32")
        reduction = LaneReduction(lanes, 4)
        function = te.create_prim_func(w.expression(reduction)).with_attr("global_symbol", "main")
        sch = Schedule(tvm.IRModule({"main": function}))
        sch.compute_inline(sch.get_sblock("mean"))
        y, total = sch.get_sblock("y"), sch.get_sblock("total")
        batch = sch.get_loops(y)[0]
        if config["parallel"] == "batch" and w.batch > 1:
            sch.parallel(batch)
        if w.normalize:
            sch.compute_at(sch.get_sblock("scale"), batch, preserve_unit_loops=True)
            compute_reduction_at(sch, reduction.stages["squares"], batch)
        sch.compute_at(sch.get_sblock("share"), batch, preserve_unit_loops=True)
        compute_reduction_at(sch, reduction.stages["count"], batch)
        if config["parallel"] != "features":
            sch.compute_at(total, batch, preserve_unit_loops=True)
        vectorize_inner(sch, y, lanes)
        self._tile(sch, total, w, lanes_within(lanes, w.features), config)
        return sch.mod

    def _tile(self, sch: Any, total: Any, w: MeanPool, lanes: int, config: Config) -> None:
        """``for f: for s: total`` → ``for tile: for s: for vector unrolled: for lane vectorised: total``."""
        feature, position = sch.get_loops(total)[-2:]
        vectors = config.integer("tile_vectors")
        tile, vector, lane = sch.split(feature, [None, vectors, lanes])
        step, inner = sch.split(position, [None, config.integer("seq_unroll")])
        sch.reorder(tile, step, inner, vector, lane)
        outer = tile
        if config["parallel"] == "features":
            outer = fuse_outer(sch, total, len(sch.get_loops(total)) - 4)
            sch.parallel(outer)
        sch.vectorize(lane)
        sch.unroll(inner)
        if w.features % (vectors * lanes):
            sch.annotate(outer, PARTITION_HINT, 1)
            sch.annotate(vector, PARTITION_HINT, 1)
        else:
            sch.unroll(vector)
        init = sch.decompose_reduction(total, step)
        *_, init_vector, init_lane = sch.get_loops(init)
        sch.vectorize(init_lane)
        if not w.features % (vectors * lanes):
            sch.unroll(init_vector)

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, registers in use, footprints, tail, balance."""
        w = _mean_pool(workload)
        lanes = lanes_within(target.lanes("float32"), w.features)
        tile = config.integer("tile_vectors")
        tiles = math.ceil(w.features / (tile * lanes))
        tasks = {"none": 1, "batch": w.batch, "features": w.batch * tiles}[str(config["parallel"])]
        return {
            **super().features(workload, target, config),
            "tasks_per_core": tasks / target.cores,
            "imbalance": math.ceil(tasks / target.cores) * target.cores / tasks,
            "registers": tile / target.vector_registers,
            "tail": w.features % (tile * lanes) / (tile * lanes),
            "slice_bytes": float(tile * lanes * 4),
            "sequence_in_l2": workload.bytes_moved() / w.batch / target.l2_bytes,
            "whole_in_l3": workload.bytes_moved() / max(target.l3_bytes, 1),
            "intensity": workload.flops() / workload.bytes_moved(),
            "log_seq": math.log2(w.seq),
            "log_features": math.log2(w.features),
        }


def _mean_pool(workload: Workload) -> MeanPool:
    assert isinstance(workload, MeanPool), f"expected a MeanPool workload, got {workload}"
    return workload
