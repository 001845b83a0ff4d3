"""Which workload of a model gets the next batch of trials.

A model's time is ``sum(calls × best)`` over its workloads. A batch should go where it is expected to take most off that
sum: weight (calls × best so far) times the expected relative gain. A model tuned for several shapes has one such sum
for each; a weight is a share of its own sum, so that a large shape does not starve a small one. The gain of a
workload's next batch is the larger of what its last batches gained and an optimism that fades with every batch, less
what has been explored of its space and how near its best is to the machine's peak.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: A relative gain below this is noise and does not count as improvement.
MIN_GAIN = 0.005
#: Batches whose mean gain is the recent slope.
_WINDOW = 3
#: Relative gain expected of the first batch after the warm-up, when nothing else is known.
_OPTIMISM = 0.3
#: Nothing is ever closer than this to its floor: peaks are measured too.
_LEAST_HEADROOM = 0.02


@dataclass
class Task:
    """What the scheduler knows of one workload."""

    calls: int
    """Calls in one run of the model."""
    group: str
    """Tasks of one group add up to one time that matters."""
    size: int
    """Configs in its space."""
    floor_secs: float = 0.0
    """Time at the machine's peak; 0 where unknown."""
    trials: int = 0
    best_secs: float = math.inf
    history: list[float] = field(default_factory=list)
    """Best after each batch, in seconds."""
    stale_batches: int = 0
    """Batches since the best last improved."""
    exhausted: bool = False

    def expected_gain(self) -> float:
        """Relative gain that the next batch is expected to bring."""
        explored = min(1.0, self.trials / max(1, self.size))
        optimism = _OPTIMISM / max(1, len(self.history))
        headroom = 1.0
        if self.floor_secs and math.isfinite(self.best_secs):
            headroom = max(_LEAST_HEADROOM, 1 - self.floor_secs / self.best_secs)
        return min(headroom, max(self._slope(), optimism * headroom)) * (1 - explored)

    def _slope(self) -> float:
        recent = [secs for secs in self.history[-_WINDOW - 1 :] if math.isfinite(secs)]
        if len(recent) < 2:
            return 0.0
        return (1 - recent[-1] / recent[0]) / (len(recent) - 1)


class TaskScheduler:
    """Gives batches of trials to workloads; deterministic, ties go to the task added first.

    Args:
        patience: batches without improvement after which a task is finished.
    """

    def __init__(self, patience: int = 6) -> None:
        self.patience = patience
        self.tasks: dict[str, Task] = {}

    def add(
        self,
        name: str,
        *,
        size: int,
        calls: int = 1,
        group: str = "",
        floor_secs: float = 0.0,
        known: Sequence[float | None] = (),
    ) -> None:
        """Add a workload.

        Args:
            name: anything distinct.
            size: configs in its space.
            calls: how often one run of the model calls it.
            group: the shape whose run that is; every group counts alike.
            floor_secs: its time at the machine's peak, where known.
            known: costs already measured, as when a run is resumed; they count as one batch.
        """
        self.tasks[name] = Task(calls, group, size, floor_secs)
        if known:
            self.update(name, known)

    def next(self) -> str | None:
        """The task to give the next batch; None when all are finished.

        First every task once, in the order added; then the one whose batch is expected to save the most.
        """
        open_tasks = {name: task for name, task in self.tasks.items() if not self._finished(task)}
        for name, task in open_tasks.items():
            if not task.history:
                return name
        priorities = self.priorities()
        return max(open_tasks, key=lambda name: priorities[name], default=None)

    def update(self, name: str, costs: Sequence[float | None], *, exhausted: bool = False) -> None:
        """Report a batch's costs in seconds (None: failed), and whether the searcher has nothing more to ask."""
        task = self.tasks[name]
        best = min((cost for cost in costs if cost is not None), default=math.inf)
        improved = best < task.best_secs * (1 - MIN_GAIN) if math.isfinite(task.best_secs) else math.isfinite(best)
        task.best_secs = min(task.best_secs, best)
        task.trials += len(costs)
        task.history.append(task.best_secs)
        task.stale_batches = 0 if improved else task.stale_batches + 1
        task.exhausted = exhausted or task.trials >= task.size

    def finished(self, name: str) -> bool:
        """Whether a task gets no more batches: exhausted, or no improvement for ``patience`` batches."""
        return self._finished(self.tasks[name])

    def weight(self, name: str) -> float:
        """Share of its group's time that this task takes.

        A task of which nothing works yet is taken for as heavy as the heaviest of its group: nobody knows better.
        """
        group = self.tasks[name].group
        secs = {other: task.calls * task.best_secs for other, task in self.tasks.items() if task.group == group}
        heaviest = max((value for value in secs.values() if math.isfinite(value)), default=1.0)
        secs = {other: value if math.isfinite(value) else heaviest for other, value in secs.items()}
        return secs[name] / sum(secs.values())

    def priorities(self) -> Mapping[str, float]:
        """Share of its group's time that each task's next batch is expected to save."""
        return {name: self.weight(name) * task.expected_gain() for name, task in self.tasks.items()}

    def _finished(self, task: Task) -> bool:
        return task.exhausted or task.stale_batches >= self.patience
