"""``attntune compare``: an artifact against other engines, parity first, then timing in turns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attntune.cli.common import Reply, ShapesOption, existing, load_model, note, parse_shapes, seconds_text, table
from attntune.errors import ArtifactError

if TYPE_CHECKING:
    from attntune.engines.comparison import Comparison


def compare(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.")],
    artifact: Annotated[Path, typer.Argument(help="What `attntune compile` wrote of it.")],
    engines: Annotated[
        str, typer.Option(help="Whom to compare with, separated by commas: onnxruntime, pytorch, torch-compile.")
    ] = "onnxruntime,pytorch",
    shapes: ShapesOption = "1x128",
    entry: Annotated[str, typer.Option(help="Which of the model's entries.")] = "forward",
    threads: Annotated[int | None, typer.Option(min=1, help="Of each engine; default: this machine's cores.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine per shape.")] = 11,
    masks: Annotated[str, typer.Option(help="Attention masks, separated by commas: full, ragged.")] = "full",
    cold: Annotated[bool, typer.Option("--cold", help="Time with flushed caches too.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the results go, as JSON.")] = None,
) -> Reply:
    """Run the model here and in other engines with the same threads, in turns; ratios with confidence intervals."""
    sizes = parse_shapes(shapes)
    existing(artifact, "an artifact", ArtifactError)
    loaded = load_model(model)
    from attntune.engines.compare import CompareOptions
    from attntune.engines.compare import compare as run_comparison

    options = CompareOptions(rounds=rounds, masks=_names(masks), caches=("hot", "cold") if cold else ("hot",))
    comparison = run_comparison(
        loaded, artifact, sizes, _names(engines), threads=threads, entry=entry, options=options, on_event=note
    )
    if output is not None:
        comparison.save(output)
    summary = comparison.summary()
    wrong = any(row["outcome"] in ("wrong_result", "failed") for row in summary)
    where = f"\nraw samples and machine in {output}" if output is not None else ""
    return Reply(comparison.to_json(), _text(comparison, summary) + where, exit_code=1 if wrong else 0)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip()))


def _text(comparison: Comparison, summary: list[dict[str, Any]]) -> str:
    rows = []
    for row in summary:
        ratio = row["ratio"]
        shown = "" if ratio is None else f"{ratio[0]:.2f}x [{ratio[1]:.2f}, {ratio[2]:.2f}]"
        error = "-" if row["max_abs_error"] is None else f"{row['max_abs_error']:.1e}"
        rows.append(
            (
                row["case"], comparison.title(row["engine"]), row["outcome"], error,
                seconds_text(row["median_secs"]), shown, row["message"],
            )
        )  # fmt: skip
    headers = ("case", "engine", "outcome", "max error", "median", "time / attntune's", "")
    intro = f"{comparison.model}, {comparison.entry}, {comparison.threads} threads each; above 1x attntune is faster"
    return f"{intro}\n{table(headers, rows)}"
