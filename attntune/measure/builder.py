"""A trial to a shared object. Runs in a worker process."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attntune.measure.trial import Trial


@dataclass(frozen=True)
class Built:
    """A trial that was built."""

    secs: float
    resources: dict[str, Any] = field(default_factory=dict)
    """For CUDA, what each kernel takes of an SM, as ``attntune/templates/nvcc.py`` reports it."""


def warm_up() -> None:
    """Import what every build needs, TVM above all."""
    import tvm  # noqa: F401

    import attntune.templates
    import attntune.templates.lowering  # noqa: F401


def build_trial(trial: Trial, path: str) -> Built:
    """Schedule and compile ``trial`` into the shared object ``path``.

    Raises:
        CompileError: for CUDA, when a kernel spills or asks for more than the target has: it is not worth a run.
    """
    from attntune.templates import load_template
    from attntune.templates.lowering import export

    start = time.perf_counter()
    module = load_template(trial.template).schedule(trial.workload, trial.target, trial.config)
    resources = export(module, trial.target, Path(path))
    return Built(time.perf_counter() - start, resources)
