"""Both ends of a patch embedding on CPUs: patches cut from an image, token and positions added to their embeddings.

They move memory and are bound by it; the loop nest is that of ``moves.py``: rows of the result, along a row vectors.
"""

from __future__ import annotations

from typing import Any, ClassVar

from attntune.ops.patchify import Patchify
from attntune.ops.prepend_token import PrependToken
from attntune.ops.workload import Workload
from attntune.templates.cpu.elements import Elements
from attntune.templates.cpu.moves import MoveTemplate, Operands, copy


class PatchifyCPU(MoveTemplate):
    """One row a patch: ``channels·patch`` runs of ``patch`` neighbours each."""

    op: ClassVar[str] = "patchify"

    def rows(self, workload: Workload) -> int:
        """Patches of all images."""
        assert isinstance(workload, Patchify), f"expected a Patchify workload, got {workload}"
        return workload.batch * workload.patches

    def row(self, workload: Workload, elements: Elements, operands: Operands, row: Any) -> None:
        """One patch."""
        from tvm.tirx.script.builder import ir as T

        assert isinstance(workload, Patchify)
        w = workload
        b, p = row // w.patches, row % w.patches
        top, left = p // w.across * w.patch, p % w.across * w.patch
        with T.serial(w.channels) as c, T.serial(w.patch) as i:
            source = (operands["x"], [b, c, top + i, left])
            copy(elements, source, (operands["y"], [b, p, (c * w.patch + i) * w.patch]), w.patch)


class PrependTokenCPU(MoveTemplate):
    """One row a position; the token's is the first of each sequence."""

    op: ClassVar[str] = "prepend_token"

    def rows(self, workload: Workload) -> int:
        """Positions of all sequences."""
        assert isinstance(workload, PrependToken), f"expected a PrependToken workload, got {workload}"
        return workload.batch * (workload.seq + 1)

    def row(self, workload: Workload, elements: Elements, operands: Operands, row: Any) -> None:
        """Token or x, plus the position's embedding."""
        from tvm.tirx.script.builder import ir as T

        assert isinstance(workload, PrependToken)
        w = workload
        b, i = row // (w.seq + 1), row % (w.seq + 1)

        def add(source: Any, at: list[Any]) -> None:
            def move(column: Any, width: int) -> None:
                value = elements.load(source, [*at, column], width)
                value = value + elements.load(operands["position"], [i, column], width)
                elements.store(operands["y"], [b, i, column], value, width)

            elements.along(w.features, move)

        with T.If(i == 0):
            with T.Then():
                add(operands["token"], [])
            with T.Else():
                add(operands["x"], [b, i - 1])
