"""The machine that measures: its state, for records, and its measured peaks, for percentages."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from attntune.errors import TargetError
from attntune.host import host_features, host_triple, user_cache_dir
from attntune.measure.worker import IsolatedProcess
from attntune.target import Target

_PEAKS_VERSION = 5
_PEAKS_TIMEOUT_SECS = 120.0
#: What a record says of a GPU: our name, nvidia-smi's.
_GPU_FIELDS = {
    "name": "name", "driver": "driver_version", "sm_clock_mhz": "clocks.sm", "memory_clock_mhz": "clocks.mem",
    "max_sm_clock_mhz": "clocks.max.sm", "power_watts": "power.draw", "power_limit_watts": "power.limit",
    "temperature_celsius": "temperature.gpu",
}  # fmt: skip


def machine_state(target: Target) -> dict[str, Any]:
    """What a record says of the machine, now.

    ``cpu_model``, ``cores`` (used by the kernel), ``logical_cores``, ``load_average`` (1 minute), ``governor``,
    ``versions`` of attntune, tvm and llvm, and the ``target`` with all its limits; for CUDA also :func:`gpu_state`.
    """
    gpu = {"gpu": gpu_state()} if target.kind == "cuda" else {}
    return {
        **gpu,
        "cpu_model": cpu_model(),
        "cores": target.cores,
        "logical_cores": os.cpu_count() or 1,
        "load_average": round(os.getloadavg()[0], 2),
        "governor": _governor(),
        "versions": dict(versions()),
        "target": target.to_json(),
    }


def gpu_state() -> dict[str, str]:
    """Of the first GPU, now: name, driver, clocks in MHz, power in W, temperature in °C; empty without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(_GPU_FIELDS.values())}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = ended.stdout.strip().split(", ")
    return dict(zip(_GPU_FIELDS, values, strict=True)) if len(values) == len(_GPU_FIELDS) else {}


@cache
def cpu_model() -> str:
    """The CPU's name as its maker gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split(":")[0].strip() == "model name":
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _governor() -> str:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return "unknown"


@cache
def versions() -> Mapping[str, str]:
    """Versions of attntune, apache-tvm and the LLVM inside it; empty where there is none."""
    from attntune import __version__

    try:
        tvm_version = metadata.version("apache-tvm")
    except metadata.PackageNotFoundError:
        tvm_version = ""
    try:
        import tvm

        llvm = str(tvm.get_global_func("target.llvm_version_major")())
    except Exception:  # a runtime-only TVM has no LLVM
        llvm = ""
    return {"attntune": __version__, "tvm": tvm_version, "llvm": llvm}


def require_host(target: Target) -> None:
    """Raise :class:`TargetError` unless kernels for ``target`` can run on this machine."""
    if target.kind != "cpu":
        raise TargetError(f"expected a CPU target to run here, got {target.key()}")
    ours, theirs = host_triple().split("-")[0], target.triple.split("-")[0]
    if ours != theirs:
        raise TargetError(f"target {target.key()} is for {theirs}; this machine is {ours}")
    if missing := set(target.features) - set(host_features()):
        raise TargetError(
            f"target {target.key()} needs {sorted(missing)}, which this CPU ({cpu_model()}) lacks; "
            "expected a target such as 'native'"
        )


def measure_peaks(target: Target) -> dict[str, Any]:
    """Measured limits of this machine with ``target.cores`` threads; takes some seconds.

    Returns:
        ``flops_per_sec``: dtype to operations per second of independent multiply-adds held in registers (a fused
        multiply-add is two): float32, and bfloat16 and int8 where the ISA multiplies them. ``read_bytes_per_sec``:
        summing a buffer of more than four L3. ``copy_bytes_per_sec``: copying one, bytes read plus bytes written.

    Raises:
        TargetError: the target is not this machine.
    """
    require_host(target)
    from attntune.measure.threads import POOL_ENV

    preload = ("attntune.measure.threads:pin_pool", target.cores)
    with IsolatedProcess(threads=target.cores, env=POOL_ENV, preload=(preload,)) as process:
        peaks = process.call("attntune.measure.peaks:measure", target, timeout_secs=_PEAKS_TIMEOUT_SECS)
    return dict(peaks)


def better_peaks(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The higher of each limit in two results of :func:`measure_peaks`: a peak is what an undisturbed machine does."""
    return {
        key: {k: max(v, b[key][k]) for k, v in value.items()} if isinstance(value, Mapping) else max(value, b[key])
        for key, value in a.items()
    }


def cached_peaks(target: Target, *, measure: bool = True, refresh: bool = False) -> dict[str, Any] | None:
    """:func:`measure_peaks`, remembered in the user's cache directory by CPU model, architecture and cores.

    Args:
        target: this machine.
        measure: measure when nothing is remembered; otherwise None is returned then.
        refresh: measure in any case and remember the result.
    """
    path = user_cache_dir() / "peaks.json"
    key = "|".join((str(_PEAKS_VERSION), cpu_model(), target.key(), *target.features))
    known = _read_cache(path)
    if key in known and not refresh:
        return dict(known[key])
    if not measure and not refresh:
        return None
    peaks = measure_peaks(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"peaks.{os.getpid()}.tmp")
        scratch.write_text(json.dumps({**_read_cache(path), key: peaks}, indent=2, sort_keys=True))
        scratch.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs seconds, no more
    return peaks


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
