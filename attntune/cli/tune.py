"""``attntune tune``: measure schedules until the budget is spent."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attntune.cli.common import (
    DatabaseOption,
    EntriesOption,
    OptionalShapes,
    PrecisionOption,
    Reply,
    TargetOption,
    load_model,
    note,
    parse_names,
    parse_shapes,
    seconds_text,
    table,
    to_json,
)
from attntune.cli.live import Progress, percent_text, ratio_text
from attntune.errors import InputError

if TYPE_CHECKING:
    from attntune.progress import TuningSummary

_DATABASE = Path("tuning.jsonl")


def tune(
    what: Annotated[
        list[str], typer.Argument(help="A model directory, file or hub id, preset:NAME, or workload keys (JSON).")
    ],
    target: TargetOption = "native",
    seconds: Annotated[float | None, typer.Option(min=0, help="Stop after so many seconds.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Stop after so many trials.")] = None,
    database: DatabaseOption = _DATABASE,
    searcher: Annotated[str, typer.Option(help="grid, random or evolutionary.")] = "evolutionary",
    seed: Annotated[int, typer.Option(help="Of the searcher and of the operands.")] = 0,
    shapes: OptionalShapes = None,
    entries: EntriesOption = None,
    precision: PrecisionOption = "float32",
    cold: Annotated[bool, typer.Option("--cold", help="Flush the caches before each timed call.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the summary goes, as JSON.")] = None,
) -> Reply:
    """Tune a model's or single workloads' schedules; records go to the database, and a later run resumes from it."""
    import attntune

    database = database or _DATABASE
    subject = subject_of(what, shapes, entries)
    again = resume_command(
        what, target, seconds, trials, database, searcher, seed, shapes, cold, output, precision, entries
    )
    try:
        with Progress() as progress:
            summary = attntune.tune(
                subject,
                target=target,
                seconds=seconds,
                trials=trials,
                database=database,
                searcher=searcher,
                seed=seed,
                shapes=None if shapes is None else parse_shapes(shapes),
                entries=parse_names(entries),
                cache="cold" if cold else "hot",
                precision=precision,
                on_event=progress,
                on_progress=note,
            )
    except KeyboardInterrupt:
        note(f"interrupted; every finished trial is kept in {database}. Resume with:\n  {again}")
        raise
    document = {**summary.to_json(), "resume": again}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(to_json(document) + "\n")
    return Reply(document, _text(summary, again), exit_code=130 if summary.interrupted else 0)


def subject_of(what: Sequence[str], shapes: str | None, entries: str | None = None) -> Any:
    """The model, or the workloads, that the arguments name.

    Raises:
        InputError: models and workload keys are mixed, or there are several models.
    """
    keys = [text for text in what if text.lstrip().startswith("{")]
    if keys and len(keys) == len(what):
        from attntune.ops import workload_from_key

        if shapes is not None or entries is not None:
            raise InputError("expected --shapes and --entries only with a model: workload keys hold their own shapes")
        return [workload_from_key(key) for key in keys]
    if len(what) != 1:
        raise InputError(f"expected one model, or workload keys only, got {list(what)}")
    return load_model(what[0])


def resume_command(
    what: Sequence[str], target: str, seconds: float | None, trials: int | None, database: Path, searcher: str,
    seed: int, shapes: str | None, cold: bool, output: Path | None,
    precision: str = "float32", entries: str | None = None,
) -> str:  # fmt: skip
    """The command that goes on where this run stopped."""
    options = {
        "--target": target if target != "native" else None,
        "--seconds": f"{seconds:g}" if seconds is not None else None,
        "--trials": trials,
        "--database": database,
        "--searcher": searcher if searcher != "evolutionary" else None,
        "--seed": seed or None,
        "--shapes": shapes,
        "--entries": entries,
        "--output": output,
        "--precision": precision if precision != "float32" else None,
    }
    words = ["attntune", "tune", *what]
    for option, value in options.items():
        if value is not None:
            words += [option, str(value)]
    return shlex.join([*words, "--cold"] if cold else words)


def _text(summary: TuningSummary, again: str) -> str:
    rows = [
        (
            r.calls, r.trials, sum(n for status, n in r.statuses.items() if status != "correct"), r.source,
            seconds_text(r.best_secs), ratio_text(r.speedup), percent_text(r.peak_fraction), r.workload,
        )
        for r in summary.results
    ]  # fmt: skip
    headers = ("calls", "trials", "failed", "winner", "best", "vs default", "of peak", "workload")
    whole = "" if summary.speedup is None else f"; all kernels together {summary.speedup:.2f}x the default"
    lines = [
        table(headers, rows),
        f"{summary.trials} trials in {summary.elapsed_secs:.0f} s, {summary.resumed} known before"
        f"{whole}; records in {summary.database}",
    ]
    if summary.interrupted:
        lines.append(f"interrupted; every finished trial is kept. Resume with:\n  {again}")
    return "\n".join(lines)
