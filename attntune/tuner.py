"""The loop that joins the stages: a model or workloads in, measured records in a journal out."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from attntune.database.journal import Journal
from attntune.database.query import Database
from attntune.database.record import TuningRecord
from attntune.errors import TuningError
from attntune.host import available_cpus
from attntune.measure.runner import Runner
from attntune.measure.trial import Trial
from attntune.models.shapes import Shape
from attntune.progress import OnEvent, TrialDone, TuningSummary
from attntune.search import searcher_named
from attntune.search.scheduler import TaskScheduler
from attntune.search.searcher import Features, Searcher
from attntune.search.space import Config, ConfigSpace
from attntune.target import Target
from attntune.tuning_request import at_precision, requested
from attntune.tuning_task import TuningTask

SearcherFactory = Callable[[ConfigSpace, Features, Config, int], Searcher]

#: Configs of one workload asked for at once; more where more are built at once.
_BATCH = 4
#: Batches without improvement after which a workload's search ends.
_PATIENCE = 8
#: A workload with fewer trials of its own than this first tries what won for its siblings.
_YOUNG = 6
_RACE_ROUNDS = 10
#: So many failures and nothing that works: it is not the configs.
_HOPELESS = 16
#: At most this share of the seconds is kept for the finals.
_FINAL_SHARE = 0.25
_MOST_BUILDERS = 8


def tune(
    model: Any,
    *,
    target: str | Target | Mapping[str, Any] = "native",
    seconds: float | None = None,
    trials: int | None = None,
    database: str | os.PathLike[str] = "tuning.jsonl",
    searcher: str | SearcherFactory = "evolutionary",
    seed: int = 0,
    shapes: Sequence[Shape] | None = None,
    entries: Sequence[str] | None = None,
    operators: Sequence[str] | None = None,
    cache: str = "hot",
    precision: str = "float32",
    runner: Runner | None = None,
    peaks: Mapping[str, Any] | None = None,
    on_event: OnEvent | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> TuningSummary:
    """Search schedules by measurement until a budget is spent or every search has ended.

    Every trial is appended to ``database`` as soon as it is known, failed ones too. What the database already holds
    for a workload and target is learned from and never measured again, so an ended or killed run is resumed by the
    same call. At the end the best few configs and the default are measured again in turns: a config that does not beat
    the default there beyond noise does not replace it.

    Args:
        model: a model (anything with ``workloads(shapes, entry)`` and ``entries``), one workload, a list of them, or a
            mapping from workload to its number of calls.
        target: see :meth:`Target.parse`.
        seconds: wall-clock budget, the finals included; a trial or final begun is ended.
        trials: budget of new trials over all workloads, finals not counted. At least one budget is required.
        database: path of the journal; created if missing.
        searcher: a name in ``SEARCHERS``, or a callable ``(space, features, default, seed) -> Searcher``.
        seed: of the search and of the operands.
        shapes: of a model, as :func:`attntune.compile` takes them, e.g. ``[{"batch": 1, "seq": 128}]``. By default
            ``model.shapes``, or batch 1 with 128 positions where it has none.
        entries: entry points of a model; by default those that are compiled unasked.
        operators: tune no others, such as ``["attention"]``; by default all.
        cache: ``hot`` or ``cold``; of the runner that is made here.
        precision: of a model, as :func:`attntune.compile` takes it.
        runner: where trials run; by default this machine. One that is given stays open, except after an interrupt.
        peaks: limits of the machine as :func:`attntune.measure.machine.measure_peaks` gives them; by default those
            remembered from an earlier measurement, if any.
        on_event: called with every :class:`TaskState` and :class:`TrialDone`.
        on_progress: called with a line that says what precision is used instead, see ``precision``.

    Returns:
        The summary. ``interrupted`` is true after Ctrl-C; nothing measured is lost then.

    Raises:
        TuningError: no or a bad budget, an unknown searcher, nothing to tune, or many trials none of which works.
        TargetError: an unknown target, or one that cannot run here.
    """
    started = monotonic()
    if seconds is None and trials is None:
        raise TuningError("expected a budget: seconds=… or trials=… or both; got neither")
    for name, budget in (("seconds", seconds), ("trials", trials)):
        if budget is not None and not budget > 0:
            raise TuningError(f"expected {name} to be positive, got {budget!r}")
    make = searcher_named(searcher) if isinstance(searcher, str) else searcher
    where = Target.parse(target)
    if precision != "float32":
        model = at_precision(model, precision, where, on_progress)
    calls = requested(model, shapes, entries, operators)
    journal = Journal(Path(database))
    known = journal.load()
    own_runner = runner is None
    runner = runner if runner is not None else _local_runner(cache)
    try:
        if peaks is None:
            from attntune.measure.machine import cached_peaks

            peaks = cached_peaks(where, measure=False)
        counted_cache = getattr(getattr(runner, "options", None), "cache", cache)
        tasks = [TuningTask(workload, n, where, make, seed, peaks or {}) for workload, (n, _) in calls.items()]
        session = _Session(tasks, runner, journal, seed, started, seconds, trials, on_event or (lambda event: None))
        groups = {workload.key(): group for workload, (_, group) in calls.items()}
        session.remember(known, counted_cache, groups)
        session.run()
        return TuningSummary(
            target=where.key(), database=str(database), searcher=searcher if isinstance(searcher, str) else repr(make),
            seed=seed, results=tuple(task.result() for task in tasks), trials=session.measured,
            resumed=sum(len(task.records) - task.new_trials for task in tasks),
            elapsed_secs=monotonic() - started, interrupted=session.stopped_by == "interrupt",
            stopped_by=session.stopped_by,
            resume=f"call tune again with database={str(database)!r}: what it holds is not measured again",
        )  # fmt: skip
    finally:
        if own_runner:
            runner.close()


class _Session:
    """One call of :func:`tune`: its tasks, budgets and the runner."""

    def __init__(
        self, tasks: Sequence[TuningTask], runner: Runner, journal: Journal, seed: int, started: float,
        seconds: float | None, trials: int | None, on_event: OnEvent,
    ) -> None:  # fmt: skip
        self.tasks = {task.key: task for task in tasks}
        self.runner = runner
        self.journal = journal
        self.seed = seed
        self.seconds = seconds
        self.deadline = math.inf if seconds is None else started + seconds
        self.trials = trials
        self.on_event = on_event
        self.measured = 0
        self.stopped_by = "finished"
        self._search_started = started
        self._reserved_secs = 0.0
        self._interrupted = False
        self._batch = max(_BATCH, getattr(getattr(runner, "options", None), "builders", 1))
        self.scheduler = TaskScheduler(patience=_PATIENCE)

    def remember(self, records: Sequence[TuningRecord], cache: str, groups: Mapping[str, str]) -> None:
        """Give every task what the journal knows of it, and the scheduler every task."""
        database = Database(records)
        for record in records:
            task = self.tasks.get(record.workload)
            if task is not None and record.cache == cache and task.owns(record):
                task.remember(record)
                self._share(task, record)
        for task in self.tasks.values():
            choice = database.lookup(task.workload, task.target, task.template)
            task.searcher.suggest([choice.config])
            self.scheduler.add(
                task.key, size=len(task.space), calls=task.calls, group=groups[task.key],
                floor_secs=task.floor_secs, known=task.costs(),
            )  # fmt: skip

    def run(self) -> None:
        """Search, then the finals; an interrupt ends both and closes the runner."""
        try:
            with self._noting_interrupts():
                for task in self.tasks.values():
                    self.on_event(task.state(self.scheduler.finished(task.key)))
                self._search_started = monotonic()
                self._search()
                self._finals()
        except KeyboardInterrupt:
            self.stopped_by = "interrupt"
            # Impatient hands press twice; the summary is worth more than an orderly end of the workers.
            with contextlib.suppress(KeyboardInterrupt):
                self.runner.close()

    @contextlib.contextmanager
    def _noting_interrupts(self) -> Iterator[None]:
        """Remember an interrupt: the exception is lost where it meets a finalizer or a callback from C++."""

        def note(number: int, frame: Any) -> None:
            self._interrupted = True
            signal.default_int_handler(number, frame)

        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not usual or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _search(self) -> None:
        defaults = [(task, task.default) for task in self.tasks.values() if not task.searcher.seen(task.default)]
        # Asking for one config gives the default: together they are built side by side.
        batch = [(task, config) for task, _ in defaults for config in task.searcher.ask(1)]
        if self.trials is not None:
            batch = batch[: self.trials]
        if batch and self._open():
            self._measure(batch)
            for task, _ in batch:
                self.scheduler.update(task.key, task.take_new_costs())
        while self._open():
            name = self.scheduler.next()
            if name is None:
                return
            task = self.tasks[name]
            room = self._batch if self.trials is None else min(self._batch, self.trials - self.measured)
            if len(task.records) < _YOUNG:
                task.searcher.suggest(self._siblings_best(task))
            configs = task.searcher.ask(room)
            if configs:
                self._measure([(task, config) for config in configs])
            self.scheduler.update(name, task.take_new_costs(), exhausted=not configs or task.searcher.exhausted)

    def _open(self) -> bool:
        """Whether there is budget for another batch; says in ``stopped_by`` which one ended."""
        if self.trials is not None and self.measured >= self.trials:
            self.stopped_by = "trials"
        elif self._late():
            self.stopped_by = "seconds"
        else:
            self._reserved_secs = self._reserve()
            return True
        return False

    def _late(self) -> bool:
        """Whether what is left of the seconds is for the finals."""
        return monotonic() >= self.deadline - self._reserved_secs

    def _measure(self, batch: Sequence[tuple[TuningTask, Config]]) -> None:
        records = self.runner.measure([self._trial(task, config) for task, config in batch])
        try:
            for record in records:
                self.journal.append(record)
                task = self.tasks[record.workload]
                task.remember(record, new=True)
                self.measured += 1
                self._share(task, record)
                self._tell(task, record)
                self._require_hope(record)
                if self._interrupted:
                    raise KeyboardInterrupt
                if self._late():
                    break
        finally:
            close = getattr(records, "close", None)
            if close is not None:
                close()

    def _require_hope(self, last: TuningRecord) -> None:
        """Stop when nothing ever worked, before a broken installation fills the journal with failures."""
        if self.measured >= _HOPELESS and not any(task.searcher.ranked() for task in self.tasks.values()):
            raise TuningError(
                f"{self.measured} trials and none worked; the last was a {last.status}: {last.message or 'no reason'}. "
                f"See `attntune doctor`. These records are in {self.journal.path}; "
                "remove them there, or they will not be tried again"
            )

    def _share(self, task: TuningTask, record: TuningRecord) -> None:
        """Let the searchers of the same template learn from a trial."""
        if record.final:
            return
        features = task.features(record.config)
        for other in self.tasks.values():
            if other is not task and other.template_name == task.template_name:
                other.searcher.learn(task.key, features, task.cost(record))

    def _siblings_best(self, task: TuningTask) -> list[Config]:
        """What is best so far for the most similar workload of the same template."""
        siblings = [t for t in self.tasks.values() if t is not task and t.template_name == task.template_name]
        siblings.sort(key=lambda other: abs(math.log(max(1, other.flops) / max(1, task.flops))))
        best = (next(iter(other.searcher.ranked()), None) for other in siblings)
        fresh = (c for c in best if c is not None and c in task.space and not task.searcher.seen(c))
        return [config for config, _ in zip(fresh, range(1), strict=False)]

    def _finals(self) -> None:
        """Race each workload's finalists, the heaviest workload first, while there is time."""
        heaviest = sorted(self.tasks.values(), key=lambda task: -self.scheduler.weight(task.key))
        for task in heaviest:
            finalists = task.finalists()
            if not finalists:
                continue
            if monotonic() >= self.deadline:
                self.stopped_by = "seconds"
                return
            raced = self.runner.race([self._trial(task, config) for config in finalists], _RACE_ROUNDS)
            self.journal.extend(raced)  # in one write: half a race would tell who lost it
            for record in raced:
                task.remember(record)
                self._tell(task, record)
            self.on_event(task.state(self.scheduler.finished(task.key)))

    def _reserve(self) -> float:
        """Seconds the finals are expected to take: a racing config costs about what a trial costs."""
        if self.seconds is None or not self.measured:
            return 0.0
        trial_secs = (monotonic() - self._search_started) / self.measured
        racing = sum(len(task.finalists()) for task in self.tasks.values())
        return min(trial_secs * racing, _FINAL_SHARE * self.seconds)

    def _trial(self, task: TuningTask, config: Config) -> Trial:
        return Trial(
            task.workload, task.target, task.template_name, config, seed=self.seed, is_default=config == task.default
        )

    def _tell(self, task: TuningTask, record: TuningRecord) -> None:
        left = None if self.trials is None else max(0, self.trials - self.measured)
        seconds_left = None if self.seconds is None else max(0.0, self.deadline - monotonic())
        state = task.state(self.scheduler.finished(task.key))
        self.on_event(TrialDone(record, state, self.measured, left, seconds_left))


def _local_runner(cache: str) -> Runner:
    from attntune.measure.runner import LocalRunner
    from attntune.measure.trial import MeasureOptions

    runner = LocalRunner(MeasureOptions(cache=cache, builders=max(2, min(_MOST_BUILDERS, len(available_cpus())))))
    runner.start()
    return runner
