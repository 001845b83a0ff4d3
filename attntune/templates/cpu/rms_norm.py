"""RMS norm on CPUs: two passes over a row that stays in the first-level cache. Loop nest in ``rows.py``."""

from __future__ import annotations

from typing import Any, ClassVar

from attntune.ops.reduction import Reduction
from attntune.ops.rms_norm import RMSNorm
from attntune.ops.workload import Workload
from attntune.templates.cpu.rows import RowTemplate


class RMSNormCPU(RowTemplate):
    """Sum of squares, then the result; each pass reads the row from cache."""

    op: ClassVar[str] = "rms_norm"
    stages: ClassVar[tuple[str, ...]] = ("row", "squares", "scale")
    row_stage: ClassVar[str] = "row"
    row_stage_is_cheap: ClassVar[bool] = True

    def expression(self, workload: Workload, reduction: Reduction) -> list[Any]:
        """RMS norm over ``reduction``."""
        assert isinstance(workload, RMSNorm), f"expected an RMSNorm workload, got {workload}"
        return workload.expression(reduction)

    def stores_by_default(self, workload: Workload) -> bool:
        """No: adding the residual again costs less than storing the sum."""
        return False
