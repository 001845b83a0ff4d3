"""What norms and softmax have in common on CUDA: every row is reduced, then rewritten, by threads that share it.

    blockIdx.x    blocks of ``rows_per_block`` rows
    threadIdx.y   rows of a block
    threadIdx.x   ``threads`` of a row
                  row stage     kept in shared memory (``store_row``), or computed again by every pass that reads it
                  reductions    strided over the threads, partial results combined by shuffles and shared memory
                  result        ``vector`` neighbours a thread, ``threads · vector`` at a step

A row crosses memory once in each direction: passes after the first find it in shared memory, or in the first-level
cache.

Ladder: none yet, for nothing here ran on a GPU.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.common import reductions_of, stages_of
from attntune.templates.cuda.generic import VECTORS
from attntune.templates.template import ScheduleTemplate

_WARP = 32


class RowCUDA(ScheduleTemplate):
    """Base of the templates that reduce and rewrite rows of contiguous features."""

    kind: ClassVar[str] = "cuda"
    row_stage: ClassVar[str]
    """The stage as large as the row itself."""

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Threads of a row, rows of a block, width of loads and stores, and whether the row stage is stored."""
        assert workload.op == self.op, f"expected a workload of {self.op!r}, got {workload}"
        rows, features = _shape(workload)
        widths = [v for v in VECTORS if features % v == 0]
        knobs = [
            Knob("threads", tuple(t for t in (32, 64, 128, 256, 512, 1024) if t == _WARP or t < 2 * features)),
            Knob("rows_per_block", tuple(r for r in (1, 2, 4, 8) if rows % r == 0)),
            Knob("vector", tuple(widths)),
            Knob("store_row", (False, True)),
        ]

        def fits(config: Config) -> bool:
            threads, held = config.integer("threads"), config.integer("rows_per_block")
            in_block = threads * held <= min(target.threads_per_block, 1024)
            useful = config.integer("vector") == 1 or threads * config.integer("vector") < 2 * features
            # Static shared memory is limited to 48 KiB; a part of it holds partial results.
            stored = not config["store_row"] or 4 * features * held <= 40 * 1024
            return in_block and useful and stored

        return ConfigSpace(knobs, [fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """Widest loads, threads for one or two steps over a row, blocks of at least four warps."""
        _, features = _shape(workload)

        def cost(config: Config) -> tuple[float, ...]:
            threads, held = config.integer("threads"), config.integer("rows_per_block")
            steps = features / (threads * config.integer("vector"))
            return (
                -config.integer("vector"),
                abs(math.log2(max(steps, 0.5)) - 0.5),
                abs(math.log2(threads * held / 128)),
                not config["store_row"],
            )

        return min(self.space(workload, target), key=cost)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm
        from tvm import te
        from tvm.s_tir import Schedule

        assert workload.op == self.op, f"expected a workload of {self.op!r}, got {workload}"
        function = te.create_prim_func(workload.compute()).with_attr("global_symbol", "main")
        sch = Schedule(tvm.IRModule({"main": function}))
        threads, vector = config.integer("threads"), config.integer("vector")
        *stages, y = stages_of(sch)
        kept = []
        for block in stages:
            stored = config["store_row"] and sch.get(block).name_hint == self.row_stage
            if reductions_of(sch, block) or stored:
                kept.append(block)
            else:
                sch.compute_inline(block)
        *lead, _ = sch.get_loops(y)
        blocks, row = sch.split(sch.fuse(*lead) if len(lead) > 1 else lead[0], [None, config.integer("rows_per_block")])
        sch.bind(blocks, "blockIdx.x")
        sch.bind(row, "threadIdx.y")
        for block in reversed(kept):
            sch.compute_at(block, row, preserve_unit_loops=True)
            # Every thread gets its row's sum by a shuffle. In shared memory, TVM would let one thread of the row store
            # it and the others read it with no barrier between, where a block has several rows.
            sch.set_scope(block, 0, "local" if reductions_of(sch, block) else "shared")
        for block in (*kept, y):
            feature = sch.get_loops(block)[-1]
            if reductions_of(sch, block):
                sch.bind(sch.split(feature, [None, threads])[1], "threadIdx.x")
            else:
                _, lane, inner = sch.split(feature, [None, threads, vector])
                sch.bind(lane, "threadIdx.x")
                sch.vectorize(inner)
        return sch.mod

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, steps over a row, waves of blocks, shared memory and intensity."""
        rows, features = _shape(workload)
        threads, held = config.integer("threads"), config.integer("rows_per_block")
        stored = 4.0 * features * held if config["store_row"] else 0.0
        return {
            **super().features(workload, target, config),
            "steps": features / (threads * config.integer("vector")),
            "block_threads": float(threads * held),
            "waves": rows / held * math.ceil(threads * held / _WARP) / (target.sm_count * target.warps_per_sm),
            "shared": stored / target.shared_memory_bytes,
            "intensity": workload.flops() / workload.bytes_moved(),
            "log_rows": math.log2(rows),
            "log_features": math.log2(features),
        }


def _shape(workload: Workload) -> tuple[int, int]:
    """Rows (all axes of the result but the last) and features (the last)."""
    *lead, features = workload.outputs()[0].shape
    return math.prod(lead), features


class LayerNormCUDA(RowCUDA):
    """Mean, then variance about it, then the result."""

    op: ClassVar[str] = "layer_norm"
    row_stage: ClassVar[str] = "row"


class EmbeddingNormCUDA(RowCUDA):
    """The three table rows are added once and kept, or read again by every pass."""

    op: ClassVar[str] = "embedding_norm"
    row_stage: ClassVar[str] = "row"


class RMSNormCUDA(RowCUDA):
    """Sum of squares, then the result."""

    op: ClassVar[str] = "rms_norm"
    row_stage: ClassVar[str] = "row"


class SoftmaxCUDA(RowCUDA):
    """Maximum, sum of exponentials, then the result; exponentials are kept, or computed again."""

    op: ClassVar[str] = "softmax"
    row_stage: ClassVar[str] = "power"
