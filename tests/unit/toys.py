"""A workload, template, model and runner for tests of the tuner: times come from a formula, nothing is compiled."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from landscape import Landscape

from attntune.database.record import Status, TuningRecord
from attntune.measure.runner import Runner
from attntune.measure.trial import Trial
from attntune.ops.workload import TensorSpec, Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.template import ScheduleTemplate


@dataclass(frozen=True)
class Toy(Workload):
    op: ClassVar[str] = "toy"

    m: int = 384
    n: int = 1536
    k: int = 384
    dtype: str = "float32"

    def inputs(self) -> tuple[TensorSpec, ...]:
        return TensorSpec("x", (self.m, self.k), self.dtype), TensorSpec("w", (self.k, self.n), self.dtype)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("y", (self.m, self.n), self.dtype),)

    def compute(self) -> list[Any]:
        raise NotImplementedError

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        raise NotImplementedError

    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> Toy:
        raise NotImplementedError

    @property
    def landscape(self) -> Landscape:
        return Landscape(self.m, self.n, self.k)


class ToyTemplate(ScheduleTemplate):
    op: ClassVar[str] = "toy"
    kind: ClassVar[str] = "cpu"

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        return workload.landscape.space

    def default(self, workload: Workload, target: Target) -> Config:
        return workload.landscape.default

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        raise NotImplementedError

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        return {f"f{i:02}": value for i, value in enumerate(workload.landscape.features(config))}


class SmallTemplate(ToyTemplate):
    """Six configs."""

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        return ConfigSpace([Knob("tile", (1, 2, 4)), Knob("order", ("mn", "nm"))])

    def default(self, workload: Workload, target: Target) -> Config:
        return Config.of(tile=2, order="mn")

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        return {"tile": float(config.integer("tile"))}


class ToyModel:
    """Two layers: 4 and 1 calls for each shape; the second entry has one call more."""

    entries: ClassVar[dict[str, Any]] = {"forward": None, "embed": None}

    def workloads(self, shapes: Sequence[Mapping[str, int]], entry: str = "forward") -> dict[Workload, int]:
        calls: dict[Workload, int] = {}
        for shape in shapes:
            rows = shape["batch"] * shape["seq"]
            calls[Toy(m=rows, n=384)] = 4
            calls[Toy(m=rows, n=1536)] = 1 if entry == "forward" else 2
        return calls


def toy_secs(trial: Trial) -> float | None:
    return trial.workload.landscape.cost(trial.config)


class FakeRunner(Runner):
    """Computes times; counts what it is asked for.

    Args:
        secs: of a trial; None makes it fail to build.
        race_secs: likewise, in a race.
        clock: advanced by a trial's cost in wall time.
        interrupt_after: trials after which Ctrl-C is pressed; negative: in the first race.
    """

    def __init__(
        self, secs: Callable[[Trial], float | None] = toy_secs, *,
        race_secs: Callable[[Trial], float | None] | None = None, clock: Clock | None = None,
        interrupt_after: int | None = None,
    ) -> None:  # fmt: skip
        self.secs = secs
        self.race_secs = race_secs or secs
        self.clock = clock or Clock()
        self.interrupt_after = interrupt_after
        self.trials: list[Trial] = []
        self.races: list[tuple[Trial, ...]] = []
        self.closed = 0

    def measure(self, trials: Sequence[Trial]) -> Iterator[TuningRecord]:
        for trial in trials:
            if self.interrupt_after == len(self.trials):
                raise KeyboardInterrupt
            self.trials.append(trial)
            self.clock.now += 1.0
            yield self.record(trial, self.secs(trial), samples=5)

    def race(self, trials: Sequence[Trial], rounds: int) -> list[TuningRecord]:
        if self.interrupt_after is not None and self.interrupt_after < 0:
            raise KeyboardInterrupt
        self.races.append(tuple(trials))
        self.clock.now += 0.5 * len(trials)
        time = self.time()
        records = [self.record(trial, self.race_secs(trial), samples=rounds) for trial in trials]
        return [dataclasses.replace(record, final=True, time=time) for record in records]

    def close(self) -> None:
        self.closed += 1

    def record(self, trial: Trial, secs: float | None, samples: int) -> TuningRecord:
        rng = random.Random(f"{trial.key()} {samples}")
        return TuningRecord(
            trial.workload.key(), trial.target.key(), trial.template, trial.config,
            Status.BUILD_ERROR if secs is None else Status.CORRECT,
            () if secs is None else tuple(secs * rng.uniform(0.998, 1.002) for _ in range(samples)),
            seed=trial.seed, is_default=trial.is_default, message="does not build" if secs is None else "",
            time=self.time(),
        )  # fmt: skip

    def time(self) -> str:
        return f"2025-01-01T{len(self.trials):06}.{len(self.races):06}"

    def keys(self) -> list[tuple[str, str, str, str]]:
        return [trial.key() for trial in self.trials]


@dataclass
class Clock:
    """Stands for ``time.monotonic``."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now
