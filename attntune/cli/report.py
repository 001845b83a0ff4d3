"""``attntune report``: records and comparisons as Markdown and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attntune.cli.common import Reply, existing, note
from attntune.errors import DatabaseError, ReportError

if TYPE_CHECKING:
    from attntune.database.record import TuningRecord


def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    database: Annotated[list[Path] | None, typer.Option(help="Tuning records; repeat for several files.")] = None,
    comparison: Annotated[list[Path] | None, typer.Option(help="Results of compare; repeat for several.")] = None,
    summary: Annotated[
        Path | None, typer.Option(help="What `attntune tune -o` wrote: calls and times of a run.")
    ] = None,
    title: Annotated[str, typer.Option(help="The report's first line.")] = "attntune report",
) -> Reply:
    """Write a report: speed against each engine, percent of peak per kernel, tuning curves."""
    if not database and not comparison:
        raise ReportError("expected --database, --comparison, or both: a report is made from records and comparisons")
    journals = [existing(path, "a tuning database", DatabaseError) for path in database or ()]
    told = None if summary is None else read_summary(summary)
    results = [existing(path, "a comparison", ReportError) for path in comparison or ()]
    from attntune.database.journal import Journal
    from attntune.engines.comparison import Comparison
    from attntune.report import write_report

    records = [record for path in journals for record in Journal(path).load()]
    comparisons = [Comparison.load(path) for path in results]
    path = write_report(output, records, comparisons, told, known_peaks(records), title=title)
    files = sorted(str(file.relative_to(output)) for file in output.iterdir())
    document = {"report": str(path), "files": files, "records": len(records), "comparisons": len(comparisons)}
    return Reply(document, f"wrote {path} from {len(records)} records and {len(comparisons)} comparisons")


def read_summary(path: Path) -> dict[str, Any]:
    """A tuning summary; raises :class:`ReportError` for anything else."""
    try:
        fields = json.loads(existing(path, "a tuning summary", ReportError).read_text())
    except ValueError as error:
        raise ReportError(f"expected a tuning summary as JSON at {path}: {error}") from None
    if not isinstance(fields, dict) or "results" not in fields:
        raise ReportError(f"expected a tuning summary, as `attntune tune -o` writes it, at {path}")
    return fields


def known_peaks(records: Sequence[TuningRecord]) -> dict[str, Any] | None:
    """Peaks by target key, for those records that this machine measured; taken now if they are not remembered."""
    from attntune.measure.machine import cached_peaks, cpu_model
    from attntune.target import Target

    machines = {r.target: r.machine for r in records if r.machine.get("cpu_model") == cpu_model()}
    peaks = {}
    for key, machine in machines.items():
        if "target" in machine:
            target = Target.from_json(machine["target"])
            if cached_peaks(target, measure=False) is None:
                note("measuring this machine's peaks")
            peaks[key] = cached_peaks(target)
    return peaks or None
