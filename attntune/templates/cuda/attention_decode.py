"""Attention of few queries over many keys on CUDA, as in decoding: keys are split between blocks, then put together.

    first kernel    blockIdx.y   sequences and heads of keys; the query heads that share one are rows of one tile
                    blockIdx.x   ``splits`` parts of the keys that any query sees; online softmax over a part's blocks,
                                 as in :mod:`attntune.templates.cuda.attention`, whose sums, top and total go to device
                                 memory
    second kernel   a thread a result: sums of all parts, each scaled to the highest top, over the sum of the totals

A cache's keys and values are read once, by all SMs, whatever their batch and heads. Parts follow the lengths of the
sequences that are there, not the capacity of the cache.

Source: Dao et al., "Flash-Decoding for long-context inference" (2023).

Ladder: none yet, for this kernel never ran on a GPU.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.attention import FLOOR, MASKED, Attention
from attntune.ops.attention_expression import conditions, modified
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cuda.attention import AttentionCUDA, fits, registers, shared_bytes
from attntune.templates.cuda.attention_kernel import AttentionKernel
from attntune.templates.cuda.launch import Launch, kernels

#: Rows of one tile of queries at most, and keys at least, for which splitting is worth a second kernel.
MOST_ROWS, LEAST_KEYS = 64, 128
#: Registers of a thread, estimated, up to which the assembler of every target was seen to spill none.
_SAFE_REGISTERS = 160
_LOG2_E = math.log2(math.e)
_THREADS = 128


class AttentionDecodeCUDA(AttentionCUDA):
    """As :class:`AttentionCUDA`, few queries over many keys; separate operands, lengths of the keys only."""

    op: ClassVar[str] = "attention"
    kind: ClassVar[str] = "cuda"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Whether there are few queries and many keys."""
        w = _attention(workload)
        few = _rows(w) <= MOST_ROWS and w.q_len <= 16 and w.kv_len >= LEAST_KEYS
        return few and not w.packed and w.lengths != "qkv" and super().supports(workload, target)

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Parts of the keys, keys of a block, blocks in flight, and whether queries stay in registers."""
        w = _attention(workload)
        tiles = math.ceil(_rows(w) / 16)
        knobs = [
            Knob("warps", (1 << (tiles - 1).bit_length(),)),
            Knob("warp_tiles", (1,)),
            Knob("key_block", tuple(n for n in (16, 32, 64, 128) if n <= w.kv_len)),
            Knob("stages", (2, 3, 4)),
            Knob("hold_query", (False, True)),
            Knob("splits", tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n == 1 or n * 16 <= w.kv_len)),
        ]

        return ConfigSpace(knobs, [lambda config: fits(w, target, config)])

    def default(self, workload: Workload, target: Target) -> Config:
        """Blocks of 64 keys, as many parts as give every SM several warps."""
        w = _attention(workload)

        def cost(config: Config) -> tuple[float, str]:
            keys, stages, splits = (config.integer(name) for name in ("key_block", "stages", "splits"))
            blocks = w.batch * w.kv_heads * splits
            held = max(1, min(target.shared_memory_per_sm_bytes // (shared_bytes(w, config) + 1024), 4))
            waves = math.ceil(blocks / (target.sm_count * held))
            each = math.ceil(w.kv_len / splits / keys) * keys
            # What a block costs to start and to leave its sums, in keys.
            started = 32 + 4 * _rows(w) / 16
            shape = 1.0 + 0.03 * abs(math.log2(keys / 64)) + 0.02 * abs(stages - 3) + 0.01 * (not config["hold_query"])
            # The estimate of registers is low for small blocks: near the limit they spill.
            shape += 0.5 * (registers(w, config) > _SAFE_REGISTERS)
            return waves * (each + started * (splits > 1)) * shape, config.key()

        return min(self.space(workload, target), key=cost)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        return tvm.IRModule({"main": _SplitKernel(_attention(workload), config).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """As of :class:`AttentionCUDA`, and waves and keys of the parts."""
        w, splits = _attention(workload), config.integer("splits")
        found = super().features(workload, target, config)
        split_waves = w.batch * w.kv_heads * splits / target.sm_count
        return {**found, "split_waves": split_waves, "split_keys": w.kv_len / splits, "rows": float(_rows(w))}


class _SplitKernel(AttentionKernel):
    """The two kernels being written out. A tile's rows: queries of the first head of a group, then of the second."""

    def __init__(self, w: Attention, config: Config) -> None:
        super().__init__(w, config)
        self.splits = config.integer("splits")
        self.group = w.heads // w.kv_heads
        self.q_rows = _rows(w)

    def function(self) -> Any:
        """The ``PrimFunc``."""
        from tvm.tirx.script.builder import ir as T

        w, pairs = self.w, self.w.batch * self.w.kv_heads

        def attend(operand: dict[str, Any], blocks: list[Any], thread: Any) -> None:
            self.split, self.pair = blocks
            self.operand, self.first_query = operand, 0
            self._allocate()
            self.b, self.kv_head = T.bind(self.pair // w.kv_heads), T.bind(self.pair % w.kv_heads)
            self.thread, self.lane, self.warp = thread, T.bind(thread % 32), T.bind(thread // 32)
            self._block()

        def combine(operand: dict[str, Any], blocks: list[Any], thread: Any) -> None:
            self.operand = operand
            at = T.bind(blocks[0] * _THREADS + thread)
            with T.If(at < pairs * self.q_rows * self.dim), T.Then():
                self._combine(at)

        scratch = {
            "sums": (self.splits, pairs, self.q_rows, self.dim),
            "tops": (self.splits, pairs, self.q_rows),
            "totals": (self.splits, pairs, self.q_rows),
        }
        second = -(-pairs * self.q_rows * self.dim // _THREADS)
        return kernels(
            w, scratch, [Launch([self.splits, pairs], self.threads, attend), Launch([second], _THREADS, combine)]
        )

    def _key_blocks(self) -> tuple[Any, Any]:
        """This part's share of the blocks of keys that any query may see."""
        from tvm.tirx.script.builder import ir as T

        w = self.w
        last = T.bind(self.operand["lengths"][self.b]) if w.lengths else w.kv_len
        if w.causal:
            last = T.min(self._position(w.q_len - 1) + 1, last)
        first = T.max(self._position(0) - (w.window - 1), 0) if w.window else 0
        start = T.bind(first // self.bk)
        end = T.bind((T.max(T.min(last, w.kv_len), 0) + (self.bk - 1)) // self.bk)
        share = T.bind((T.max(end - start, 0) + (self.splits - 1)) // self.splits)
        own = T.bind(start + self.split * share)
        return own, T.bind(T.min(own + share, end))

    def _element(self, name: str, i: Any, column: Any) -> tuple[Any, Any]:
        if name == "query":
            self.h, i = self._head(i), i % self.w.q_len
        else:
            self.h = self.kv_head * self.group
        return super()._element(name, i, column)

    def _head(self, row: Any) -> Any:
        return self.kv_head * self.group + row // self.w.q_len

    def _finish_scores(self, block: Any) -> None:
        """As of the base, each row by its own head and query; rows past the last are not looked at."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        first_key = T.bind(block * self.bk + self.lane % 4 * 2)
        for half in range(2):
            row = T.bind(T.min(self._query(0, half), self.q_rows - 1))
            head, i = T.bind(self._head(row)), T.bind(row % w.q_len)
            for at, j in self._keys(half, first_key):
                value = self.scores[at] * tirx.const(w.scaling * (1.0 if self.general else _LOG2_E), "float32")
                if self.general:
                    value = modified(w, value, self._read, self.modify, self.b, head, i, j)
                    value = value * tirx.const(_LOG2_E, "float32")
                allowed = conditions(w, self._read, self.b, i, j)
                if w.kv_len % self.bk:
                    allowed.append(j < w.kv_len)
                if allowed:
                    value = tirx.Select(tirx.all(*allowed), value, tirx.const(MASKED, "float32"))
                T.buffer_store(self.scores, value, [at])

    def _keys(self, half: int, first_key: Any) -> list[tuple[int, Any]]:
        """Places of a row's scores, and their keys."""
        return [
            (self._score(0, j) + half * 2 + e, first_key + (j * 8 + e)) for j in range(self.bk // 8) for e in range(2)
        ]

    def _write(self) -> None:
        """Sums, top and total of each row."""
        from tvm.tirx.script.builder import ir as T

        for half in range(2):
            total = T.bind(self._over_lanes(lambda a, b: a + b, self.total[half]))
            row = T.bind(self._query(0, half))
            with T.If(row < self.q_rows), T.Then():
                place = [self.split, self.pair, row]
                T.buffer_store(self.operand["tops"], self.top[half], place)
                T.buffer_store(self.operand["totals"], total, place)
                for d in range(self.dim // 8):
                    for e in range(2):
                        at = [*place, d * 8 + e + self.lane % 4 * 2]
                        T.buffer_store(self.operand["sums"], self.out[self._sum(0, d) + half * 2 + e], at)

    def _combine(self, at: Any) -> None:
        """One result; zero for a query that sees no key."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, operand = self.w, self.operand
        column, row = T.bind(at % self.dim), T.bind(at // self.dim % self.q_rows)
        self.pair = T.bind(at // (self.dim * self.q_rows))
        self.b, self.kv_head = self.pair // w.kv_heads, self.pair % w.kv_heads
        held = [T.sblock_alloc_buffer((1,), "float32", scope="local") for _ in range(3)]
        for buffer, value in zip(held, (FLOOR, 0.0, 0.0), strict=True):
            T.buffer_store(buffer, tirx.const(value, "float32"), [0])
        top, total, value = held
        with T.serial(self.splits) as split:
            T.buffer_store(top, T.max(top[0], operand["tops"][split, self.pair, row]), [0])
        with T.serial(self.splits) as split:
            scale = T.bind(T.exp2(operand["tops"][split, self.pair, row] - top[0]))
            T.buffer_store(total, total[0] + operand["totals"][split, self.pair, row] * scale, [0])
            T.buffer_store(value, value[0] + operand["sums"][split, self.pair, row, column] * scale, [0])
        zero = tirx.const(0.0, "float32")
        result = tirx.Select(total[0] > zero, value[0] / T.max(total[0], tirx.const(1e-37, "float32")), zero)
        self.h = self._head(row)
        buffer, place = super()._element("out", row % w.q_len, column)
        shape = [int(extent) for extent in buffer.shape]
        indices = []
        for extent in reversed(shape):
            indices.append(place % extent)
            place = place // extent
        T.buffer_store(buffer, tirx.Cast(w.dtype, result), indices[::-1])


def _rows(w: Attention) -> int:
    """Queries that share a head of keys."""
    return w.q_len * (w.heads // w.kv_heads)


def _attention(workload: Workload) -> Attention:
    assert isinstance(workload, Attention), f"expected an Attention workload, got {workload}"
    return workload
