"""``attntune export``: the model as ONNX, for other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attntune.cli.common import DatabaseOption, Reply, ShapesOption, TargetOption, load_model, parse_shapes


def export(
    model: Annotated[str, typer.Argument(help="Model directory, file or hub id, or preset:NAME.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    attention: Annotated[
        str, typer.Option(help="decomposed (opset 17), standard (opset 24), or onnxruntime (its own operator).")
    ] = "decomposed",
    entry: Annotated[str, typer.Option(help="Which of the model's entries.")] = "forward",
    database: DatabaseOption = None,
    target: TargetOption = "native",
    shapes: ShapesOption = "1x128",
) -> Reply:
    """Write a model to ONNX; with --database, its tuning summary goes into the file's metadata."""
    from attntune.interop.onnx_export import export_onnx

    sizes = parse_shapes(shapes)
    loaded = load_model(model)
    metadata = None if database is None else _tuning_summary(loaded, entry, sizes, database, target)
    path = export_onnx(loaded, output, attention=attention, entry=entry, metadata=metadata)
    document = {"path": str(path), "bytes": path.stat().st_size, "attention": attention, "entry": entry}
    summary = "" if metadata is None else f", with the choices for {len(metadata['kernels'])} kernels in its metadata"
    text = f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB), attention {attention}{summary}"
    return Reply({**document, "tuning": metadata}, text)


def _tuning_summary(
    model: Any, entry: str, shapes: list[dict[str, int]], database: Path, target: str
) -> dict[str, Any]:
    from attntune.database.query import Database
    from attntune.interop.onnx_export import tuning_metadata
    from attntune.target import Target

    machine = Target.parse(target)
    records = Database(database)
    choices = {}
    for workload in model.workloads(shapes, entry):
        choice = records.lookup(workload, machine)
        median_secs = choice.record.median_secs if choice.record is not None else None
        choices[workload.key()] = {"config": choice.config, "source": choice.source, "median_secs": median_secs}
    return tuning_metadata(machine.key(), choices)
