"""``attntune compile``: model and records into an artifact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attntune.cli.common import (
    DatabaseOption,
    EntriesOption,
    OptionalShapes,
    PrecisionOption,
    Reply,
    TargetOption,
    existing,
    load_model,
    note,
    parse_names,
    parse_shapes,
    seconds_text,
    table,
)
from attntune.errors import DatabaseError

if TYPE_CHECKING:
    from attntune.runtime import Artifact


def compile(
    model: Annotated[str, typer.Argument(help="Model directory, file or hub id, or preset:NAME.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The artifact to write, such as model.attn.")],
    database: DatabaseOption = None,
    target: TargetOption = "native",
    shapes: OptionalShapes = None,
    precision: PrecisionOption = "float32",
    entries: EntriesOption = None,
    cuda_code: Annotated[
        str, typer.Option(help="For CUDA, what the artifact carries: cubin, ptx (newer GPUs too), source (needs nvcc).")
    ] = "cubin",
) -> Reply:
    """Compile a model with the best schedules known into an artifact; without --shapes for a grid of shapes."""
    import attntune

    sizes = None if shapes is None else parse_shapes(shapes)
    if database is not None:
        existing(database, "a tuning database", DatabaseError)
    loaded = load_model(model)
    artifact = attntune.compile(
        loaded, target=target, database=database, shapes=sizes, precision=precision, on_progress=note,
        entries=parse_names(entries), cuda_code=cuda_code,
    )  # fmt: skip
    path = artifact.save(output)
    size = sum(file.stat().st_size for file in path.iterdir())
    sources = Counter(kernel["source"] for kernel in artifact.kernels)
    document = {
        "path": str(path),
        "bytes": size,
        "target": artifact.manifest["target"],
        "precision": artifact.manifest["precision"],
        "sources": dict(sources),
        "kernels": artifact.kernels,
        "shapes": [bucket["dims"] for bucket in artifact.manifest["buckets"]],
    }
    found = ", ".join(f"{n} {source}" for source, n in sorted(sources.items()))
    return Reply(document, f"{_kernels(artifact)}\nwrote {path} ({size / 1e6:.1f} MB): {found} schedules")


def _kernels(artifact: Artifact) -> str:
    import json

    from attntune.ops import workload_from_key

    rows = [
        (
            kernel["source"], seconds_text(kernel["median_secs"]), workload_from_key(json.dumps(kernel["workload"])),
            " ".join(f"{name}={value}" for name, value in kernel["config"].items()),
        )
        for kernel in artifact.kernels
    ]  # fmt: skip
    return table(("schedule", "measured", "kernel", "config"), rows)
