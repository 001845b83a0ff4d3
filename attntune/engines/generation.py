"""Writers side by side: the same prompt continued by each in turn, tokens compared, times kept."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from attntune.engines.writers import Engine, WriterSource, Written
from attntune.errors import AttntuneError, EngineError
from attntune.measure.machine import machine_state
from attntune.measure.worker import IsolatedProcess
from attntune.target import Target

_TIMEOUT_SECS = 300.0
#: Rounds follow one another after so long, in which the threads of the writer before go to sleep.
_PAUSE_SECS = 0.3


def compare_writers(
    source: WriterSource,
    prompts: Mapping[str, Any],
    count: int,
    engines: Mapping[str, type[Engine]],
    *,
    target: Target,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Let each writer continue each prompt by ``count`` tokens, once a round, every other round in reverse order.

    Args:
        source: the model.
        prompts: by label, as the engines take them.
        count: new tokens.
        engines: by name, such as :data:`attntune.engines.writers.WRITERS`; one that is not installed, or fails, is said
            and left out.
        target: whose cores are the threads of every writer.
        rounds: how often, after one that is not kept.
        say: is told what happens.

    Returns:
        A document, JSON-ready: ``samples`` by prompt and writer, a list of rounds with ``prefill_secs`` and the median
        of ``step_secs``; ``tokens`` by prompt and writer, those of the first round; ``left_out`` by writer.

    Raises:
        EngineError: no writer is left.
    """
    left_out: dict[str, str] = {}
    state = machine_state(target)
    tokens: dict[str, dict[str, list[int]]] = {label: {} for label in prompts}
    samples: dict[str, dict[str, list[dict[str, float]]]] = {label: {} for label in prompts}
    with contextlib.ExitStack() as stack:
        processes: dict[str, IsolatedProcess] = {}

        def call(name: str, function: str, *arguments: Any) -> Any:
            try:
                return processes[name].call(f"{__name__}:{function}", *arguments, timeout_secs=_TIMEOUT_SECS)
            except AttntuneError as error:
                left_out[name] = str(error)
                say(f"{name}: {error}")
                return None

        for name, engine in engines.items():
            if (reason := engine.unavailable()) is not None:
                left_out[name] = reason
                say(f"{name}: {reason}")
                continue
            say(f"{name}: loading")
            processes[name] = stack.enter_context(IsolatedProcess(threads=target.cores, env=engine.env))
            call(name, "open_engine", engine, source, target.cores)
        for label, prompt in prompts.items():
            for turn in range(rounds + 1):
                say(f"{label}: round {turn} of {rounds}")
                going = [name for name in processes if name not in left_out]
                if not going:
                    raise EngineError(f"no writer is left: {left_out}")
                for name in going if turn % 2 == 0 else reversed(going):
                    time.sleep(_PAUSE_SECS)
                    written: Written | None = call(name, "write", prompt, count)
                    if written is None:
                        continue
                    if turn == 0:
                        tokens[label][name] = list(written.tokens)
                        continue
                    samples[label].setdefault(name, []).append(
                        {"prefill_secs": written.prefill_secs, "step_secs": statistics.median(written.step_secs)}
                    )
    return {
        "prompt_tokens": {label: len(prompt) for label, prompt in prompts.items()},
        "new_tokens": count,
        "writers": {name: {"title": e.shown(), "precision": e.precision} for name, e in engines.items()},
        "samples": samples,
        "tokens": tokens,
        "left_out": left_out,
        "threads": target.cores,
        "machine": state,
        "settings": {"rounds": rounds, "pause_secs": _PAUSE_SECS, "context": source.context},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


_open: Engine | None = None


def open_engine(engine: type[Engine], source: WriterSource, threads: int) -> None:
    """Make this process that engine."""
    global _open
    _open = engine()
    _open.load(source, threads)


def write(prompt: Any, count: int) -> Written:
    """See :meth:`Engine.write`."""
    if _open is None:
        raise EngineError("expected open_engine before write")
    return _open.write(prompt, count)
