"""What a tuning run tells: events while it runs, and a summary at its end."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from attntune.database.record import TuningRecord
from attntune.ops.workload import Workload
from attntune.search.space import Config


@dataclass(frozen=True)
class TaskState:
    """How far one workload has got; sent for every workload at the start and after its final."""

    workload: Workload
    calls: int
    """Calls in one run of the model."""
    trials: int
    """Configs measured, those of earlier runs included."""
    failures: int
    """Of ``trials``, those that did not build, run or match the reference."""
    best_secs: float | None
    default_secs: float | None
    peak_fraction: float | None
    """Time at the machine's measured peak / best time; None where the peak is not known."""
    finished: bool
    """No more trials for it: its space is exhausted, or many batches brought nothing."""

    @property
    def speedup(self) -> float | None:
        """Default time / best time."""
        return self.default_secs / self.best_secs if self.default_secs and self.best_secs else None


@dataclass(frozen=True)
class TrialDone:
    """One record has come and is in the journal; ``record.final`` marks the re-measurement at the end."""

    record: TuningRecord
    task: TaskState
    trials_done: int
    """In this run."""
    trials_left: int | None
    seconds_left: float | None


Event = TaskState | TrialDone
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class WorkloadResult:
    """What is known of one workload when a run ends."""

    workload: Workload
    template: str
    calls: int
    trials: int
    """Configs measured, those of earlier runs included."""
    new_trials: int
    statuses: Mapping[str, int]
    """How many of ``trials`` ended how."""
    default_secs: float | None
    best_secs: float | None
    """Of ``config``. Both times are from the interleaved final where there was one."""
    config: Config | None
    source: str
    """``tuned``, ``default`` (nothing beat it), or ``none`` (no config was correct)."""
    confirmed: bool
    """Whether an interleaved final, or the lack of any rival, decided; otherwise the times are of single trials."""
    peak_fraction: float | None

    @property
    def speedup(self) -> float | None:
        """Default time / best time."""
        return self.default_secs / self.best_secs if self.default_secs and self.best_secs else None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "workload": self.workload.key(),
            "statuses": dict(self.statuses),
            "config": self.config.to_json() if self.config else None,
            "speedup": self.speedup,
        }


@dataclass(frozen=True)
class TuningSummary:
    """What a tuning run did and found."""

    target: str
    """:meth:`Target.key`."""
    database: str
    searcher: str
    seed: int
    results: tuple[WorkloadResult, ...]
    trials: int
    """Measured in this run, finals not counted."""
    resumed: int
    """Trials that were known before and not repeated."""
    elapsed_secs: float
    interrupted: bool = False
    stopped_by: str = ""
    """``seconds``, ``trials``, ``finished`` (every workload's search ended by itself), or ``interrupt``."""
    resume: str = field(default="")
    """How to go on, in a sentence."""

    @property
    def statuses(self) -> Mapping[str, int]:
        """How many trials ended how, over all workloads."""
        total: Counter[str] = Counter()
        for result in self.results:
            total.update(result.statuses)
        return dict(total)

    @property
    def speedup(self) -> float | None:
        """Default time / best time of one run of the model's tuned kernels, by calls; None if any is unknown."""
        pairs = [(r.calls, r.default_secs, r.best_secs) for r in self.results if r.source != "none"]
        if not pairs or any(default is None or best is None for _, default, best in pairs):
            return None
        default_secs = sum(calls * default for calls, default, _ in pairs if default is not None)
        return default_secs / sum(calls * best for calls, _, best in pairs if best is not None)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "results": [result.to_json() for result in self.results],
            "statuses": dict(self.statuses),
            "speedup": self.speedup,
        }
