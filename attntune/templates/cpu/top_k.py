"""The largest elements of rows on CPUs.

ArgMax: two lane-wise reductions of a row, the maximum and then the first place that holds it, the second from cache.

TopK: one pass that compares a strip of vectors with the least of the k kept so far; only a strip that holds something
larger is looked at element by element. Of n elements in random order about k·ln(n/k) are ever inserted.
"""

from __future__ import annotations

from typing import Any, ClassVar

from attntune.ops.top_k import ArgMax, TopK
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.common import LaneReduction, compute_reduction_at, lanes_within
from attntune.templates.cpu.elements import Elements
from attntune.templates.cpu.rows import SERIAL_BYTES
from attntune.templates.template import ScheduleTemplate


class _RowsOnCores(ScheduleTemplate):
    """Base: registers that a pass keeps busy, and whether rows go to several cores."""

    kind: ClassVar[str] = "cpu"

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Vectors compared at once, and whether to use more than one core."""
        features = workload.inputs()[0].shape[-1]
        lanes = lanes_within(target.lanes("float32"), features)
        vectors = tuple(v for v in (1, 2, 4, 8) if v == 1 or v * lanes <= features)
        return ConfigSpace([Knob("vectors", vectors), Knob("parallel", (False, True))])

    def default(self, workload: Workload, target: Target) -> Config:
        """Eight vectors; several cores for several rows."""
        rows = workload.inputs()[0].shape[0]
        parallel = target.cores > 1 and rows > 1 and workload.bytes_moved() > SERIAL_BYTES
        return min(
            self.space(workload, target), key=lambda c: (c["parallel"] != parallel, -c.integer("vectors"))
        )  # fmt: skip


class ArgMaxCPU(_RowsOnCores):
    """See the module's description."""

    op: ClassVar[str] = "argmax"

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """``for row: top; before; index``."""
        import tvm
        from tvm import te
        from tvm.s_tir import Schedule

        assert isinstance(workload, ArgMax), f"expected an ArgMax workload, got {workload}"
        reduction = LaneReduction(target.lanes("float32"), config.integer("vectors"))
        function = te.create_prim_func(workload.expression(reduction)).with_attr("global_symbol", "main")
        sch = Schedule(tvm.IRModule({"main": function}))
        (row,) = sch.get_loops(sch.get_sblock("index"))
        if config["parallel"] and workload.rows > 1:
            sch.parallel(row)
        for name in ("before", "top"):
            compute_reduction_at(sch, reduction.stages[name], row)
        return sch.mod


class TopKCPU(_RowsOnCores):
    """See the module's description."""

    op: ClassVar[str] = "top_k"

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """One pass over each row."""
        import tvm
        from tvm import tirx
        from tvm.script.ir_builder import IRBuilder
        from tvm.tirx.script.builder import ir as T

        assert isinstance(workload, TopK), f"expected a TopK workload, got {workload}"
        w = workload
        elements = Elements(target.lanes("float32"))
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            arguments = [
                T.arg(spec.name, T.buffer(spec.shape, spec.dtype)) for spec in (*w.inputs(), *w.outputs())
            ]  # fmt: skip
            with T.sblock("root"):
                x, values, indices = (elements.of(argument) for argument in arguments)
                loop = T.parallel if config["parallel"] and w.rows > 1 else T.serial
                with loop(w.rows) as row, T.sblock("row"):
                    T.reads()
                    T.writes()
                    kept = T.sblock_alloc_buffer((1, w.k), "float32", scope="local")
                    places = T.sblock_alloc_buffer((1, w.k), "int32", scope="local")
                    with T.serial(w.k) as j:
                        T.buffer_store(kept, tirx.const(float("-inf"), "float32"), [0, j])
                        T.buffer_store(places, tirx.const(w.features, "int32"), [0, j])
                    _scan(elements, x, row, w, kept, places, config.integer("vectors"))
                    with T.serial(w.k) as j:
                        elements.store(values, [row, j], kept[0, j], 1)
                        T.buffer_store(indices, T.Cast("int64", places[0, j]), [row, j])
        return tvm.IRModule({"main": builder.get()})


def _scan(elements: Elements, x: Any, row: Any, w: TopK, kept: Any, places: Any, vectors: int) -> None:
    """Every element of a row against the ``k`` kept; strips of ``vectors`` registers, then single elements."""
    from tvm import tirx
    from tvm.tirx.script.builder import ir as T

    lanes = lanes_within(elements.lanes, w.features)
    strip = lanes * vectors
    whole = w.features // strip

    def free(j: Any) -> Any:
        return places[0, j] == w.features

    def insert(at: Any) -> None:
        value = T.bind(elements.load(x, [row, at], 1))
        with T.If(tirx.Or(free(w.k - 1), value > kept[0, w.k - 1])), T.Then():
            T.buffer_store(kept, value, [0, w.k - 1])
            T.buffer_store(places, at, [0, w.k - 1])
            with T.serial(w.k - 1) as up:
                j = w.k - 2 - up
                # Strictly: an equal element that came first stays first.
                with T.If(tirx.Or(free(j), kept[0, j + 1] > kept[0, j])), T.Then():
                    above, below = T.bind(kept[0, j]), T.bind(kept[0, j + 1])
                    place_above, place_below = T.bind(places[0, j]), T.bind(places[0, j + 1])
                    T.buffer_store(kept, below, [0, j])
                    T.buffer_store(kept, above, [0, j + 1])
                    T.buffer_store(places, place_below, [0, j])
                    T.buffer_store(places, place_above, [0, j + 1])

    if whole:
        with T.serial(whole) as step:
            top = elements.load(x, [row, step * strip], lanes)
            for v in range(1, vectors):
                top = T.max(top, elements.load(x, [row, step * strip + v * lanes], lanes))
            width = lanes
            while width > 1:
                top = T.bind(top)
                width //= 2
                low = tirx.Shuffle([top], list(range(width)))
                top = T.max(low, tirx.Shuffle([top], list(range(width, 2 * width))))
            with T.If(tirx.Or(free(w.k - 1), top > kept[0, w.k - 1])), T.Then(), T.serial(strip) as lane:
                insert(step * strip + lane)
    if w.features > whole * strip:
        with T.serial(w.features - whole * strip) as lane:
            insert(whole * strip + lane)
