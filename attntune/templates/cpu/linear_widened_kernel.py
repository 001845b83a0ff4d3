"""Linear kernels that make a column's panels float32 before its tiles are multiplied as float32."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from attntune.ops.linear import Linear
from attntune.ops.workload import TensorSpec
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu import bf16
from attntune.templates.cpu.arithmetic import Arithmetic, Float32
from attntune.templates.cpu.linear_kernel import LinearKernel, Panels
from attntune.templates.cpu.vectors import chained


class FloatPanelsKernel(LinearKernel):
    """A stored weight of another dtype; a column's panels as float32 lie in the second-level cache."""

    def __init__(
        self, w: Linear, target: Target, config: Config, arithmetic: Arithmetic, packed: Mapping[str, TensorSpec]
    ) -> None:
        super().__init__(w, target, config, Float32(), packed)
        self.stored = arithmetic
        self.prefetch_level = 1  # of panels that lie in the second

    def _prepare_column(self, panels: Panels) -> None:
        from tvm.tirx.script.builder import ir as T

        shape = (panels.count * self.parts, self.w.in_features, self.lanes)
        self.floats = T.sblock_alloc_buffer(shape, "float32")
        self._fill(panels)

    @abstractmethod
    def _fill(self, panels: Panels) -> None:
        """``floats`` (panels, in_features, lanes) from the stored weight."""

    def _panel(self, panels: Panels, v: int) -> tuple[Any, list[Any]]:
        return self.floats, [v]


class WidenedLinearKernel(FloatPanelsKernel):
    """bfloat16 as float32: x once, all cores sharing its rows, and each column's panels."""

    def _multiplied(self, operand: dict[str, Any]) -> None:
        from tvm.tirx.script.builder import ir as T

        self.operand["weight"] = self._words(operand["weight"])
        # A vector more than a row has: rows a multiple of 4 KiB apart would fight for the same lines of the cache.
        self.operand["x"] = T.sblock_alloc_buffer((self.w.rows, self.w.in_features + self.lanes), "float32")

    def _prepare(self, x: Any) -> None:
        from tvm.tirx.script.builder import ir as T

        bits, wide = bf16.view(x, "uint16"), self.operand["x"]
        whole, left = divmod(self.w.in_features, self.lanes)
        with T.parallel(self.w.rows, annotations=self.imports) as i, T.sblock("widen"):
            T.reads()
            T.writes()
            with T.serial(whole) as n:
                at = [i, n * self.lanes]
                self.v.store(wide, at, bf16.from_bits(bits.vload(at, dtype=f"uint16x{self.lanes}"), self.lanes))
            if left:
                with T.serial(left) as k:
                    at = [i, whole * self.lanes + k]
                    T.buffer_store(wide, bf16.from_bits(bits[tuple(at)]), at)

    def _fill(self, panels: Panels) -> None:
        from tvm.tirx.script.builder import ir as T

        for v in range(panels.count * self.parts):

            def step(n: Any, _: int, v: int = v) -> None:
                pairs = self.operand["weight"].vload([self._part(panels, v), n, 0], dtype=f"int32x{self.lanes}")
                low, high = bf16.from_pairs(T.bind(pairs), self.lanes)
                self.v.store(self.floats, [v, n * 2, 0], low)
                self.v.store(self.floats, [v, n * 2 + 1, 0], high)

            chained(self.stored.steps(self.w), 4, 1, step)
