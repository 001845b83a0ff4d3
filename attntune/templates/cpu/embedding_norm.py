"""Embedding sum and norm on CPUs: one gather per position, then layer norm of it. Loop nest in ``rows.py``."""

from __future__ import annotations

from typing import Any, ClassVar

from attntune.ops.embedding_norm import EmbeddingNorm
from attntune.ops.reduction import Reduction
from attntune.ops.workload import Workload
from attntune.templates.cpu.rows import RowTemplate


class EmbeddingNormCPU(RowTemplate):
    """The three table rows are read once and their sum kept, or read again from cache by every pass."""

    op: ClassVar[str] = "embedding_norm"
    stages: ClassVar[tuple[str, ...]] = ("row", "total", "mean", "squares", "scale")
    row_stage: ClassVar[str] = "row"
    row_stage_is_cheap: ClassVar[bool] = True

    def expression(self, workload: Workload, reduction: Reduction) -> list[Any]:
        """Embedding sum and norm over ``reduction``."""
        assert isinstance(workload, EmbeddingNorm), f"expected an EmbeddingNorm workload, got {workload}"
        return workload.expression(reduction)
