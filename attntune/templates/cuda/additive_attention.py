"""Additive attention on CUDA: one kernel, a block for each query.

    blockIdx.x    queries of every sequence
    a warp a key  lanes along dim: hyperbolic tangents, their sum by shuffles; scores in shared memory
    barrier       every warp finds the largest score
    threads       scores become weights; every warp adds them up
    threads       features: weights times values, key after key

Scores never leave the block. Nearly all of the work is the hyperbolic tangents.

Ladder: none yet, for nothing here ran on a GPU.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.additive_attention import LOWEST, AdditiveAttention
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cuda.intrinsics import SharedFloats
from attntune.templates.cuda.launch import WARP, kernel, over_lanes, when
from attntune.templates.template import ScheduleTemplate

_DISTANCES = (16, 8, 4, 2, 1)


class AdditiveAttentionCUDA(ScheduleTemplate):
    """Scores, softmax and weighted sum of a query; keys of as many positions as shared memory has room for scores."""

    op: ClassVar[str] = "additive_attention"
    kind: ClassVar[str] = "cuda"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Whether a block has room for the scores of a query."""
        return 4 * _additive(workload).kv_len <= target.shared_memory_bytes

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Threads of a block, and keys that a warp has under way at a time."""
        w = _additive(workload)
        return ConfigSpace(
            [
                Knob("threads", tuple(n for n in (64, 128, 256, 512, 1024) if n <= target.threads_per_block)),
                Knob("keys", tuple(n for n in (1, 2, 4) if n < 2 * w.kv_len)),
            ]
        )

    def default(self, workload: Workload, target: Target) -> Config:
        """A warp for every two keys and a thread for every feature, 128 to 512 threads."""
        w = _additive(workload)
        wanted = min(512, max(128, WARP * w.kv_len // 2, w.features))
        space = self.space(workload, target)
        return min(space, key=lambda c: (abs(math.log2(c.integer("threads") / wanted)), -c.integer("keys")))

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        return tvm.IRModule({"main": _Kernel(_additive(workload), config).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, waves of blocks, turns of a warp and of a thread, and sizes."""
        w = _additive(workload)
        threads, keys = config.integer("threads"), config.integer("keys")
        return {
            **super().features(workload, target, config),
            "waves": w.batch * w.q_len / target.sm_count,
            "turns": math.ceil(w.kv_len / (threads // WARP * keys)),
            "columns": math.ceil(w.features / threads),
            "log_keys": math.log2(w.kv_len),
            "log_dim": math.log2(w.dim),
        }


class _Kernel:
    """The kernel being written out."""

    def __init__(self, w: AdditiveAttention, config: Config) -> None:
        self.w = w
        self.threads, self.keys = config.integer("threads"), config.integer("keys")

    def function(self) -> Any:
        w = self.w
        return kernel(w, [w.batch * w.q_len], self.threads, self._block)

    def _block(self, operand: dict[str, Any], blocks: list[Any], thread: Any) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        self.operand, self.thread = operand, thread
        self.b, self.i = T.bind(blocks[0] // w.q_len), T.bind(blocks[0] % w.q_len)
        self.lane, self.warp = T.bind(thread % WARP), T.bind(thread // WARP)
        self.scores = SharedFloats(w.kv_len)
        self.sums = T.sblock_alloc_buffer((self.keys,), "float32", scope="local")
        self.held = T.sblock_alloc_buffer((1,), "float32", scope="local")
        self._scores()
        T.evaluate(T.tvm_storage_sync("shared"))
        top = T.bind(self._of_all(T.max, LOWEST))
        T.evaluate(T.tvm_storage_sync("shared"))
        self._shares(top)
        T.evaluate(T.tvm_storage_sync("shared"))
        total = self._of_all(lambda a, b: a + b, 0.0)
        inverse = T.bind(tirx.const(1.0, "float32") / T.max(total, tirx.const(1e-30, "float32")))
        self._write(inverse)

    def _scores(self) -> None:
        """Of every key that is seen, the lowest value of others; ``keys`` keys of a warp at a time."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        w, operand = self.w, self.operand
        at_once = self.threads // WARP * self.keys
        with T.serial(-(-w.kv_len // at_once)) as turn:
            first = T.bind(turn * at_once + self.warp * self.keys)
            for t in range(self.keys):
                T.buffer_store(self.sums, tirx.const(0.0, "float32"), [t])
            with T.serial(-(-w.dim // WARP)) as chunk:
                d = T.bind(chunk * WARP + self.lane)
                with when(d < w.dim):
                    query = T.bind(operand["query"][self.b, self.i, d])
                    scale = T.bind(operand["scale"][d]) if w.scale else None
                    for t in range(self.keys):
                        # A key past the last is computed as the last one, and stored nowhere.
                        j = T.min(first + t, w.kv_len - 1)
                        energy = T.bind(tmath.tanh(query + operand["key"][self.b, j, d]))
                        T.buffer_store(self.sums, self.sums[t] + (energy if scale is None else energy * scale), [t])
            for t in range(self.keys):
                score = T.bind(over_lanes(lambda a, b: a + b, self.sums[t], _DISTANCES))
                j = T.bind(first + t)
                with when(tirx.all(self.lane == 0, j < w.kv_len)):
                    seen = w.seen(operand, self.b, T.min(j, w.kv_len - 1))
                    hidden = tirx.const(LOWEST, "float32")
                    self.scores.store(j, score if seen is None else tirx.Select(seen, score, hidden))

    def _of_all(self, combine: Any, start: float) -> Any:
        """What is in shared memory, combined; by every warp for itself."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        T.buffer_store(self.held, tirx.const(start, "float32"), [0])
        with T.serial(-(-self.w.kv_len // WARP)) as turn:
            j = T.bind(turn * WARP + self.lane)
            with when(j < self.w.kv_len):
                T.buffer_store(self.held, combine(self.held[0], self.scores.load(j)), [0])
        return over_lanes(combine, self.held[0], _DISTANCES)

    def _shares(self, top: Any) -> None:
        """Scores to exponentials, 0 where a key is not seen."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        w = self.w
        with T.serial(-(-w.kv_len // self.threads)) as turn:
            j = T.bind(turn * self.threads + self.thread)
            with when(j < w.kv_len):
                share = T.bind(tmath.exp(self.scores.load(j) - top))
                seen = w.seen(self.operand, self.b, j)
                zero = tirx.const(0.0, "float32")
                self.scores.store(j, share if seen is None else tirx.Select(seen, share, zero))

    def _write(self, inverse: Any) -> None:
        """Weights, and their products with values; what is not seen is not read."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, operand = self.w, self.operand
        with T.serial(-(-w.kv_len // self.threads)) as turn:
            j = T.bind(turn * self.threads + self.thread)
            with when(j < w.kv_len):
                T.buffer_store(operand["weights"], self.scores.load(j) * inverse, [self.b, self.i, j])
        with T.serial(-(-w.features // self.threads)) as turn:
            f = T.bind(turn * self.threads + self.thread)
            with when(f < w.features):
                T.buffer_store(self.held, tirx.const(0.0, "float32"), [0])
                with T.serial(w.kv_len) as j:
                    seen = w.seen(operand, self.b, j)
                    with when(tirx.const(True, "bool") if seen is None else seen):
                        value = operand["value"][self.b, j, f]
                        T.buffer_store(self.held, self.held[0] + self.scores.load(j) * value, [0])
                T.buffer_store(operand["context"], self.held[0] * inverse, [self.b, self.i, f])


def _additive(workload: Workload) -> AdditiveAttention:
    assert isinstance(workload, AdditiveAttention), f"expected an AdditiveAttention workload, got {workload}"
    return workload
