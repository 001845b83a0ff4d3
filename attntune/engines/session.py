"""One engine in a worker process: functions that :mod:`attntune.engines.compare` calls there by name."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from attntune.engines import engine
from attntune.engines.engine import Engine, ModelSource
from attntune.errors import EngineError

_ESTIMATE_CALLS = 3

_engine: Engine | None = None
_calls: dict[str, Callable[[], object]] = {}
_threads = 1


def open_engine(name: str, source: ModelSource, threads: int) -> dict[str, Any]:
    """Load the model into the engine; its description."""
    global _engine, _threads
    _engine = engine(name)()
    _engine.load(source, threads)
    _calls.clear()
    _threads = threads
    return {"precision": _engine.precision, **_engine.describe()}


def outputs(key: str, inputs: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str, float]:
    """Bind inputs under ``key``; the outputs, the variant bound, and an estimate of the seconds of one call."""
    if _engine is None:
        raise EngineError("expected open_engine before outputs")
    # Bound first: the outputs that are checked then come from the configuration that is timed.
    call = _engine.bind(inputs)
    _calls[key] = call
    result = _engine.run(inputs)
    secs = []
    for _ in range(_ESTIMATE_CALLS):
        start = time.perf_counter()
        call()
        secs.append(time.perf_counter() - start)
    return result, _engine.bound_variant(), min(secs)


def turn(key: str, warmup: int, calls: int, flush_bytes: int = 0) -> list[float]:
    """Seconds of each of ``calls`` calls after ``warmup`` calls.

    With ``flush_bytes``, that much memory is streamed over before every call, which must exceed the last cache.
    """
    call = _calls[key]
    flush = _flusher(flush_bytes) if flush_bytes else None
    clock = time.perf_counter
    secs = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(warmup):
            call()
        for _ in range(calls):
            if flush is not None:
                flush()
            start = clock()
            call()
            secs.append(clock() - start)
    finally:
        if collecting:
            gc.enable()
    return secs


@cache
def _flusher(flush_bytes: int) -> Callable[[], None]:
    """Streams over its share of ``flush_bytes`` on every thread, so that each core's own caches turn over too."""
    buffers = [np.ones(flush_bytes // 8 // _threads + 1) for _ in range(_threads)]
    pool = ThreadPoolExecutor(_threads)

    def flush() -> None:
        list(pool.map(lambda buffer: np.add(buffer, 1.0, out=buffer), buffers))

    return flush
