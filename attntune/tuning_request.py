"""What is to be tuned: workloads, and how often each is called, of whatever ``attntune.tune`` accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from attntune.errors import TuningError
from attntune.models.shapes import Shape, by_name
from attntune.ops.workload import Workload
from attntune.target import Target

#: Shapes a model is tuned for when none are given and it names none itself.
DEFAULT_SHAPES: tuple[Mapping[str, int], ...] = ({"batch": 1, "seq": 128},)


def at_precision(model: Any, precision: str, target: Target, tell: Callable[[str], None] | None) -> Any:
    """``model`` at ``precision``, or at the one that it and ``target`` have instead, which ``tell`` is told."""
    from attntune.models import precision as precisions

    if not hasattr(model, "workloads"):
        raise TuningError("expected a precision only with a model: a workload's dtypes are fixed")
    return precisions.at_precision(model, precisions.fitting(precision, target, tell, model))


def requested(
    model: Any, shapes: Sequence[Shape] | None, entries: Sequence[str] | None, operators: Sequence[str] | None
) -> dict[Workload, tuple[int, str]]:
    """Workload → calls and the shape of the model it belongs to, of whatever :func:`attntune.tune` accepts."""
    calls = _workloads(model, shapes, entries)
    if operators is None:
        return calls
    known = sorted({workload.op for workload in calls})
    if unknown := sorted({*operators} - {*known}):
        raise TuningError(f"unknown operators {unknown}; expected some of {known}")
    return {workload: n for workload, n in calls.items() if workload.op in operators}


def _workloads(
    model: Any, shapes: Sequence[Shape] | None, entries: Sequence[str] | None
) -> dict[Workload, tuple[int, str]]:
    if hasattr(model, "workloads"):
        own = getattr(model, "shapes", ()) or DEFAULT_SHAPES
        return _of_model(model, shapes if shapes is not None else own, entries)
    if shapes is not None or entries is not None:
        raise TuningError("expected shapes and entries only with a model: a workload's shape is fixed")
    calls: dict[Workload, int] = {}
    if isinstance(model, Mapping):
        calls = dict(model)
    elif isinstance(model, Iterable) and not isinstance(model, str | bytes):
        for workload in model:
            calls[workload] = calls.get(workload, 0) + 1
    else:
        calls = {model: 1}
    if not calls:
        raise TuningError("nothing to tune: expected at least one workload, got none")
    for workload, n in calls.items():
        if not isinstance(workload, Workload):
            raise TuningError(f"expected a model, a Workload, or a list or dict of them; got {type(workload).__name__}")
        if not isinstance(n, int) or n < 1:
            raise TuningError(f"expected a positive number of calls of {workload}, got {n!r}")
    return {workload: (n, "") for workload, n in calls.items()}


def _of_model(model: Any, shapes: Sequence[Shape], chosen: Sequence[str] | None) -> dict[Workload, tuple[int, str]]:
    """A workload of several shapes belongs to the first."""
    found: dict[Workload, tuple[int, str]] = {}
    named = getattr(model, "named_shape", by_name)
    entries = getattr(model, "entries", None) or {"forward": None}
    unasked = [name for name, spec in entries.items() if not getattr(spec, "on_request", False)]
    if unknown := [name for name in chosen or () if name not in entries]:
        raise TuningError(f"unknown entries {unknown}; expected some of {sorted(entries)}")
    for shape in map(named, shapes):
        calls: dict[Workload, int] = {}
        # Entry points share most of their calls, and one run uses one of them.
        for entry in chosen or unasked:
            for workload, n in model.workloads([shape], entry).items():
                calls[workload] = max(n, calls.get(workload, 0))
        for workload, n in calls.items():
            known, group = found.get(workload, (0, str(shape)))
            found[workload] = known + n, group
    if not found:
        raise TuningError("nothing to tune: expected a model with operator calls and at least one shape")
    return found
