"""Correct before fast, on a CUDA device: what ``evaluator.py`` is for CPUs. Runs in a worker process.

After a kernel that failed, the device refuses everything else this process asks of it: such an evaluation is tainted,
and its process is replaced.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from attntune.database.record import Status
from attntune.errors import TargetError
from attntune.measure.buffers import numpy_dtype
from attntune.measure.evaluator import HOPELESS, Evaluation, KeptOperands, mismatch
from attntune.measure.trial import MeasureOptions, Trial


def start(_cores: int) -> None:
    """Once in a process: load TVM and its CUDA runtime.

    Raises:
        TargetError: when there is no CUDA device.
    """
    import tvm

    from attntune.templates.cuda_lowering import load_cuda_runtime

    if not load_cuda_runtime() or not tvm.cuda(0).exist:
        raise TargetError("expected a CUDA device to run kernels on, found none")


class DeviceOperands(KeptOperands):
    """Inputs (packed) and outputs of one workload on the device, and parts of its float64 reference."""

    kept = 16

    def __init__(self, trial: Trial) -> None:
        from attntune.templates import load_template

        workload = trial.workload
        inputs = workload.example_inputs(trial.seed)
        self.workload = workload
        self.parts = list(workload.reference_sample(*inputs))
        packings = load_template(trial.template).pack(workload, trial.target)
        names = [spec.name for spec in workload.inputs()]
        self.host = [
            np.ascontiguousarray(packings[name].apply(values) if name in packings else values)
            for name, values in zip(names, inputs, strict=True)
        ]
        self.inputs = [_upload(values) for values in self.host]
        self.fresh = [_upload(_poison(spec.shape, spec.dtype)) for spec in workload.fresh()]
        self.updated = [names.index(name) for name in workload.updated]
        self.tensors = [*self.inputs, *self.fresh]

    def poison(self) -> None:
        """Fill the outputs with NaN; what is updated in place starts afresh."""
        for tensor, spec in zip(self.fresh, self.workload.fresh(), strict=True):
            tensor.copyfrom(_poison(spec.shape, spec.dtype))
        for i in self.updated:
            self.inputs[i].copyfrom(self.host[i])

    def outputs(self) -> list[np.ndarray]:
        """What the kernel wrote, on the host."""
        return [tensor.numpy() for tensor in (*self.fresh, *(self.inputs[i] for i in self.updated))]

    def compare(self) -> Evaluation:
        """The outputs against the reference."""
        rtol, atol = self.workload.tolerance()
        worst, worst_relative, problem = 0.0, 0.0, ""
        outputs = self.outputs()
        for spec, output in zip(self.workload.outputs(), outputs, strict=True):
            if np.isnan(output.astype(np.float32)).any() and not self._may_be_nan():
                problem = problem or f"output {spec.name!r} holds NaN"
        for places, expected in self.parts:
            for spec, output, place, values in zip(self.workload.outputs(), outputs, places, expected, strict=True):
                part = np.asarray(values, np.float64)
                absolute, relative, found = mismatch(spec.name, output[place], part, rtol, atol)
                worst, worst_relative = max(worst, absolute), max(worst_relative, relative)
                problem = problem or found
        return Evaluation(Status.WRONG_RESULT if problem else Status.CORRECT, (), worst, worst_relative, problem)

    def _may_be_nan(self) -> bool:
        return any(np.isnan(np.asarray(values, np.float64)).any() for _, part in self.parts for values in part)


def _upload(values: np.ndarray) -> Any:
    import tvm

    return tvm.runtime.tensor(values, device=tvm.cuda(0))


def _poison(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    values = np.empty(shape, numpy_dtype(dtype))
    values.reshape(-1).view(np.uint8)[:] = 0xFF
    return values


def evaluate(trial: Trial, so_path: str, options: MeasureOptions, best_secs: float | None = None) -> Evaluation:
    """Check the shared object built for ``trial`` and, if it is right, time it; as for CPUs."""
    try:
        operands = DeviceOperands.of(trial)
        kernel = _Kernel(so_path, operands, options)
        checked = kernel.check()
        if checked.status is not Status.CORRECT:
            return checked
        estimate = kernel.estimate()
        brief = best_secs is not None and estimate > HOPELESS * best_secs
        samples = (estimate, kernel.sample()) if brief else tuple(kernel.sample() for _ in range(options.samples))
        after = operands.compare()
    except Exception as error:  # whatever it is, the device may be lost
        DeviceOperands.forget()
        return Evaluation(Status.RUN_ERROR, message=f"{type(error).__name__}: {str(error)[-500:]}", tainted=True)
    return dataclasses.replace(checked, run_secs=samples) if after.status is Status.CORRECT else after


def check(trial: Trial, so_path: str) -> Evaluation:
    """Run the shared object built for ``trial`` once; nothing is timed. What it raises ends with the process."""
    return _Kernel(so_path, DeviceOperands(trial), MeasureOptions()).check()


def race(
    trials: Sequence[Trial], so_paths: Sequence[str], rounds: int, options: MeasureOptions
) -> list[Evaluation | None]:
    """Check built trials, then time the right ones in turns, one sample each a round, every second round backwards."""
    results: list[Evaluation | None] = [None] * len(trials)
    running: dict[int, tuple[_Kernel, list[float]]] = {}
    for i, (trial, path) in enumerate(zip(trials, so_paths, strict=True)):
        try:
            kernel = _Kernel(path, DeviceOperands.of(trial), options)
            checked = results[i] = kernel.check()
            if checked.status is Status.CORRECT:
                kernel.estimate()
                running[i] = kernel, []
        except Exception as error:
            DeviceOperands.forget()
            failed = Evaluation(Status.RUN_ERROR, message=f"{type(error).__name__}: {str(error)[-500:]}", tainted=True)
            return [failed if j == i else None for j in range(len(trials))]
    for turn in range(rounds):
        for i in running if turn % 2 == 0 else reversed(running):
            kernel, samples = running[i]
            samples.append(kernel.sample())
    for i, (_, samples) in running.items():
        results[i] = dataclasses.replace(results[i], run_secs=tuple(samples))  # type: ignore[type-var]
    return results


class _Kernel:
    """A loaded kernel and the operands it is called with."""

    def __init__(self, so_path: str, operands: DeviceOperands, options: MeasureOptions) -> None:
        import tvm

        self.device = tvm.cuda(0)
        self.module = tvm.runtime.load_module(so_path)
        self.operands = operands
        self.options = options
        self.number = 1

    def check(self) -> Evaluation:
        """Run it once on poisoned outputs."""
        self.operands.poison()
        self.module.get_function("main")(*self.operands.tensors)
        self.device.sync()
        return self.operands.compare()

    def estimate(self) -> float:
        """Seconds per call after a warm-up; sets how many calls a sample averages."""
        self._timed(1)
        secs = max(self._timed(3), 1e-7)
        self.number = 1 if self.options.cache == "cold" else max(1, math.ceil(self.options.min_sample_secs / secs))
        self._timed(max(1, math.ceil(self.options.warmup_secs / secs)))
        return secs

    def sample(self) -> float:
        """Seconds per call, by the device's clock."""
        return self._timed(self.number)

    def _timed(self, number: int) -> float:
        # Twice the second-level cache of the largest GPU, written before each call that is to find it cold.
        flushed = 256 * 1024**2 if self.options.cache == "cold" else 0
        timer = self.module.time_evaluator("main", self.device, number=number, repeat=1, cache_flush_bytes=flushed)
        return float(timer(*self.operands.tensors).results[0])
