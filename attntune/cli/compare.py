"""``attntune compare``: an artifact against other engines, parity first, then interleaved timing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attntune.cli.common import Reply, ShapesOption, existing, load_model, note, parse_shapes
from attntune.errors import ArtifactError


def compare(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.")],
    artifact: Annotated[Path, typer.Argument(help="What `attntune compile` wrote of it.")],
    engines: Annotated[str, typer.Option(help="Whom to compare with, separated by commas.")] = "onnxruntime,pytorch",
    shapes: ShapesOption = "1x128",
    threads: Annotated[int | None, typer.Option(min=1, help="Of each engine; default: this machine's cores.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the JSON results go.")] = None,
) -> Reply:
    """Run the model here and in other engines with the same threads, in turns; ratios with confidence intervals."""
    existing(artifact, "an artifact", ArtifactError)
    raise NotImplementedError((load_model, note, parse_shapes))
