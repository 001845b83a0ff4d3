"""Write a report folder: ``report.md``, its plots as PNG and SVG, and the comparisons' raw data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attntune.database.record import TuningRecord
from attntune.engines.comparison import Comparison
from attntune.errors import ReportError
from attntune.report import markdown, plots
from attntune.report.kernels import Kernel, summarize


def write_report(
    out_dir: str | Path,
    records: Iterable[TuningRecord] = (),
    comparisons: Sequence[Comparison] = (),
    summary: Any = None,
    peaks: Mapping[str, Any] | None = None,
    *,
    title: str = "attntune report",
) -> Path:
    """Write a report of tuning records, comparisons, or both.

    Args:
        out_dir: folder to write into; files of an earlier report there are replaced.
        records: of one or more tuning journals, in their order.
        comparisons: what :func:`attntune.engines.compare.compare` returned.
        summary: a ``TuningSummary`` or its ``to_json()``.
        peaks: what ``measure_peaks`` returned for the one target of the records; or, by target key, for several.
        title: first line of the report.

    Returns:
        The path of ``report.md``. Beside it: ``speed-<n>``, ``kernels``, ``tuning-trials`` and ``tuning-seconds`` as
        ``.png`` and ``.svg``, and ``comparison-<n>.json`` with every raw sample.

    Raises:
        ReportError: there is nothing to report, the folder cannot be written, or matplotlib is missing.
    """
    records = list(records)
    if not records and not comparisons:
        raise ReportError("expected tuning records, comparisons or both; got neither")
    if summary is not None and not isinstance(summary, Mapping):
        summary = summary.to_json()
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kernels = summarize(records, summary)
        speed = []
        for number, comparison in enumerate(comparisons, 1):
            comparison.save(folder / f"comparison-{number}.json")
            speed.append(plots.plot_speed(comparison, folder / f"speed-{number}"))
        lines = _text(folder, title, records, kernels, comparisons, speed, summary, peaks)
        path = folder / "report.md"
        path.write_text("\n".join(lines).rstrip() + "\n")
    except OSError as error:
        raise ReportError(f"cannot write the report to {folder}: {error}") from error
    return path


def _text(
    folder: Path,
    title: str,
    records: Sequence[TuningRecord],
    kernels: Sequence[Kernel],
    comparisons: Sequence[Comparison],
    speed: Sequence[str | None],
    summary: Mapping[str, Any] | None,
    peaks: Mapping[str, Any] | None,
) -> list[str]:
    machines = [comparison.machine for comparison in comparisons] + [record.machine for record in records]
    lines = [f"# {title}", ""]
    for comparison in comparisons:
        if found := markdown.headline(comparison):
            lines += [*found, ""]
    for comparison, plot in zip(comparisons, speed, strict=True):
        lines += markdown.comparison_section(comparison, plot)
    lines += markdown.negative_section(comparisons, kernels)
    if kernels:
        lines += markdown.kernel_section(kernels, peaks, plots.plot_kernels(kernels, peaks, folder / "kernels"))
        drawn = [plots.plot_tuning(kernels, folder / f"tuning-{by}s", by=by) for by in ("trial", "second")]
        curves = [name for name in drawn if name]
        lines += markdown.tuning_section(kernels, summary, curves, len(plots.panels(kernels)))
    lines += markdown.machine_section([machine for machine in machines if machine], peaks)
    return lines + markdown.method_section(comparisons)
