"""The child's side of :mod:`attntune.measure.worker`: set up as the parent says, then answer calls by name.

Run as ``python -m attntune.measure.worker_child REQUEST_FD REPLY_FD``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from attntune.errors import AttntuneError

HEADER_BYTES = 8
"""Each message is so many bytes of its length, little-endian, then a pickle."""
_PR_SET_PDEATHSIG = 1


def resolve(name: str) -> Any:
    """The object that ``"module:qualified.name"`` names."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _serve(request_fd: int, reply_fd: int) -> None:
    """The child's life: set up, then answer calls until the parent closes the pipe."""
    for fd in (request_fd, reply_fd):
        os.set_inheritable(fd, False)
    requests, replies = open(request_fd, "rb"), open(reply_fd, "wb")  # noqa: SIM115 (open until the process ends)
    setup = _receive(requests)
    _die_with(setup["parent"])
    _limit(setup["memory_limit_bytes"])
    sys.path[:0] = setup["plugin_paths"]

    def preload() -> None:
        for name, *arguments in setup["preload"]:
            resolve(name)(*arguments)

    _reply(replies, _answer(preload))
    while True:
        try:
            function, args, kwargs = _receive(requests)
        except EOFError:
            os._exit(0)
        except Exception as error:
            _reply(replies, _failure(error))
            continue
        _reply(replies, _answer(partial(_call, function, args, kwargs)))


def _call(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return resolve(function)(*args, **kwargs)


def _receive(stream: BinaryIO) -> Any:
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise EOFError
    return pickle.loads(stream.read(int.from_bytes(header, "little")))


def _answer(work: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps(("ok", work()), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> bytes:
    if isinstance(error, AttntuneError):
        with contextlib.suppress(Exception):
            body = pickle.dumps(("raised", error))
            pickle.loads(body)
            return body
    trace = "".join(traceback.format_exception(error))
    return pickle.dumps(("error", type(error).__name__, str(error), trace))


def _reply(stream: BinaryIO, body: bytes) -> None:
    try:
        stream.write(len(body).to_bytes(HEADER_BYTES, "little"))
        stream.write(body)
        stream.flush()
    except BrokenPipeError:
        os._exit(0)


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, whatever this process is doing then."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _limit(memory_limit_bytes: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_limit_bytes is not None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = memory_limit_bytes if hard == resource.RLIM_INFINITY else min(memory_limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


if __name__ == "__main__":
    import faulthandler

    faulthandler.enable()
    _serve(int(sys.argv[1]), int(sys.argv[2]))
