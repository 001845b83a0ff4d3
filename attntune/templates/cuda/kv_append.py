"""Appending to a key-value cache on CUDA: one kernel rotates queries and keys and writes the new rows where they lie.

    blockIdx.x    blocks of ``threads`` pieces of the packed rows
    threadIdx.x   ``vector`` neighbouring elements of one row: of a query, a key or a value

A thread reads its elements and, where they are rotated, their partners, half a head or one element away: each line of
the packed rows crosses memory once. Nothing else of the caches is touched.

Ladder: none yet, for nothing here ran on a GPU.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.kv_append import KVAppend
from attntune.ops.rope import rotated
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cuda.launch import kernel
from attntune.templates.template import ScheduleTemplate


class KVAppendCUDA(ScheduleTemplate):
    """Every dtype and style."""

    op: ClassVar[str] = "kv_append"
    kind: ClassVar[str] = "cuda"

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Threads of a block, and neighbouring elements of a thread."""
        w = _append(workload)
        return ConfigSpace(
            [
                Knob("threads", tuple(n for n in (64, 128, 256, 512) if n <= target.threads_per_block)),
                Knob("vector", tuple(n for n in (1, 2, 4, 8) if w.head_dim % n == 0)),
            ]
        )

    def default(self, workload: Workload, target: Target) -> Config:
        """Blocks of 128 threads, the most elements a thread that leave every SM a block."""
        w = _append(workload)
        space = self.space(workload, target)
        enough = [c for c in space if _elements(w) // c.integer("vector") >= 128 * target.sm_count]
        vector = max((c.integer("vector") for c in enough), default=1)
        return space.check({"threads": 128, "vector": vector})

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        w = _append(workload)
        threads, vector = config.integer("threads"), config.integer("vector")
        blocks = math.ceil(_elements(w) / (threads * vector))

        def body(operand: dict[str, Any], indices: list[Any], thread: Any) -> None:
            from tvm.tirx.script.builder import ir as T

            piece = T.bind(indices[0] * threads + thread)
            with T.If(piece < _elements(w) // vector), T.Then():
                _write(w, operand, piece, vector)

        return tvm.IRModule({"main": kernel(w, [blocks], threads, body)})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs and waves of blocks."""
        elements = _elements(_append(workload))
        blocks = elements / (config.integer("threads") * config.integer("vector"))
        return {
            **super().features(workload, target, config),
            "waves": blocks / target.sm_count,
            "log_elements": math.log2(elements),
        }


def _write(w: KVAppend, operand: dict[str, Any], piece: Any, vector: int) -> None:
    """``vector`` elements of one row, which one head holds."""
    from tvm import tirx
    from tvm.tirx.script.builder import ir as T

    width, dim, qkv = _width(w), w.head_dim, operand["qkv"]
    row, column = T.bind(piece // (width // vector)), T.bind(piece % (width // vector) * vector)
    b, i = T.bind(row // w.q_len), T.bind(row % w.q_len)
    p = T.bind(operand["lengths"][b] - w.q_len + i)
    keys_at, values_at = w.heads * dim, (w.heads + w.kv_heads) * dim

    def turned(at: Any) -> Any:
        if not w.style:
            return qkv[b, i, at]
        angle = T.max(T.min(p, w.positions - 1), 0)
        value = rotated(
            lambda c: qkv[b, i, c].astype("float32"), operand["cos"], operand["sin"], angle, at, dim, w.style
        )
        return value.astype(w.dtype)

    def cached(at: Any) -> list[Any]:
        return [b, at // dim, p, at % dim]

    with T.If(column < keys_at):
        with T.Then(), T.unroll(vector) as e:
            T.buffer_store(operand["query"], turned(column + e), [b, i, column + e])
        with T.Else(), T.If(tirx.And(p >= 0, p < w.context)), T.Then(), T.If(column < values_at):
            with T.Then(), T.unroll(vector) as e:
                T.buffer_store(operand["key_cache"], turned(column + e), cached(column + e - keys_at))
            with T.Else(), T.unroll(vector) as e:
                T.buffer_store(operand["value_cache"], qkv[b, i, column + e], cached(column + e - values_at))


def _width(w: KVAppend) -> int:
    return (w.heads + 2 * w.kv_heads) * w.head_dim


def _elements(w: KVAppend) -> int:
    return w.batch * w.q_len * _width(w)


def _append(workload: Workload) -> KVAppend:
    assert isinstance(workload, KVAppend), f"expected a KVAppend workload, got {workload}"
    return workload
