"""The attention kernel on tensor cores, written out in TIR; see :mod:`attntune.templates.cuda.attention`."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from attntune.ops.attention import FLOOR, MASKED, Attention
from attntune.ops.attention_expression import conditions, modified, position
from attntune.search.space import Config
from attntune.templates.cuda.intrinsics import call
from attntune.templates.cuda.launch import WARP, dynamic_shared, kernel, over_lanes
from attntune.templates.cuda.tiles import CHUNK, swizzled

_LOG2_E = math.log2(math.e)


def padded_dim(head_dim: int) -> int:
    """Elements of a row in shared memory: a power of two, so that rows can be swizzled."""
    return 1 << (head_dim - 1).bit_length()


class AttentionKernel:
    """One attention kernel being written out: a block of queries of one head meets the blocks of keys it may see."""

    def __init__(self, w: Attention, config: Config) -> None:
        self.w = w
        names = ("warps", "warp_tiles", "key_block", "stages")
        self.warps, self.tiles, self.bk, self.stages = map(config.integer, names)
        self.hold_query = bool(config["hold_query"])
        self.threads = self.warps * WARP
        self.bq = self.warps * self.tiles * 16
        self.dim = w.head_dim
        self.row = padded_dim(w.head_dim)
        #: Rows of queries that a block's head has.
        self.q_rows = w.q_len
        self.q_blocks = -(-w.q_len // self.bq)
        self.modify = w.modification() if w.score_mod else None
        #: Whether scores are more than scaled products.
        self.general = bool(w.softcap or w.bias_heads or w.alibi or w.score_mod)
        #: Whether any block may hold keys that a query does not see, wherever it lies.
        self.always_masked = bool(w.mask or w.lengths)

    def function(self) -> Any:
        """The ``PrimFunc``."""
        from tvm.tirx.script.builder import ir as T

        w = self.w

        def body(operand: dict[str, Any], blocks: list[Any], thread: Any) -> None:
            block, sequence = blocks
            self.operand = operand
            self._allocate()
            self.b, self.h = T.bind(sequence // w.heads), T.bind(sequence % w.heads)
            self.thread, self.lane, self.warp = thread, T.bind(thread % WARP), T.bind(thread // WARP)
            # Under a causal mask the last queries see most keys: they start first.
            self.first_query = T.bind(((self.q_blocks - 1 - block) if w.causal else block) * self.bq)
            self._block()

        return kernel(w, [self.q_blocks, w.batch * w.heads], self.threads, body)

    def _allocate(self) -> None:
        from tvm.tirx.script.builder import ir as T

        def local(count: int, dtype: str = "float32") -> Any:
            return T.sblock_alloc_buffer((count,), dtype, scope="local")

        elements = (self.bq + self.stages * 2 * self.bk) * self.row
        self.shared = dynamic_shared(elements, self.w.dtype)
        self.scores = local(self.tiles * self.bk // 8 * 4)
        self.out = local(self.tiles * self.dim // 8 * 4)
        self.top, self.total = local(self.tiles * 2), local(self.tiles * 2)
        self.a = local(self.tiles * 4 * (self.dim // 16 if self.hold_query else 1), "uint32")
        self.weights = local(4, "uint32")
        self.fragment = local(4, "uint32")

    # -- one block of queries ------------------------------------------------------------------------------------------

    def _block(self) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        for buffer, value in ((self.out, 0.0), (self.top, FLOOR), (self.total, 0.0)):
            for i in range(int(buffer.shape[0])):
                T.buffer_store(buffer, tirx.const(value, "float32"), [i])
        start, end = self._key_blocks()
        self._load("query", self.first_query, self.bq, 0)
        for stage in range(self.stages - 1):
            with T.If(start + stage < end), T.Then():
                self._load_keys(start + stage, stage)
            call("cp_async_commit")
        if self.hold_query:
            call(f"cp_async_wait_{self.stages - 2}")
            T.evaluate(T.tvm_storage_sync("shared"))
            for step in range(self.dim // 16):
                self._load_query_fragments(step, step * self.tiles * 4)
        with T.serial(T.bind(T.max(end - start, 0))) as n:
            block = T.bind(start + n)
            call(f"cp_async_wait_{self.stages - 2}")
            T.evaluate(T.tvm_storage_sync("shared"))
            # Overwrites the block that every warp was done with before this barrier. Empty groups count, too.
            with T.If(block + (self.stages - 1) < end), T.Then():
                self._load_keys(block + (self.stages - 1), T.bind((n + (self.stages - 1)) % self.stages))
            call("cp_async_commit")
            stage = T.bind(n % self.stages)
            self._multiply_scores(stage)
            self._finish_scores(block)
            self._softmax()
            self._multiply_values(stage)
        call("cp_async_wait_0")
        self._write()

    def _key_blocks(self) -> tuple[Any, Any]:
        """First and one past the last of the blocks of keys that any query here may see."""
        from tvm.tirx.script.builder import ir as T

        w = self.w
        last = T.bind(self.operand["lengths"][self.b]) if w.lengths else w.kv_len
        if w.causal:
            last = T.min(self._position(self.first_query) + self.bq, last)
        first = T.max(self._position(self.first_query) - (w.window - 1), 0) if w.window else 0
        return T.bind(first // self.bk), T.bind((T.min(last, w.kv_len) + (self.bk - 1)) // self.bk)

    def _position(self, i: Any) -> Any:
        return position(self.w, self._read, self.b, i)

    def _read(self, name: str, *indices: Any) -> Any:
        """An element of an operand; of rows and keys past the end, the last one, which a condition then masks."""
        from tvm.tirx.script.builder import ir as T

        buffer = self.operand[name]
        if name in ("mask", "bias"):
            shape = [int(extent) for extent in buffer.shape]
            fixed = [
                i if isinstance(i, int) else T.min(i, extent - 1) for i, extent in zip(indices, shape, strict=True)
            ]
            return buffer[tuple(fixed)]
        return buffer[indices]

    # -- loading -------------------------------------------------------------------------------------------------------

    def _load_keys(self, block: Any, stage: Any) -> None:
        """Block ``block`` of keys and values into ``stage``, asynchronously."""
        from tvm.tirx.script.builder import ir as T

        base = T.bind((self.bq + stage * (2 * self.bk)) * self.row)
        for i, name in enumerate(("key", "value")):
            self._load(name, block * self.bk, self.bk, base + i * self.bk * self.row)

    def _load(self, name: str, first: Any, height: int, base: Any) -> None:
        """``height`` rows of an operand from ``first`` on, at ``base``; zeros past the last."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        chunks = self.dim // CHUNK
        limit = self.q_rows if name == "query" else self.w.kv_len
        count = height * chunks
        for i in range(-(-count // self.threads)):
            at = self.thread + i * self.threads
            with contextlib.ExitStack() as frames:
                if (i + 1) * self.threads > count:
                    frames.enter_context(T.If(at < count))
                    frames.enter_context(T.Then())
                row, chunk = T.bind(at // chunks), T.bind(at % chunks)
                valid = T.bind(first + row < limit)
                buffer, source = self._element(name, tirx.Select(valid, first + row, 0), chunk * CHUNK)
                target = base + swizzled(row, chunk, self.row // CHUNK)
                call("cp_async_16", self.shared.data, target, buffer.access_ptr("r", offset=source), valid)

    def _element(self, name: str, i: Any, column: Any) -> tuple[Any, Any]:
        """The buffer that holds row ``i`` of this block's head of an operand, and the offset of a column in it."""
        w, b = self.w, self.b
        own = name in ("query", "out")
        heads, length = (w.heads, w.q_len) if own else (w.kv_heads, w.kv_len)
        head = self.h if own else self.h // (w.heads // w.kv_heads)
        if w.packed and name != "out":
            first = {"query": 0, "key": w.heads, "value": w.heads + w.kv_heads}[name]
            width = (w.heads + 2 * w.kv_heads) * w.head_dim
            return self.operand["qkv"], (b * length + i) * width + (first + head) * w.head_dim + column
        if w.heads_apart(name):
            return self.operand[name], ((b * heads + head) * length + i) * w.head_dim + column
        return self.operand[name], (b * length + i) * (heads * w.head_dim) + head * w.head_dim + column

    # -- products ------------------------------------------------------------------------------------------------------

    def _load_query_fragments(self, step: int, at: int) -> None:
        lane = self.lane
        for i in range(self.tiles):
            row = (self.warp * self.tiles + i) * 16 + lane % 16
            place = swizzled(row, step * 2 + lane // 16, self.row // CHUNK)
            call("ldmatrix_x4", self.a.access_ptr("rw", offset=at + i * 4), self.shared.data, place)

    def _multiply_scores(self, stage: Any) -> None:
        """Scores of this warp's queries and all keys of the block."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        for i in range(int(self.scores.shape[0])):
            T.buffer_store(self.scores, tirx.const(0.0, "float32"), [i])
        base = T.bind((self.bq + stage * (2 * self.bk)) * self.row)
        lane = self.lane
        for step in range(self.dim // 16):
            at = step * self.tiles * 4 if self.hold_query else 0
            if not self.hold_query:
                self._load_query_fragments(step, 0)
            for j in range(self.bk // 16):
                row = j * 16 + lane // 16 * 8 + lane % 8
                place = base + swizzled(row, step * 2 + lane // 8 % 2, self.row // CHUNK)
                call("ldmatrix_x4", self.fragment.access_ptr("rw"), self.shared.data, place)
                for i in range(self.tiles):
                    for half in range(2):
                        self._mma(self.scores, self._score(i, j * 2 + half), self.a, at + i * 4, half * 2)

    def _multiply_values(self, stage: Any) -> None:
        """The weighted sum of the block's values, the weights rounded to the operands' dtype."""
        from tvm.tirx.script.builder import ir as T

        base = T.bind((self.bq + stage * (2 * self.bk) + self.bk) * self.row)
        lane = self.lane
        for i in range(self.tiles):
            for j in range(self.bk // 16):
                for half in range(2):
                    for r in range(2):
                        at = self._score(i, j * 2 + half) + r * 2
                        call(f"pack_2_{self.w.dtype}", self.weights.access_ptr("rw", offset=half * 2 + r),
                             self.scores[at], self.scores[at + 1])  # fmt: skip
                for d in range(self.dim // 16):
                    place = base + swizzled(j * 16 + lane % 16, d * 2 + lane // 16, self.row // CHUNK)
                    call("ldmatrix_x4_trans", self.fragment.access_ptr("rw"), self.shared.data, place)
                    for half in range(2):
                        self._mma(self.out, self._sum(i, d * 2 + half), self.weights, 0, half * 2)

    def _mma(self, sums: Any, at: int, a: Any, a_at: int, b_at: int) -> None:
        call(f"mma_{self.w.dtype}", sums.access_ptr("rw", offset=at), a.access_ptr("r", offset=a_at),
             self.fragment.access_ptr("r", offset=b_at))  # fmt: skip

    def _score(self, i: int, j: int) -> int:
        """Where scores of tile ``i`` of queries and 8 keys ``j`` lie."""
        return (i * (self.bk // 8) + j) * 4

    def _sum(self, i: int, d: int) -> int:
        """Where sums of tile ``i`` of queries and 8 dimensions ``d`` lie."""
        return (i * (self.dim // 8) + d) * 4

    # -- softmax -------------------------------------------------------------------------------------------------------

    def _query(self, i: int, half: int) -> Any:
        """The query whose scores are element ``half`` of tile ``i``."""
        return self.first_query + (self.warp * self.tiles + i) * 16 + half * 8 + self.lane // 4

    def _finish_scores(self, block: Any) -> None:
        """Scores scaled, modified and in units of log 2; those of keys that a query does not see at MASKED."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        first_key = T.bind(block * self.bk + self.lane % 4 * 2)

        def each(change: Any) -> None:
            for i in range(self.tiles):
                for half in range(2):
                    row = T.bind(self._query(i, half))
                    for j in range(self.bk // 8):
                        for e in range(2):
                            at = self._score(i, j) + half * 2 + e
                            T.buffer_store(self.scores, change(self.scores[at], row, first_key + (j * 8 + e)), [at])

        def scaled(value: Any, i: Any, j: Any) -> Any:
            if not self.general:
                return value * tirx.const(w.scaling * _LOG2_E, "float32")
            value = value * tirx.const(w.scaling, "float32")
            value = modified(w, value, self._read, self.modify, self.b, self.h, i, j)
            return value * tirx.const(_LOG2_E, "float32")

        def masked(value: Any, i: Any, j: Any) -> Any:
            allowed = conditions(w, self._read, self.b, i, j)
            if w.kv_len % self.bk:
                allowed.append(j < w.kv_len)
            return tirx.Select(tirx.all(*allowed), value, tirx.const(MASKED, "float32"))

        each(scaled)
        partly = self._partly_seen(block)
        if partly is not None:
            with T.If(partly), T.Then():
                each(masked)

    def _partly_seen(self, block: Any) -> Any:
        """Whether some key of a block is hidden from some query; None where none ever is."""
        from tvm import tirx

        w = self.w
        if self.always_masked:
            return tirx.const(True, "bool")
        hidden = []
        if w.kv_len % self.bk:
            hidden.append((block + 1) * self.bk > w.kv_len)
        if w.causal:
            hidden.append((block + 1) * self.bk - 1 > self._position(self.first_query))
        if w.window:
            hidden.append(block * self.bk <= self._position(self.first_query) + (self.bq - 1 - w.window))
        return tirx.any(*hidden) if hidden else None

    def _softmax(self) -> None:
        """New maxima; scores become weights relative to them, and what was summed so far is scaled to match."""
        from tvm.tirx.script.builder import ir as T

        for i in range(self.tiles):
            for half in range(2):
                row = i * 2 + half
                places = [self._score(i, j) + half * 2 + e for j in range(self.bk // 8) for e in range(2)]
                top = T.bind(self._over_lanes(T.max, _reduced(T.max, [self.scores[at] for at in places])))
                top = T.bind(T.max(self.top[row], top))
                scale = T.bind(T.exp2(self.top[row] - top))
                T.buffer_store(self.top, top, [row])
                for at in places:
                    T.buffer_store(self.scores, T.exp2(self.scores[at] - top), [at])
                added = _reduced(lambda a, b: a + b, [self.scores[at] for at in places])
                T.buffer_store(self.total, self.total[row] * scale + added, [row])
                for d in range(self.dim // 8):
                    for e in range(2):
                        at = self._sum(i, d) + half * 2 + e
                        T.buffer_store(self.out, self.out[at] * scale, [at])

    def _over_lanes(self, combine: Any, value: Any) -> Any:
        """``value`` combined over the four lanes that share a row."""
        return over_lanes(combine, value, (1, 2))

    def _inverse(self, row: int) -> Any:
        """One divided by the total of a row's weights; zero where it sees no key."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        zero, one = tirx.const(0.0, "float32"), tirx.const(1.0, "float32")
        total = T.bind(self._over_lanes(lambda a, b: a + b, self.total[row]))
        return T.bind(tirx.Select(total > zero, one / T.max(total, tirx.const(1e-37, "float32")), zero))

    def _write(self) -> None:
        """Sums divided by the total of their weights; zeros for a query that sees no key."""
        from tvm.tirx.script.builder import ir as T

        w = self.w
        for i in range(self.tiles):
            for half in range(2):
                inverse = self._inverse(i * 2 + half)
                query = T.bind(self._query(i, half))
                with contextlib.ExitStack() as frames:
                    if w.q_len % self.bq:
                        frames.enter_context(T.If(query < w.q_len))
                        frames.enter_context(T.Then())
                    for d in range(self.dim // 8):
                        buffer, place = self._element("out", query, d * 8 + self.lane % 4 * 2)
                        at = self._sum(i, d) + half * 2
                        call(f"store_2_{w.dtype}", buffer.access_ptr("w", offset=place),
                             self.out[at] * inverse, self.out[at + 1] * inverse)  # fmt: skip


def _reduced(combine: Any, values: list[Any]) -> Any:
    """``values`` combined pairwise, as a tree."""
    while len(values) > 1:
        paired = [combine(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = paired + values[len(paired) * 2 :]
    return values[0]
