"""Operators that move rows about on CPUs: embedding, row selection, rotary embedding, appending to a cache.

Loop nest: rows of the result, on all cores where there is more to move than a launch costs; along a row, vectors. The
kernels are bound by memory or by their launch, so there is little to choose.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from attntune.ops.embedding import Embedding
from attntune.ops.kv_append import KVAppend
from attntune.ops.rope import Rope
from attntune.ops.select_rows import SelectRows
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cpu.elements import Elements
from attntune.templates.cpu.rows import SERIAL_BYTES
from attntune.templates.template import ScheduleTemplate

Operands = Mapping[str, Any]
Place = tuple[Any, list[Any]]
"""A buffer and the index of an element of it."""
HeadPlace = Callable[[Any], Place]
"""Where a head's first element is."""


class MoveTemplate(ScheduleTemplate):
    """Base: one loop over rows, and what a row does."""

    kind: ClassVar[str] = "cpu"

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Register width, and whether to use more than one core."""
        widest = target.lanes("float32")
        lanes = tuple(sorted({max(widest // 2, 4), widest}))
        return ConfigSpace([Knob("parallel", (False, True)), Knob("lanes", lanes)])

    def default(self, workload: Workload, target: Target) -> Config:
        """Widest registers; several cores unless the work is done before they have started."""
        parallel = self.uses_cores(workload, target)
        return min(
            self.space(workload, target),
            key=lambda config: (config["parallel"] != parallel, -config.integer("lanes")),
        )

    def uses_cores(self, workload: Workload, target: Target) -> bool:
        """Whether there is more to move than starting a second core costs."""
        return target.cores > 1 and self.rows(workload) > 1 and workload.bytes_moved() > SERIAL_BYTES

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm
        from tvm.script.ir_builder import IRBuilder
        from tvm.tirx.script.builder import ir as T

        rows = self.rows(workload)
        elements = Elements(config.integer("lanes") if "lanes" in config else target.lanes("float32"))
        packed = {name: packing.spec for name, packing in self.pack(workload, target).items()}
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            specs = [packed.get(spec.name, spec) for spec in (*workload.inputs(), *workload.fresh())]
            names = [spec.name for spec in (*workload.inputs(), *workload.fresh())]
            arguments = {
                name: T.arg(name, T.buffer(spec.shape, spec.dtype)) for name, spec in zip(names, specs, strict=True)
            }
            with T.sblock("root"):
                operands = {name: elements.of(argument) for name, argument in arguments.items()}
                loop = T.parallel if config["parallel"] and rows > 1 else T.serial
                with loop(rows) as row, T.sblock("row"):
                    T.reads()
                    T.writes()
                    self.row(workload, elements, operands, row)
        return tvm.IRModule({"main": builder.get()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, rows, and what moves against the caches."""
        moved = workload.bytes_moved()
        return {
            **super().features(workload, target, config),
            "rows": float(self.rows(workload)),
            "in_l2": moved / target.l2_bytes,
            "in_l3": moved / max(target.l3_bytes, 1),
        }

    @abstractmethod
    def rows(self, workload: Workload) -> int:
        """Independent rows."""

    @abstractmethod
    def row(self, workload: Workload, elements: Elements, operands: Operands, row: Any) -> None:
        """Write out one row."""


class EmbeddingCPU(MoveTemplate):
    """One gather for each token."""

    op: ClassVar[str] = "embedding"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Tables of floats; ``embedding_grouped.py`` has the others."""
        return isinstance(workload, Embedding) and not workload.weight_dtype

    def rows(self, workload: Workload) -> int:
        """Tokens."""
        assert isinstance(workload, Embedding), f"expected an Embedding workload, got {workload}"
        return workload.batch * workload.seq

    def row(self, workload: Workload, elements: Elements, operands: Operands, row: Any) -> None:
        """``y = scale · table[id] + position[p]``."""
        from tvm.tirx.script.builder import ir as T

        assert isinstance(workload, Embedding)
        w = workload
        b, i = row // w.seq, row % w.seq
        token = T.bind(T.Cast("int32", operands["ids"][b, i]))
        if w.positions:
            at = T.bind(T.max(T.min(w.position_of(operands.get("lengths"), b, i), w.positions - 1), 0))

        def move(column: Any, width: int) -> None:
            value = elements.load(operands["table"], [token, column], width)
            if w.scale != 1.0:
                value = value * elements.splat(w.scale, width)
            if w.positions:
                value = value + elements.load(operands["position"], [at, column], width)
            elements.store(operands["y"], [b, i, column], value, width)

        elements.along(w.features, move)


class SelectRowsCPU(MoveTemplate):
    """One copy for each sequence."""

    op: ClassVar[str] = "select_rows"

    def rows(self, workload: Workload) -> int:
        """Sequences."""
        assert isinstance(workload, SelectRows), f"expected a SelectRows workload, got {workload}"
        return workload.batch

    def row(self, workload: Workload, elements: Elements, operands: Operands, row: Any) -> None:
        """``y[b] = x[b, index[b]]``."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        assert isinstance(workload, SelectRows)
        first, last = tirx.const(0, "int64"), tirx.const(workload.seq - 1, "int64")
        at: Any = workload.row
        if workload.row < 0:
            at = T.bind(T.Cast("int32", T.max(T.min(operands["index"][row], last), first)))

        def move(column: Any, width: int) -> None:
            elements.store(
                operands["y"], [row, column], elements.load(operands["x"], [row, at, column], width), width
            )  # fmt: skip

        elements.along(workload.features, move)


class RopeCPU(MoveTemplate):
    """Rotates heads pair by pair; copies values."""

    op: ClassVar[str] = "rope"

    def rows(self, workload: Workload) -> int:
        """Tokens."""
        assert isinstance(workload, Rope), f"expected a Rope workload, got {workload}"
        return workload.batch * workload.seq

    def row(self, workload: Workload, elements: Elements, operands: Operands, row: Any) -> None:
        """Queries and keys of one token rotated, its values copied."""
        assert isinstance(workload, Rope)
        w = workload
        b, s = row // w.seq, row % w.seq
        qkv, y = operands["qkv"], operands["y"]

        def head(buffer: Any) -> HeadPlace:
            return lambda h: (buffer, [b, s, h * w.head_dim])

        rotate_heads(elements, w, operands, s, head(qkv), head(y), w.heads + w.kv_heads)
        rotates = (w.heads + w.kv_heads) * w.head_dim
        copy(elements, (qkv, [b, s, rotates]), (y, [b, s, rotates]), w.kv_heads * w.head_dim)


class KVAppendCPU(MoveTemplate):
    """Writes the new rows of the caches where they lie; nothing else of them is touched."""

    op: ClassVar[str] = "kv_append"

    def rows(self, workload: Workload) -> int:
        """New tokens."""
        assert isinstance(workload, KVAppend), f"expected a KVAppend workload, got {workload}"
        return workload.batch * workload.q_len

    def row(self, workload: Workload, elements: Elements, operands: Operands, row: Any) -> None:
        """The query of one token out, its key and value into the caches where they fit."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        assert isinstance(workload, KVAppend)
        w = workload
        b, i = row // w.q_len, row % w.q_len
        qkv = operands["qkv"]
        p = T.bind(operands["lengths"][b] - w.q_len + i)
        angle = T.bind(T.max(T.min(p, w.positions - 1), 0)) if w.style else p

        def source(first: int) -> HeadPlace:
            return lambda head: (qkv, [b, i, (head + first) * w.head_dim])

        def cached(name: str) -> HeadPlace:
            return lambda head: (operands[name], [b, head, p, 0])

        def move(first: int, target: HeadPlace, count: int, rotates: bool) -> None:
            if rotates and w.style:
                rotate_heads(elements, w, operands, angle, source(first), target, count)
                return
            with T.serial(count) as head:
                copy(elements, source(first)(head), target(head), w.head_dim)

        move(0, lambda head: (operands["query"], [b, i, head * w.head_dim]), w.heads, True)
        with T.If(tirx.And(p >= 0, p < w.context)), T.Then():
            move(w.heads, cached("key_cache"), w.kv_heads, True)
            move(w.heads + w.kv_heads, cached("value_cache"), w.kv_heads, False)


def copy(elements: Elements, source: Place, target: Place, count: int) -> None:
    """``count`` elements along the last axis."""

    def move(column: Any, width: int) -> None:
        value = elements.load(source[0], shifted(source[1], column), width)
        elements.store(target[0], shifted(target[1], column), value, width)

    elements.along(count, move)


def rotate_heads(
    elements: Elements, w: Rope | KVAppend, operands: Operands, position: Any, source: HeadPlace, target: HeadPlace,
    count: int,
) -> None:  # fmt: skip
    """``count`` heads from ``source`` to ``target``, each pair of elements turned by the angles of ``position``."""
    from tvm import tirx
    from tvm.tirx.script.builder import ir as T

    half = w.head_dim // 2
    with T.serial(count) as head:
        read, read_at = source(head)
        written, written_at = target(head)

        def load(at: Any, width: int) -> Any:
            return elements.load(read, shifted(read_at, at), width)

        def store(at: Any, value: Any, width: int) -> None:
            elements.store(written, shifted(written_at, at), value, width)

        def rotate(pair: Any, width: int) -> None:
            if w.style == "half":
                a, b = load(pair, width), load(pair + half, width)
            elif width == 1:
                a, b = load(2 * pair, 1), load(2 * pair + 1, 1)
            else:
                low, high = T.bind(load(2 * pair, width)), T.bind(load(2 * pair + width, width))
                a = tirx.Shuffle([low, high], list(range(0, 2 * width, 2)))
                b = tirx.Shuffle([low, high], list(range(1, 2 * width, 2)))
            a, b = T.bind(a), T.bind(b)
            cos = T.bind(elements.load(operands["cos"], [position, pair], width))
            sin = T.bind(elements.load(operands["sin"], [position, pair], width))
            turned, other = T.bind(a * cos - b * sin), T.bind(b * cos + a * sin)
            if w.style == "half":
                store(pair, turned, width)
                store(pair + half, other, width)
            elif width == 1:
                store(2 * pair, turned, 1)
                store(2 * pair + 1, other, 1)
            else:
                zipped = [lane // 2 + (lane % 2) * width for lane in range(2 * width)]
                store(2 * pair, tirx.Shuffle([turned, other], zipped[:width]), width)
                store(2 * pair + width, tirx.Shuffle([turned, other], zipped[width:]), width)

        elements.along(half, rotate)


def shifted(at: list[Any], by: Any) -> list[Any]:
    """The index ``by`` elements further along the last axis."""
    return [*at[:-1], at[-1] + by]
