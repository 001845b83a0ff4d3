"""``attntune records``: list, merge, prune, diff and export tuning databases."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attntune.cli.common import Reply, command, existing, seconds_text, table
from attntune.errors import DatabaseError, InputError

if TYPE_CHECKING:
    from attntune.database.journal import Journal
    from attntune.database.record import TuningRecord

DatabaseArgument = Annotated[Path, typer.Argument(help="Tuning records, a JSON-lines file.")]
NewFileOption = Annotated[Path, typer.Option("--output", "-o", help="The file to write; it must not exist.")]


def build() -> typer.Typer:
    """The sub-commands."""
    app = typer.Typer(help="List, merge, prune, diff and export tuning records.", no_args_is_help=True)
    for name, verb in (("list", list_), ("merge", merge), ("prune", prune), ("diff", diff), ("export", export)):
        app.command(name)(command(verb))
    return app


def list_(
    database: DatabaseArgument,
    best: Annotated[bool, typer.Option("--best", help="Only the winner of each workload and target.")] = False,
    op: Annotated[str | None, typer.Option(help="Only this operator.")] = None,
    status: Annotated[str | None, typer.Option(help="Only this status: correct, wrong_result, …")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Show at most so many to people; 0 shows all.")] = 50,
) -> Reply:
    """List records, fastest first within a workload and target."""
    from attntune.database.maintenance import winners
    from attntune.database.record import Status

    if status is not None and status not in set(Status):
        raise InputError(f"unknown status {status!r}; expected one of {[str(s) for s in Status]}")
    records = winners(read(database)) if best else read(database)
    chosen = [
        record
        for record in sorted(records, key=_order)
        if (op is None or _operator(record) == op) and (status is None or record.status == status)
    ]
    shown = chosen if limit == 0 else chosen[:limit]
    counts = Counter(str(record.status) for record in chosen)
    rest = f", {len(chosen) - len(shown)} not shown (--limit 0 shows all)" if len(shown) < len(chosen) else ""
    summary = f"{len(chosen)} records ({', '.join(f'{n} {s}' for s, n in sorted(counts.items())) or 'none'}){rest}"
    rows = [
        (
            workload_text(r.workload), r.target, seconds_text(r.median_secs), seconds_text(r.spread_secs or None),
            r.status, "default" if r.is_default else "", str(r.config),
        )
        for r in shown
    ]  # fmt: skip
    headers = ("workload", "target", "median", "spread", "status", "", "config")
    return Reply([r.to_json() for r in chosen], f"{table(headers, rows)}\n{summary}" if rows else summary)


def merge(
    databases: Annotated[list[Path], typer.Argument(help="Tuning records, one file or more.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The database that takes them; may exist.")],
) -> Reply:
    """Add to one database every record of others that it lacks."""
    from attntune.database.maintenance import merged

    sources = [read(path) for path in databases]
    journal = _journal(output)
    present = merged([journal.load()])
    added = merged([present, *sources])[len(present) :]
    journal.extend(added)
    return Reply({"output": str(output), "added": len(added)}, f"added {len(added)} records to {output}")


def prune(
    database: DatabaseArgument,
    output: NewFileOption,
    keep: Annotated[int, typer.Option(min=1, help="How many of the fastest to keep per workload and target.")] = 3,
) -> Reply:
    """Write the fastest records of each workload and target, its default and its last final round to a new file."""
    from attntune.database.maintenance import pruned

    records = read(database)
    kept = pruned(records, keep)
    _journal(output, new=True).extend(kept)
    document = {"output": str(output), "kept": len(kept), "removed": len(records) - len(kept)}
    return Reply(document, f"wrote {len(kept)} of {len(records)} records to {output}")


def diff(
    before: Annotated[Path, typer.Argument(help="Tuning records.")],
    after: Annotated[Path, typer.Argument(help="Tuning records to compare with them.")],
) -> Reply:
    """Compare the winners of two databases; a ratio below 1 means that the second is faster."""
    from attntune.database import maintenance

    found = maintenance.diff(read(before), read(after))
    document = [
        {
            "workload": d.workload,
            "target": d.target,
            "before_secs": d.before.median_secs if d.before else None,
            "after_secs": d.after.median_secs if d.after else None,
            "ratio": d.ratio,
            "same_config": d.same_config,
        }
        for d in found
    ]
    rows = [
        (
            workload_text(d.workload), d.target, seconds_text(d.before.median_secs if d.before else None),
            seconds_text(d.after.median_secs if d.after else None), "-" if d.ratio is None else f"{d.ratio:.3f}",
            "same" if d.same_config else "-" if d.ratio is None else "changed",
        )
        for d in found
    ]  # fmt: skip
    headers = ("workload", "target", "before", "after", "after/before", "config")
    return Reply(document, table(headers, rows) if rows else "no correct record in either")


def export(
    database: DatabaseArgument,
    output: NewFileOption,
    csv_: Annotated[bool, typer.Option("--csv", help="Every record as a CSV table, for a spreadsheet.")] = False,
    target: Annotated[str | None, typer.Option(help="Only this target's records, by key: cpu/znver4/2.")] = None,
) -> Reply:
    """Write the winner of each workload and target, in the form that schedules/ ships; or everything as CSV."""
    from attntune.database.maintenance import winners

    records = [record for record in read(database) if target in (None, record.target)]
    journal = _journal(output, new=True)
    if csv_:
        output.write_text(_as_csv(records))
        return Reply({"output": str(output), "written": len(records)}, f"wrote {len(records)} rows to {output}")
    best = winners(records)
    journal.extend(best)
    return Reply({"output": str(output), "written": len(best)}, f"wrote {len(best)} winners to {output}")


def read(path: Path) -> list[TuningRecord]:
    """Every record of a database that exists."""
    from attntune.database.journal import Journal

    return Journal(existing(path, "a tuning database", DatabaseError)).load()


def _journal(path: Path, *, new: bool = False) -> Journal:
    from attntune.database.journal import Journal

    if new and path.exists():
        raise DatabaseError(f"expected {path} not to exist yet; name another file or move that one away")
    path.parent.mkdir(parents=True, exist_ok=True)
    return Journal(path)


def workload_text(key: str) -> str:
    """A workload for people: its operator and the fields that are not the default."""
    from attntune.errors import WorkloadError
    from attntune.ops import workload_from_key

    try:
        return str(workload_from_key(key))
    except WorkloadError:  # written by a version with other operators
        return key


def _operator(record: TuningRecord) -> str:
    return str(json.loads(record.workload).get("op", ""))


def _order(record: TuningRecord) -> tuple[str, str, float, str]:
    return record.workload, record.target, record.median_secs, record.config.key()


def _as_csv(records: Sequence[TuningRecord]) -> str:
    names = ("workload", "target", "template", "status", "median_secs", "spread_secs", "samples", "cache",
             "is_default", "final", "max_abs_error", "max_rel_error", "config", "time", "message")  # fmt: skip
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(names)
    for r in records:
        values = {**r.to_json(), "config": r.config.key(), "samples": len(r.run_secs)}
        values |= {name: getattr(r, name) if r.run_secs else "" for name in ("median_secs", "spread_secs")}
        rows.writerow(values[name] for name in names)
    return text.getvalue()
