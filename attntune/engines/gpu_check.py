"""The closed loop on a machine with a CUDA device: check every template, tune the benchmark shapes, compare.

Everything is in one folder, and finished once it is there, so a run that was stopped goes on where it was:

    check-OP.json      records of the corner workloads of one operator, default configs
    check-models.json  small models of each family against the CPU's results
    check-PART.json    default kernels of a benchmark part against the reference and PyTorch; a token of timing
    tuning.jsonl       the journal; tuning.json: the seconds spent
    PART.json          a comparison, with its raw samples

What is finished is repeated only when what it was made from has changed: the templates, versions or the device; for a
comparison also the config chosen for one of its kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from attntune.database.query import Database
from attntune.database.record import Status, TuningRecord
from attntune.engines.compare_kernels import KernelOptions, compare_kernels
from attntune.engines.comparison import Outcome
from attntune.engines.cuda_kernel_engines import CUDA_KERNEL_ENGINES, cuda_peaks
from attntune.engines.cuda_suites import Part
from attntune.engines.gpu_models import every_check, problems
from attntune.engines.kernel_comparison import OURS, KernelComparison
from attntune.engines.kernel_engines import KernelEngine
from attntune.errors import AttntuneError, EngineError, TargetError
from attntune.kernel_cache import KernelCache, package_versions, sources_digest
from attntune.measure.machine import machine_state
from attntune.measure.runner import Runner
from attntune.measure.trial import Trial
from attntune.measure.worker import IsolatedProcess
from attntune.ops import Workload
from attntune.progress import Event, TrialDone
from attntune.target import Target
from attntune.templates import template_for
from attntune.tuner import tune

STEPS = ("check", "tune", "compare")
_CHECKED_AT_ONCE = 32
_MODEL_TIMEOUT_SECS = 300.0
_NOTE_SECS = 2.0
"""Between notes of how long tuning has taken."""


@dataclass(frozen=True)
class GpuSettings:
    """What a run does, and with what."""

    target: Target
    device: str
    """Name of the device."""
    results: Path
    parts: Sequence[Part]
    corners: Sequence[Workload]
    runner: Callable[[], Runner]
    """Makes what builds, checks and times trials."""
    options: KernelOptions = field(default_factory=lambda: KernelOptions(caches=("hot",), whole=True))
    kernels: Path | None = None
    """Where compiled kernels are kept; the user's cache by default."""
    process: Callable[..., IsolatedProcess] = IsolatedProcess
    table: Mapping[str, type[KernelEngine]] = field(default_factory=lambda: CUDA_KERNEL_ENGINES)
    peaks: Callable[[Target], Mapping[str, Any]] = cuda_peaks
    say: Callable[[str], None] = lambda _: None
    models: Sequence[tuple[str, str]] = field(default_factory=every_check)
    """Whole models to check, each with its precision."""


class GpuCheck:
    """The steps; each may be stopped at any time and repeated."""

    def __init__(self, settings: GpuSettings) -> None:
        self.settings = settings
        self.journal = settings.results / "tuning.jsonl"
        self._measured: Mapping[str, Any] | None = None
        self._made_from = [
            sources_digest(), *package_versions(), settings.target.key(), settings.device, settings.options.seed
        ]  # fmt: skip

    def check(self) -> Iterator[Path]:
        """Default configs of every template, by operator; whole models; then the parts; files as they are finished.

        A part's kernels are held against the float64 reference and the whole outputs of PyTorch's functions.
        """
        by_op: dict[str, list[Workload]] = {}
        for workload in self.settings.corners:
            by_op.setdefault(workload.op, []).append(workload)
        with contextlib.ExitStack() as stack:
            runner: Runner | None = None
            for op, workloads in by_op.items():
                path = self.settings.results / f"check-{op}.json"
                made_from = self._digest(workload.key() for workload in workloads)
                if not self._finished(path, made_from):
                    runner = runner or stack.enter_context(self.settings.runner())
                    self._check_corners(runner, op, workloads, path, made_from)
                yield path
        if self.settings.models:
            yield self._check_models()
        options = dataclasses.replace(self.settings.options, rounds=1, turn_secs=1e-6, warmup=0, whole=True)
        kernels = self._cache(Database(shipped=False))
        for part in self.settings.parts:
            engines = [name for name in part.engines if name != "flex"][:2]  # one that is independent is enough
            yield self._compared(f"check-{part.name}", part, engines, kernels, options, lambda _: {})

    def tune(self, minutes: float) -> Iterator[Path]:
        """Spend what is left of so many minutes, those of earlier runs counted.

        Raises:
            KeyboardInterrupt: after an interrupt; nothing measured is lost.
        """
        note, digest = self.settings.results / "tuning.json", self._digest()
        known = _read(note)
        if known.get("made_from", digest) != digest:
            self.settings.say(
                f"templates, versions or the device have changed since {self.journal} was begun; records there count "
                "as before: remove it and tuning.json to begin afresh"
            )
        spent, workloads = float(known.get("secs", 0.0)), self._workloads()
        ended = known.get("finished") == [workload.key() for workload in workloads] and known["made_from"] == digest
        left = 60.0 * minutes - spent
        if ended or left < 1e-3 or not workloads:  # so much a rounding of minutes may leave
            why = "every search has ended" if ended else f"{spent / 60:.1f} minutes were spent"
            self.settings.say(f"tuning: {why}")
            return
        started, noted = monotonic(), monotonic()

        def write(finished: bool) -> None:
            keys = [workload.key() for workload in workloads] if finished else []
            secs = spent + monotonic() - started
            _write(note, {"made_from": digest, "secs": secs, "finished": keys})

        def told(event: Event) -> None:
            nonlocal noted
            if isinstance(event, TrialDone):
                record = event.record
                took = f"{record.median_secs * 1e6:.1f} µs" if record.run_secs else str(record.status)
                self.settings.say(f"{event.trials_done} {record.workload} {record.config}: {took}")
                if monotonic() - noted > _NOTE_SECS:
                    write(False)
                    noted = monotonic()

        try:
            with self.settings.runner() as runner:
                summary = tune(
                    workloads, target=self.settings.target, seconds=left, database=self.journal, runner=runner,
                    seed=self.settings.options.seed, peaks={}, on_event=told,
                )  # fmt: skip
        except BaseException:
            write(False)
            raise
        write(summary.stopped_by == "finished")
        if summary.interrupted:
            raise KeyboardInterrupt
        yield note

    def compare(self) -> Iterator[Path]:
        """Each part against all of its engines, with the best configs known; the files as they are finished."""
        kernels = self._cache(Database([self.journal] if self.journal.exists() else []))
        for part in self.settings.parts:
            options = dataclasses.replace(self.settings.options, whole=True)
            yield self._compared(part.name, part, part.engines, kernels, options, self._peaks)

    # -- corner workloads ----------------------------------------------------------------------------------------------

    def _check_corners(
        self, runner: Runner, op: str, workloads: Sequence[Workload], path: Path, made_from: str
    ) -> None:
        target, records, unsupported = self.settings.target, [], []
        trials = []
        for workload in workloads:
            try:
                template = template_for(workload, target)
            except TargetError:
                unsupported.append(workload.key())
                continue
            config = template.default(workload, target)
            trials.append(Trial(workload, target, template.reference_name(), config, is_default=True))
        self.settings.say(f"checking {len(trials)} kernels of {op}")
        for first in range(0, len(trials), _CHECKED_AT_ONCE):
            for record in runner.measure(trials[first : first + _CHECKED_AT_ONCE]):
                records.append(dataclasses.replace(record, machine={}))
                if record.status is not Status.CORRECT:
                    self.settings.say(f"  {record.workload} {record.config} {record.status}: {record.message[:300]}")
        _write(path, {
            "made_from": made_from, "op": op, "device": self.settings.device, "machine": machine_state(target),
            "unsupported": unsupported, "records": [record.to_json() for record in records],
        })  # fmt: skip

    def _check_models(self) -> Path:
        """Each in a process of its own: after a kernel that failed, a process can do no more on the device."""
        settings, path = self.settings, self.settings.results / "check-models.json"
        made_from = self._digest([" ".join(each) for each in settings.models])
        if self._finished(path, made_from):
            return path
        rows = []
        for name, precision in settings.models:
            settings.say(f"checking {name} in {precision}")
            try:
                with settings.process(threads=1) as worker:
                    arguments = (name, settings.target, precision)
                    row = worker.call(
                        "attntune.engines.gpu_models:compared", *arguments, timeout_secs=_MODEL_TIMEOUT_SECS
                    )
            except AttntuneError as error:
                row = {"model": name, "precision": precision, "error": str(error)[-1000:]}
            rows.append(row)
        _write(path, {
            "made_from": made_from, "device": settings.device, "machine": machine_state(settings.target), "models": rows
        })  # fmt: skip
        return path

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _compared(
        self, name: str, part: Part, engines: Sequence[str], kernels: KernelCache, options: KernelOptions,
        peaks: Callable[[Target], Mapping[str, Any]],
    ) -> Path:  # fmt: skip
        settings, path = self.settings, self.settings.results / f"{name}.json"
        keys = [kernels.key(case.workload) for case in part.cases if case.workload is not None]
        asked = json.dumps(dataclasses.asdict(options), sort_keys=True)
        made_from = self._digest([*keys, *engines, asked])
        if not self._finished(path, made_from):
            settings.say(f"{name}: {len(part.cases)} cases")
            found = compare_kernels(
                name, part.cases, engines, kernels, target=settings.target, options=options, peaks=peaks,
                on_event=settings.say, table=settings.table, process=settings.process,
            )  # fmt: skip
            noted = {**found.settings, "made_from": made_from, "device": settings.device}
            scratch = dataclasses.replace(found, settings=noted).save(path.with_suffix(".tmp"))
            scratch.replace(path)
        return path

    def _cache(self, database: Database) -> KernelCache:
        return KernelCache(
            self.settings.kernels, target=self.settings.target, database=database, process=self.settings.process
        )

    def _peaks(self, target: Target) -> Mapping[str, Any]:
        """Measured once: PyTorch takes long to start."""
        if self._measured is None:
            self._measured = self.settings.peaks(target)
        return self._measured

    def _workloads(self) -> list[Workload]:
        cases = itertools.chain.from_iterable(part.cases for part in self.settings.parts)
        return list(dict.fromkeys(case.workload for case in cases if case.workload is not None))

    def _digest(self, also: Iterator[str] | Sequence[str] = ()) -> str:
        return hashlib.sha256(json.dumps([*self._made_from, *also]).encode()).hexdigest()[:32]

    def _finished(self, path: Path, made_from: str) -> bool:
        known = _read(path)
        finished = made_from in (known.get("made_from"), known.get("settings", {}).get("made_from"))
        if finished:
            self.settings.say(f"{path.stem}: finished before")
        return finished


def failures(path: Path) -> list[str]:
    """What is wrong in a file that :meth:`GpuCheck.check` or :meth:`GpuCheck.compare` has finished, a line each."""
    known = _read(path)
    if "records" in known:
        records = [TuningRecord.from_json(fields) for fields in known["records"]]
        return [
            f"{r.workload} {r.config}: {r.status}: {r.message}" for r in records if r.status is not Status.CORRECT
        ]  # fmt: skip
    if "models" in known:
        return problems(known["models"])
    try:
        found = KernelComparison.load(path)
    except EngineError:
        return []
    return [
        f"{r.group} {r.label}: {r.outcome}: {r.message}"
        for r in found.results
        if r.engine == OURS and r.outcome not in (Outcome.OK, Outcome.UNAVAILABLE)
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, document: Mapping[str, Any]) -> None:
    """In one step: what is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(document, separators=(",", ":"), default=str) + "\n")
    scratch.replace(path)
