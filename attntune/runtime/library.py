"""The thread that runs kernels, and tensors over other libraries' memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from attntune.measure.threads import load_runtime, pin_pool

T = TypeVar("T")

# With torch installed, tvm_ffi otherwise compiles an extension at first import, for half a minute.
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")


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
            pin_pool(cores)
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
