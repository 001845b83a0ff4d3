"""Compare kernels: one operator at a time on several engines, each in its own process; correct first, then in turns.

The rules are those of :mod:`attntune.engines.compare`; a process more measures what the machine can do beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attntune.engines.comparison import Outcome
from attntune.engines.kernel_comparison import OURS, KernelCase, KernelComparison, KernelResult, bound
from attntune.engines.kernel_engines import KERNEL_ENGINES, KernelEngine, KernelSource
from attntune.errors import AttntuneError, EngineError
from attntune.kernel_cache import KernelCache
from attntune.measure.machine import better_peaks, machine_state, measure_peaks
from attntune.measure.threads import POOL_ENV
from attntune.measure.worker import IsolatedProcess
from attntune.ops import Workload, workload_from_key
from attntune.target import Target

#: Largest error allowed, as a share of the reference's largest value, by the dtype that is multiplied.
PARITY = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3, "int8": 5e-2}


@dataclass(frozen=True)
class KernelOptions:
    """How kernels are compared."""

    rounds: int = 9
    turn_secs: float = 0.03
    """Aim for the timed part of one turn."""
    max_samples: int = 200
    """Most samples in one turn; at least 2 are taken."""
    warmup: int = 2
    pause_secs: float = 0.02
    """Between turns, in which the spinning threads of the engine before go to sleep."""
    caches: tuple[str, ...] = ("hot", "cold")
    """``hot``: the same operands each call; ``cold``: weights, or everything where there are none, come from memory."""
    seed: int = 0
    timeout_secs: float = 300.0
    whole: bool = False
    """Whether the whole of attntune's output is held against that of each other engine, too."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.turn_secs <= 0:
            raise EngineError(f"expected rounds >= 1 and turn_secs > 0, got {self}")
        if unknown := {*self.caches} - {"hot", "cold"}:
            raise EngineError(f"unknown cache states {sorted(unknown)}; expected 'hot' or 'cold'")


def compare_kernels(
    suite: str,
    cases: Sequence[KernelCase],
    engines: Sequence[str],
    kernels: KernelCache,
    *,
    target: Target,
    options: KernelOptions | None = None,
    peaks: Callable[[Target], Mapping[str, Any]] = measure_peaks,
    on_event: Callable[[str], None] | None = None,
    table: Mapping[str, type[KernelEngine]] = KERNEL_ENGINES,
    process: Callable[..., IsolatedProcess] = IsolatedProcess,
) -> KernelComparison:
    """Run a suite. What an engine cannot run, or computes wrongly, is reported so and not timed; the others go on.

    Args:
        suite: its name.
        cases: the workloads.
        engines: names from ``table``; attntune's own goes first. One that cannot start is left out, with the reason
            in ``settings["left_out"]``.
        kernels: where attntune's kernels come from.
        target: this machine with the number of threads that every engine gets.
        options: rounds, length of turns, states of the caches.
        peaks: measures what the machine can do. On a CPU, what bounds a kernel is measured again beside each round.
        on_event: is told what happens, one line at a time.
        table: the engines there are for this kind of target.
        process: starts the process of an engine.

    Raises:
        EngineError: an engine is unknown, there is no case, or attntune's own engine cannot start.
    """
    options, say = options or KernelOptions(), on_event or (lambda _: None)
    if unknown := set(engines) - set(table):
        raise EngineError(f"unknown kernel engines {sorted(unknown)}; expected some of {sorted(table)}")
    if not cases:
        raise EngineError(f"suite {suite!r}: expected at least one case")
    say("measuring the machine's peaks")
    before, state = peaks(target), machine_state(target)
    results: list[KernelResult] = []
    info: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        processes = {}
        for name in dict.fromkeys((OURS, *engines)):
            if (reason := table[name].unavailable()) is not None:
                left_out[name] = reason
                continue
            processes[name] = stack.enter_context(process(
                threads=target.cores, env=table[name].env,
                preload=[("attntune.engines.kernel_engines:open_engine", table[name].reference_name(), target.cores)],
            ))  # fmt: skip
            processes[name].start()
        for name in tuple(processes):
            try:
                described = processes[name].call(
                    "attntune.engines.kernel_engines:describe", timeout_secs=options.timeout_secs
                )
            except AttntuneError as error:
                if name == OURS:
                    raise
                left_out[name] = str(error)
                del processes[name]
                continue
            info[name] = {"title": table[name].title, **described}
        for name, reason in left_out.items():
            say(f"{name} is left out: {reason[:300]}")
        beside = _nothing
        if before and target.kind == "cpu":
            pin = ("attntune.measure.threads:pin_pool", target.cores)
            worker = stack.enter_context(process(threads=target.cores, env=POOL_ENV, preload=(pin,)))
            beside = partial(_beside, worker, target, before, options)
        for number, case in enumerate(cases, 1):
            say(f"{number}/{len(cases)} {case.group} {case.label}")
            with tempfile.TemporaryDirectory(prefix="attntune-") as scratch:
                results += _run_case(case, processes, kernels, target, options, say, scratch, beside)
    say("measuring the machine's peaks again")
    best = _at_best(better_peaks(before, peaks(target)), before, results)
    return KernelComparison(
        suite, target.cores, tuple(results), info, best,
        {**dataclasses.asdict(options), "left_out": left_out}, state, datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _run_case(
    case: KernelCase,
    processes: Mapping[str, IsolatedProcess],
    kernels: KernelCache,
    target: Target,
    options: KernelOptions,
    say: Callable[[str], None],
    scratch: str,
    beside: Callable[[Workload, str], tuple[float, ...]],
) -> Iterator[KernelResult]:
    """Check every engine, then time those that are right.

    ``scratch`` is a folder for whole outputs; ``beside`` measures the machine, see :func:`_beside`.
    """
    workload = case.workload
    key = "" if workload is None else workload.key()

    def untimed(engine: str, outcome: Outcome, message: str, error: float | None = None) -> Iterator[KernelResult]:
        say(f"  {engine} {outcome}: {message[:200]}")
        for cache in options.caches:
            yield KernelResult(
                case.group, case.label, key, cache, engine, outcome, max_rel_error=error, message=message
            )

    if workload is None:
        yield from untimed(OURS, Outcome.UNAVAILABLE, case.problem)
        return
    right: dict[str, _Right] = {}
    expected = list(workload.reference_sample(*workload.example_inputs(options.seed)))
    places = [place for place, _ in expected]
    limit = PARITY[workload.compute_dtype]
    for name, process in processes.items():
        source, origin = KernelSource(workload, target, seed=options.seed), ""
        try:
            if name == OURS:
                if not kernels.has_template(workload):
                    yield from untimed(name, Outcome.UNAVAILABLE, f"no template schedules {workload}")
                    continue
                library, manifest = kernels.library(workload)
                source = dataclasses.replace(source, library=str(library), template=manifest["template"])
                origin = manifest["source"]
            kept = str(Path(scratch) / "ours.npy") if options.whole else ""
            outputs, prepared = process.call(
                "attntune.engines.kernel_engines:prepare",
                source,
                options.caches,
                places,
                kept if name == OURS else "",
                timeout_secs=options.timeout_secs,
            )
            apart = None
            if kept and name != OURS and OURS in right:
                difference = "attntune.engines.kernel_engines:difference"
                apart = process.call(difference, kept, timeout_secs=options.timeout_secs)
        except AttntuneError as error:
            yield from untimed(name, Outcome.FAILED, str(error))
            continue
        error_ = max(_error(outputs[cache], expected) for cache in options.caches)
        if not error_ <= limit:
            message = f"expected an error of at most {limit:g} of the largest value, got {error_:.3g}"
            yield from untimed(name, Outcome.WRONG_RESULT, message, error_)
            continue
        right[name] = _Right(error_, prepared, origin, apart)
    # Each may be off the truth by the limit, so that much more between them.
    others = {name: each.apart for name, each in right.items() if each.apart is not None}
    if others and not any(apart <= 2 * limit for apart in others.values()):
        name = min(others, key=lambda name: others[name])
        message = f"the whole output differs by {others[name]:.3g} from {name}, expected at most {2 * limit:g}"
        yield from untimed(OURS, Outcome.WRONG_RESULT, message, right.pop(OURS).error)
    for cache in options.caches:
        rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in right}
        failed: dict[str, str] = {}
        limits: list[tuple[float, ...]] = []
        for turn in range(options.rounds):
            for name in right if turn % 2 == 0 else reversed(right):
                secs = right[name].prepared[cache].secs
                samples = max(2, min(options.max_samples, round(options.turn_secs / max(secs, 20e-6))))
                time.sleep(options.pause_secs)
                if name == OURS:
                    limits.append(beside(workload, cache))
                    time.sleep(options.pause_secs)
                try:
                    if name not in failed:
                        rounds[name].append(tuple(processes[name].call(
                            "attntune.engines.kernel_engines:turn", cache, options.warmup, samples, secs,
                            timeout_secs=options.timeout_secs,
                        )))  # fmt: skip
                except AttntuneError as error:
                    failed[name] = str(error)
        for name, each in right.items():
            outcome = Outcome.FAILED if name in failed else Outcome.OK
            yield KernelResult(
                case.group, case.label, key, cache, name, outcome, () if name in failed else tuple(rounds[name]),
                each.error, each.origin or each.prepared[cache].way, failed.get(name, ""), each.apart,
                tuple(limits) if name == OURS and name not in failed and all(limits) else (),
            )  # fmt: skip


def _beside(
    worker: IsolatedProcess,
    target: Target,
    peaks: Mapping[str, Any],
    options: KernelOptions,
    workload: Workload,
    cache: str,
) -> tuple[float, ...]:
    """Seconds that what bounds the workload would take at what the machine does now, of several measurements.

    Empty where that is memory, but operands are in caches; or where it cannot be measured.
    """
    name, _ = bound(workload, peaks)
    if name == "memory" and cache == "hot":
        return ()
    limit, work = ("read", workload.bytes_moved()) if name == "memory" else (workload.compute_dtype, workload.flops())
    measure = "attntune.measure.peaks:rates"
    try:
        rates = worker.call(measure, target, limit, options.turn_secs, timeout_secs=options.timeout_secs)
    except AttntuneError:
        return ()
    return tuple(work / rate for rate in rates)


#: What the peaks of a suite are, for its table.
_SOURCE = "the best measurement before and after, or what was done beside the best twentieth of rounds"


def _at_best(peaks: Mapping[str, Any], before: Mapping[str, Any], results: Sequence[KernelResult]) -> Mapping[str, Any]:
    """``peaks``, or what the machine did beside the best twentieth of rounds, where that is more.

    Not the very best: of a hundred measurements one or two are of a clock that was set. ``before`` told what bounds a
    workload.
    """
    rates: dict[str, list[float]] = {}
    for result in results:
        if not result.limits:
            continue
        workload = workload_from_key(result.workload)
        memory = bound(workload, before)[0] == "memory"
        work = workload.bytes_moved() if memory else workload.flops()
        found = rates.setdefault("" if memory else workload.compute_dtype, [])
        found += [work / statistics.median(turn) for turn in result.limits]
    if not rates:
        return peaks
    often = {name: float(np.quantile(found, 0.95, method="lower")) for name, found in rates.items()}
    flops = {dtype: max(rate, often.get(dtype, 0.0)) for dtype, rate in peaks["flops_per_sec"].items()}
    read = max(peaks["read_bytes_per_sec"], often.get("", 0.0))
    return {**peaks, "flops_per_sec": flops, "read_bytes_per_sec": read, "source": _SOURCE}


def _nothing(workload: Workload, cache: str) -> tuple[float, ...]:
    """In place of :func:`_beside` where nothing is measured."""
    return ()


@dataclass(frozen=True)
class _Right:
    """An engine that is right on a case."""

    error: float
    prepared: Mapping[str, Any]
    origin: str
    apart: float | None
    """How far from attntune's whole output; None for attntune itself."""


def _error(
    outputs: Sequence[Sequence[np.ndarray]], parts: Sequence[tuple[tuple[Any, ...], tuple[np.ndarray, ...]]]
) -> float:
    """Largest error over the parts of the reference, as a share of its largest value; NaN where something is NaN."""
    worst, largest = 0.0, 0.0
    for part, (_, expected) in zip(outputs, parts, strict=True):
        for output, values in zip(part, expected, strict=True):
            found = np.asarray(output, np.float64)
            if found.shape != values.shape:
                return math.inf
            worst = float(np.maximum(worst, np.abs(found - values).max(initial=0.0)))
            largest = max(largest, float(np.abs(values).max(initial=0.0)))
    return worst / largest if largest else worst
