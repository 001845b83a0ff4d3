"""The attention kernel on wgmma and TMA, written out in TIR; see :mod:`attntune.templates.cuda.attention_hopper`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from attntune.ops.attention import FLOOR, MASKED, Attention
from attntune.ops.attention_expression import conditions
from attntune.search.space import Config
from attntune.templates.cuda import hopper, tma
from attntune.templates.cuda.attention_kernel import AttentionKernel, _reduced
from attntune.templates.cuda.hopper import ROW, ROW_BYTES, WARPGROUP, Barriers, TensorMap
from attntune.templates.cuda.intrinsics import call
from attntune.templates.cuda.launch import when

_WARP = 32
_LOG2_E = math.log2(math.e)
#: Named barriers: of the consumers that take turns, and of each consumer's own threads; 0 is the block's.
_FIRST_TURN, _FIRST_OWN = 1, 3


class AttentionHopperKernel(AttentionKernel):
    """One attention kernel being written out: what scores are, which keys are seen, and the result are the base's.

    A consumer's warp has 16 queries, as a warp with one tile has there, and its registers hold the same.
    """

    def __init__(self, w: Attention, config: Config, sm_count: int) -> None:
        self.consumers, self.bk, self.stages = map(config.integer, ("consumers", "key_block", "stages"))
        self.overlap, self.pingpong = bool(config["overlap"]), bool(config["pingpong"])
        four = WARPGROUP // _WARP
        base = Config.of(
            warps=four * self.consumers, warp_tiles=1, key_block=self.bk, stages=self.stages, hold_query=False
        )
        super().__init__(w, base)
        self.threads = WARPGROUP * (1 + self.consumers)
        self.producer_registers = config.integer("producer_registers")
        self.pairs = w.batch * w.heads
        self.q_tiles = self.q_blocks * self.pairs
        self.grid = min(self.q_tiles, sm_count) if config["persistent"] else 0
        self.tma_store = bool(config["tma_store"])
        self.chunks = w.head_dim // ROW
        #: Whether scores are products until the exponential, whose argument the scale is multiplied into.
        self.folded = not self.general and w.scaling > 0

    def function(self) -> Any:
        """The ``PrimFunc``."""
        w = self.w
        maps = {name: self._map(name) for name in ("query", "key", "value", *["out"] * self.tma_store)}
        grid = [self.grid] if self.grid else [self.q_blocks, self.pairs]
        return hopper.kernel(w, maps, grid, self.threads, self._body)

    def _map(self, name: str) -> TensorMap:
        """Heads of an operand: dimensions in the order of their strides."""
        w = self.w
        own = name in ("query", "out")
        heads, length = (w.heads, w.q_len) if own else (w.kv_heads, w.kv_len)
        rows = {"query": self.bq, "out": 64}.get(name, self.bk)
        packed = w.packed and name != "out"
        if w.heads_apart(name):
            dims, box = (w.head_dim, length, heads, w.batch), (ROW, rows, 1, 1)
        else:
            heads = w.heads + 2 * w.kv_heads if packed else heads
            dims, box = (w.head_dim, heads, length, w.batch), (ROW, 1, rows, 1)
        strides = tuple(math.prod(dims[: i + 1]) for i in range(3))
        return TensorMap("qkv" if packed else name, w.dtype, dims, strides, box)

    def _body(self, operand: dict[str, Any], maps: dict[str, Any], blocks: list[Any], thread: Any) -> None:
        self.operand, self.maps, self.blocks, self.thread = operand, maps, blocks, thread
        self._allocate()
        hopper.start(thread, maps, self.barriers)
        hopper.divide(thread, self.consumers, self.producer_registers, self._produce, self._consume)

    @contextlib.contextmanager
    def _each_tile(self) -> Iterator[None]:
        """What is emitted inside runs for each block of queries of this block; its number, blocks of keys before it."""
        from tvm.tirx.script.builder import ir as T

        if not self.grid:
            self.nth, self.before = 0, 0
            self._locate(*self.blocks)
            yield
            return
        block = self.blocks[0]
        T.buffer_store(self.done, 0, [0])
        with T.serial(T.bind((self.q_tiles - block + (self.grid - 1)) // self.grid)) as n:
            tile = T.bind(block + n * self.grid)
            self.nth, self.before = n, T.bind(self.done[0])
            if self.w.causal:
                self._locate(tile // self.pairs, tile % self.pairs)
            else:
                self._locate(tile % self.q_blocks, tile // self.q_blocks)
            yield
            T.buffer_store(self.done, self.before + self.count, [0])

    def _locate(self, block: Any, sequence: Any) -> None:
        """A block of queries of a sequence and head; under a causal mask the last, which see most keys, are first."""
        from tvm.tirx.script.builder import ir as T

        w = self.w
        self.b, self.h = T.bind(sequence // w.heads), T.bind(sequence % w.heads)
        self.first_query = T.bind(((self.q_blocks - 1 - block) if w.causal else block) * self.bq)
        self.first_block, end = self._key_blocks()
        self.count = T.bind(T.max(end - self.first_block, 0))

    def _allocate(self) -> None:
        from tvm.tirx.script.builder import ir as T

        def local(count: int, dtype: str = "float32") -> Any:
            return T.sblock_alloc_buffer((count,), dtype, scope="local")

        self.query_bytes, self.key_bytes = (2 * self.dim * rows for rows in (self.bq, self.bk))
        payload = self.query_bytes + 2 * self.stages * self.key_bytes
        self.shared = hopper.shared_memory(payload + 8 * (2 + 4 * self.stages))
        arrivals = WARPGROUP // _WARP * self.consumers
        self.query_full = Barriers(self.shared + payload, 1, 1)
        self.query_empty = Barriers(self.query_full.end, 1, arrivals)
        #: By operand, keys first: what has come, what is read no more.
        self.full = [Barriers(self.query_empty.end, self.stages, 1)]
        self.full.append(Barriers(self.full[0].end, self.stages, 1))
        self.empty = [Barriers(self.full[1].end, self.stages, arrivals)]
        self.empty.append(Barriers(self.empty[0].end, self.stages, arrivals))
        self.barriers = (self.query_full, self.query_empty, *self.full, *self.empty)
        self.scores, self.out = local(self.bk // 2), local(self.dim // 2)
        self.weights = local(self.bk // 4, "uint32")
        self.top, self.total, self.rescale = local(2), local(2), local(2)
        self.done = local(1, "int32")

    def _stage(self, n: Any, which: int) -> tuple[Any, Any, Any]:
        """Where the ``n``-th block of keys (0) or values (1) lies: the stage, the parity of its use, the address."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        at = T.bind(self.before + n)
        stage, parity = T.bind(at % self.stages), T.bind(at // self.stages % 2)
        first = self.query_bytes + which * self.stages * self.key_bytes
        return stage, parity, T.bind(self.shared + tirx.Cast("uint32", stage * self.key_bytes + first))

    # -- producer ------------------------------------------------------------------------------------------------------

    def _produce(self) -> None:
        """One thread: the queries, then each block of keys and of values as soon as there is a free stage."""
        from tvm.tirx.script.builder import ir as T

        with self._each_tile():
            if self.grid:
                self.query_empty.wait(0, T.bind(1 - self.nth % 2))
            self.query_full.expect(0, self.query_bytes)
            self._copy("query", self.shared, self.first_query, self.bq, self.query_full.at(0))
            with T.serial(self.count) as n:
                for which, name in enumerate(("key", "value")):
                    stage, parity, address = self._stage(n, which)
                    self.empty[which].wait(stage, 1 - parity)
                    self.full[which].expect(stage, self.key_bytes)
                    row = (self.first_block + n) * self.bk
                    self._copy(name, address, row, self.bk, self.full[which].at(stage))

    def _copy(self, name: str, to: Any, row: Any, rows: int, barrier: Any) -> None:
        """``rows`` rows of this head of an operand, a tile for each 64 of head_dim."""
        w = self.w
        head = self.h if name == "query" else self.h // (w.heads // w.kv_heads)
        if w.packed:
            head = head + {"query": 0, "key": w.heads, "value": w.heads + w.kv_heads}[name]
        middle = [row, head] if w.heads_apart(name) else [head, row]
        for c in range(self.chunks):
            tma.copy_tile(to + c * rows * ROW_BYTES, self.maps[name], [c * ROW, *middle, self.b], barrier)

    # -- consumers -----------------------------------------------------------------------------------------------------

    def _consume(self, warpgroup: Any) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        self.lane = T.bind(self.thread % _WARP)
        self.consumer = T.bind(warpgroup - 1)
        self.warp = T.bind(self.thread // _WARP - WARPGROUP // _WARP)
        self.own = T.bind(self.shared + tirx.Cast("uint32", self.consumer * (64 * ROW_BYTES)))
        with self._each_tile():
            for buffer, value in ((self.out, 0.0), (self.top, FLOOR), (self.total, 0.0)):
                for i in range(int(buffer.shape[0])):
                    T.buffer_store(buffer, tirx.const(value, "float32"), [i])
            self.query_full.wait(0, T.bind(self.nth % 2) if self.grid else 0)
            with when(self.count > 0):
                self.query = hopper.descriptor(self.own)
                self._overlapped() if self.overlap else self._in_turn()
            if not self.tma_store:
                self._release_query()
            self._store() if self.tma_store else self._write()
            if self.tma_store:
                self._release_query()

    def _release_query(self) -> None:
        """Each warp, by one lane: it will not touch this tile's queries again."""
        if self.grid:
            with when(self.lane == 0):
                self.query_empty.arrive(0)

    def _store(self) -> None:
        """As the base writes results, through the shared memory of this consumer's queries, 64 of head_dim a tile."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, barrier = self.w, T.bind(self.consumer + _FIRST_OWN)
        hopper.named_barrier(barrier, WARPGROUP, wait=True)  # no warp of these reads the queries any more
        for half in range(2):
            inverse = self._inverse(half)
            row = T.bind(self.warp % 4 * 16 + half * 8 + self.lane // 4)
            for d in range(self.dim // 8):
                chunk, c = divmod(d, ROW // 8)
                at = row * ROW_BYTES + (row % 8 ^ c) * 16 + self.lane % 4 * 4 + chunk * self.bq * ROW_BYTES
                sums = [self.out[self._sum(0, d) + half * 2 + e] * inverse for e in range(2)]
                tma.store_pair(self.own + tirx.Cast("uint32", at), w.dtype, *sums)
        tma.written_for_copies()
        hopper.named_barrier(barrier, WARPGROUP, wait=True)
        with when(tirx.all(self.warp % 4 == 0, self.lane == 0)):
            first = T.bind(self.first_query + self.consumer * 64)
            for c in range(self.chunks):
                middle = [first, self.h] if w.heads_apart("out") else [self.h, first]
                address = self.own + c * self.bq * ROW_BYTES
                tma.store_tile(self.maps["out"], [c * ROW, *middle, self.b], address)
            tma.stores_have_read()

    def _in_turn(self) -> None:
        """Scores, softmax, weighted sum; block by block."""
        from tvm.tirx.script.builder import ir as T

        with T.serial(self.count) as n:
            self._issue_scores(n)
            self._finish(n)
            self._softmax()
            self._rescale()
            self._pack()
            self._issue_values(n)
            self._finish_values(n)

    def _overlapped(self) -> None:
        """The scores of a block are computed, and then its softmax, while the values of the block before are summed."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        turns = self.pingpong
        last = T.bind(self.count - 1)
        if turns:
            # The first consumer's first turn.
            with when(tirx.all(self.consumer == 1, last > 0)):
                hopper.named_barrier(_FIRST_TURN, 2 * WARPGROUP, wait=False)
        self._issue_scores(0)
        self._finish(0)
        self._softmax()
        self._pack()
        with T.serial(last) as i:
            n = T.bind(i + 1)
            if turns:
                hopper.named_barrier(_FIRST_TURN + self.consumer, 2 * WARPGROUP, wait=True)
            self._issue_scores(n)
            self._issue_values(i)
            if turns:
                # Nobody waits for the turn after the last.
                with when(tirx.any(self.consumer == 0, n < last)):
                    hopper.named_barrier(_FIRST_TURN + 1 - self.consumer, 2 * WARPGROUP, wait=False)
            self._finish(n, pending=1)
            self._softmax()
            self._finish_values(i)
            self._rescale()
            self._pack()
        self._issue_values(last)
        self._finish_values(last)

    def _issue_scores(self, n: Any) -> None:
        """Begin the products of this consumer's 64 queries with all keys of the ``n``-th block."""
        stage, parity, address = self._stage(n, 0)
        self.full[0].wait(stage, parity)
        keys = hopper.descriptor(address)
        hopper.hold(self.scores.access_ptr("rw"), self.bk // 2)
        hopper.begin()
        for step in range(self.dim // 16):
            chunk, inside = divmod(step * 32, ROW_BYTES)
            left = hopper.advanced(self.query, chunk * self.bq * ROW_BYTES + inside)
            right = hopper.advanced(keys, chunk * self.bk * ROW_BYTES + inside)
            hopper.multiply(self.scores.access_ptr("rw"), self.bk, self.w.dtype, left, right, int(step > 0))
        hopper.commit()

    def _finish(self, n: Any, pending: int = 0) -> None:
        """Have the scores of the ``n``-th block, so many later groups still computed; its keys are read no more."""
        hopper.wait(pending)
        hopper.hold(self.scores.access_ptr("rw"), self.bk // 2)
        self._release(n, 0)
        self._finish_scores(self.first_block + n)

    def _issue_values(self, n: Any) -> None:
        """Begin the weighted sum of the ``n``-th block's values; weights are in registers, values as they lie."""
        stage, parity, address = self._stage(n, 1)
        self.full[1].wait(stage, parity)
        values = hopper.descriptor(address, self.bk * ROW_BYTES)
        hopper.hold(self.weights.access_ptr("rw"), self.bk // 4, "uint32")
        hopper.hold(self.out.access_ptr("rw"), self.dim // 2)
        hopper.begin()
        for step in range(self.bk // 16):
            left = self.weights.access_ptr("r", offset=step * 4)
            right = hopper.advanced(values, step * 16 * ROW_BYTES)
            hopper.multiply(self.out.access_ptr("rw"), self.dim, self.w.dtype, left, right, 1, registers=True,
                            transposed=True)  # fmt: skip
        hopper.commit()

    def _finish_values(self, n: Any) -> None:
        hopper.wait(0)
        hopper.hold(self.out.access_ptr("rw"), self.dim // 2)
        self._release(n, 1)

    def _release(self, n: Any, which: int) -> None:
        """Each warp, by one lane: it will not read the ``n``-th block again."""
        stage, _, _ = self._stage(n, which)
        with when(self.lane == 0):
            self.empty[which].arrive(stage)

    # -- softmax -------------------------------------------------------------------------------------------------------

    def _finish_scores(self, block: Any) -> None:
        """As the base does; where the scale waits for the exponential, only masked."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        if not self.folded:
            super()._finish_scores(block)
            return
        w = self.w
        partly = self._partly_seen(block)
        if partly is None:
            return
        first_key = T.bind(block * self.bk + self.lane % 4 * 2)
        with when(partly):
            for half in range(2):
                row = T.bind(self._query(0, half))
                for j in range(self.bk // 8):
                    for e in range(2):
                        at, key = self._score(0, j) + half * 2 + e, first_key + (j * 8 + e)
                        seen = conditions(w, self._read, self.b, row, key)
                        seen += [key < w.kv_len] * bool(w.kv_len % self.bk)
                        masked = tirx.Select(tirx.all(*seen), self.scores[at], tirx.const(MASKED, "float32"))
                        T.buffer_store(self.scores, masked, [at])

    def _softmax(self) -> None:
        """New maxima; scores become weights relative to them; what sums so far are to be scaled by."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        factor = tirx.const(self.w.scaling * _LOG2_E if self.folded else 1.0, "float32")
        for half in range(2):
            places = [self._score(0, j) + half * 2 + e for j in range(self.bk // 8) for e in range(2)]
            top = T.bind(self._over_lanes(T.max, _reduced(T.max, [self.scores[at] for at in places])))
            top = T.bind(T.max(self.top[half], top))
            T.buffer_store(self.rescale, T.exp2((self.top[half] - top) * factor), [half])
            T.buffer_store(self.top, top, [half])
            scaled = T.bind(top * factor)
            for at in places:
                T.buffer_store(self.scores, T.exp2(self.scores[at] * factor - scaled), [at])
            added = _reduced(lambda a, b: a + b, [self.scores[at] for at in places])
            T.buffer_store(self.total, self.total[half] * self.rescale[half] + added, [half])

    def _rescale(self) -> None:
        """Scale what was summed so far to the new maxima."""
        from tvm.tirx.script.builder import ir as T

        for at in range(self.dim // 2):
            T.buffer_store(self.out, self.out[at] * self.rescale[at // 2 % 2], [at])

    def _pack(self) -> None:
        """Weights rounded to pairs, in the order that the registers of A have."""
        for i in range(self.bk // 4):
            call(f"pack_2_{self.w.dtype}", self.weights.access_ptr("rw", offset=i), self.scores[2 * i],
                 self.scores[2 * i + 1])  # fmt: skip
