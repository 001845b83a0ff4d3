"""The tuning loop as its tests call it: for one target, without peaks, with a runner that computes."""

from __future__ import annotations

from pathlib import Path

from toys import FakeRunner, Toy

from attntune import tuner
from attntune.database.journal import Journal
from attntune.progress import TuningSummary
from attntune.target import Target

TARGET = Target.parse("znver4")
TOY = Toy()


def tune(what, database: Path, runner=None, **options) -> TuningSummary:
    options.setdefault("target", TARGET)
    options.setdefault("searcher", "random")
    options.setdefault("peaks", {})
    return tuner.tune(what, database=database, runner=runner if runner is not None else FakeRunner(), **options)


def trial_keys(database: Path) -> list[tuple[str, str]]:
    """Workload and config of every trial in the journal, finals left out."""
    return [(r.workload, r.config.key()) for r in Journal(database).load() if not r.final]
