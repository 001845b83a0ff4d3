"""Additive attention on CPUs.

Loop nest, outermost first:

    parallel  queries of every sequence (``parallel``)
    serial    keys that are seen: a vector of sums over dim, ``key_tile`` keys at a time; then its lanes' sum
    then the softmax over the scores, in the first-level cache
    serial    features, ``tile_vectors`` registers at a time: weights times values, over the keys

Nearly all of the work is the hyperbolic tangents, which several keys at a time overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from attntune.ops.additive_attention import LOWEST, AdditiveAttention
from attntune.ops.recurrent_expression import along
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cpu.vectors import Vectors
from attntune.templates.template import ScheduleTemplate

#: Operations below which a second core is not worth waking.
_SERIAL_FLOPS = 256 * 1024


class AdditiveAttentionCPU(ScheduleTemplate):
    """Scores, softmax and weighted sum of one query after another."""

    op: ClassVar[str] = "additive_attention"
    kind: ClassVar[str] = "cpu"

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Keys and registers at a time, and whether queries are shared out."""
        w = _additive(workload)
        vectors = math.ceil(w.features / target.lanes("float32"))
        return ConfigSpace(
            [
                Knob("key_tile", tuple(t for t in (1, 2, 4) if w.kv_len % t == 0)),
                Knob("tile_vectors", tuple(v for v in (1, 2, 4, 8) if v <= vectors)),
                Knob("parallel", (False, True)),
            ]
        )

    def default(self, workload: Workload, target: Target) -> Config:
        """Two keys, four registers, and several cores where there is work for them."""
        w = _additive(workload)
        wide = w.flops() > _SERIAL_FLOPS and target.cores > 1 and w.batch * w.q_len > 1

        def cost(config: Config) -> tuple[float, ...]:
            return (
                config["parallel"] != wide,
                abs(config.integer("key_tile") - 2),
                abs(config.integer("tile_vectors") - 4),
            )

        return min(self.space(workload, target), key=cost)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description of the loop nest."""
        import tvm

        return tvm.IRModule({"main": _Kernel(_additive(workload), target, config).function()})


class _Kernel:
    def __init__(self, w: AdditiveAttention, target: Target, config: Config) -> None:
        self.w = w
        self.v = Vectors(target.lanes("float32"))
        self.keys = config.integer("key_tile")
        self.vectors = config.integer("tile_vectors")
        self.parallel = bool(config["parallel"]) and w.batch * w.q_len > 1

    def function(self) -> Any:
        from tvm.script.ir_builder import IRBuilder
        from tvm.tirx.script.builder import ir as T

        w = self.w
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            self.operand = {
                spec.name: T.arg(spec.name, T.buffer(spec.shape, spec.dtype)) for spec in (*w.inputs(), *w.outputs())
            }
            with T.sblock("root"):
                tasks = w.batch * w.q_len
                with T.parallel(tasks) if self.parallel else T.serial(tasks) as task, T.sblock("query"):
                    T.reads()
                    T.writes()
                    b, i = task // w.q_len, task % w.q_len
                    scores = T.sblock_alloc_buffer((w.kv_len,), "float32")
                    self._scores(scores, b, i)
                    self._softmax(scores, b, i)
                    self._context(scores, b, i)
        return builder.get()

    def _if_seen(self, b: Any, j: Any, body: Callable[[], None], other: Callable[[], None] | None = None) -> None:
        from tvm.tirx.script.builder import ir as T

        seen = self.w.seen(self.operand, b, j)
        if seen is None:
            body()
            return
        with T.If(seen):
            with T.Then():
                body()
            if other is not None:
                with T.Else():
                    other()

    def _scores(self, scores: Any, b: Any, i: Any) -> None:
        """Of every key, the lowest value where it is not seen."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        w, v = self.w, self.v
        query, key, scale = self.operand["query"], self.operand["key"], self.operand.get("scale")
        acc = T.sblock_alloc_buffer((self.keys, v.lanes), "float32", scope="local")
        whole, left = divmod(w.dim, v.lanes)
        lowest = tirx.const(LOWEST, "float32")

        def add(t: int, j: Any, start: Any, width: int) -> None:
            with T.vectorized(width) as lane:
                energy = tmath.tanh(query[b, i, start + lane] + key[b, j, start + lane])
                energy = scale[start + lane] * energy if scale is not None else energy
                T.buffer_store(acc, acc[t, lane] + energy, [t, lane])

        with T.serial(w.kv_len // self.keys) as block:
            for t in range(self.keys):
                v.store(acc, [t, 0], v.splat(0.0))
            if whole:
                with T.serial(whole) as chunk:
                    for t in range(self.keys):
                        add(t, block * self.keys + t, chunk * v.lanes, v.lanes)
            start, width = whole * v.lanes, v.lanes
            while left:
                width //= 2
                if left >= width:
                    for t in range(self.keys):
                        add(t, block * self.keys + t, start, width)
                    start, left = start + width, left - width
            for t in range(self.keys):
                j = block * self.keys + t
                v.store(acc, [t, 0], v.fold(v.load(acc, [t, 0]), lambda a, c: a + c))
                seen, hidden = (
                    partial(T.buffer_store, scores, acc[t, 0], [j]),
                    partial(T.buffer_store, scores, lowest, [j]),
                )
                self._if_seen(b, j, seen, hidden)

    def _softmax(self, scores: Any, b: Any, i: Any) -> None:
        """Scores to weights, in place and in the result."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        w = self.w
        held = T.sblock_alloc_buffer((2,), "float32", scope="local")
        T.buffer_store(held, tirx.const(LOWEST, "float32"), [0])
        T.buffer_store(held, tirx.const(0.0, "float32"), [1])
        with T.serial(w.kv_len) as j:
            T.buffer_store(held, T.max(held[0], scores[j]), [0])
        hidden = tirx.const(LOWEST / 2, "float32")
        along(w.kv_len, self.v.lanes, lambda j: T.buffer_store(
            scores, tirx.Select(scores[j] > hidden, tmath.exp(scores[j] - held[0]), tirx.const(0.0, "float32")), [j]
        ))  # fmt: skip
        with T.serial(w.kv_len) as j:
            T.buffer_store(held, held[1] + scores[j], [1])
        T.buffer_store(held, tirx.const(1.0, "float32") / T.max(held[1], tirx.const(1e-30, "float32")), [1])
        along(w.kv_len, self.v.lanes, lambda j: T.buffer_store(scores, scores[j] * held[1], [j]))
        along(w.kv_len, self.v.lanes, lambda j: T.buffer_store(self.operand["weights"], scores[j], [b, i, j]))

    def _context(self, scores: Any, b: Any, i: Any) -> None:
        """Weights times values."""
        from tvm.tirx.script.builder import ir as T

        lanes, features = self.v.lanes, self.w.features
        start, width = 0, self.vectors * lanes
        while start < features:
            count = (features - start) // width
            if count:
                with T.serial(count) as tile:
                    self._columns(scores, b, i, start + tile * width, width)
            start += count * width
            width = (width - lanes) or lanes // 2 if width > lanes else width // 2

    def _columns(self, scores: Any, b: Any, i: Any, first: Any, width: int) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        value, context = self.operand["value"], self.operand["context"]
        lanes = min(self.v.lanes, width)
        vectors = width // lanes
        acc = T.sblock_alloc_buffer((vectors, lanes), "float32", scope="local")

        def each(body: Callable[[int, Any], None]) -> None:
            for vector in range(vectors):
                with T.vectorized(lanes) if lanes > 1 else T.serial(1) as lane:
                    body(vector, lane)

        each(lambda v, lane: T.buffer_store(acc, tirx.const(0.0, "float32"), [v, lane]))
        with T.serial(self.w.kv_len) as j:
            self._if_seen(b, j, lambda: each(lambda v, lane: T.buffer_store(
                acc, acc[v, lane] + scores[j] * value[b, j, first + v * lanes + lane], [v, lane])))  # fmt: skip
        each(lambda v, lane: T.buffer_store(context, acc[v, lane], [b, i, first + v * lanes + lane]))


def _additive(workload: Workload) -> AdditiveAttention:
    assert isinstance(workload, AdditiveAttention), f"expected an AdditiveAttention workload, got {workload}"
    return workload
