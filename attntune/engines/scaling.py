"""How an entry's latency grows with its input, and what more threads bring: several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attntune.compiler import compile
from attntune.engines.interleaved import Contender, interleaved
from attntune.measure.machine import better_peaks, machine_state, measure_peaks
from attntune.models.model import Model
from attntune.ops.recurrent import Recurrent
from attntune.target import Target
from attntune.tuner import tune

_NANOSECOND_DIGITS = 9


def dependent_steps(model: Model, entry: str, dims: Mapping[str, int]) -> int:
    """Steps of ``entry`` of which each needs the one before: the longest path through its calls.

    An operator is one step, a recurrent layer one for every position.
    """
    reached: dict[str, int] = {}
    for call in model.calls(entry):
        workload = call.workload(dims, frozenset(model.weights))
        own = workload.seq if isinstance(workload, Recurrent) else 1
        steps = own + max((reached.get(arg, 0) for arg in call.args), default=0)
        reached.update(dict.fromkeys(call.results, steps))
    return max(reached.values(), default=0)


def entry_flops(model: Model, entry: str, dims: Mapping[str, int]) -> int:
    """Floating-point operations of one run of ``entry``, by its workloads' own count."""
    return sum(workload.flops() * calls for workload, calls in model.workloads([dims], entry).items())


def scaling(
    models: Mapping[str, Model],
    entry: str,
    shapes: Sequence[Mapping[str, int]],
    target: Target,
    threads: Sequence[int],
    *,
    rounds: int,
    turn_secs: float,
    most_calls: int,
    say: Callable[[str], None],
    seconds: float = 0.0,
    database: Path | None = None,
    peaks: Callable[[Target], Mapping[str, Any]] = measure_peaks,
) -> dict[str, Any]:
    """Latency of ``entry`` of each model at each shape and with each number of threads, all in turns.

    Every number of threads has an artifact of its own, with schedules for that many cores.

    Args:
        models: by name.
        entry: what is run, of all of them.
        shapes: values of its symbolic dimensions.
        target: this machine.
        threads: numbers of them, the first of which the others are compared with.
        rounds: see :func:`interleaved`.
        turn_secs: likewise.
        most_calls: likewise.
        say: told what is going on.
        seconds: of tuning, for each model and number of threads; 0: the database's schedules, or the defaults.
        database: journal of the tuning.
        peaks: measures what the machine can do, before and after; the better counts.

    Returns:
        A document, JSON-ready: ``models`` (name → rows of ``dims``, ``flops``, ``dependent_steps`` and ``rounds``:
        threads → seconds of every call, one list per round), ``peaks`` (threads → see :func:`measure_peaks`),
        ``threads``, ``entry``, ``settings``, ``machine``, ``time``.

    Raises:
        EngineError: a compiled model is not right.
    """
    targets = {count: target.with_cores(count) for count in threads}
    say("measuring the machine's peaks")
    before, state = {count: peaks(one) for count, one in targets.items()}, machine_state(target)
    contenders = {}
    for name, model in models.items():
        for count, one in targets.items():
            say(f"{name}, {count} threads: tuning for {seconds:g} s, compiling {len(shapes)} shapes")
            if seconds and database is not None:
                tune(model, target=one, seconds=seconds, database=database, shapes=shapes, entries=[entry])
            known = database if database is not None and database.is_file() else None
            artifact = compile(model, target=one, shapes=shapes, entries=[entry], database=known)
            contenders[_label(name, count)] = Contender(model, artifact, count, entry)
    timed = interleaved(
        contenders, shapes, rounds=rounds, turn_secs=turn_secs, most_calls=most_calls, say=say
    )  # fmt: skip
    say("measuring the machine's peaks again")
    return {
        "entry": entry, "threads": list(threads),
        "models": {
            name: [
                {
                    "dims": dict(dims), "flops": entry_flops(model, entry, dims),
                    "dependent_steps": dependent_steps(model, entry, dims),
                    "rounds": {str(count): _rounded(row["rounds"][_label(name, count)]) for count in threads},
                }
                for dims, row in zip(shapes, timed, strict=True)
            ]
            for name, model in models.items()
        },
        "peaks": {str(count): better_peaks(before[count], peaks(one)) for count, one in targets.items()},
        "settings": {
            "rounds": rounds, "turn_secs": turn_secs, "most_calls": most_calls, "tuning_secs": seconds,
        },
        "machine": state, "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _label(name: str, threads: int) -> str:
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _rounded(rounds: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(secs, _NANOSECOND_DIGITS) for secs in turn] for turn in rounds]
