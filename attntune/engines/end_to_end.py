"""Suites of whole models: encoders against other engines, and what tuning costs and brings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attntune.compiler import compile
from attntune.database.query import Database
from attntune.engines.compare import CompareOptions, compare
from attntune.engines.comparison import Comparison
from attntune.engines.interleaved import Contender, interleaved
from attntune.measure.machine import machine_state
from attntune.models.bert import PRESETS, random_model
from attntune.target import Target
from attntune.tuner import tune

Say = Callable[[str], None]

_TURN_SECS = 0.25
#: Less than this is no time for one search more.
_SHORT_SECS = 30.0


@dataclass(frozen=True)
class EncoderCase:
    """One model at some shapes, with one kind of mask."""

    model: str
    """A name in :data:`attntune.models.bert.PRESETS`."""
    shapes: tuple[tuple[int, int], ...]
    """(batch, seq)."""
    mask: str = "full"
    entry: str = "forward"
    """The ragged one's result has no rows of padding, which engines fill as they like."""

    def entries(self) -> list[str]:
        """What is compiled: with padding, also the entry that skips it."""
        return [self.entry] if self.mask == "full" else [self.entry, f"{self.entry}_ragged"]


ENCODERS = (
    EncoderCase("minilm-l6", ((1, 128), (8, 128), (1, 512), (32, 64))),
    EncoderCase("minilm-l6", ((8, 128),), "ragged", "embed"),
    EncoderCase("bert-base", ((1, 128), (4, 384))),
)

TUNING_SHAPES = ((1, 128), (8, 128), (1, 512))


def encoders(
    cases: Sequence[EncoderCase],
    engines: Sequence[str],
    precisions: Sequence[str],
    target: Target,
    *,
    database: Database,
    rounds: int,
    say: Say,
) -> Iterator[tuple[str, Comparison]]:
    """Compile each model with seeded weights and compare it with other engines: ``(name, comparison)``.

    A precision that attntune does not compile for is said, and left out.
    """
    for case in cases:
        model = random_model(PRESETS[case.model], case.model)
        shapes = [{"batch": batch, "seq": seq} for batch, seq in case.shapes]
        for precision in precisions:
            extra = {} if precision == "float32" else {"precision": precision}
            try:
                artifact = compile(model, target=target, shapes=case.shapes, entries=case.entries(), database=database,
                                   on_progress=say, **extra)  # fmt: skip
            except TypeError as error:
                say(f"{case.model} {precision}: left out: {error}")
                continue
            options = CompareOptions(rounds=rounds, masks=(case.mask,), turn_secs=_TURN_SECS)
            found = compare(model, artifact, shapes, engines, entry=case.entry, threads=target.cores, options=options,
                            on_event=say)  # fmt: skip
            words = [case.model, precision, *([case.mask] if case.mask != "full" else [])]
            yield "-".join(words), found


def tuning(
    folder: Path,
    target: Target,
    *,
    seconds: float,
    seeds: Sequence[int],
    shapes: Sequence[tuple[int, int]] = TUNING_SHAPES,
    rounds: int,
    long_seconds: float = 0.0,
    say: Say,
) -> dict[str, Any]:
    """Tune the MiniLM encoder from nothing with each seed; then the default and each result end to end, in turns.

    Journals go to ``folder``; those that are there are removed first. With ``long_seconds`` there is one run more, of
    so long: a search that ends before goes on with the next seed from what it knows. It shows what short ones miss.

    Returns:
        A document, JSON-ready: ``runs`` (name, seconds, trials, default over tuned of each kernel) and ``end_to_end``
        (by shape and name the seconds of every sample, one list per round).

    Raises:
        EngineError: a compiled model is not right.
    """
    model = random_model(PRESETS["minilm-l6"], "minilm-l6")
    dims = [{"batch": batch, "seq": seq} for batch, seq in shapes]
    state = machine_state(target)
    folder.mkdir(parents=True, exist_ok=True)
    forward = model.workloads(dims, "forward")

    def run(name: str, journal: Path, seconds: float, seed: int, *, all_seconds: bool = False) -> dict[str, Any]:
        journal.unlink(missing_ok=True)
        start, trials = time.monotonic(), 0
        while True:
            left = seconds - (time.monotonic() - start)
            say(f"tuning, {name}: seed {seed} for at most {left:.0f} s")
            summary = tune(forward, target=target, seconds=left, database=journal, seed=seed)
            trials, seed = trials + summary.trials, seed + 1
            spent = time.monotonic() - start
            if not all_seconds or not summary.trials or summary.interrupted or spent >= seconds - _SHORT_SECS:
                break
        # The journal lies beside the document, wherever the folder is then.
        told = {**summary.to_json(), "database": journal.name}
        del told["resume"]
        databases[name] = Database(journal, shipped=False)
        return {
            "name": name, "secs": spent, "trials": trials, "workloads": len(summary.results),
            "stopped_by": summary.stopped_by,
            "default_over_tuned": [r.speedup for r in summary.results if r.speedup], "summary": told,
        }  # fmt: skip

    databases = {"default": Database(shipped=False)}
    runs = [run(f"seed {seed}", folder / f"seed-{seed}.jsonl", seconds, seed) for seed in seeds]
    if long_seconds:
        runs.append(run(f"{long_seconds:.0f} s", folder / "long.jsonl", long_seconds, max(seeds) + 1, all_seconds=True))
    contenders = {}
    for name, database in databases.items():
        say(f"compiling {name}")
        artifact = compile(model, target=target, shapes=shapes, entries=["forward"], database=database)
        contenders[name] = Contender(model, artifact, target.cores)
    return {
        "model": model.name, "threads": target.cores, "shapes": [f"{b}×{s}" for b, s in shapes], "runs": runs,
        "end_to_end": interleaved(contenders, dims, rounds=rounds, turn_secs=_TURN_SECS, say=say), "machine": state,
        "settings": {"seconds": seconds, "long_seconds": long_seconds, "rounds": rounds, "turn_secs": _TURN_SECS},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
