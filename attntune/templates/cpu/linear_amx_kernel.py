"""The linear kernel on AMX: tiles of bfloat16, whose sums go through the first-level cache to the epilogue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attntune.ops.linear import Linear
from attntune.ops.workload import TensorSpec
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu import amx
from attntune.templates.cpu.arithmetic import Arithmetic
from attntune.templates.cpu.linear_kernel import LinearKernel, Panels
from attntune.templates.cpu.vectors import chained


class AmxLinearKernel(LinearKernel):
    """``tile_rows`` × ``tile_vectors`` in AMX's registers; in_features a multiple of two tiles' pairs."""

    def __init__(
        self, w: Linear, target: Target, config: Config, arithmetic: Arithmetic, packed: Mapping[str, TensorSpec]
    ) -> None:
        super().__init__(w, target, config, arithmetic, packed)
        whole = self.row_block or w.rows
        # Of a whole block of rows, the last, or a sequence: whole tiles and what is left.
        heights = {self.rows, *(extent % self.rows for extent in (whole, w.rows % whole, w.seq))} - {0}
        widths = {self.vectors, self.panels % self.vectors} - {0}
        blocks = [amx.Tiles(rows, wide * self.parts) for rows in heights for wide in widths]
        code = self.imports.get("pragma_import_llvm", "")
        self.imports = {"pragma_import_llvm": code + amx.llvm_ir(blocks)}

    def _column(self, first_row: Any, rows: int, panels: Panels) -> None:
        from tvm.tirx.script.builder import ir as T

        # Not on the stack, where it would not be aligned: tiles that cross cache lines take ten times as long.
        self.stage = T.sblock_alloc_buffer((self.rows, panels.count * self.parts, self.lanes), "float32")
        super()._column(first_row, rows, panels)
        amx.end()

    def _prepare_tiles(self, rows: int, panels: Panels) -> None:
        amx.Tiles(rows, panels.count * self.parts).begin()

    def _tile(self, row: Any, rows: int, panels: Panels, valid: Any | None) -> None:
        from tvm.tirx.script.builder import ir as T

        wide = panels.count * self.parts
        self._multiply(rows, row, panels)

        def held(a: Any, v: int) -> Any:
            return self.v.load(self.stage, [a, v, 0])

        with T.serial(rows) as a:
            inside = None if valid is None else a < valid
            if not self.staged:
                self._write_row(held, a, row, panels, inside)
                return
            for v in range(wide):
                self.v.store(self.stage, [a, v, 0], self._value(held, a, panels, v))
            self._finish_row(self.stage, a, row, panels, inside)

    def _multiply(self, rows: int, row: Any, panels: Panels) -> None:
        """The sums of the ``rows`` rows from ``row`` on, to ``stage`` (rows, panels of both parts, lanes)."""
        x, wide = self.operand["x"], panels.count * self.parts
        tiles = amx.Tiles(rows, wide)
        x_stride, panel_stride, stage_stride = 2 * self.w.in_features, 4 * self.lanes, 4 * self.lanes * wide
        tiles.zero()

        def step(n: Any, _: int) -> None:
            k = n * amx.PAIRS
            for i in range(len(tiles.heights)):
                tiles.load(tiles.left(i), x[row + i * amx.ROWS, k], x_stride)
            for v in range(wide):
                source, at = self._panel(panels, v)
                tiles.load(tiles.right(v), source[(*at, k, 0)], panel_stride)
                for line in range(amx.PAIRS if self.prefetch else 0):
                    self.v.prefetch(source, [*at, k + line + self.prefetch, 0], self.prefetch_level)
                for i in range(len(tiles.heights)):
                    tiles.dot(i, v)

        chained(self.steps // amx.PAIRS, self.unroll, 1, step)
        for i in range(len(tiles.heights)):
            for v in range(wide):
                tiles.store(tiles.sums(i, v), self.stage[i * amx.ROWS, v, 0], stage_stride)
