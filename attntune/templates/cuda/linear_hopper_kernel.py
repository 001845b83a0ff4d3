"""The linear kernel on wgmma and TMA, written out in TIR; see :mod:`attntune.templates.cuda.linear_hopper`."""

from __future__ import annotations

import contextlib
from typing import Any

from attntune.ops.linear import Linear
from attntune.search.space import Config
from attntune.templates.cuda import hopper, tma
from attntune.templates.cuda.hopper import ROW, ROW_BYTES, WARPGROUP, Barriers, TensorMap
from attntune.templates.cuda.intrinsics import call
from attntune.templates.cuda.launch import when
from attntune.templates.cuda.linear_kernel import finished

_WARP = 32


class LinearHopperKernel:
    """One linear kernel being written out: a producer's loop over tiles and slices, and the consumers'."""

    def __init__(self, w: Linear, config: Config, sm_count: int) -> None:
        self.w = w
        names = ("block_m", "block_n", "stages", "consumers", "group")
        self.bm, self.bn, self.stages, self.consumers, self.group = map(config.integer, names)
        self.producer_registers = config.integer("producer_registers")
        self.parts = 2 if w.gated else 1
        self.threads = WARPGROUP * (1 + self.consumers)
        #: Tiles of 64 rows of a consumer.
        self.tiles_m = self.bm // (64 * self.consumers)
        self.slices = -(-w.in_features // ROW)
        self.stage_bytes = (self.bm + self.parts * self.bn) * ROW_BYTES
        self.blocks_m, self.blocks_n = -(-w.rows // self.bm), -(-w.out_features // self.bn)
        self.tiles = self.blocks_m * self.blocks_n
        self.grid = min(self.tiles, sm_count) if config["persistent"] else self.tiles

    def function(self) -> Any:
        """The ``PrimFunc``."""
        w = self.w
        maps = {
            "x": TensorMap("x", w.dtype, (w.in_features, w.rows), (w.in_features,), (ROW, self.bm)),
            "weight": TensorMap("weight", w.dtype, (w.in_features, w.weight_rows), (w.in_features,), (ROW, self.bn)),
        }
        return hopper.kernel(w, maps, [self.grid], self.threads, self._block)

    def _block(self, operand: dict[str, Any], maps: dict[str, Any], blocks: list[Any], thread: Any) -> None:
        from tvm.tirx.script.builder import ir as T

        self.operand, self.maps, self.block, self.thread = operand, maps, blocks[0], thread
        payload = self.stages * self.stage_bytes
        self.shared = hopper.shared_memory(payload + 2 * 8 * self.stages)
        self.full = Barriers(self.shared + payload, self.stages, 1)
        self.empty = Barriers(self.full.end, self.stages, WARPGROUP // _WARP * self.consumers)
        held = self.parts * self.tiles_m * self.bn // 2
        self.sums = T.sblock_alloc_buffer((held,), "float32", scope="local")
        hopper.start(thread, maps, (self.full, self.empty))
        hopper.divide(thread, self.consumers, self.producer_registers, self._produce, self._consume)

    def _each_tile(self) -> Any:
        """Loop over the tiles of this block; how many came before."""
        from tvm.tirx.script.builder import ir as T

        return T.serial(T.bind((self.tiles - self.block + (self.grid - 1)) // self.grid))

    def _place(self, n: Any) -> tuple[Any, Any]:
        """Row and column of this block's ``n``-th tile: columns run through ``group`` rows of tiles."""
        from tvm.tirx.script.builder import ir as T

        tile = T.bind(self.block + n * self.grid)
        span = self.group * self.blocks_n
        first = T.bind(tile // span * self.group)
        height = T.bind(T.min(self.blocks_m - first, self.group)) if self.blocks_m % self.group else self.group
        return T.bind((first + tile % span % height) * self.bm), T.bind(tile % span // height * self.bn)

    def _stage(self, n: Any, k: Any) -> tuple[Any, Any, Any]:
        """Where slice ``k`` of the ``n``-th tile lies: the stage, the parity of its use, the address."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        slices = T.bind(n * self.slices + k)
        stage, parity = T.bind(slices % self.stages), T.bind(slices // self.stages % 2)
        return stage, parity, T.bind(self.shared + tirx.Cast("uint32", stage * self.stage_bytes))

    # -- producer ------------------------------------------------------------------------------------------------------

    def _produce(self) -> None:
        """One thread: every slice of every tile into the next stage, as soon as all consumers are done with it."""
        from tvm.tirx.script.builder import ir as T

        with self._each_tile() as n:
            row, column = self._place(n)
            with T.serial(self.slices) as k:
                stage, parity, address = self._stage(n, k)
                self.empty.wait(stage, 1 - parity)
                self.full.expect(stage, self.stage_bytes)
                barrier = self.full.at(stage)
                tma.copy_tile(address, self.maps["x"], [k * ROW, row], barrier)
                for part in range(self.parts):
                    to = address + (self.bm + part * self.bn) * ROW_BYTES
                    coordinates = [k * ROW, column + part * self.w.out_features]
                    tma.copy_tile(to, self.maps["weight"], coordinates, barrier)

    # -- consumers -----------------------------------------------------------------------------------------------------

    def _consume(self, warpgroup: Any) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        self.lane = T.bind(self.thread % _WARP)
        self.warp = T.bind(self.thread // _WARP % (WARPGROUP // _WARP))
        first_row = T.bind((warpgroup - 1) * (64 * self.tiles_m))
        held = int(self.sums.shape[0])
        with self._each_tile() as n:
            row, column = self._place(n)
            hopper.hold(self.sums.access_ptr("rw"), held)
            with T.serial(self.slices) as k:
                stage, parity, address = self._stage(n, k)
                self.full.wait(stage, parity)
                hopper.begin()
                a = hopper.descriptor(address + tirx.Cast("uint32", first_row * ROW_BYTES))
                self._multiply(a, hopper.descriptor(address + self.bm * ROW_BYTES), k)
                hopper.commit()
                # The slice before is multiplied, whatever is still on its way of this one.
                hopper.wait(1)
                with when(k > 0):
                    self._release(n, k - 1)
            hopper.wait(0)
            hopper.hold(self.sums.access_ptr("rw"), held)
            self._release(n, self.slices - 1)
            self._write(row + first_row, column)

    def _multiply(self, a: Any, b: Any, k: Any) -> None:
        """The products of one slice; the first of a tile begins its sums."""
        from tvm import tirx

        for step in range(ROW // 16):
            accumulate = tirx.Cast("int32", k > 0) if step == 0 else 1
            for i in range(self.tiles_m):
                left = hopper.advanced(a, i * 64 * ROW_BYTES + step * 32)
                for part in range(self.parts):
                    right = hopper.advanced(b, part * self.bn * ROW_BYTES + step * 32)
                    sums = self.sums.access_ptr("rw", offset=self._sum(i, part, 0))
                    hopper.multiply(sums, self.bn, self.w.dtype, left, right, accumulate)

    def _release(self, n: Any, k: Any) -> None:
        """Each warp, by one lane: it will not read slice ``k`` again."""
        stage, _, _ = self._stage(n, k)
        with when(self.lane == 0):
            self.empty.arrive(stage)

    def _sum(self, i: int, part: int, j: int) -> int:
        """Where sums of tile ``i`` of rows and 8 columns ``j`` lie."""
        return ((i * self.parts + part) * self.bn // 8 + j) * 4

    # -- epilogue ------------------------------------------------------------------------------------------------------

    def _write(self, row: Any, column: Any) -> None:
        """Bias, activation, gate and residual on the sums; two neighbouring columns a store."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, y = self.w, self.operand["y"]
        first_row = T.bind(row + self.warp * 16 + self.lane // 4)
        first_column = T.bind(column + self.lane % 4 * 2)
        for j in range(self.bn // 8):
            at = T.bind(first_column + j * 8)
            biases = [[self._bias(part, at, e) for e in range(2)] for part in range(self.parts)]
            for i in range(self.tiles_m):
                for half in range(2):
                    to = T.bind(first_row + (i * 64 + half * 8))
                    inside = [to < w.rows] * bool(w.rows % self.bm) + [at < w.out_features] * bool(
                        w.out_features % self.bn
                    )
                    with contextlib.ExitStack() as frames:
                        if inside:
                            frames.enter_context(when(tirx.all(*inside)))
                        values = [
                            T.bind(self._value(to, at, i, j, half * 2 + e, [b[e] for b in biases], e)) for e in range(2)
                        ]
                        place = y.access_ptr("w", offset=to * w.out_features + at)
                        call(f"store_2_{w.outputs()[0].dtype}", place, *values)

    def _bias(self, part: int, column: Any, e: int) -> Any:
        """The bias of a column in float32; 0 past the last, None where there is none."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        if not w.bias:
            return None
        value = self.operand["bias"][column + (part * w.out_features + e)].astype("float32")
        if w.out_features % self.bn:
            value = T.if_then_else(column + e < w.out_features, value, tirx.const(0.0, "float32"))
        return T.bind(value)

    def _value(self, row: Any, column: Any, i: int, j: int, r: int, biases: list[Any], e: int) -> Any:
        """Element ``e`` of a pair, in float32."""

        def biased(part: int) -> Any:
            value = self.sums[self._sum(i, part, j) + r]
            return value if biases[part] is None else value + biases[part]

        return finished(self.w, biased, lambda: self.operand["residual"][row, column + e])
