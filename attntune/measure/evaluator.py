"""Correct before fast: a built kernel is checked against its reference, then timed. Runs in a worker process.

The process only runs kernels: it loads libtvm_runtime, not the compiler.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np

from attntune.database.record import Status
from attntune.host import available_cpus
from attntune.measure.buffers import GuardedArray, as_tensor, numpy_dtype
from attntune.measure.threads import load_runtime, pin_pool
from attntune.measure.trial import MeasureOptions, Trial
from attntune.ops.workload import TensorSpec
from attntune.target import Target

HOPELESS = 3.0
"""A kernel this many times slower than the best known keeps the two calls that showed it as its samples."""
BEHIND = 1.3
"""One this many times slower is given three samples instead of all."""
_MIN_L3_BYTES = 32 * 1024**2
#: Weights and caches smaller than this stay in a core's own caches from one layer to the next.
_SMALL_BYTES = 64 * 1024

_cpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What running a built trial showed."""

    status: Status
    run_secs: tuple[float, ...] = ()
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    """Largest absolute error over the largest absolute value of the reference."""
    message: str = ""
    tainted: bool = False
    """The kernel wrote where it must not; the process should be replaced."""


def start(cores: int) -> None:
    """Once in a process, before any kernel runs: load the runtime and pin its pool of ``cores`` threads."""
    global _cpus
    _cpus = available_cpus()
    load_runtime()
    pin_pool(cores)


class KeptOperands:
    """Base of what trials of one workload, target, template and seed share; a process keeps the last few."""

    kept: ClassVar[int]
    """So many."""
    _made: ClassVar[OrderedDict[tuple[type, str, str, str, int], Any]] = OrderedDict()

    def __init__(self, trial: Trial) -> None:
        raise NotImplementedError

    @classmethod
    def of(cls, trial: Trial) -> Self:
        """The operands of ``trial``, kept from an earlier trial where they are the same."""
        key = (cls, trial.workload.key(), trial.target.key(), trial.template, trial.seed)
        if key not in cls._made:
            while len(cls._made) >= cls.kept:
                cls._made.popitem(last=False)
            cls._made[key] = cls(trial)
        cls._made.move_to_end(key)
        found: Self = cls._made[key]
        return found

    @classmethod
    def forget(cls) -> None:
        """Keep none: a kernel may have damaged them."""
        cls._made.clear()


class Operands(KeptOperands):
    """Inputs (packed), outputs and float64 reference of one workload, template and seed."""

    kept = 32

    def __init__(self, trial: Trial, *, reference: bool = True) -> None:
        from attntune.templates import load_template

        workload = trial.workload
        inputs = workload.example_inputs(trial.seed)
        self.specs: tuple[TensorSpec, ...] = workload.outputs()
        expected = workload.reference(*inputs) if reference else ()
        self.expected = [np.asarray(values, np.float64) for values in expected]
        packings = load_template(trial.template).pack(workload, trial.target)
        self.names = [spec.name for spec in workload.inputs()]
        self.inputs = [
            GuardedArray.holding(np.ascontiguousarray(packings[name].apply(values) if name in packings else values))
            for name, values in zip(self.names, inputs, strict=True)
        ]
        self.fresh = [GuardedArray(spec.shape, numpy_dtype(spec.dtype)) for spec in workload.fresh()]
        self.updated = [self.inputs[self.names.index(name)] for name in workload.updated]
        self.outputs = [*self.fresh, *self.updated]
        self.tensors = [as_tensor(operand.array) for operand in (*self.inputs, *self.fresh)]
        own = [i for i, spec in enumerate(workload.inputs()) if spec.constant or spec.name in workload.resident]
        self.rotation = self._rotation(own, max(trial.target.l3_bytes, _MIN_L3_BYTES))

    def _rotation(self, own: Sequence[int], cache_bytes: int) -> list[list[Any]]:
        """The tensors once for each copy of a layer's ``own``, of which there are enough to overflow the last cache.

        In a model the same kernel meets other weights, keys and values at each layer; timed on one copy, it would find
        them in cache.
        """
        size = sum(self.inputs[i].array.nbytes for i in own)
        copies = math.ceil(cache_bytes / size) if size >= _SMALL_BYTES else 1
        rotation = [self.tensors]
        for _ in range(copies - 1):
            tensors = list(self.tensors)
            for i in own:
                copy = GuardedArray.holding(self.inputs[i].array)
                tensors[i] = as_tensor(copy.array)
            rotation.append(tensors)
        return rotation

    def turns(self, function: Any) -> Callable[[], Any]:
        """A call of ``function`` on the next copy of what a layer has of its own each time."""
        calls = itertools.cycle([partial(function, *tensors) for tensors in self.rotation])
        return lambda: next(calls)()

    def poison(self) -> None:
        """Fill the outputs with NaN, so that one left unwritten shows; what is updated in place starts afresh."""
        for output in self.fresh:
            output.poison()
        for operand in self.updated:
            operand.restore()

    def misdeeds(self) -> str:
        """Which operand was written to that must not be; empty when none."""
        names = [*self.names, *(spec.name for spec in self.specs)]
        for name, operand in zip(names, (*self.inputs, *self.outputs), strict=True):
            if not operand.guards_intact():
                return f"wrote outside the bounds of {name!r}"
        for name, operand in zip(self.names, self.inputs, strict=True):
            if operand not in self.updated and not operand.is_unchanged():
                return f"changed its input {name!r}"
        return ""

    def compare(self, rtol: float, atol: float) -> tuple[float, float, str]:
        """Largest absolute and relative error, and what is wrong (empty when nothing is)."""
        worst, worst_relative, problem = 0.0, 0.0, ""
        for spec, output, expected in zip(self.specs, self.outputs, self.expected, strict=True):
            absolute, relative, found = mismatch(spec.name, output.array, expected, rtol, atol)
            worst, worst_relative = max(worst, absolute), max(worst_relative, relative)
            problem = problem or found
        return worst, worst_relative, problem


def mismatch(name: str, actual: np.ndarray, expected: np.ndarray, rtol: float, atol: float) -> tuple[float, float, str]:
    """Largest absolute error, the same relative to the largest expected value, and a description of what is wrong.

    Right is ``|actual - expected| <= atol + rtol * |expected|`` for every element, in float64; NaN is wrong.
    """
    values = actual.astype(np.float64)
    if values.shape != expected.shape:
        return np.inf, np.inf, f"output {name!r}: expected shape {expected.shape}, got {values.shape}"
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(values == expected, 0.0, np.abs(values - expected))
        bad = (values != expected) & ~(error <= atol + rtol * np.abs(expected))
    absolute = float(np.nan_to_num(error, nan=np.inf).max(initial=0.0))
    scale = float(np.abs(expected).max(initial=0.0))
    relative = absolute / scale if scale > 0 else absolute
    if not bad.any():
        return absolute, relative, ""
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    return absolute, relative, (
        f"output {name!r}{list(at)}: expected {expected[at]:.9g}, got {values[at]:.9g}; {int(bad.sum())} of {bad.size} "
        f"elements break |error| <= {atol:.3g} + {rtol:.3g} * |expected|"
    )  # fmt: skip


def evaluate(trial: Trial, so_path: str, options: MeasureOptions, best_secs: float | None = None) -> Evaluation:
    """Check the shared object built for ``trial`` and, if it is right, time it.

    Args:
        trial: what was built.
        so_path: the shared object, with ``main(*inputs, *outputs)``.
        options: how to time.
        best_secs: seconds per call of the best kernel known for this workload; far slower ones are timed briefly.
    """
    operands = Operands.of(trial)
    function = load_runtime().load_module(so_path).get_function("main")
    checked = _check(trial, operands, partial(function, *operands.tensors))
    if checked.status is not Status.CORRECT:
        return checked
    samples = _time(operands.turns(function), options, trial, best_secs)
    after = _verify(trial, operands)
    return _timed(checked, samples) if after.status is Status.CORRECT else after


def check(trial: Trial, so_path: str) -> Evaluation:
    """Run the shared object built for ``trial`` once; nothing is timed.

    What it writes is compared with the reference, of which long attention takes a sample; all of it must be finite.
    """
    operands = Operands(trial, reference=False)
    operands.poison()
    load_runtime().load_module(so_path).get_function("main")(*operands.tensors)
    rtol, atol = trial.workload.tolerance()
    worst, worst_relative, problem = 0.0, 0.0, operands.misdeeds()
    for name, output in zip((spec.name for spec in operands.specs), operands.outputs, strict=True):
        if not np.isfinite(output.array.astype(np.float32)).all():
            problem = problem or f"output {name!r} holds values that are not finite"
    for places, expected in trial.workload.reference_sample(*trial.workload.example_inputs(trial.seed)):
        for spec, output, place, values in zip(operands.specs, operands.outputs, places, expected, strict=True):
            absolute, relative, found = mismatch(f"{spec.name}{place}", output.array[place], values, rtol, atol)
            worst, worst_relative = max(worst, absolute), max(worst_relative, relative)
            problem = problem or found
    return Evaluation(Status.WRONG_RESULT if problem else Status.CORRECT, (), worst, worst_relative, problem)


def race(
    trials: Sequence[Trial], so_paths: Sequence[str], rounds: int, options: MeasureOptions
) -> list[Evaluation | None]:
    """Check built trials, then time the right ones in turns, one sample each a round, every second round backwards.

    A trial that wrote where it must not ends the race: the others, whose operands it may have spoilt, get None.
    """
    operands = [Operands.of(trial) for trial in trials]
    load = load_runtime().load_module
    modules = [load(path) for path in so_paths]
    functions = [module.get_function("main") for module in modules]
    calls = [partial(f, *o.tensors) for f, o in zip(functions, operands, strict=True)]
    results: list[Evaluation | None] = [None] * len(trials)
    running: dict[int, Evaluation] = {}
    for i, each in enumerate(zip(trials, operands, calls, strict=True)):
        checked = results[i] = _check(*each)
        if checked.tainted:
            return [None] * i + [checked] + [None] * (len(trials) - i - 1)
        if checked.status is Status.CORRECT:
            running[i] = checked
    samplers = {i: _sampler(operands[i].turns(functions[i]), options, trials[i]) for i in running}
    samples: dict[int, list[float]] = {i: [] for i in running}
    for turn in range(rounds):
        for i in running if turn % 2 == 0 else reversed(running):
            samples[i].append(samplers[i]())
    for i, checked in running.items():
        after = _check(trials[i], operands[i], calls[i])
        results[i] = _timed(checked, samples[i]) if after.status is Status.CORRECT else after
    return results


def _check(trial: Trial, operands: Operands, call: Callable[[], Any]) -> Evaluation:
    operands.poison()
    call()
    return _verify(trial, operands)


def _verify(trial: Trial, operands: Operands) -> Evaluation:
    rtol, atol = trial.workload.tolerance()
    absolute, relative, problem = operands.compare(rtol, atol)
    misdeed = operands.misdeeds()
    if misdeed or problem:
        message = "; ".join(filter(None, (misdeed, problem)))
        if misdeed:
            Operands.forget()
        return Evaluation(Status.WRONG_RESULT, (), absolute, relative, message, bool(misdeed))
    return Evaluation(Status.CORRECT, (), absolute, relative)


def _timed(checked: Evaluation, samples: Sequence[float]) -> Evaluation:
    return Evaluation(Status.CORRECT, tuple(samples), checked.max_abs_error, checked.max_rel_error)


def _time(call: Callable[[], Any], options: MeasureOptions, trial: Trial, best_secs: float | None) -> list[float]:
    """Samples in seconds per call."""
    if best_secs is not None:
        quick = [_batch(call, 1), _batch(call, 1)]
        if min(quick) > HOPELESS * best_secs:
            return quick
    sample = _sampler(call, options, trial)
    samples: list[float] = []
    while len(samples) < options.samples:
        samples.append(sample())
        if best_secs is not None and len(samples) == 3 and min(samples) > BEHIND * best_secs:
            break
    return samples


def _sampler(call: Callable[[], Any], options: MeasureOptions, trial: Trial) -> Callable[[], float]:
    """Warm up; then what takes one sample each time it is called."""
    warm: list[float] = []
    start = time.perf_counter()
    while not warm or time.perf_counter() - start < options.warmup_secs:
        warm.append(_batch(call, 1))
    if options.cache == "cold":
        flush = _cache_flusher(trial.target)

        def cold() -> float:
            flush()
            return _batch(call, 1)

        return cold
    number = max(1, round(options.min_sample_secs / max(statistics.median(warm), 1e-7)))
    return partial(_batch, call, number)


def _batch(call: Callable[[], Any], number: int) -> float:
    """Mean seconds of ``number`` calls in a row."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in itertools.repeat(None, number):
            call()
        return (time.perf_counter() - start) / number
    finally:
        if collecting:
            gc.enable()


def _cache_flusher(target: Target) -> Callable[[], None]:
    """What evicts every cache: streams over twice the L3 here, and over four L2s on each other CPU."""
    large = np.ones(2 * max(target.l3_bytes, 8 * target.l2_bytes, _MIN_L3_BYTES) // 8)
    small = large[: 4 * target.l2_bytes // 8]

    def flush() -> None:
        if hasattr(os, "sched_setaffinity"):
            home = os.sched_getaffinity(0)
            for cpu in _cpus:
                if cpu not in home:
                    os.sched_setaffinity(0, {cpu})
                    small.sum()
            os.sched_setaffinity(0, home)
        np.add(large, 1.0, out=large)

    return flush
