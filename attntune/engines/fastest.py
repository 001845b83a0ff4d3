"""Which of several ways an engine has of running the same inputs is the fastest here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

_TRIAL_CALLS = 7


def fastest(calls: Mapping[str, Callable[[], object]]) -> str:
    """The name of the call with the smallest median, taken in turns; the first where there is only one.

    Each timed call follows an untimed one of its own, so that all run with the caches they leave themselves.
    """
    names = list(calls)
    if len(names) == 1:
        return names[0]
    secs: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(_TRIAL_CALLS + 1):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            if turn:
                secs[name].append(time.perf_counter() - start)
    return min(names, key=lambda name: statistics.median(secs[name]))
