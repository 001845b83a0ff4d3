"""Which CUDA device this machine has, and the target that stands for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from attntune.host import physical_cores
from attntune.measure.worker import IsolatedProcess
from attntune.target import Target, cuda_target

_TIMEOUT_SECS = 120.0


def describe() -> dict[str, Any]:
    """Name, compute capability and SMs of the first CUDA device. Runs in a worker process.

    Raises:
        TargetError: there is none.
    """
    import tvm

    from attntune.measure.cuda_evaluator import start

    start(0)
    device = tvm.cuda(0)
    major, _, minor = str(device.compute_version).partition(".")
    return {
        "name": str(device.device_name or ""), "major": int(major), "minor": int(minor or 0),
        "sm_count": int(device.multi_processor_count),
    }  # fmt: skip


def detect_cuda(process: Callable[..., IsolatedProcess] = IsolatedProcess) -> tuple[Target, str]:
    """The target for this machine's first CUDA device, and the device's name.

    ``cores`` are those of the host: references are computed by all of them. ``process`` starts worker processes.

    Raises:
        TargetError: there is no device, or none that a preset is for.
    """
    with process() as worker:
        found = worker.call("attntune.measure.cuda_device:describe", timeout_secs=_TIMEOUT_SECS)
    target = cuda_target(found["major"], found["minor"], found["sm_count"])
    return dataclasses.replace(target, cores=physical_cores(), logical_cores=physical_cores()), found["name"]
