"""A child process that may segfault, hang or run out of memory without harming its parent.

Each child is ``python -m attntune.measure.worker_child``, started afresh rather than forked or spawned by
``multiprocessing``, so that user scripts need no ``if __name__ == "__main__"`` guard. Requests and replies are
length-prefixed pickles over two pipes of their own; what the child prints goes to a file whose end is attached to
failures.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import queue
import select
import signal
import site
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from attntune.errors import WorkerError
from attntune.measure.worker_child import HEADER_BYTES

_START_TIMEOUT_SECS = 120.0
_TAIL_BYTES = 4000


class WorkerDied(WorkerError):  # noqa: N818 (says what happened)
    """The child ended while it held a call: ``exit_code`` is negative for a signal, as in ``subprocess``."""

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class WorkerTimeout(WorkerError):  # noqa: N818 (says what happened)
    """The call exceeded its time and the child was killed."""


class RemoteError(WorkerError):
    """The called function raised; ``exception_type`` and ``remote_traceback`` say what and where."""

    def __init__(self, exception_type: str, message: str, remote_traceback: str = "") -> None:
        super().__init__(f"{exception_type}: {message}")
        self.exception_type = exception_type
        self.remote_traceback = remote_traceback


class IsolatedProcess:
    """Calls functions by name in a child process, which is restarted by the next call after it died.

    Args:
        threads: cores the child may compute on; sets the thread counts of TVM, OpenMP, OpenBLAS and MKL.
        env: further environment variables of the child.
        memory_limit_bytes: its address space (``RLIMIT_AS``); None for no limit.
        plugin_paths: directories put in front of its ``sys.path``.
        preload: calls, as ``("module:function", *arguments)``, made when it starts, so that later ones need not wait.

    The child ends with its parent, even when the parent is killed and the child hangs in native code (Linux). Calls
    from several threads take turns.
    """

    def __init__(
        self,
        *,
        threads: int | None = None,
        env: Mapping[str, str] | None = None,
        memory_limit_bytes: int | None = None,
        plugin_paths: Sequence[str] = (),
        preload: Sequence[tuple[Any, ...]] = (),
    ) -> None:
        self._env = _child_environment(threads, env or {})
        self._setup = {
            "memory_limit_bytes": memory_limit_bytes,
            "plugin_paths": [str(path) for path in plugin_paths],
            "preload": list(preload),
        }
        self._lock = threading.Lock()
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the running child, None when there is none."""
        child = self._child
        return child.process.pid if child is not None else None

    def start(self) -> None:
        """Start the child now, if there is none; returns at once, while the child preloads."""
        with self._lock:
            self._ensure()

    def call(self, function: str, *args: Any, timeout_secs: float | None = None, **kwargs: Any) -> Any:
        """Result of ``function`` (``"module:name"``) in the child.

        Starting and preloading do not count towards ``timeout_secs``. Arguments and result are pickled.

        Raises:
            WorkerDied: the child ended (crash, ``exit``, abort); the message holds the end of what it printed.
            WorkerTimeout: no answer in time; the child was killed.
            RemoteError: the function raised, or its result cannot be pickled. attntune's own errors come as themselves.
        """
        with self._lock:
            child = self._ensure()
            try:
                child.wait_ready(time.monotonic() + _START_TIMEOUT_SECS)
                child.forget_output()
                child.send((function, args, kwargs), _deadline(timeout_secs))
                answer = child.receive(_deadline(timeout_secs))
            except TimeoutError:
                self._drop()
                raise WorkerTimeout(f"{function} gave no answer in {timeout_secs or _START_TIMEOUT_SECS:g} s") from None
            except (EOFError, OSError):
                code, output = child.post_mortem()
                self._drop()
                raise WorkerDied(_obituary(function, code, output), code) from None
            except BaseException:
                self._drop()
                raise
            return self._unwrap(answer)

    def _unwrap(self, answer: tuple[Any, ...]) -> Any:
        kind, *rest = answer
        if kind == "ok":
            return rest[0]
        if kind == "raised":
            raise rest[0]
        exception_type, message, trace = rest
        if exception_type == "MemoryError":
            self._drop()  # what is left of its heap is not to be trusted
        raise RemoteError(exception_type, message, trace)

    def kill(self) -> None:
        """End the child at once; safe from another thread, whose call then raises :class:`WorkerDied`."""
        child = self._child
        if child is not None:
            child.kill()

    def close(self) -> None:
        """End the child and wait for it."""
        self.kill()
        with self._lock:
            self._drop()

    def __enter__(self) -> IsolatedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ensure(self) -> _Child:
        if self._child is not None and self._child.process.poll() is not None:
            self._drop()
        if self._child is None:
            self._child = _Child(self._env, self._setup)
            weakref.finalize(self, _Child.bury, self._child)
        return self._child

    def _drop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.bury()


class _Child:
    """One running process with its pipes and its output file."""

    def __init__(self, env: Mapping[str, str], setup: Mapping[str, Any]) -> None:
        request_read, self._request = os.pipe()
        self._reply, reply_write = os.pipe()
        self._output: BinaryIO = tempfile.TemporaryFile("ab", buffering=0)  # noqa: SIM115 (closed by bury)
        self._ready = False
        self._buried = False
        self._burying = threading.Lock()
        try:
            self.process = _spawn(
                [sys.executable, "-P", "-m", "attntune.measure.worker_child", str(request_read), str(reply_write)],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(request_read, reply_write),
                env=dict(env),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._request)
            os.close(self._reply)
            self._output.close()
            raise
        finally:
            os.close(request_read)
            os.close(reply_write)
        os.set_blocking(self._request, False)
        with contextlib.suppress(OSError):
            self.send({**setup, "parent": os.getpid()}, _deadline(None))

    def wait_ready(self, deadline: float) -> None:
        if self._ready:
            return
        kind, *rest = self.receive(deadline)
        if kind == "raised":
            raise WorkerError(f"worker could not start: {type(rest[0]).__name__}: {rest[0]}")
        if kind != "ok":
            raise WorkerError(f"worker could not start: {rest[0]}: {rest[1]}\n{rest[2]}")
        self._ready = True

    def send(self, message: object, deadline: float) -> None:
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        for part in (len(body).to_bytes(HEADER_BYTES, "little"), body):
            view = memoryview(part)
            while view:
                _wait(self._request, select.POLLOUT, deadline)
                view = view[os.write(self._request, view) :]

    def receive(self, deadline: float) -> Any:
        size = int.from_bytes(self._read(HEADER_BYTES, deadline), "little")
        return pickle.loads(self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytearray:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            _wait(self._reply, select.POLLIN, deadline)
            count = os.readv(self._reply, [view])
            if count == 0:
                raise EOFError
            view = view[count:]
        return buffer

    def forget_output(self) -> None:
        os.ftruncate(self._output.fileno(), 0)

    def post_mortem(self) -> tuple[int | None, str]:
        """Exit code (negative: a signal) and the end of what the child printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        code = self.process.returncode
        try:
            size = os.fstat(self._output.fileno()).st_size
            path = f"/proc/self/fd/{self._output.fileno()}"
            with open(path, "rb") as output:
                output.seek(max(0, size - _TAIL_BYTES))
                return code, output.read().decode(errors="replace").strip()
        except (OSError, ValueError):
            return code, ""

    def kill(self) -> None:
        if self.process.poll() is None:
            # Workers of its own may have left its process group, as TVM's do; they would poll for ever.
            offspring = []
            with contextlib.suppress(psutil.Error):
                offspring = psutil.Process(self.process.pid).children(recursive=True)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            for process in offspring:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def bury(self) -> None:
        """Kill, reap and close everything; may be called twice."""
        with self._burying:
            if self._buried:
                return
            self._buried = True
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        for fd in (self._request, self._reply):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._output.close()


def _child_environment(threads: int | None, extra: Mapping[str, str]) -> dict[str, str]:
    env = dict(os.environ)
    env["TVM_FFI_DISABLE_TORCH_C_DLPACK"] = "1"
    env["PYTHONUNBUFFERED"] = "1"
    if threads is not None:
        for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            env[name] = str(threads)
    # An installed package is found anyway; a checkout must be named, without shadowing the standard library.
    root = str(Path(__file__).resolve().parents[2])
    if root not in {str(Path(path).resolve()) for path in site.getsitepackages()}:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH", ""))))
    env.update(extra)
    return env


def _deadline(timeout_secs: float | None) -> float:
    return math.inf if timeout_secs is None else time.monotonic() + timeout_secs


def _wait(fd: int, event: int, deadline: float) -> None:
    """Return when ``fd`` is ready for ``event`` or its other end is closed; TimeoutError at ``deadline``."""
    poll = select.poll()
    poll.register(fd, event)
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if poll.poll(min(left, 3600.0) * 1000):
            return


def _obituary(function: str, code: int | None, output: str) -> str:
    if code is not None and code < 0:
        try:
            cause = f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            cause = f"was killed by signal {-code}"
    elif code is None:
        cause = "closed its pipe"
    else:
        cause = f"exited with code {code}"
    return f"worker {cause} in {function}" + (f"; it printed:\n{output}" if output else "")


# Linux kills the child when the *thread* that started it ends, so all children are started from one thread that
# lives as long as the interpreter.
_spawn_requests: queue.SimpleQueue[tuple[Callable[[], subprocess.Popen[bytes]], queue.SimpleQueue[Any]]]
_spawner_pid = 0
_spawner_lock = threading.Lock()


def _spawn(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    global _spawn_requests, _spawner_pid
    with _spawner_lock:
        if _spawner_pid != os.getpid():
            _spawn_requests = queue.SimpleQueue()
            threading.Thread(target=_spawner, args=(_spawn_requests,), name="attntune-spawner", daemon=True).start()
            _spawner_pid = os.getpid()
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
    _spawn_requests.put((lambda: subprocess.Popen(command, **options), answer))
    result = answer.get()
    if isinstance(result, BaseException):
        raise WorkerError(f"cannot start a worker process: {result}") from result
    return result  # type: ignore[no-any-return]


def _spawner(requests: queue.SimpleQueue[Any]) -> None:
    while True:
        start, answer = requests.get()
        try:
            answer.put(start())
        except Exception as error:
            answer.put(error)
