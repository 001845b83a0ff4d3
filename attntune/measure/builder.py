"""A trial to a shared object. Runs in a worker process."""

from __future__ import annotations

import time
from pathlib import Path

from attntune.measure.trial import Trial


def warm_up() -> None:
    """Import what every build needs, TVM above all."""
    import tvm  # noqa: F401

    import attntune.templates
    import attntune.templates.lowering  # noqa: F401


def build_trial(trial: Trial, path: str) -> float:
    """Schedule and compile ``trial`` into the shared object ``path``; seconds it took."""
    from attntune.templates import load_template
    from attntune.templates.lowering import export

    start = time.perf_counter()
    module = load_template(trial.template).schedule(trial.workload, trial.target, trial.config)
    export(module, trial.target, Path(path))
    return time.perf_counter() - start
