"""Where trials run: the contract of every runner, and the runner on this machine."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import statistics
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from attntune.database.record import Status, TuningRecord
from attntune.errors import AttntuneError
from attntune.measure.builder import Built
from attntune.measure.evaluator import Evaluation
from attntune.measure.machine import machine_state, require_host
from attntune.measure.threads import POOL_ENV
from attntune.measure.trial import MeasureOptions, Trial
from attntune.measure.worker import IsolatedProcess, RemoteError, WorkerTimeout

_BATCH = 32
"""Most trials built before the first of them is timed."""
_WORTH_KEEPING = 2.0
"""Kernels up to this many times slower than the best are kept for a race; others are deleted, and rebuilt if raced."""


class Runner(ABC):
    """Turns trials into records. Every trial gets exactly one record, failed ones too."""

    @abstractmethod
    def measure(self, trials: Sequence[Trial]) -> Iterator[TuningRecord]:
        """One record for each trial, in order, as they become known."""

    @abstractmethod
    def race(self, trials: Sequence[Trial], rounds: int) -> list[TuningRecord]:
        """Re-measure correct trials in turns (A B C, C B A, …), one sample each a round.

        The records, in the order of ``trials``, are marked ``final`` and share one ``time``.
        """

    def close(self) -> None:  # noqa: B027 (most runners hold nothing)
        """Release what the runner holds."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalRunner(Runner):
    """Builds trials side by side in worker processes, then times them here one at a time with no build beside them.

    Workers start when first needed; :meth:`start` starts them ahead of time. Not for use from several threads at once.
    """

    evaluator = "attntune.measure.evaluator"
    """Module with ``start``, ``evaluate`` and ``race``, which run in the timing process."""

    def __init__(self, options: MeasureOptions | None = None) -> None:
        self.options = options or MeasureOptions()
        self._folder = Path(tempfile.mkdtemp(prefix="attntune-"))
        self._numbers = itertools.count()
        self._built: dict[tuple[str, str, str, str], tuple[Path, Built]] = {}
        self._best: dict[tuple[str, str], float] = {}
        self._builders = [
            self._process(1, {}, ("attntune.measure.builder:warm_up",)) for _ in range(self.options.builders)
        ]
        self._idle: SimpleQueue[IsolatedProcess] = SimpleQueue()
        for builder in self._builders:
            self._idle.put(builder)
        self._pool = ThreadPoolExecutor(self.options.builders, thread_name_prefix="attntune-build")
        self._timer: IsolatedProcess | None = None
        self._timer_cores = 0

    def start(self) -> None:
        """Start the builders now, in the background, so that the first trials need not wait for TVM's import."""
        for builder in self._builders:
            builder.start()

    def measure(self, trials: Sequence[Trial]) -> Iterator[TuningRecord]:
        """One record for each trial, in order; batches of trials are built, then timed."""
        for first in range(0, len(trials), _BATCH):
            batch = trials[first : first + _BATCH]
            self._require_local(batch)
            machine = machine_state(batch[0].target)
            unwanted: list[Path] = []
            for trial, built in zip(batch, self._build(batch), strict=True):
                if isinstance(built, TuningRecord):
                    yield dataclasses.replace(built, machine=machine)
                    continue
                path, how = built
                record = self._record(trial, self._evaluate(trial, path), how, machine, _now())
                if record.median_secs > _WORTH_KEEPING * self._best_of(trial):
                    self._built.pop(trial.key(), None)
                    unwanted.append(path)
                yield record
            for path in unwanted:
                path.unlink(missing_ok=True)

    def race(self, trials: Sequence[Trial], rounds: int) -> list[TuningRecord]:
        """Interleaved re-measurement in one timing process; builds first what this runner has not built."""
        self._require_local(trials)
        if not trials:
            return []
        records: dict[int, TuningRecord] = {}
        running: dict[int, tuple[Path, Built]] = {}
        machine, now = machine_state(trials[0].target), _now()
        for i, built in enumerate(self._build(trials)):
            if isinstance(built, TuningRecord):
                records[i] = dataclasses.replace(built, machine=machine, time=now, final=True)
            else:
                running[i] = built
        while running:
            order = list(running)
            evaluations = self._race([trials[i] for i in order], [running[i][0] for i in order], rounds)
            finished = not any(evaluation is None for evaluation in evaluations)
            for i, evaluation in zip(order, evaluations, strict=True):
                if evaluation is not None and (finished or evaluation.status is not Status.CORRECT):
                    record = self._record(trials[i], evaluation, running.pop(i)[1], machine, now)
                    records[i] = dataclasses.replace(record, final=True)
        return [records[i] for i in range(len(trials))]

    def close(self) -> None:
        """End the workers and delete what was built."""
        for process in (*self._builders, *([self._timer] if self._timer else [])):
            process.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _process(self, threads: int, env: Mapping[str, str], preload: tuple[Any, ...]) -> IsolatedProcess:
        return IsolatedProcess(
            threads=threads, env=env, preload=(preload,), plugin_paths=self.options.plugin_paths,
            memory_limit_bytes=self.options.memory_limit_bytes,
        )  # fmt: skip

    def _require_local(self, trials: Sequence[Trial]) -> None:
        for target in {trial.target for trial in trials}:
            require_host(target)

    def _build(self, trials: Sequence[Trial]) -> list[tuple[Path, Built] | TuningRecord]:
        """For each trial its shared object and how it was built, or the record of why there is none."""
        futures: list[Future[tuple[Path, Built] | TuningRecord]] = []
        try:
            futures = [self._pool.submit(self._build_one, trial) for trial in trials]
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            for builder in self._builders:
                builder.kill()
            raise

    def _build_one(self, trial: Trial) -> tuple[Path, Built] | TuningRecord:
        known = self._built.get(trial.key())
        if known is not None:
            return known
        path = self._folder / f"{next(self._numbers)}.so"
        builder = self._idle.get()
        try:
            built = builder.call(
                "attntune.measure.builder:build_trial", trial, str(path), timeout_secs=self.options.build_timeout_secs
            )
        except WorkerTimeout:
            path.unlink(missing_ok=True)
            limit = self.options.build_timeout_secs
            return _failed(trial, self.options, Status.TIMEOUT, f"building took more than {limit:g} s")
        except AttntuneError as error:
            path.unlink(missing_ok=True)
            return _failed(trial, self.options, Status.BUILD_ERROR, _reason(error))
        finally:
            builder.start()  # a dead one comes back while others build
            self._idle.put(builder)
        assert isinstance(built, Built)
        self._built[trial.key()] = path, built
        return path, built

    def _timing_process(self, cores: int) -> IsolatedProcess:
        if self._timer is not None and self._timer_cores != cores:
            self._timer.close()
            self._timer = None
        if self._timer is None:
            self._timer = self._process(cores, POOL_ENV, (f"{self.evaluator}:start", cores))
            self._timer_cores = cores
        return self._timer

    def _evaluate(self, trial: Trial, path: Path) -> Evaluation:
        best = self._best_of(trial)
        evaluation = self._attempt(
            f"{self.evaluator}:evaluate", trial, str(path), self.options,
            best if math.isfinite(best) else None, cores=trial.target.cores,
        )  # fmt: skip
        assert isinstance(evaluation, Evaluation)
        if evaluation.run_secs:
            place = (trial.workload.key(), trial.target.key())
            self._best[place] = min(statistics.median(evaluation.run_secs), best)
        return evaluation

    def _best_of(self, trial: Trial) -> float:
        """Median seconds of the fastest kernel this runner measured for the workload; infinity before the first."""
        return self._best.get((trial.workload.key(), trial.target.key()), math.inf)

    def _race(self, trials: list[Trial], paths: list[Path], rounds: int) -> list[Evaluation | None]:
        """Evaluations of a race; where it broke off, None for the trials that have to race again."""
        outcome = self._attempt(
            f"{self.evaluator}:race", trials, [str(path) for path in paths], rounds, self.options,
            cores=trials[0].target.cores, shares=len(trials),
        )  # fmt: skip
        if isinstance(outcome, list):
            return outcome
        if len(trials) == 1:
            return [outcome]
        # One of them ended the process: find out which, each on its own.
        alone = [self._evaluate(trial, path) for trial, path in zip(trials, paths, strict=True)]
        failed: list[Evaluation | None] = [e if e.status is not Status.CORRECT else None for e in alone]
        return failed if any(failed) else [outcome, *[None] * (len(trials) - 1)]

    def _attempt(self, function: str, *args: Any, cores: int, shares: int = 1) -> Any:
        """Result of an evaluator function; an :class:`Evaluation` of the failure when the process fails."""
        process = self._timing_process(cores)
        limit = self.options.run_timeout_secs * shares
        try:
            result = process.call(function, *args, timeout_secs=limit)
        except WorkerTimeout:
            return Evaluation(Status.TIMEOUT, message=f"running took more than {limit:g} s")
        except AttntuneError as error:
            return Evaluation(Status.RUN_ERROR, message=_reason(error))
        if any(e is not None and e.tainted for e in (result if isinstance(result, list) else [result])):
            process.close()
        return result

    def _record(
        self, trial: Trial, evaluation: Evaluation, built: Built, machine: Mapping[str, Any], now: str
    ) -> TuningRecord:
        record = _failed(trial, self.options, evaluation.status, evaluation.message, evaluation.run_secs)
        return dataclasses.replace(
            record, max_abs_error=evaluation.max_abs_error, max_rel_error=evaluation.max_rel_error,
            build_secs=round(built.secs, 4), resources=built.resources, machine=machine, time=now,
        )  # fmt: skip


def _failed(
    trial: Trial, options: MeasureOptions, status: Status, message: str, run_secs: tuple[float, ...] = ()
) -> TuningRecord:
    rtol, atol = trial.workload.tolerance()
    return TuningRecord(
        trial.workload.key(), trial.target.key(), trial.template, trial.config, status, run_secs,
        cache=options.cache, rtol=rtol, atol=atol, seed=trial.seed, is_default=trial.is_default, message=message,
        time=_now(),
    )  # fmt: skip


def _reason(error: AttntuneError) -> str:
    if isinstance(error, RemoteError) and error.remote_traceback:
        where = [line.strip() for line in error.remote_traceback.splitlines() if line.startswith("  File ")]
        return f"{error}" + (f" ({where[-1]})" if where else "")
    return str(error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
