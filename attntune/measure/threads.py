"""TVM's runtime without its compiler, with every thread of a kernel on a core of its own.

TVM pins its pool's workers by CPU number and leaves the calling thread, which computes too, wherever the system puts
it, often beside a worker. Here TVM's own pinning is off (``TVM_BIND_THREADS=0`` in ``POOL_ENV``) and each thread,
the caller included, gets one of the CPUs this process may use, distinct physical cores first.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from attntune.errors import WorkerError
from attntune.target import available_cpus

POOL_ENV = {"TVM_BIND_THREADS": "0", "OPENBLAS_THREAD_TIMEOUT": "10"}
"""Environment of a process that calls :func:`pin_pool`; idle BLAS threads must not spin beside a timed kernel."""


@cache
def load_runtime() -> Any:
    """The ``tvm_ffi`` module, with libtvm_runtime loaded and neither the TVM compiler nor torch imported."""
    spec = importlib.util.find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        raise WorkerError("expected apache-tvm to be installed, found no package 'tvm'")
    lib = Path(next(iter(spec.submodule_search_locations))) / "lib"
    without_torch = "torch" not in sys.modules
    if without_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]  # tvm_ffi imports torch where it can: 1.4 s
    try:
        import tvm_ffi
        from tvm_ffi.libinfo import load_lib_ctypes
    finally:
        if without_torch:
            del sys.modules["torch"]
    load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=[lib])
    return tvm_ffi


def pin_pool(cores: int) -> bool:
    """Start this thread's pool of ``cores`` threads, itself one of them, and pin each to its own CPU.

    Returns whether it pinned: not when there are fewer CPUs than threads, nor where the system has no such call.
    """
    runtime = load_runtime()
    before = _threads()
    runtime.get_global_func("runtime.config_threadpool")(1, cores)
    started = sorted(_threads() - before)
    cpus = available_cpus()
    if cores > len(cpus) or not hasattr(os, "sched_setaffinity") or len(started) != cores - 1:
        return False
    for thread, cpu in zip((0, *started), cpus, strict=False):
        os.sched_setaffinity(thread, {cpu})
    return True


def _threads() -> set[int]:
    try:
        return {int(name) for name in os.listdir("/proc/self/task")}
    except OSError:
        return set()
