"""Normalised heads on CPUs: a head is read twice, the second time from a cache. Loop nest in ``moves.py``."""

from __future__ import annotations

from typing import Any, ClassVar

from attntune.ops.head_norm import HeadNorm
from attntune.ops.workload import Workload
from attntune.templates.common import lanes_within
from attntune.templates.cpu.elements import Elements
from attntune.templates.cpu.moves import MoveTemplate, Operands, copy
from attntune.templates.cpu.vectors import Vectors


class HeadNormCPU(MoveTemplate):
    """Sum of squares of a head, then its elements; values are copied."""

    op: ClassVar[str] = "head_norm"

    def rows(self, workload: Workload) -> int:
        """Tokens."""
        assert isinstance(workload, HeadNorm), f"expected a HeadNorm workload, got {workload}"
        return workload.rows

    def row(self, workload: Workload, elements: Elements, operands: Operands, row: Any) -> None:
        """Queries and keys of one token normalised, its values copied."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        assert isinstance(workload, HeadNorm)
        w = workload
        qkv, weight, y = operands["qkv"], operands["weight"], operands["y"]
        lanes = lanes_within(elements.lanes, w.head_dim)
        with T.serial(w.normed) as head:
            first = T.bind(head * w.head_dim)
            sums = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
            elements.store(sums, [0], elements.splat(0.0, lanes), lanes)

            def add(at: Any, width: int) -> None:
                value = T.bind(elements.load(qkv, [row, first + at], width))
                elements.store(sums, [0], elements.load(sums, [0], width) + value * value, width)

            elements.along(w.head_dim, add)
            if lanes > 1:
                total = Vectors(lanes).fold(elements.load(sums, [0], lanes), lambda a, b: a + b)
                elements.store(sums, [0], total, lanes)
            mean = sums[0] * tirx.const(1.0 / w.head_dim, "float32") + tirx.const(w.eps, "float32")
            scale = T.bind(tirx.const(1.0, "float32") / tirx.sqrt(mean))

            def scaled(at: Any, width: int) -> None:
                spread = scale if width == 1 else tirx.Broadcast(scale, width)
                value = elements.load(qkv, [row, first + at], width) * spread
                elements.store(y, [row, first + at], value * elements.load(weight, [head, at], width), width)

            elements.along(w.head_dim, scaled)
        kept = w.normed * w.head_dim
        copy(elements, (qkv, [row, kept]), (y, [row, kept]), w.kv_heads * w.head_dim)
