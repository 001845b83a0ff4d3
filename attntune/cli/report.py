"""``attntune report``: records and comparisons as Markdown and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attntune.cli.common import DatabaseOption, Reply, existing
from attntune.errors import DatabaseError, InputError


def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    database: DatabaseOption = None,
    comparison: Annotated[list[Path] | None, typer.Option(help="Results of compare; repeat for several.")] = None,
) -> Reply:
    """Write a report: speed against each engine, percent of peak per kernel, tuning curves."""
    if database is None and not comparison:
        raise InputError("expected --database, --comparison, or both: a report is made from records and comparisons")
    if database is not None:
        existing(database, "a tuning database", DatabaseError)
    for path in comparison or ():
        existing(path, "a comparison")
    raise NotImplementedError
