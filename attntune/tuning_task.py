"""One workload while it is tuned: its template, its searcher, and what is known of its configs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attntune import templates
from attntune.database.query import select
from attntune.database.record import Status, TuningRecord
from attntune.ops.workload import Workload
from attntune.progress import TaskState, WorkloadResult
from attntune.search.searcher import Features, Searcher
from attntune.search.space import Config, ConfigSpace
from attntune.target import Target

#: Configs beside the default that reach the final …
_FINALISTS = 3
#: … and how much slower than the best in its single trial one may be.
_FINAL_RATIO = 1.1


class TuningTask:
    """A workload, its searcher, and what is known of its configs."""

    def __init__(
        self, workload: Workload, calls: int, target: Target,
        make_searcher: Callable[[ConfigSpace, Features, Config, int], Searcher], seed: int, peaks: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.workload = workload
        self.key = workload.key()
        self.calls = calls
        self.target = target
        self.template = templates.template_for(workload, target)
        self.template_name = self.template.reference_name()
        self.space = self.template.space(workload, target)
        self.default = self.space.check(self.template.default(workload, target))
        self.flops = workload.flops()
        self.floor_secs = floor_secs(workload, target, peaks)
        self.searcher = make_searcher(self.space, self.features, self.default, seed)
        self.records: dict[Config, TuningRecord] = {}
        """The newest single trial of each config; of one that failed in a final, that failure."""
        self._log: list[TuningRecord] = []
        self.new_trials = 0
        self._untold: list[float | None] = []
        self._undecided = False

    def features(self, config: Config) -> Sequence[float]:
        """The template's features, knobs that are words by their place among the values, and the workload's size."""
        named = self.template.features(self.workload, self.target, config)
        words = [
            float(knob.values.index(config[knob.name])) for knob in self.space.knobs if isinstance(knob.values[0], str)
        ]
        size = [math.log2(1 + self.flops), math.log2(1 + self.workload.bytes_moved())]
        return [*(named[name] for name in sorted(named)), *words, *size]

    def owns(self, record: TuningRecord) -> bool:
        """Whether a record is of this workload, target and template, and its config still a member of the space."""
        names = (record.workload, record.target, record.template)
        return names == (self.key, self.target.key(), self.template_name) and record.config in self.space

    def remember(self, record: TuningRecord, *, new: bool = False) -> None:
        """Take in a trial or a record of a final, in the order of the journal."""
        self._log.append(record)
        self._undecided = not record.final
        if record.final and record.status is Status.CORRECT:
            return
        self.records[record.config] = record
        cost = self.cost(record)
        self.searcher.tell(record.config, cost)
        if new:
            self.new_trials += 1
            self._untold.append(cost)

    def cost(self, record: TuningRecord) -> float | None:
        """Seconds, or None for a trial that failed."""
        return record.median_secs if record.status is Status.CORRECT else None

    def costs(self) -> list[float | None]:
        """Of every trial known."""
        return [self.cost(record) for record in self.records.values()]

    def take_new_costs(self) -> list[float | None]:
        """Costs since the last time this was called."""
        costs, self._untold = self._untold, []
        return costs

    def finalists(self) -> list[Config]:
        """Configs to race, the default first; none if the last race saw all there is, or there is no rival."""
        ranked = self.searcher.ranked()
        if not self._undecided or not ranked:
            return []
        limit = _FINAL_RATIO * (self.records[ranked[0]].median_secs)
        chosen = [config for config in ranked[:_FINALISTS] if self.records[config].median_secs <= limit]
        champion = select(self._log)
        if champion is not None:
            chosen.append(champion.config)
        if self.searcher.costs.get(self.default) is not None:
            chosen.insert(0, self.default)
        distinct = list(dict.fromkeys(chosen))
        return distinct if len(distinct) > 1 else []

    def state(self, finished: bool) -> TaskState:
        """For an event."""
        best = next(iter(self.searcher.ranked()), None)
        default_secs, best_secs = self._times(select(self._log) if best and not self._undecided else None, best)
        failures = sum(record.status is not Status.CORRECT for record in self.records.values())
        return TaskState(
            self.workload, self.calls, len(self.records), failures, best_secs, default_secs,
            self._peak_fraction(best_secs), finished,
        )  # fmt: skip

    def result(self) -> WorkloadResult:
        """For the summary: the config that a lookup in the database finds."""
        winner = select(self._log)
        config = winner.config if winner is not None else None
        default_secs, best_secs = self._times(winner, config)
        source = "none" if config is None else "default" if config == self.default else "tuned"
        return WorkloadResult(
            self.workload, self.template_name, self.calls, len(self.records), self.new_trials,
            dict(Counter(str(record.status) for record in self.records.values())), default_secs, best_secs, config,
            source, config is not None and not self.finalists(), self._peak_fraction(best_secs),
        )  # fmt: skip

    def _times(self, winner: TuningRecord | None, best: Config | None) -> tuple[float | None, float | None]:
        """Seconds of the default and of the best; both of the final, if ``winner`` won one."""
        known = dict(self.records)
        if winner is not None and winner.final:
            best = winner.config
            known |= {record.config: record for record in self._log if record.final and record.time == winner.time}
        default, tuned = known.get(self.default), known.get(best) if best is not None else None
        return (self.cost(default) if default else None, self.cost(tuned) if tuned else None)

    def _peak_fraction(self, best_secs: float | None) -> float | None:
        return self.floor_secs / best_secs if self.floor_secs and best_secs else None


def floor_secs(workload: Workload, target: Target, peaks: Mapping[str, Any]) -> float:
    """Seconds that ``workload`` takes at the machine's peak; 0 where the peak is unknown.

    Operands that fit into the last cache may never cross memory, so bandwidth only counts for larger ones.
    """
    flops_per_sec = peaks.get("flops_per_sec", {}).get(workload.compute_dtype, 0.0)
    compute = workload.flops() / flops_per_sec if flops_per_sec else 0.0
    bandwidth = peaks.get("read_bytes_per_sec", 0.0)
    memory = workload.bytes_moved() / bandwidth if bandwidth and workload.bytes_moved() > target.l3_bytes else 0.0
    return max(compute, memory)
