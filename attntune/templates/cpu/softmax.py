"""Softmax on CPUs: maximum, exponentials stored for the row, their sum, result. Loop nest in ``rows.py``."""

from __future__ import annotations

from typing import Any, ClassVar

from attntune.ops.reduction import Reduction
from attntune.ops.softmax import Softmax
from attntune.ops.workload import Workload
from attntune.templates.cpu.rows import RowTemplate


class SoftmaxCPU(RowTemplate):
    """Each exponential is computed once and kept for the row."""

    op: ClassVar[str] = "softmax"
    stages: ClassVar[tuple[str, ...]] = ("wide", "top", "power", "total", "inverse")
    row_stage: ClassVar[str] = "power"
    row_stage_is_cheap: ClassVar[bool] = False

    def expression(self, workload: Workload, reduction: Reduction) -> list[Any]:
        """Softmax over ``reduction``."""
        assert isinstance(workload, Softmax), f"expected a Softmax workload, got {workload}"
        return workload.expression(reduction)
