"""TVM's runtime without its compiler, with every thread of a kernel on a core of its own.

TVM uses half the logical CPUs unless told otherwise, and leaves the calling thread, which computes too, wherever the
system puts it: beside a worker, that halves the speed of a two-core machine. Here each thread, the caller included,
gets one of the CPUs this process may use, distinct physical cores first.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from attntune.errors import AttntuneError
from attntune.host import available_cpus

POOL_ENV = {"OPENBLAS_THREAD_TIMEOUT": "10"}
"""Environment of a process that calls :func:`pin_pool`; idle BLAS threads must not spin beside a timed kernel."""


#: How often a worker looks for work before it sleeps, about 0.3 µs each: a millisecond, many times the gap between two
#: kernels of a model. TVM's own 300,000 keep a core busy for 100 ms after every call, and keep others from it.
_SPIN_COUNT = "3000"


@cache
def load_runtime() -> Any:
    """The ``tvm_ffi`` module, with libtvm_runtime loaded and neither the TVM compiler nor torch imported."""
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", _SPIN_COUNT)
    spec = importlib.util.find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        raise AttntuneError("expected apache-tvm to be installed, found no package 'tvm'")
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
    """Give this thread a pool of ``cores`` threads, itself one of them, each on a CPU of its own.

    Returns whether it pinned: not when there are fewer CPUs than threads, nor where the system has no such call.
    """
    configure = load_runtime().get_global_func("runtime.config_threadpool")
    cpus = available_cpus()
    if cores > len(cpus) or not hasattr(os, "sched_setaffinity"):
        configure(1, cores)
        return False
    # -2: worker i on the i-th CPU given. The caller counts as the first but is left where it is.
    configure(-2, cores, [str(cpu) for cpu in cpus[:cores]])
    os.sched_setaffinity(0, {cpus[0]})
    return True
