"""``attntune compare``: an artifact against other engines, parity first, then timing in turns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attntune.cli.common import Reply, ShapesOption, existing, load_model, note, parse_shapes, seconds_text, table
from attntune.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from attntune.engines.comparison import Comparison

# Written out here, and held to the registry by a test: importing it would slow down every call of the command line.
_ENGINES = (
    "onnxruntime, openvino, openvino-bf16, pytorch, pytorch-bf16, torch-compile, torch-compile-max-autotune, "
    "zentorch, zentorch-bf16, metaschedule"
)


def compare(
    model: Annotated[str, typer.Argument(help="Model directory, file or hub id, or preset:NAME.")],
    artifact: Annotated[Path, typer.Argument(help="What `attntune compile` wrote of it.")],
    engines: Annotated[
        str | None,
        typer.Option(help=f"Whom to compare with, separated by commas: {_ENGINES}. [default: onnxruntime,pytorch]"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Instead of --engines: every engine at these precisions: float32, bfloat16."),
    ] = None,
    shapes: ShapesOption = "1x128",
    entry: Annotated[str, typer.Option(help="Which of the model's entries.")] = "forward",
    threads: Annotated[int | None, typer.Option(min=1, help="Of each engine; default: this machine's cores.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine per shape.")] = 11,
    masks: Annotated[str, typer.Option(help="Attention masks, separated by commas: full, ragged.")] = "full",
    cold: Annotated[bool, typer.Option("--cold", help="Time with flushed caches too.")] = False,
    tuning_secs: Annotated[float, typer.Option(min=1, help="For engines that tune (metaschedule), per shape.")] = 60.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the results go, as JSON.")] = None,
) -> Reply:
    """Run the model here and in other engines with the same threads, in turns; ratios with confidence intervals."""
    asked = parse_shapes(shapes)
    if engines is not None and precision is not None:
        raise InputError(f"expected --engines or --precision, got both: {engines!r} and {precision!r}")
    existing(artifact, "an artifact", ArtifactError)
    loaded = load_model(model)
    sizes = loaded.entry_shapes(asked, entry)
    from attntune.engines.compare import DEFAULT_ENGINES, CompareOptions, engines_at
    from attntune.engines.compare import compare as run_comparison

    chosen = _names(engines) if engines is not None else DEFAULT_ENGINES
    if precision is not None:
        chosen = engines_at(*_names(precision))
    caches = ("hot", "cold") if cold else ("hot",)
    options = CompareOptions(rounds=rounds, masks=_names(masks), caches=caches, tuning_secs=tuning_secs)
    comparison = run_comparison(
        loaded, artifact, sizes, chosen, threads=threads, entry=entry, options=options, on_event=note
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
    from attntune.engines.comparison import BASELINE

    rows = []
    for row in summary:
        error = "-" if row["max_abs_error"] is None else f"{row['max_abs_error']:.1e}"
        rows.append(
            (
                row["case"], comparison.title(row["engine"]), row["precision"], row["outcome"], error,
                _cosine_text(row["min_cosine"]), seconds_text(row["median_secs"]), _ratio_text(row["ratio"]),
                row["message"],
            )
        )  # fmt: skip
    headers = (
        "case", "engine", "precision", "outcome", "max error", "1 - cosine", "median", "time / attntune's", "",
    )  # fmt: skip
    intro = f"{comparison.model}, {comparison.entry}, {comparison.threads} threads each; above 1x attntune is faster"
    text = f"{intro}\n{table(headers, rows)}"
    best = [(row["case"], comparison.title(row["engine"]), _ratio_text(row["ratio"]), f"attntune is {row['verdict']}")
            for row in comparison.best()]  # fmt: skip
    if best:
        own = comparison.precision(BASELINE)
        text += f"\n\nagainst the best other engine in {own}:\n{table(('case', 'engine', 'ratio', ''), best)}"
    return text


def _ratio_text(ratio: list[float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.2f}x [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def _cosine_text(cosine: float | None) -> str:
    """How far from 1: rows of float32 engines would all read 1.000000."""
    return "-" if cosine is None else f"{max(1.0 - cosine, 0.0):.1e}"
