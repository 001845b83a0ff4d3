"""What a person does with the records of journals: merge, prune, compare, pick the winners."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attntune.database.query import select
from attntune.database.record import Status, TuningRecord


@dataclass(frozen=True)
class Difference:
    """What two sets of records say about one workload on one target; None where one of them says nothing."""

    workload: str
    target: str
    before: TuningRecord | None
    after: TuningRecord | None

    @property
    def ratio(self) -> float | None:
        """Seconds after over seconds before: below 1 is faster."""
        if self.before is None or self.after is None:
            return None
        return self.after.median_secs / self.before.median_secs

    @property
    def same_config(self) -> bool:
        """Whether both use the same config."""
        return self.before is not None and self.after is not None and self.before.config == self.after.config


def merged(sources: Iterable[Iterable[TuningRecord]]) -> list[TuningRecord]:
    """The records of several journals, in order; what several of them hold comes once."""
    distinct: dict[str, TuningRecord] = {}
    for records in sources:
        for record in records:
            distinct.setdefault(json.dumps(record.to_json(), sort_keys=True), record)
    return list(distinct.values())


def pruned(records: Sequence[TuningRecord], keep: int = 3) -> list[TuningRecord]:
    """The records that lookups need, in order.

    Kept are, for each workload, target and template, the ``keep`` fastest correct configs, the default, and the newest
    final round.
    """
    kept: set[int] = set()
    for group in _groups(records).values():
        kept |= _worth_keeping({i: records[i] for i in group}, keep)
    return [records[i] for i in sorted(kept)]


def _worth_keeping(group: Mapping[int, TuningRecord], keep: int) -> set[int]:
    latest = {record.config: i for i, record in group.items()}
    correct = [i for i in latest.values() if group[i].status is Status.CORRECT]
    fastest = sorted(correct, key=lambda i: (group[i].median_secs, group[i].config.key()))[:keep]
    defaults = [i for i in correct if group[i].is_default]
    newest = max((record.time for record in group.values() if record.final), default=None)
    last_round = [i for i, record in group.items() if record.final and record.time == newest]
    return {*fastest, *defaults, *last_round}


def diff(before: Iterable[TuningRecord], after: Iterable[TuningRecord]) -> list[Difference]:
    """For every workload and target of either side, the record each side would use; sorted by workload and target."""
    ours, theirs = ({(r.workload, r.target): r for r in winners(side)} for side in (before, after))
    return [
        Difference(workload, target, ours.get((workload, target)), theirs.get((workload, target)))
        for workload, target in sorted({*ours, *theirs})
    ]


def winners(records: Iterable[TuningRecord]) -> list[TuningRecord]:
    """The winning record of each workload and target, sorted by target and workload: what ``schedules/`` ships.

    Where several templates have a winner, the fastest of them.
    """
    every = list(records)
    found: dict[tuple[str, str], TuningRecord] = {}
    for (workload, target, _), group in _groups(every).items():
        winner = select([every[i] for i in group])
        rival = found.get((target, workload))
        if winner is not None and (rival is None or winner.median_secs < rival.median_secs):
            found[target, workload] = winner
    return [found[place] for place in sorted(found)]


def _groups(records: Sequence[TuningRecord]) -> dict[tuple[str, str, str], list[int]]:
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        groups[record.workload, record.target, record.template].append(i)
    return groups
