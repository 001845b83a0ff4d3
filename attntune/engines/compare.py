"""Compare engines: each in a process of its own, same threads; correct first, then timed in turns, A B A B.

Turns are interleaved so that whatever else the machine does falls on all engines alike, and separated by pauses in
which the spinning threads of the engine before go to sleep.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attntune.engines import ENGINES
from attntune.engines import engine as engine_class
from attntune.engines.comparison import BASELINE, Case, Comparison, Outcome, Result
from attntune.engines.engine import Engine, ModelSource
from attntune.engines.graph import ModelGraph
from attntune.engines.parity import Agreement, agreement, parity_of
from attntune.errors import AttntuneError, EngineError
from attntune.interop import evaluate, export_onnx, sample_inputs
from attntune.interop.onnx_export import OPSETS
from attntune.measure.machine import machine_state
from attntune.measure.worker import IsolatedProcess
from attntune.target import Target, native

if TYPE_CHECKING:
    from attntune.models.model import Model

#: Engines of a comparison when none are named. torch.compile takes minutes to compile and is asked for by name.
DEFAULT_ENGINES = (BASELINE, "onnxruntime", "pytorch")

_MIN_FLUSH_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class CompareOptions:
    """How a comparison is taken."""

    rounds: int = 11
    """Turns of each engine per case; the confidence interval is over these."""
    turn_secs: float = 0.25
    """Aim for the timed part of one turn; sets how many calls it makes."""
    min_calls: int = 3
    max_calls: int = 200
    """Timed calls in one turn, at least and at most."""
    warmup: int = 2
    """Calls before the timed ones of each turn."""
    pause_secs: float = 0.05
    """Between turns."""
    masks: tuple[str, ...] = ("full",)
    """Kinds of attention mask, see :func:`attntune.interop.sample_inputs`."""
    caches: tuple[str, ...] = ("hot",)
    """``hot``, ``cold`` or both."""
    tolerance: float = 1e-4
    """Of float32 engines: maximum absolute error, times the reference's largest value where that exceeds 1. Engines of
    other precisions are held to :data:`attntune.engines.parity.PARITY`."""
    tuning_secs: float = 60.0
    """What an engine that tunes (:attr:`Engine.tunes`) may spend on each shape."""
    seed: int = 0
    timeout_secs: float = 600.0
    """For one request to an engine's process: loading, checking (besides what tuning takes) or one turn."""
    plugin_paths: tuple[str, ...] = ()
    """Directories from which processes import engines named ``module:Class``."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.min_calls < 1 or self.max_calls < self.min_calls:
            raise EngineError(f"expected rounds >= 1 and 1 <= min_calls <= max_calls, got {self}")
        if self.tuning_secs <= 0:
            raise EngineError(f"expected tuning_secs > 0, got {self.tuning_secs}")
        if unknown := {*self.caches} - {"hot", "cold"}:
            raise EngineError(f"unknown cache states {sorted(unknown)}; expected 'hot' or 'cold'")


@dataclass
class _Runner:
    """One engine's process and what became of it."""

    name: str
    process: IsolatedProcess | None = None
    info: dict[str, Any] = field(default_factory=dict)
    problem: tuple[Outcome, str] | None = None
    """Why it cannot run any case."""

    @property
    def precision(self) -> str:
        return str(self.info["precision"])


@dataclass(frozen=True)
class _Checked:
    """An engine's result for one set of inputs: right when ``outcome`` is ok, and only then timed."""

    runner: _Runner
    outcome: Outcome
    agreement: Agreement | None = None
    message: str = ""
    variant: str = ""
    calls: int = 0
    """Per turn."""

    def result(self, case: Case, rounds: Sequence[tuple[float, ...]] = (), failure: str = "") -> Result:
        found = self.agreement
        return Result(
            self.runner.name,
            case,
            Outcome.FAILED if failure else self.outcome,
            () if failure else tuple(rounds),
            None if found is None else found.max_abs_error,
            self.variant,
            failure or self.message,
            None if found is None else found.min_cosine,
        )


def engines_at(*precisions: str) -> tuple[str, ...]:
    """Every engine of the registry that computes in one of ``precisions``, but attntune's own and those that tune.

    Raises:
        EngineError: naming the precision that no engine has.
    """
    known = {cls.precision for name, cls in ENGINES.items() if name != BASELINE}
    if unknown := [precision for precision in precisions if precision not in known]:
        raise EngineError(f"no engine computes in {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    return tuple(n for n, cls in ENGINES.items() if n != BASELINE and cls.precision in precisions and not cls.tunes)


def compare(
    model: Model,
    artifact: Any,
    shapes: Sequence[Mapping[str, int]],
    engines: Sequence[str] = DEFAULT_ENGINES,
    *,
    threads: int | None = None,
    entry: str = "forward",
    options: CompareOptions | None = None,
    on_event: Callable[[str], None] | None = None,
) -> Comparison:
    """Run one entry of a model on several engines and compare results and speed.

    An engine that is missing, fails, or is out of tolerance is reported so and not timed; the others go on.

    Args:
        model: the model; its float64 reference is the oracle, its ONNX and PyTorch twins are made from it.
        artifact: what was compiled from it: an :class:`~attntune.runtime.Artifact` or the path of a saved one; None
            when attntune itself is not among ``engines``.
        shapes: values of the symbolic axes, e.g. ``[{"batch": 1, "seq": 128}]``.
        engines: names from :data:`attntune.engines.ENGINES`, or ``"module:Class"`` of an engine elsewhere; attntune
            itself goes first wherever there is an artifact.
        threads: of every engine; the physical cores of this machine by default.
        entry: which of the model's entries.
        options: rounds, turn length, masks, caches, tolerance.
        on_event: is told what happens, one line at a time.

    Raises:
        EngineError: an engine or entry is unknown, or nothing is left to compare.
    """
    options = options or CompareOptions()
    say = on_event or (lambda _: None)
    target = native().with_cores(threads) if threads else native()
    names = engines if artifact is None else (BASELINE, *engines)
    classes = {name: engine_class(name) for name in dict.fromkeys(names)}
    if entry not in model.entries:
        raise EngineError(f"model {model.name!r} has no entry {entry!r}; expected one of {sorted(model.entries)}")
    if not classes or not shapes:
        raise EngineError(f"expected at least one engine and one shape, got {list(engines)} and {list(shapes)}")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attntune-compare-")))
        source = make_source(model, entry, folder, artifact, classes, options.tuning_secs)
        runners = [_open(stack, name, source, target, options, say) for name in classes]
        state = machine_state(target)
        results: list[Result] = []
        for dims in shapes:
            for mask in options.masks:
                results += _run_case(runners, model, entry, dims, mask, options, target, say)
    return Comparison(
        model=model.name,
        entry=entry,
        threads=target.cores,
        results=tuple(results),
        engines={runner.name: runner.info for runner in runners},
        settings={
            **{name: getattr(options, name) for name in options.__dataclass_fields__},
            "parity": {p: parity_of(p, options.tolerance).text() for p in sorted({r.precision for r in runners})},
        },
        machine=state,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def make_source(
    model: Model,
    entry: str,
    folder: Path,
    artifact: Any,
    engines: Mapping[str, type[Engine]],
    tuning_secs: float = 0.0,
) -> ModelSource:
    """Write what the named engines need into ``folder``."""
    wanted = {style for cls in engines.values() if cls.unavailable() is None for style in cls.onnx_styles}
    onnx = {
        style: str(export_onnx(model, folder / f"{style}.onnx", attention=style, entry=entry))
        for style in OPSETS
        if style in wanted
    }
    graph = ""
    if any(name != BASELINE for name in engines):
        ModelGraph.of(model, entry).save(folder / "graph")
        graph = str(folder / "graph")
    where = "" if artifact is None else str(getattr(artifact, "folder", artifact))
    outputs = tuple(spec.name for spec in model.entries[entry].outputs)
    return ModelSource(entry, outputs, graph, onnx, where, tuning_secs)


def _open(
    stack: contextlib.ExitStack,
    name: str,
    source: ModelSource,
    target: Target,
    options: CompareOptions,
    say: Callable[[str], None],
) -> _Runner:
    cls = engine_class(name)
    runner = _Runner(name, info={"title": cls.title, "precision": cls.precision})
    if (reason := cls.unavailable()) is not None:
        runner.problem = (Outcome.UNAVAILABLE, reason)
        say(f"{cls.title}: {reason}")
        return runner
    runner.process = stack.enter_context(
        IsolatedProcess(threads=target.cores, env=cls.env, plugin_paths=options.plugin_paths)
    )
    say(f"{cls.title}: loading")
    try:
        runner.info |= runner.process.call(
            "attntune.engines.session:open_engine", name, source, target.cores, timeout_secs=options.timeout_secs
        )
    except AttntuneError as error:
        runner.problem = (Outcome.FAILED, str(error))
        say(f"{cls.title}: {error}")
    return runner


def _run_case(
    runners: Sequence[_Runner],
    model: Model,
    entry: str,
    dims: Mapping[str, int],
    mask: str,
    options: CompareOptions,
    target: Target,
    say: Callable[[str], None],
) -> Iterator[Result]:
    """Check every engine on one set of inputs, then time those that passed, hot or cold or both."""
    inputs = sample_inputs(model, dims, entry=entry, mask=mask, seed=options.seed)
    expected = evaluate(model, inputs, entry)
    key = Case(dims, mask).label()
    correct: dict[str, _Checked] = {}
    for runner in runners:
        checked = _check(runner, key, inputs, expected, options)
        if checked.outcome is Outcome.OK:
            correct[runner.name] = checked
            continue
        say(f"{key}: {runner.info['title']} {checked.outcome}: {checked.message}")
        for cache in options.caches:
            yield checked.result(Case(dims, mask, cache))
    for cache in options.caches:
        case = Case(dims, mask, cache)
        flush_bytes = max(2 * target.l3_bytes, _MIN_FLUSH_BYTES) if cache == "cold" else 0
        say(f"{case.label()}: {options.rounds} rounds of {', '.join(correct)}")
        rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in correct}
        failed: dict[str, str] = {}
        for turn in range(options.rounds):
            # Every other round runs backwards: no engine always follows the same neighbour.
            order = list(correct) if turn % 2 == 0 else list(reversed(correct))
            for name in order:
                if name in failed:
                    continue
                runner, calls = correct[name].runner, correct[name].calls
                time.sleep(options.pause_secs)
                try:
                    assert runner.process is not None
                    rounds[name].append(
                        tuple(
                            runner.process.call(
                                "attntune.engines.session:turn", key, options.warmup, calls, flush_bytes,
                                timeout_secs=options.timeout_secs,
                            )
                        )
                    )  # fmt: skip
                except AttntuneError as error:
                    failed[name] = str(error)
                    runner.problem = (Outcome.FAILED, str(error))
        for name, checked in correct.items():
            yield checked.result(case, rounds[name], failed.get(name, ""))
        correct = {name: checked for name, checked in correct.items() if name not in failed}


def _check(
    runner: _Runner,
    key: str,
    inputs: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    options: CompareOptions,
) -> _Checked:
    if runner.problem is not None:
        return _Checked(runner, runner.problem[0], message=runner.problem[1])
    assert runner.process is not None
    time.sleep(options.pause_secs)
    tuning_secs = options.tuning_secs if engine_class(runner.name).tunes else 0.0
    try:
        got, variant, secs = runner.process.call(
            "attntune.engines.session:outputs", key, dict(inputs), timeout_secs=options.timeout_secs + tuning_secs
        )
    except AttntuneError as error:
        if runner.process.pid is None:  # its process died and took the loaded model with it
            runner.problem = (Outcome.FAILED, str(error))
        return _Checked(runner, Outcome.FAILED, message=str(error))
    found = agreement(got, expected, parity_of(runner.precision, options.tolerance))
    if found.problem:
        return _Checked(runner, Outcome.WRONG_RESULT, found, found.problem, variant)
    calls = min(max(round(options.turn_secs / max(secs, 1e-9)), options.min_calls), options.max_calls)
    return _Checked(runner, Outcome.OK, found, variant=variant, calls=calls)
