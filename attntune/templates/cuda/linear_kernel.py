"""The linear kernel on tensor cores, written out in TIR; see :mod:`attntune.templates.cuda.linear`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from attntune.ops.linear import Linear
from attntune.ops.padding import before_end
from attntune.search.space import Config
from attntune.templates.cuda.intrinsics import call
from attntune.templates.cuda.launch import dynamic_shared, kernel
from attntune.templates.cuda.tiles import CHUNK, swizzled

_WARP = 32


class LinearKernel:
    """One linear kernel being written out: a block's loop over slices of in_features, then the epilogue."""

    def __init__(self, w: Linear, config: Config) -> None:
        self.w = w
        names = ("block_m", "block_n", "block_k", "stages", "warps_m", "warps_n", "group")
        self.bm, self.bn, self.bk, self.stages, self.warps_m, self.warps_n, self.group = map(config.integer, names)
        self.parts = 2 if w.gated else 1
        self.threads = self.warps_m * self.warps_n * _WARP
        #: Tiles of 16 × 16 of x, and of 16 rows of the weight, that a warp multiplies.
        self.tiles_m = self.bm // self.warps_m // 16
        self.tiles_n = self.bn // self.warps_n // 16
        self.slices = -(-w.in_features // self.bk)
        self.stage_elements = (self.bm + self.parts * self.bn) * self.bk
        self.blocks_m = -(-w.rows // self.bm)
        self.blocks_n = -(-w.out_features // self.bn)

    def function(self) -> Any:
        """The ``PrimFunc``."""

        def body(operand: dict[str, Any], blocks: list[Any], thread: Any) -> None:
            self.operand = operand
            self._block(blocks[0], thread)

        return kernel(self.w, [self.blocks_m * self.blocks_n], self.threads, body)

    def _block(self, block: Any, thread: Any) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        self.thread = thread
        self.lane, self.warp = T.bind(thread % _WARP), T.bind(thread // _WARP)
        self._place(block)
        self.shared = dynamic_shared(self.stages * self.stage_elements, self.w.dtype)
        held = self.parts * self.tiles_m * self.tiles_n * 2 * 4
        self.sums = T.sblock_alloc_buffer((held,), "float32", scope="local")
        self.a = T.sblock_alloc_buffer((self.tiles_m * 4,), "uint32", scope="local")
        self.b = T.sblock_alloc_buffer((self.parts * self.tiles_n * 4,), "uint32", scope="local")
        for i in range(held):
            T.buffer_store(self.sums, tirx.const(0.0, "float32"), [i])
        for stage in range(self.stages - 1):
            if stage < self.slices:
                self._load(stage, stage)
            call("cp_async_commit")
        with T.serial(self.slices) as k:
            call(f"cp_async_wait_{self.stages - 2}")
            T.evaluate(T.tvm_storage_sync("shared"))
            # Overwrites the slice that every warp was done with before this barrier. Empty groups count, too.
            with T.If(k + (self.stages - 1) < self.slices), T.Then():
                self._load(k + (self.stages - 1), T.bind((k + (self.stages - 1)) % self.stages))
            call("cp_async_commit")
            self._multiply(T.bind(k % self.stages))
        self._write()

    def _place(self, block: Any) -> None:
        """Which tile a block computes: columns run through ``group`` rows of tiles, so that these share cache lines."""
        from tvm.tirx.script.builder import ir as T

        span = self.group * self.blocks_n
        first = T.bind(block // span * self.group)
        height = T.bind(T.min(self.blocks_m - first, self.group)) if self.blocks_m % self.group else self.group
        self.row = T.bind((first + block % span % height) * self.bm)
        self.column = T.bind(block % span // height * self.bn)

    # -- loading -------------------------------------------------------------------------------------------------------

    def _load(self, k: Any, stage: Any) -> None:
        """Slice ``k`` of both operands into ``stage``, asynchronously."""
        base = stage * self.stage_elements
        self._load_tile("x", self.bm, self.row, self.w.rows, k, base)
        for part in range(self.parts):
            offset = self.bm * self.bk + part * self.bn * self.bk
            limit = (part + 1) * self.w.out_features
            self._load_tile("weight", self.bn, part * self.w.out_features + self.column, limit, k, base + offset)

    def _load_tile(self, name: str, height: int, first: Any, limit: int, k: Any, base: Any) -> None:
        """``height`` rows from ``first`` on; zeros for rows from ``limit`` on and past the end of in_features."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, chunks = self.w, self.bk // CHUNK
        for i in range(height * chunks // self.threads):
            at = self.thread + i * self.threads
            row, chunk = T.bind(at // chunks), T.bind(at % chunks)
            column = T.bind(k * self.bk + chunk * CHUNK)
            valid = T.bind(tirx.all(first + row < limit, column < w.in_features))
            source = T.bind(tirx.Select(valid, (first + row) * w.in_features + column, 0))
            target = base + swizzled(row, chunk, chunks)
            call("cp_async_16", self.shared.data, target, self.operand[name].access_ptr("r", offset=source), valid)

    # -- multiplying ---------------------------------------------------------------------------------------------------

    def _multiply(self, stage: Any) -> None:
        """The products of one slice: fragments by ldmatrix, each used by every tile it meets."""
        from tvm.tirx.script.builder import ir as T

        chunks = self.bk // CHUNK
        lane = self.lane
        base = T.bind(stage * self.stage_elements)
        a_row = T.bind(self.warp // self.warps_n * (self.tiles_m * 16) + lane % 16)
        b_row = T.bind(self.warp % self.warps_n * (self.tiles_n * 16) + lane // 16 * 8 + lane % 8)
        for step in range(self.bk // 16):
            for i in range(self.tiles_m):
                at = base + swizzled(a_row + i * 16, step * 2 + lane // 16, chunks)
                call("ldmatrix_x4", self.a.access_ptr("rw", offset=i * 4), self.shared.data, at)
            for j in range(self.parts * self.tiles_n):
                part, tile = divmod(j, self.tiles_n)
                offset = self.bm * self.bk + part * self.bn * self.bk
                at = base + offset + swizzled(b_row + tile * 16, step * 2 + lane // 8 % 2, chunks)
                call("ldmatrix_x4", self.b.access_ptr("rw", offset=j * 4), self.shared.data, at)
            for i in range(self.tiles_m):
                for j in range(self.parts * self.tiles_n * 2):
                    call(f"mma_{self.w.dtype}", self.sums.access_ptr("rw", offset=self._sum(i, j)),
                         self.a.access_ptr("r", offset=i * 4), self.b.access_ptr("r", offset=j * 2))  # fmt: skip

    def _sum(self, i: int, j: int) -> int:
        """Where the sums of tile row ``i`` and 8 columns ``j`` lie."""
        return (i * self.parts * self.tiles_n * 2 + j) * 4

    # -- epilogue ------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Bias, activation, gate and residual on the sums; two neighbouring columns a store."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, lane = self.w, self.lane
        first_row = T.bind(self.row + self.warp // self.warps_n * (self.tiles_m * 16) + lane // 4)
        first_column = T.bind(self.column + self.warp % self.warps_n * (self.tiles_n * 16) + lane % 4 * 2)
        checks_row, checks_column = bool(w.rows % self.bm), bool(w.out_features % self.bn)
        for j in range(self.tiles_n * 2):
            column = T.bind(first_column + j * 8)
            biases = [self._biases(column + part * w.out_features, column) for part in range(self.parts)]
            for i in range(self.tiles_m):
                for half in range(2):
                    row = T.bind(first_row + (i * 16 + half * 8))
                    inside = [row < w.rows] * checks_row + [column < w.out_features] * checks_column
                    with contextlib.ExitStack() as frames:
                        if inside:
                            frames.enter_context(T.If(tirx.all(*inside)))
                            frames.enter_context(T.Then())
                        self._write_pair(row, column, i, j, half, biases)

    def _biases(self, at: Any, column: Any) -> list[Any]:
        """Float32 biases of two columns; 0 past the last."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        if not w.bias:
            return [None, None]
        zero = tirx.const(0.0, "float32")
        checked = w.out_features % self.bn
        return [
            T.bind(
                T.if_then_else(column + e < w.out_features, self.operand["bias"][at + e].astype("float32"), zero)
                if checked
                else self.operand["bias"][at + e].astype("float32")
            )
            for e in range(2)
        ]

    def _write_pair(self, row: Any, column: Any, i: int, j: int, half: int, biases: list[list[Any]]) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, y = self.w, self.operand["y"]
        values = [T.bind(self._value(row, column, i, j, half, e, [b[e] for b in biases])) for e in range(2)]
        dtype = w.outputs()[0].dtype
        if w.out_features % 2 == 0:
            call(f"store_2_{dtype}", y.access_ptr("w", offset=row * w.out_features + column), *values)
            return
        for e, value in enumerate(values):
            with T.If(column + e < w.out_features), T.Then():
                T.buffer_store(y, tirx.Cast(dtype, value), [row, column + e])

    def _value(self, row: Any, column: Any, i: int, j: int, half: int, e: int, biases: list[Any]) -> Any:
        """Element ``e`` of a pair, in float32."""
        w = self.w

        def biased(part: int) -> Any:
            value = self.sums[self._sum(i, part * self.tiles_n * 2 + j) + half * 2 + e]
            return value if biases[part] is None else value + biases[part]

        def residual() -> Any:
            # Past the last column of an odd number, any value will do: it is not stored.
            at = column + e if w.out_features % 2 == 0 else (column + e) % w.out_features
            return self.operand["residual"][row, at]

        value = finished(w, biased, residual)
        return before_end(value, row, w.seq, self.operand["lengths"]) if w.seq else value


def finished(w: Linear, biased: Callable[[int], Any], residual: Callable[[], Any]) -> Any:
    """An element of y in float32.

    Args:
        w: the layer.
        biased: the sum of a part with its bias: 0, or of a gated layer the gate; 1, what that multiplies.
        residual: what is added, if the layer has such.
    """
    from attntune.ops import math as tmath

    value = biased(0)
    if w.activation:
        value = getattr(tmath, w.activation)(value)
    if w.gated:
        value = value * biased(1)
    return value + residual().astype("float32") if w.residual else value
