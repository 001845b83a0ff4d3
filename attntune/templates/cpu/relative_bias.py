"""Position bias on CPUs: a row is one piece of its head's table, and beyond the table's ends the ends themselves."""

from __future__ import annotations

from typing import Any, ClassVar

from attntune.ops.relative_bias import RelativeBias
from attntune.ops.workload import Workload
from attntune.templates.cpu.elements import Elements
from attntune.templates.cpu.moves import MoveTemplate, Operands


class RelativeBiasCPU(MoveTemplate):
    """One row a head and query; the table is read as it lies, a row further back for each query further on."""

    op: ClassVar[str] = "relative_bias"

    def rows(self, workload: Workload) -> int:
        """Queries of all heads, and with lengths of all sequences."""
        assert isinstance(workload, RelativeBias), f"expected a RelativeBias workload, got {workload}"
        batch, heads, queries, _ = workload.outputs()[0].shape
        return batch * heads * queries

    def row(self, workload: Workload, elements: Elements, operands: Operands, row: Any) -> None:
        """``bias[b, h, i, :]``: nearer than the table's first column, then within it, then past its last."""
        from tvm.tirx.script.builder import ir as T

        assert isinstance(workload, RelativeBias)
        w, lanes = workload, elements.lanes
        table, bias = operands["table"], operands["bias"]
        b, h, i = row // (w.heads * w.q_len), row // w.q_len % w.heads, row % w.q_len
        at = operands["lengths"][b] - w.q_len + i if w.lengths else i
        # Column of the first key; the table lies between low and high of the keys.
        column = T.bind(w.zero - at)
        low = T.bind(T.max(T.min(-column, w.kv_len), 0))
        high = T.bind(T.max(T.min(w.distances - column, w.kv_len), low))
        whole = T.bind((high - low) // lanes * lanes)

        def move(j: Any, source: Any, width: int) -> None:
            elements.store(bias, [b, h, i, j], elements.load(table, [h, source], width), width)

        with T.serial(low) as j:
            move(j, 0, 1)
        with T.serial(whole // lanes) as step:
            start = low + step * lanes
            move(start, column + start, lanes)
        with T.serial(high - low - whole) as j:
            start = low + whole + j
            move(start, column + start, 1)
        with T.serial(w.kv_len - high) as j:
            move(high + j, w.distances - 1, 1)
