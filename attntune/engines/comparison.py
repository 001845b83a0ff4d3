"""What a comparison found: raw samples of every engine, ratios with confidence intervals, and how it was taken."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from attntune.engines.parity import FLOAT32
from attntune.errors import EngineError

SCHEMA_VERSION = 2
BASELINE = "attntune"
_RESAMPLES = 2000


class Outcome(StrEnum):
    """How an engine fared with one case. Only ``ok`` carries times."""

    OK = "ok"
    WRONG_RESULT = "wrong_result"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True)
class Case:
    """What is run: a shape, a kind of attention mask (``full``, ``ragged``), hot or cold caches."""

    dims: Mapping[str, int]
    mask: str = "full"
    cache: str = "hot"

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.dims.items())), self.mask, self.cache))

    def label(self) -> str:
        """``1×128``, with what is unusual after it: ``5×200 ragged``, ``1×128 cold``."""
        words = ["×".join(str(value) for value in self.dims.values())]
        words += [self.mask] if self.mask != "full" else []
        words += [self.cache] if self.cache != "hot" else []
        return " ".join(words)


@dataclass(frozen=True)
class Result:
    """One engine in one case."""

    engine: str
    case: Case
    outcome: Outcome
    rounds: tuple[tuple[float, ...], ...] = ()
    """Seconds of every call, one tuple per round; round i of all engines ran one after another."""
    max_abs_error: float | None = None
    """Against the float64 reference."""
    variant: str = ""
    """Which of its configurations the engine chose."""
    message: str = ""
    min_cosine: float | None = None
    """Of the worst output row with the reference's."""

    def __post_init__(self) -> None:
        if bool(self.rounds) != (self.outcome is Outcome.OK) or not all(self.rounds):
            raise EngineError(f"expected samples in every round of an ok result, and in no other; got {self}")

    @cached_property
    def round_medians(self) -> np.ndarray:
        """Median seconds of each round."""
        return np.array([statistics.median(samples) for samples in self.rounds])

    @property
    def samples(self) -> tuple[float, ...]:
        """Every sample in the order taken."""
        return tuple(secs for samples in self.rounds for secs in samples)

    @property
    def median_secs(self) -> float:
        """Median of all samples; NaN when not timed."""
        return statistics.median(self.samples) if self.rounds else math.nan

    @property
    def quartiles_secs(self) -> tuple[float, float]:
        """First and third quartile of all samples; NaN when not timed."""
        if not self.rounds:
            return math.nan, math.nan
        low, high = np.quantile(self.samples, [0.25, 0.75])
        return float(low), float(high)


@dataclass(frozen=True)
class Ratio:
    """How many times as long an engine takes as attntune: above 1, attntune is faster."""

    value: float
    low: float
    high: float
    confidence: float = 0.95

    @property
    def verdict(self) -> str:
        """``faster``, ``slower`` (attntune than the engine), or ``tied`` when the interval holds 1."""
        if self.low > 1.0:
            return "faster"
        return "slower" if self.high < 1.0 else "tied"


def paired_ratio(
    theirs: Sequence[float] | np.ndarray,
    ours: Sequence[float] | np.ndarray,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Ratio:
    """Median over rounds of theirs[i] / ours[i], with a bootstrap confidence interval over rounds.

    The two of a round ran next to each other, so whatever slowed the machine then cancels. Percentile bootstrap
    (Efron 1979), resampling rounds; one round gives an interval of no width.

    Args:
        theirs: seconds of the other engine, one value per round.
        ours: seconds of attntune in the same rounds.
        confidence: of the interval.
        seed: of the resampling; the same data give the same interval.

    Raises:
        EngineError: the two have different numbers of rounds, or none.
    """
    ratios = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
    if ratios[0].shape != ratios[1].shape or ratios[0].size == 0:
        raise EngineError(f"expected the same rounds of both engines, got {ratios[0].size} and {ratios[1].size}")
    per_round = ratios[0] / ratios[1]
    picks = np.random.default_rng(seed).integers(0, per_round.size, (_RESAMPLES, per_round.size))
    medians = np.median(per_round[picks], axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Ratio(float(np.median(per_round)), float(low), float(high), confidence)


@dataclass(frozen=True)
class Comparison:
    """Engines that ran the same model in turn, each in its own process with the same number of threads."""

    model: str
    entry: str
    threads: int
    results: tuple[Result, ...]
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Engine → title, precision, version and configuration."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Rounds, seconds per turn, pause, parity demanded of each precision, seed."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """See ``measure/machine.py``."""
    time: str = ""
    """UTC, ISO 8601."""
    schema: int = SCHEMA_VERSION

    def title(self, engine: str) -> str:
        """An engine's name in reports."""
        return str(self.engines.get(engine, {}).get("title", engine))

    def precision(self, engine: str) -> str:
        """What an engine computes in: one of :data:`attntune.models.precision.PRECISIONS`."""
        return str(self.engines.get(engine, {}).get("precision", FLOAT32))

    def peers(self) -> tuple[str, ...]:
        """The other engines at attntune's own precision: those that it is fair to be faster than."""
        own = self.precision(BASELINE)
        return tuple(n for n in self.engine_names() if n != BASELINE and self.precision(n) == own)

    def cases(self) -> tuple[Case, ...]:
        """Every case, in the order run."""
        return tuple(dict.fromkeys(result.case for result in self.results))

    def engine_names(self) -> tuple[str, ...]:
        """Every engine, attntune first."""
        names = dict.fromkeys(result.engine for result in self.results)
        return (*(n for n in names if n == BASELINE), *(n for n in names if n != BASELINE))

    def result(self, engine: str, case: Case) -> Result | None:
        """What ``engine`` did in ``case``; None when it was not asked."""
        return next((r for r in self.results if r.engine == engine and r.case == case), None)

    def ratio(self, engine: str, case: Case, baseline: str = BASELINE) -> Ratio | None:
        """Time of ``engine`` over time of ``baseline``, paired by round; None unless both were timed."""
        theirs, ours = self.result(engine, case), self.result(baseline, case)
        if theirs is None or ours is None or not theirs.rounds or not ours.rounds:
            return None
        return paired_ratio(theirs.round_medians, ours.round_medians)

    def best_peer(self, case: Case) -> tuple[str, Ratio] | None:
        """The fastest other engine at attntune's precision, and its ratio; None unless it and attntune were timed."""
        ratios = [(name, ratio) for name in self.peers() if (ratio := self.ratio(name, case)) is not None]
        return min(ratios, key=lambda pair: pair[1].value, default=None)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready fields, raw samples included; ``summary`` and ``best`` repeat what follows from them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        results = [{**dataclasses.asdict(r), "outcome": str(r.outcome)} for r in self.results]
        return {**fields, "results": results, "summary": self.summary(), "best": self.best()}

    def summary(self) -> list[dict[str, Any]]:
        """One row per engine and case: outcome, median, quartiles, and the ratio to attntune with its interval."""
        rows = []
        for result in self.results:
            ratio = self.ratio(result.engine, result.case) if result.engine != BASELINE else None
            low, high = result.quartiles_secs
            timed = bool(result.rounds)
            rows.append(
                {
                    "engine": result.engine,
                    "precision": self.precision(result.engine),
                    "case": result.case.label(),
                    "outcome": str(result.outcome),
                    "median_secs": result.median_secs if timed else None,
                    "quartiles_secs": [low, high] if timed else None,
                    "max_abs_error": result.max_abs_error,
                    "min_cosine": result.min_cosine,
                    "ratio": None if ratio is None else [ratio.value, ratio.low, ratio.high],
                    "verdict": None if ratio is None else ratio.verdict,
                    "message": result.message,
                }
            )
        return rows

    def best(self) -> list[dict[str, Any]]:
        """One row per case: the fastest other engine at attntune's precision, and its ratio."""
        rows = []
        for case in self.cases():
            if (found := self.best_peer(case)) is None:
                continue
            name, ratio = found
            rows.append(
                {
                    "case": case.label(),
                    "precision": self.precision(BASELINE),
                    "engine": name,
                    "ratio": [ratio.value, ratio.low, ratio.high],
                    "verdict": ratio.verdict,
                }
            )
        return rows

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Comparison:
        """Inverse of :meth:`to_json`; raises :class:`EngineError` for what is not a comparison."""
        try:
            if fields["schema"] > SCHEMA_VERSION:
                raise EngineError(f"expected a comparison of schema {SCHEMA_VERSION} or older, got {fields['schema']}")
            known = {f.name for f in dataclasses.fields(cls)}
            results = tuple(_result(row) for row in fields["results"])
            return cls(**{**{k: v for k, v in fields.items() if k in known}, "results": results})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"malformed comparison: {type(error).__name__}: {error}") from None

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_json` to a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1, default=str) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Inverse of :meth:`save`; raises :class:`EngineError` naming the file."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except (OSError, ValueError, EngineError) as error:
            raise EngineError(f"cannot read the comparison {path}: {error}") from None


def _result(fields: Mapping[str, Any]) -> Result:
    rounds = tuple(tuple(float(secs) for secs in samples) for samples in fields["rounds"])
    return Result(**{**fields, "case": Case(**fields["case"]), "outcome": Outcome(fields["outcome"]), "rounds": rounds})


def geometric_mean(ratios: Iterable[float]) -> float:
    """Of positive ratios; NaN of none."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.fmean(logs)) if logs else math.nan
