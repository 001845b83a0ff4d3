"""Compiled models in turns, each in a process of its own, checked against the reference before they are timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attntune.engines.comparison import BASELINE
from attntune.engines.engine import ModelSource
from attntune.errors import EngineError
from attntune.interop import evaluate, sample_inputs
from attntune.measure.worker import IsolatedProcess
from attntune.models.model import Model
from attntune.runtime.artifact import Artifact

_SESSION = "attntune.engines.session"
_TIMEOUT_SECS = 600.0
_PAUSE_SECS = 0.05
_LEAST_CALLS, _MOST_CALLS = 3, 200
_WARMUP = 2
_TOLERANCE = 1e-4
"""Error allowed, as a share of an output's largest value, or of 1 where that is less."""


@dataclass(frozen=True, eq=False)
class Contender:
    """A compiled model and how it is run."""

    model: Model
    artifact: Artifact
    threads: int
    entry: str = "forward"


def interleaved(
    contenders: Mapping[str, Contender],
    shapes: Sequence[Mapping[str, int]],
    *,
    rounds: int,
    turn_secs: float,
    most_calls: int = _MOST_CALLS,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Time every contender at every shape: in each round all of them one after another, every other round backwards.

    Args:
        contenders: by name.
        shapes: values of the symbolic dimensions, which all of them have.
        rounds: of each shape.
        turn_secs: what one contender's turn lasts, within 3 and ``most_calls`` calls.
        most_calls: of a turn.
        say: told what is going on.

    Returns:
        One row for each shape: ``shape`` (its label, ``1×128``) and ``rounds``, by name the seconds of every call, one
        list per round.

    Raises:
        EngineError: a contender's result is not the reference's.
    """
    found = []
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, contender in contenders.items():
            process = stack.enter_context(IsolatedProcess(threads=contender.threads))
            outputs = tuple(spec.name for spec in contender.model.entry(contender.entry).outputs)
            source = ModelSource(contender.entry, outputs, artifact=str(contender.artifact.folder))
            process.call(f"{_SESSION}:open_engine", BASELINE, source, contender.threads, timeout_secs=_TIMEOUT_SECS)
            processes[name] = process
        for dims in shapes:
            label = "×".join(str(size) for size in dims.values())
            say(f"{label}: {rounds} rounds of {', '.join(contenders)}")
            calls = {
                name: max(_LEAST_CALLS, min(most_calls, round(turn_secs / secs)))
                for name, secs in _checked(contenders, processes, label, dims).items()
            }
            turns: dict[str, list[list[float]]] = {name: [] for name in processes}
            for turn in range(rounds):
                for name in processes if turn % 2 == 0 else reversed(processes):
                    time.sleep(_PAUSE_SECS)
                    secs = processes[name].call(
                        f"{_SESSION}:turn", label, _WARMUP, calls[name], timeout_secs=_TIMEOUT_SECS
                    )
                    turns[name].append(secs)
            found.append({"shape": label, "rounds": turns})
    return found


def _checked(
    contenders: Mapping[str, Contender], processes: Mapping[str, IsolatedProcess], label: str, dims: Mapping[str, int]
) -> dict[str, float]:
    """Bind one shape's inputs in every process; about how many seconds a call takes there."""
    expected: dict[tuple[int, str], tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}
    estimates = {}
    for name, contender in contenders.items():
        key = id(contender.model), contender.entry
        if key not in expected:
            inputs = sample_inputs(contender.model, dims, entry=contender.entry)
            expected[key] = inputs, evaluate(contender.model, inputs, contender.entry)
        inputs, reference = expected[key]
        got, _, estimates[name] = processes[name].call(
            f"{_SESSION}:outputs", label, dict(inputs), timeout_secs=_TIMEOUT_SECS
        )
        for output, values in reference.items():
            error = float(np.abs(got[output] - values).max())
            if not error <= _TOLERANCE * max(1.0, float(np.abs(values).max())):
                raise EngineError(f"{name} at {label}: {output} is off by {error:.3g}")
    return estimates
