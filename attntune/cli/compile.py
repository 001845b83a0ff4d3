"""``attntune compile``: model and records into an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attntune.cli.common import DatabaseOption, OptionalShapes, Reply, TargetOption, existing, load_model, parse_shapes


def compile(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The artifact to write, such as model.attn.")],
    database: DatabaseOption = None,
    target: TargetOption = "native",
    shapes: OptionalShapes = None,
) -> Reply:
    """Compile a model with the best schedules known into an artifact."""
    import attntune

    sizes = None if shapes is None else parse_shapes(shapes)
    if database is not None:
        existing(database, "a tuning database")
    loaded = load_model(model)
    artifact = attntune.compile(loaded, target=target, database=database, shapes=sizes)
    artifact.save(output)
    return Reply({"path": str(output)}, f"wrote {output}")
