"""The thread that runs kernels, and tensors over other libraries' memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar, cast

from attntune.measure.buffers import as_tensor
from attntune.measure.threads import pin_pool

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
        self._starting = threading.Lock()
        self._jobs: SimpleQueue[tuple[int, Callable[[], Any], list[Any], threading.Lock]] | None = None

    def run(self, cores: int, call: Callable[[], T]) -> T:
        """Run ``call`` with a pool of ``cores`` threads and return its result."""
        jobs = self._jobs or self._start()
        # A queue and a lock, not an executor: between two kernels every Python object touched is a cache miss.
        outcome: list[Any] = []
        done = threading.Lock()
        done.acquire()
        jobs.put((cores, call, outcome, done))
        done.acquire()
        result, error = outcome
        if error is not None:
            raise error
        return cast(T, result)

    def _start(self) -> SimpleQueue[tuple[int, Callable[[], Any], list[Any], threading.Lock]]:
        with self._starting:
            if self._jobs is None:
                self._jobs = SimpleQueue()
                threading.Thread(target=self._work, args=(self._jobs,), name="attntune-kernels", daemon=True).start()
            return self._jobs

    @staticmethod
    def _work(jobs: SimpleQueue[tuple[int, Callable[[], Any], list[Any], threading.Lock]]) -> None:
        placed = 0
        while True:
            cores, call, outcome, done = jobs.get()
            try:
                if cores != placed:
                    pin_pool(cores)
                    placed = cores
                outcome += call(), None
            except BaseException as error:
                outcome += None, error
            done.release()
            # What the job held must not live until the next one comes.
            del call, outcome, done

    def forget(self) -> None:
        """Start afresh, as a forked child must: threads do not survive a fork."""
        self.__init__()  # type: ignore[misc]


KERNEL_THREAD = KernelThread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=KERNEL_THREAD.forget)


def device_tensors(arrays: Sequence[Any]) -> list[Any]:
    """TVM tensors over the memory of NumPy arrays or torch tensors (DLPack; no copies)."""
    return [as_tensor(array) for array in arrays]
