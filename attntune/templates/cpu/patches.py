"""Around the product of a patch embedding or convolution on CPUs: patches and windows cut out, positions added.

They move memory and are bound by it; the loop nest is that of ``moves.py``: rows of the result, along a row vectors.
"""

from __future__ import annotations

from typing import Any, ClassVar

from attntune.ops.add_positions import AddPositions
from attntune.ops.patchify import Patchify
from attntune.ops.prepend_token import PrependToken
from attntune.ops.unfold import Unfold
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


class UnfoldCPU(MoveTemplate):
    """One row a window: one run of neighbours for each step of the kernel, or with ``"bcl"`` one element a channel."""

    op: ClassVar[str] = "unfold"

    def rows(self, workload: Workload) -> int:
        """Windows of all sequences."""
        assert isinstance(workload, Unfold), f"expected an Unfold workload, got {workload}"
        return workload.batch * workload.steps

    def row(self, workload: Workload, elements: Elements, operands: Operands, row: Any) -> None:
        """One window; steps outside the sequence are zero."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        assert isinstance(workload, Unfold)
        w = workload
        b, t = row // w.steps, row % w.steps

        def zero(column: Any, width: int) -> None:
            elements.store(operands["y"], [b, t, k * w.channels + column], elements.splat(0.0, width), width)

        with T.serial(w.kernel) as k:
            at = t * w.stride + k - w.padding
            with T.If(tirx.And(at >= 0, at < w.length)):
                with T.Then():
                    if w.layout == "blc":
                        copy(elements, (operands["x"], [b, at, 0]), (operands["y"], [b, t, k * w.channels]), w.channels)
                    else:
                        with T.serial(w.channels) as c:
                            value = elements.load(operands["x"], [b, c, at], 1)
                            elements.store(operands["y"], [b, t, k * w.channels + c], value, 1)
                with T.Else():
                    elements.along(w.channels, zero)


class AddPositionsCPU(MoveTemplate):
    """One row a position of a sequence."""

    op: ClassVar[str] = "add_positions"

    def rows(self, workload: Workload) -> int:
        """Positions of all sequences."""
        assert isinstance(workload, AddPositions), f"expected an AddPositions workload, got {workload}"
        return workload.batch * workload.seq

    def row(self, workload: Workload, elements: Elements, operands: Operands, row: Any) -> None:
        """X plus the position's embedding."""
        assert isinstance(workload, AddPositions)
        b, i = row // workload.seq, row % workload.seq

        def move(column: Any, width: int) -> None:
            value = elements.load(operands["x"], [b, i, column], width)
            value = value + elements.load(operands["position"], [i, column], width)
            elements.store(operands["y"], [b, i, column], value, width)

        elements.along(workload.features, move)
