"""Which config to use: the best measured, else one transferred from a like workload, else the template's default."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from attntune.database.journal import Journal
from attntune.database.record import Status, TuningRecord
from attntune.errors import ConfigError
from attntune.ops.workload import Workload
from attntune.search.final import pick_winner
from attntune.search.space import Config, ConfigSpace
from attntune.target import PRESETS, Target
from attntune.templates.template import ScheduleTemplate

MAX_DISTANCE = 4.0
"""A config is not transferred between shapes that differ, over all their dimensions, by more than 2 to this power, nor
where more than sizes differ (dtypes, flags, activations): the template's default, made for the workload at hand, is the
better guess then. (Of attention's 92 benchmarks on Emerald Rapids 7 had such a neighbour, of another layout or mask,
whose config was not its default: it took 0.82 to 1.08 times as long as the own default, 1.000 times in the mean.)"""

_LIMITS = (
    "vector_bits", "vector_registers", "fmas_per_cycle", "bf16_dots_per_cycle", "l1d_bytes", "l2_bytes",
    "shared_memory_bytes",
)  # fmt: skip
"""Those of a :class:`Target` that must be the same for a config to be transferred to it."""

Source = Path | str | os.PathLike[str]


@dataclass(frozen=True)
class Choice:
    """A config and why it was chosen."""

    config: Config
    source: str
    """``exact``: measured for this workload and target; ``transferred``: from another; ``default``."""
    record: TuningRecord | None
    """What it was chosen by; None for a default nobody measured."""
    from_: str
    """The journal, workload and target it comes from, for people to read."""


@dataclass(frozen=True)
class _Entry:
    record: TuningRecord
    origin: str
    tier: int
    """0: the user's; 1: shipped."""
    at: int
    """Position; later records of the same config replace earlier ones."""


class Database:
    """Records of one or more journals, or records given as such, consulted before the shipped schedules.

    Args:
        sources: paths of journals (those that do not exist yet are empty), or records.
        shipped: whether to fall back on the schedules that attntune ships.
        strict: whether a malformed line is an error (see :meth:`Journal.load`).
    """

    def __init__(
        self, sources: Source | Iterable[Source | TuningRecord] = (), *, shipped: bool = True, strict: bool = True
    ) -> None:
        self._entries: dict[tuple[str, str], list[_Entry]] = defaultdict(list)
        self._like: dict[tuple[str, str, str], set[tuple[str, str]]] = defaultdict(set)
        self._count = 0
        for source in [sources] if isinstance(sources, (str, os.PathLike)) else sources:
            if isinstance(source, TuningRecord):
                self.add(source)
            else:
                for record in Journal(source).load(strict=strict):
                    self.add(record, origin=str(source))
        for path in shipped_journals() if shipped else ():
            for record in Journal(path).load(strict=False):
                self._add(_Entry(record, f"shipped {path.name}", 1, self._count))

    def add(self, record: TuningRecord, origin: str = "this run") -> None:
        """Make a record known to this object; it is not written anywhere."""
        self._add(_Entry(record, origin, 0, self._count))

    def _add(self, entry: _Entry) -> None:
        record = entry.record
        place = (record.workload, record.target)
        self._entries[place].append(entry)
        self._like[_operator(record.workload), record.template, record.target.partition("/")[0]].add(place)
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def records(self) -> list[TuningRecord]:
        """The user's records, shipped ones not included, in the order they were added."""
        every = (entry for entries in self._entries.values() for entry in entries if entry.tier == 0)
        return [entry.record for entry in sorted(every, key=lambda entry: entry.at)]

    def measured(self, workload: Workload, target: Target, template: str | None = None) -> dict[str, TuningRecord]:
        """The user's latest record of each config, failed ones too, by :meth:`Config.key`.

        Args:
            workload: exactly this one.
            target: exactly this one.
            template: ``module:Class``, to leave out records of other templates.
        """
        entries = self._entries.get((workload.key(), target.key()), ())
        return {
            entry.record.config.key(): entry.record
            for entry in entries
            if entry.tier == 0 and template in (None, entry.record.template)
        }

    def best(self, workload: Workload, target: Target, template: str | None = None) -> TuningRecord | None:
        """The record of the config that wins for exactly this workload and target; the user's before shipped ones."""
        entry = self._winner((workload.key(), target.key()), template, None)
        return entry.record if entry else None

    def lookup(self, workload: Workload, target: Target, template: ScheduleTemplate | None = None) -> Choice:
        """The config to build ``workload`` with on ``target``; always a member of the template's space.

        Only configs whose latest record is correct are considered. Where the default was measured, another takes its
        place by a final round alone, in which configs are re-measured in turns. Of equally fast configs the default
        wins, then the first by key.

        Args:
            workload: what is to be built.
            target: for which machine.
            template: what it is built by; by default the one registered for it.
        """
        if template is None:
            from attntune.templates import template_for

            template = template_for(workload, target)
        space = template.space(workload, target)
        name = template.reference_name()
        exact = self._winner((workload.key(), target.key()), name, space)
        if exact is not None:
            return Choice(exact.record.config, "exact", exact.record, exact.origin)
        near = self._nearest(workload, target, name, space)
        default = template.default(workload, target)
        if near is None:
            return Choice(default, "default", None, "the template's default; nothing like it was measured")
        where = f"{near.record.workload} on {near.record.target} ({near.origin})"
        if near.record.is_default:
            return Choice(default, "default", None, f"the template's default, which also won for {where}")
        return Choice(near.record.config, "transferred", near.record, where)

    def _winner(self, place: tuple[str, str], template: str | None, space: ConfigSpace | None) -> _Entry | None:
        entries = self._entries.get(place, ())
        for tier in (0, 1):
            ours = [e for e in entries if e.tier == tier and template in (None, e.record.template)]
            if space is not None:
                ours = [e for e in ours if _member(e.record.config, space)]
            winner = select([e.record for e in ours])
            if winner is not None:
                return next(e for e in reversed(ours) if e.record is winner)
        return None

    def _nearest(self, workload: Workload, target: Target, template: str, space: ConfigSpace) -> _Entry | None:
        ranked = []
        # Keys leave out what is at its default.
        unsaid = {field.name: field.default for field in dataclasses.fields(workload)}
        fields = {**unsaid, **json.loads(workload.key())}
        for place in self._like.get((workload.op, template, target.kind), ()):
            if place == (workload.key(), target.key()):
                continue
            rank = _target_rank(target, self._entries[place][-1].record)
            mismatches, distance = shape_distance(fields, {**unsaid, **json.loads(place[0])})
            if rank is not None and mismatches == 0 and distance <= MAX_DISTANCE:
                ranked.append((rank, distance, place))
        for *_, place in sorted(ranked):
            if winner := self._winner(place, template, space):
                return winner
        return None


def select(records: Sequence[TuningRecord]) -> TuningRecord | None:
    """The record whose config wins, of records of one workload, target and template in the order written.

    Only configs whose latest record is correct take part; in the newest final round, if there is one. Without one the
    default stays, if it was measured: one measurement after the other, a core that was taken away in between makes any
    config look faster.
    """
    latest = {record.config: record for record in records}
    usable = {config: record for config, record in latest.items() if record.status is Status.CORRECT}
    finals = [r for r in records if r.final and r.status is Status.CORRECT and r.config in usable]
    if finals:
        newest = max(record.time for record in finals)
        usable = {record.config: record for record in finals if record.time == newest}
    if not usable:
        return None
    default = next((config for config, record in usable.items() if record.is_default), None)
    winner: Config | None
    if finals:
        winner = pick_winner({config: record.run_secs for config, record in usable.items()}, default)
    elif default is not None:
        winner = default
    else:
        winner = _first_of_tied(usable)
    return usable[winner] if winner is not None else None


def _first_of_tied(records: Mapping[Config, TuningRecord]) -> Config:
    """Of the configs within noise of the fastest, the first by key.

    Measured one after the other, two configs are tied when the middle halves of their samples overlap.
    """
    fastest = min(records.values(), key=lambda record: (record.median_secs, record.config.key()))
    _, high = _middle_half(fastest)
    tied = [config for config, record in records.items() if _middle_half(record)[0] <= high]
    return min(tied, key=Config.key)


def _middle_half(record: TuningRecord) -> tuple[float, float]:
    half = record.spread_secs / 2
    return record.median_secs - half, record.median_secs + half


def shape_distance(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[int, float]:
    """How unlike two workloads of one operator are.

    Args:
        ours: every field of a workload.
        theirs: fields of another.

    Returns:
        How many fields differ in more than size (dtypes, flags, activations, a window where the other has none); and
        over all sizes the sum of the absolute logarithms, base 2, of their ratios.
    """
    mismatches, distance = 0, 0.0
    for name in {*ours, *theirs}:
        a, b = ours.get(name), theirs.get(name)
        if a == b and type(a) is type(b):
            continue
        if _is_size(a) and _is_size(b):
            distance += abs(math.log2(abs(a / b)))
        else:
            mismatches += 1
    return mismatches, distance


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value != 0


def _operator(workload_key: str) -> str:
    return str(json.loads(workload_key)["op"])


def _member(config: Config, space: ConfigSpace) -> bool:
    try:
        space.check(config)
    except ConfigError:
        return False
    return True


def _target_rank(target: Target, record: TuningRecord) -> int | None:
    """0 for the same target, 1 for another with as many cores, 2 with more or fewer; None: nothing is transferred.

    Between targets whose limits differ nothing is: spaces and defaults are derived from them, and the default made for
    the limits at hand is the better guess.
    """
    if record.target == target.key():
        return 0
    kind, arch, *cores = record.target.split("/")
    limits, known = record.machine.get("target"), PRESETS.get(arch)

    def limit(field: str) -> Any:
        default = getattr(known, field, None)
        return limits.get(field, default) if isinstance(limits, Mapping) else default

    if kind != target.kind or any(limit(field) != getattr(target, field) for field in _LIMITS):
        return None
    return 1 if cores == target.key().split("/")[2:] else 2


def shipped_journals() -> list[Path]:
    """The schedules that come with attntune, one journal for each target; ``attntune/schedules`` is package data."""
    return sorted((Path(__file__).resolve().parents[1] / "schedules").glob("*.jsonl"))
