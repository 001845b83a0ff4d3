"""Load TVM's runtime library, without the compiler, and place its threads."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from attntune.errors import ArtifactError
from attntune.target import available_cpus

T = TypeVar("T")

# With torch installed, tvm_ffi otherwise compiles an extension at first import, for half a minute.
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")


@lru_cache(maxsize=1)
def load_runtime() -> Any:
    """``tvm_ffi``, with ``libtvm_runtime`` loaded; the compiler is neither needed nor loaded.

    Raises:
        ArtifactError: when the library is not installed.
    """
    try:
        import tvm_ffi
        from tvm_ffi.libinfo import load_lib_ctypes
    except ImportError:
        raise ArtifactError("running an artifact needs apache-tvm-ffi; install it with: pip install attntune") from None
    spec = importlib.util.find_spec("tvm")
    folders = [Path(spec.origin).parent / "lib"] if spec is not None and spec.origin else []
    try:
        load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=folders)
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"expected libtvm_runtime in {[str(f) for f in folders]}: {error}") from None
    return tvm_ffi


def place_threads(cores: int) -> None:
    """Give the calling thread a pool of ``cores`` threads, each on a core of its own, itself included.

    TVM uses half the logical CPUs unless told otherwise, and leaves the caller unpinned, where it may share a core with
    one of its workers: that halves the speed of a two-core machine.
    """
    tvm_ffi = load_runtime()
    cpus = available_cpus()
    cores = min(cores, len(cpus))
    spread = [str(cpu) for cpu in cpus[:cores]]
    # -2: one given core for each thread.
    tvm_ffi.get_global_func("runtime.config_threadpool")(-2, cores, spread)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cpus[0]})


class KernelThread:
    """The one thread of this process that runs kernels.

    TVM gives every calling thread a pool of its own whose workers spin; were each caller to run kernels itself, eight
    callers would mean eight pools on the same cores. All models of a process share this thread, so calls from many
    threads queue and give the same bits as calls from one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._cores = 0

    def run(self, cores: int, call: Callable[[], T]) -> T:
        """Run ``call`` with a pool of ``cores`` threads and return its result."""
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="attntune-kernels")
            future = self._executor.submit(self._with_cores, cores, call)
        return future.result()

    def _with_cores(self, cores: int, call: Callable[[], T]) -> T:
        if cores != self._cores:
            place_threads(cores)
            self._cores = cores
        return call()

    def forget(self) -> None:
        """Start afresh, as a forked child must: threads do not survive a fork."""
        self.__init__()  # type: ignore[misc]


KERNEL_THREAD = KernelThread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=KERNEL_THREAD.forget)


def device_tensors(arrays: Sequence[Any]) -> list[Any]:
    """TVM tensors over the memory of NumPy arrays or torch tensors (DLPack; no copies)."""
    tvm_ffi = load_runtime()
    return [tvm_ffi.from_dlpack(array) for array in arrays]
