"""What a comparison of kernels found: every sample of every engine on every workload, ratios and percentages.

Percentages are of what the machine was measured to do: at best, before and after the suite, and beside each round, for
cores of a shared host change their speed from one moment to the next.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attntune.engines.comparison import Outcome, Ratio, paired_ratio
from attntune.errors import EngineError
from attntune.ops import Workload, workload_from_key

SCHEMA_VERSION = 1
OURS = "attntune"


@dataclass(frozen=True)
class KernelCase:
    """One workload of a suite."""

    group: str
    """What it is summarised with, ``float32``, ``bfloat16 causal``."""
    label: str
    workload: Workload | None
    problem: str = ""
    """Why there is no such workload, when there is none."""


def bound(workload: Workload, peaks: Mapping[str, Any]) -> tuple[str, float]:
    """``compute`` or ``memory``, whichever bounds the workload at these peaks, and the seconds it then takes."""
    rate = peaks["flops_per_sec"].get(workload.compute_dtype)
    compute = workload.flops() / rate if rate else 0.0
    memory = workload.bytes_moved() / peaks["read_bytes_per_sec"]
    return ("compute", compute) if compute >= memory else ("memory", memory)


@dataclass(frozen=True)
class KernelResult:
    """One engine on one workload, hot or cold."""

    group: str
    label: str
    workload: str
    """Its key; empty when there is no such workload."""
    cache: str
    engine: str
    outcome: Outcome
    rounds: tuple[tuple[float, ...], ...] = ()
    """Seconds per call of every sample, one tuple per round."""
    max_rel_error: float | None = None
    """Largest error against the float64 reference, as a share of its largest value."""
    way: str = ""
    """For attntune where the schedule comes from; for others which of their functions was the fastest."""
    message: str = ""
    max_rel_difference: float | None = None
    """Largest difference between attntune's whole output and this engine's, as a share of its largest value."""
    limits: tuple[tuple[float, ...], ...] = ()
    """Of attntune: seconds that what bounds the workload takes at the machine's rates beside each round; or empty."""

    def __post_init__(self) -> None:
        if bool(self.rounds) != (self.outcome is Outcome.OK) or not all(self.rounds):
            raise EngineError(f"expected samples in every round of an ok result, and in no other; got {self}")

    @property
    def median_secs(self) -> float:
        """Median of all samples; NaN when not timed."""
        return statistics.median(s for turn in self.rounds for s in turn) if self.rounds else math.nan

    def round_medians(self) -> list[float]:
        """Median seconds of each round."""
        return [statistics.median(turn) for turn in self.rounds]

    def limit(self, peaks: Mapping[str, Any]) -> tuple[str, float] | None:
        """``compute`` or ``memory``, whichever bounds the workload at the measured peaks, and the share of it reached.

        The share is above 1 where operands stay in a cache that is faster than memory.
        """
        if not self.rounds or not peaks:
            return None
        name, secs = bound(workload_from_key(self.workload), peaks)
        return name, secs / self.median_secs

    def share(self) -> Ratio | None:
        """Of what the machine did beside each round, the share that was reached; None where that was not measured."""
        if not self.limits:
            return None
        return paired_ratio([statistics.median(turn) for turn in self.limits], self.round_medians())


@dataclass(frozen=True)
class KernelComparison:
    """A suite that was run, with everything needed to judge it."""

    suite: str
    threads: int
    results: tuple[KernelResult, ...]
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    peaks: Mapping[str, Any] = field(default_factory=dict)
    """Of each limit the best measurement before and after the suite, or what was done beside its best rounds."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    time: str = ""
    """UTC, ISO 8601."""
    schema: int = SCHEMA_VERSION

    def cases(self) -> tuple[tuple[str, str, str], ...]:
        """Group, label and cache of every case, in the order run."""
        return tuple(dict.fromkeys((r.group, r.label, r.cache) for r in self.results))

    def result(self, engine: str, case: tuple[str, str, str]) -> KernelResult | None:
        """What ``engine`` did in ``case``."""
        return next((r for r in self.results if (r.engine, r.group, r.label, r.cache) == (engine, *case)), None)

    def ratio(self, engine: str, case: tuple[str, str, str]) -> Ratio | None:
        """Time of ``engine`` over attntune's, paired by round; None unless both were timed."""
        theirs, ours = self.result(engine, case), self.result(OURS, case)
        if theirs is None or ours is None or not theirs.rounds or not ours.rounds:
            return None
        return paired_ratio(theirs.round_medians(), ours.round_medians())

    def to_json(self) -> dict[str, Any]:
        """JSON-ready fields, raw samples included."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "results": [{**dataclasses.asdict(r), "outcome": str(r.outcome)} for r in self.results]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> KernelComparison:
        """Inverse of :meth:`to_json`; raises :class:`EngineError` for what is none."""
        try:
            if fields["schema"] > SCHEMA_VERSION:
                raise EngineError(f"expected a schema up to {SCHEMA_VERSION}, got {fields['schema']}")
            results = tuple(KernelResult(**_row(row)) for row in fields["results"])
            return cls(**{**fields, "results": results})
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"malformed kernel comparison: {type(error).__name__}: {error}") from None

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_json` to a file, samples rounded to a tenth of a nanosecond."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = self.to_json()
        for row in fields["results"]:
            for name in ("rounds", "limits"):
                row[name] = [[round(secs, 10) for secs in turn] for turn in row[name]]
        path.write_text(json.dumps(fields, indent=None, separators=(",", ":"), default=str) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> KernelComparison:
        """Inverse of :meth:`save`; raises :class:`EngineError` naming the file."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except (OSError, ValueError, EngineError) as error:
            raise EngineError(f"cannot read the kernel comparison {path}: {error}") from None


def _row(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a result, from what :meth:`KernelComparison.to_json` made of it."""
    turns = {name: tuple(map(tuple, fields.get(name, ()))) for name in ("rounds", "limits")}
    return {**fields, "outcome": Outcome(fields["outcome"]), **turns}
