"""Which of several ways an engine has of running the same inputs is the fastest here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

_TRIAL_CALLS = 7


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(
    calls: Mapping[str, Callable[[], Any]],
    trials: int = _TRIAL_CALLS,
    timed: Callable[[Callable[[], Any]], float] = _seconds,
) -> dict[str, float]:
    """Median seconds of each call, taken in turns; a first turn is not counted.

    Each timed call follows an untimed one of its own, so that all run with the caches they leave themselves. ``timed``
    makes a call and returns the seconds it took.
    """
    secs: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(trials + 1):
        for name, call in calls.items():
            call()
            taken = timed(call)
            if turn:
                secs[name].append(taken)
    return {name: statistics.median(values) for name, values in secs.items()}


def fastest(calls: Mapping[str, Callable[[], object]]) -> str:
    """The name of the call with the smallest median; the first where there is only one."""
    if len(calls) == 1:
        return next(iter(calls))
    found = medians(calls)
    return min(found, key=lambda name: found[name])
