"""Linear on tensor cores for few rows: in_features is split between blocks, whose sums a second kernel adds up.

    first kernel    blockIdx.x   tiles, as in :mod:`attntune.templates.cuda.linear`
                    blockIdx.y   ``splits`` parts of in_features; their sums go to device memory, in float32
    second kernel   a thread a result: sums of all parts, then bias, activation, gate, residual

With few rows there are fewer tiles than SMs, and each would read its part of the weight alone; so all SMs read it. The
sums are ``splits`` · rows · out_features, small against the weight where rows are few. One split is the plain kernel.

Ladder: none yet, for this kernel never ran on a GPU.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.linear import Linear
from attntune.ops.padding import before_end
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cuda.launch import Launch, kernels
from attntune.templates.cuda.linear import LinearCUDA, shared_bytes
from attntune.templates.cuda.linear_kernel import LinearKernel, finished

#: Rows at most, and in_features at least, for which splitting is worth a second kernel.
MOST_ROWS, LEAST_FEATURES = 128, 512
_THREADS = 128


class LinearSplitCUDA(LinearCUDA):
    """As :class:`LinearCUDA`, few rows of many in_features."""

    op: ClassVar[str] = "linear"
    kind: ClassVar[str] = "cuda"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Whether there are few rows and what is multiplied is long."""
        assert isinstance(workload, Linear), f"expected a Linear workload, got {workload}"
        few = workload.rows <= MOST_ROWS and workload.in_features >= LEAST_FEATURES
        return few and super().supports(workload, target)

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """That of :class:`LinearCUDA` without the order of tiles, and into how many parts in_features is split."""
        assert isinstance(workload, Linear), f"expected a Linear workload, got {workload}"
        plain = super().space(workload, target)
        knobs = [knob for knob in plain.knobs if knob.name != "group"]
        knobs += [Knob("group", (1,)), Knob("splits", (1, 2, 4, 8, 16))]

        def fits(config: Config) -> bool:
            slices = math.ceil(workload.in_features / config.integer("block_k"))
            splits = config.integer("splits")
            # Every part has slices to multiply.
            return splits == 1 or (splits - 1) * math.ceil(slices / splits) < slices

        return ConfigSpace(knobs, [*plain.constraints, fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """The tile with the fewest rows, and as many parts as give every SM a block of several warps."""
        assert isinstance(workload, Linear), f"expected a Linear workload, got {workload}"
        w, parts = workload, 2 if workload.gated else 1

        def cost(config: Config) -> tuple[float, str]:
            m, n, k, stages = (config.integer(name) for name in ("block_m", "block_n", "block_k", "stages"))
            warps, splits = config.integer("warps_m") * config.integer("warps_n"), config.integer("splits")
            tiles = math.ceil(w.rows / m) * math.ceil(w.out_features / n)
            held = max(1, target.shared_memory_per_sm_bytes // (stages * shared_bytes(m, parts * n, k) + 1024))
            waves = math.ceil(tiles * splits / (target.sm_count * min(held, 2)))
            work = waves * math.ceil(w.in_features / splits / k) * k * (m + parts * n) * math.ceil(w.rows / m)
            # A second kernel, and sums written and read.
            added = 1.0 + (splits > 1) * 0.05 + 4.0 * splits * w.rows / w.in_features
            shape = 1.0 + 0.03 * abs(stages - 4) + 0.02 * (k != 64) + 0.03 * abs(math.log2(warps / 4))
            return work * added * shape, config.key()

        return min(self.space(workload, target), key=cost)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        assert isinstance(workload, Linear), f"expected a Linear workload, got {workload}"
        if config["splits"] == 1:
            return super().schedule(workload, target, config)
        return tvm.IRModule({"main": _SplitKernel(workload, config).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """As of :class:`LinearCUDA`, and waves and slices of the parts."""
        found = super().features(workload, target, config)
        splits = config.integer("splits")
        return {**found, "split_waves": found["waves"] * splits, "split_slices": math.ceil(found["slices"] / splits)}


class _SplitKernel(LinearKernel):
    """The two kernels being written out."""

    def __init__(self, w: Linear, config: Config) -> None:
        super().__init__(w, config)
        self.splits = config.integer("splits")
        #: Of one part. What lies past the end of in_features is loaded as zeros.
        self.slices = -(-self.slices // self.splits)
        self.width = self.blocks_n * self.bn

    def function(self) -> Any:
        """The ``PrimFunc``."""
        from tvm.tirx.script.builder import ir as T

        w = self.w

        def multiply(operand: dict[str, Any], blocks: list[Any], thread: Any) -> None:
            self.operand, self.split = operand, blocks[1]
            self._block(blocks[0], thread)

        def finish(operand: dict[str, Any], blocks: list[Any], thread: Any) -> None:
            self.operand = operand
            at = T.bind(blocks[0] * _THREADS + thread)
            with T.If(at < w.rows * w.out_features), T.Then():
                self._finish(T.bind(at // w.out_features), T.bind(at % w.out_features))

        return kernels(
            w, {"partial": (self.splits, self.parts, w.rows, self.width)},
            [
                Launch([self.blocks_m * self.blocks_n, self.splits], self.threads, multiply),
                Launch([-(-w.rows * w.out_features // _THREADS)], _THREADS, finish),
            ],
        )  # fmt: skip

    def _load(self, k: Any, stage: Any) -> None:
        super()._load(self.split * self.slices + k, stage)

    def _write(self) -> None:
        """The part's sums, rows of the workload and columns of whole tiles."""
        from tvm.tirx.script.builder import ir as T

        lane = self.lane
        first_row = T.bind(self.row + self.warp // self.warps_n * (self.tiles_m * 16) + lane // 4)
        first_column = T.bind(self.column + self.warp % self.warps_n * (self.tiles_n * 16) + lane % 4 * 2)
        for i in range(self.tiles_m):
            for half in range(2):
                row = T.bind(first_row + (i * 16 + half * 8))
                with T.If(row < self.w.rows), T.Then():
                    for part in range(self.parts):
                        for j in range(self.tiles_n * 2):
                            at = self._sum(i, part * self.tiles_n * 2 + j) + half * 2
                            for e in range(2):
                                place = [self.split, part, row, first_column + (j * 8 + e)]
                                T.buffer_store(self.operand["partial"], self.sums[at + e], place)

    def _finish(self, row: Any, column: Any) -> None:
        """One result: the parts' sums, then the epilogue in float32."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, operand = self.w, self.operand

        def biased(part: int) -> Any:
            value = operand["partial"][0, part, row, column]
            for split in range(1, self.splits):
                value = value + operand["partial"][split, part, row, column]
            if w.bias:
                value = value + operand["bias"][part * w.out_features + column].astype("float32")
            return T.bind(value)

        value = finished(w, biased, lambda: operand["residual"][row, column])
        if w.seq:
            value = before_end(value, row, w.seq, operand["lengths"])
        T.buffer_store(operand["y"], tirx.Cast(w.outputs()[0].dtype, value), [row, column])
