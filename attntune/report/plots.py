"""Plots as PNG and SVG: colour-blind safe (Okabe and Ito's palette), readable in print, units on every axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attntune.engines.comparison import BASELINE, Comparison
from attntune.errors import ReportError
from attntune.report.kernels import Kernel, peaks_for

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
YELLOW = "#F0E442"
GREY, INK = "#8A8A8A", "#222222"
ENGINE_COLOURS = (ORANGE, GREEN, PURPLE, SKY, VERMILLION, YELLOW, GREY)
MAX_PANELS = 12

_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "svg.hashsalt": "attntune",
    "figure.constrained_layout.use": True,
}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ReportError("plots need matplotlib: pip install 'attntune[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, stem: Path) -> str:
    """Write ``<stem>.png`` and ``<stem>.svg``, the same bytes for the same data; the stem's name."""
    figure.savefig(stem.with_suffix(".png"), dpi=160, facecolor="white", metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), facecolor="white", metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)
    return stem.name


@contextmanager
def picture(path: Path, inches: tuple[float, float]) -> Iterator[Any]:
    """A figure without grid lines, written to ``path`` as PNG when the block ends."""
    plt = _pyplot()
    with plt.rc_context({**_STYLE, "axes.grid": False}):
        figure = plt.figure(figsize=inches)
        try:
            yield figure
            figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
        finally:
            plt.close(figure)


def plot_speed(comparison: Comparison, stem: Path) -> str | None:
    """Latency of every engine per case, and how many times as long as attntune each other one takes.

    Returns:
        The stem's name; None when nothing was timed.
    """
    timed = {r.engine for r in comparison.results if r.rounds}
    cases = [c for c in comparison.cases() if any(r.rounds for r in comparison.results if r.case == c)]
    names = [name for name in comparison.engine_names() if name in timed]
    if not cases:
        return None
    plt = _pyplot()
    others = [name for name in names if name != BASELINE]
    show_ratios = BASELINE in names and bool(others)
    colours = {name: ENGINE_COLOURS[i % len(ENGINE_COLOURS)] for i, name in enumerate(others)} | {BASELINE: BLUE}
    with plt.rc_context(_STYLE):
        width = max(3.6, 0.42 * len(cases) * (len(names) + 0.6) + 1.4)
        columns = 2 if show_ratios else 1
        figure, axes = plt.subplots(1, columns, figsize=(width * columns, 4.0), squeeze=False)
        _latency_panel(axes[0][0], comparison, cases, names, colours)
        if show_ratios:
            _ratio_panel(axes[0][1], comparison, cases, others, colours)
        handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
        figure.legend(
            handles, [comparison.title(name) for name in names], loc="outside upper left", ncols=len(names),
            handlelength=1.2, columnspacing=1.4,
        )  # fmt: skip
        return _save(figure, stem)


def _latency_panel(
    axes: Any, comparison: Comparison, cases: Sequence[Any], names: Sequence[str], colours: Mapping[str, str]
) -> None:
    step = 0.8 / len(names)
    for i, name in enumerate(names):
        for x, case in enumerate(cases):
            result = comparison.result(name, case)
            if result is None or not result.rounds:
                continue
            low, high = result.quartiles_secs
            middle, at = result.median_secs * 1e3, x + (i - (len(names) - 1) / 2) * step
            axes.plot([at, at], [low * 1e3, high * 1e3], color=colours[name], linewidth=5, alpha=0.4)
            axes.plot(at, middle, marker="o" if name == BASELINE else "s", color=colours[name], markersize=6)
            axes.annotate(f"{middle:.3g}", (at, high * 1e3), xytext=(0, 5), textcoords="offset points",
                          ha="center", fontsize=7.5, color=INK)  # fmt: skip
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.15, high * 1.25)
    plain_log_axis(axes.yaxis)
    axes.set_ylabel("latency, ms (log scale)")
    axes.set_title("Latency: median and interquartile range")
    _case_axis(axes, cases)


def _ratio_panel(
    axes: Any, comparison: Comparison, cases: Sequence[Any], others: Sequence[str], colours: Mapping[str, str]
) -> None:
    step, top = 0.8 / len(others), 1.0
    for i, name in enumerate(others):
        for x, case in enumerate(cases):
            ratio = comparison.ratio(name, case)
            if ratio is None:
                continue
            at = x + (i - (len(others) - 1) / 2) * step
            slower = ratio.verdict == "slower"
            axes.bar(at, ratio.value, step * 0.9, color=colours[name], hatch="///" if slower else None,
                     edgecolor="white")  # fmt: skip
            axes.errorbar(at, ratio.value, [[ratio.value - ratio.low], [ratio.high - ratio.value]], color=INK,
                          capsize=3, linewidth=1.1)  # fmt: skip
            axes.annotate(f"{ratio.value:.2f}×", (at, ratio.high), xytext=(0, 4), textcoords="offset points",
                          ha="center", fontsize=8, color=INK)  # fmt: skip
            top = max(top, ratio.high)
    axes.axhline(1.0, color=BLUE, linewidth=1.6)
    axes.annotate("attntune", (1.0, 1.0), xycoords=("axes fraction", "data"), xytext=(4, 0),
                  textcoords="offset points", va="center", color=BLUE, fontsize=8.5, fontweight="bold")  # fmt: skip
    axes.set_ylim(0, top * 1.14)
    axes.set_ylabel("time / attntune's time")
    axes.set_title("Above 1: attntune is faster (95 % interval; hatched: slower)")
    _case_axis(axes, cases)


def _case_axis(axes: Any, cases: Sequence[Any]) -> None:
    labels = [case.label().replace(" ", "\n") for case in cases]
    axes.set_xticks(range(len(cases)), labels)
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.set_xlabel(" × ".join(cases[0].dims))
    axes.tick_params(axis="x", length=0)


def plain_log_axis(axis: Any) -> None:
    """10, 20, 50 rather than 10¹."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def plot_kernels(kernels: Sequence[Kernel], peaks: Mapping[str, Any] | None, stem: Path) -> str | None:
    """Percent of the machine's measured peak per kernel, tuned and default; None when no peak is known."""
    targets = len({kernel.target for kernel in kernels})
    rows = []
    for kernel in kernels:
        known = peaks_for(peaks, kernel.target, targets)
        tuned = kernel.roofline(known)
        if tuned is not None:
            default = kernel.roofline(known, kernel.default) if kernel.default is not None else None
            rows.append((kernel, tuned, default))
    if not rows:
        return None
    plt = _pyplot()
    with plt.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure, axes = plt.subplots(figsize=(8.6, 1.5 + 0.34 * len(rows)))
        limit = max(100.0, *(max(tuned.percent, default.percent if default else 0) for _, tuned, default in rows))
        for y, (_, tuned, default) in enumerate(reversed(rows)):
            compute = tuned.bound == "compute"
            axes.barh(y, tuned.percent, 0.66, color=BLUE if compute else SKY, hatch=None if compute else "..",
                      edgecolor="white")  # fmt: skip
            if default is not None:
                axes.plot(default.percent, y, marker="D", color=ORANGE, markeredgecolor=INK, markersize=5.5)
            unit = f"{tuned.rate / 1e9:,.0f} {'GFLOP/s' if compute else 'GB/s'}"
            reach = max(tuned.percent, default.percent if default else 0)
            axes.annotate(f"{tuned.percent:.0f} %  {unit}", (reach, y), xytext=(7, 0),
                          textcoords="offset points", va="center", fontsize=8, color=INK, zorder=4,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
        axes.axvline(100, color=VERMILLION, linewidth=1.3)
        axes.set_yticks(range(len(rows)), [kernel.label for kernel, _, _ in reversed(rows)])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(0, limit * 1.22)
        axes.set_xlabel("percent of this machine's measured peak")
        axes.set_title("Kernels against the peak that limits them", pad=24)
        handles = [
            plt.Rectangle((0, 0), 1, 1, facecolor=BLUE),
            plt.Rectangle((0, 0), 1, 1, facecolor=SKY, hatch="..", edgecolor="white"),
            plt.Line2D([], [], marker="D", color=ORANGE, markeredgecolor=INK, linestyle="", markersize=5.5),
        ]
        axes.legend(handles, ["multiply-add rate", "memory bandwidth", "default schedule"], loc="lower left",
                    bbox_to_anchor=(-0.01, 1.0), ncols=3, handlelength=1.4, columnspacing=1.4)  # fmt: skip
        return _save(figure, stem)


def plot_tuning(kernels: Sequence[Kernel], stem: Path, *, by: str = "trial") -> str | None:
    """Best so far against the default, one panel per workload; None when there is nothing to draw.

    Args:
        kernels: those with more than one trial are drawn, the ones that weigh most first, at most ``MAX_PANELS``.
        stem: path without suffix.
        by: ``"trial"`` or ``"second"``.
    """
    drawn = [kernel for kernel in panels(kernels) if by == "trial" or kernel.curve[-1].elapsed_secs]
    if not drawn:
        return None
    plt = _pyplot()
    columns = min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(3.7 * columns, 2.45 * rows + 0.7), squeeze=False)
        for panel, kernel in zip(axes.flat, drawn, strict=False):
            _tuning_panel(panel, kernel, by)
        for panel in list(axes.flat)[len(drawn) :]:
            panel.set_visible(False)
        figure.supxlabel("trial" if by == "trial" else "seconds since the workload's first trial", fontsize=10)
        figure.supylabel("speed relative to the default schedule", fontsize=10)
        handles = [
            plt.Line2D([], [], color=BLUE, linewidth=2),
            plt.Line2D([], [], color=SKY, marker="o", linestyle="", markersize=4),
            plt.Line2D([], [], color=VERMILLION, marker="x", linestyle="", markersize=5),
            plt.Line2D([], [], color=ORANGE, linestyle="--"),
        ]
        figure.legend(handles, ["best so far", "one trial", "failed trial", "default"], loc="outside upper left",
                      ncols=4, handlelength=1.6)  # fmt: skip
        return _save(figure, stem)


def panels(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels that tuning curves are drawn for, those that weigh most first."""
    worth = [k for k in kernels if len(k.curve) > 1 and k.curve[-1].best_secs is not None]
    worth.sort(key=lambda k: -(k.calls or 1) * (k.curve[-1].best_secs or 0.0))
    return worth[:MAX_PANELS]


def _tuning_panel(axes: Any, kernel: Kernel, by: str) -> None:
    base = kernel.searched_default_secs
    if base is None:
        base = next(point.best_secs for point in kernel.curve if point.best_secs is not None)
    points = [p for p in kernel.curve if by == "trial" or p.elapsed_secs is not None]
    x = [float(p.trial if by == "trial" else p.elapsed_secs or 0.0) for p in points]
    right = [(at, base / p.secs) for at, p in zip(x, points, strict=True) if p.secs]
    best = [(at, base / p.best_secs) for at, p in zip(x, points, strict=True) if p.best_secs]
    failed = [at for at, p in zip(x, points, strict=True) if p.secs is None]
    axes.plot(*zip(*right, strict=True), "o", color=SKY, markersize=2.6, alpha=0.6, zorder=2)
    axes.step(*zip(*best, strict=True), where="post", color=BLUE, linewidth=2, zorder=3)
    axes.axhline(1.0, color=ORANGE, linestyle="--", linewidth=1.2)
    top = max(1.0, *(value for _, value in best))
    axes.set_ylim(0, top * 1.18)
    axes.plot(failed, [top * 0.04] * len(failed), "x", color=VERMILLION, markersize=4, zorder=4)
    axes.annotate(f"{best[-1][1]:.2f}×", best[-1], xytext=(0, 4), textcoords="offset points", ha="right",
                  fontsize=8.5, color=BLUE, fontweight="bold")  # fmt: skip
    axes.set_title(kernel.label, fontsize=8.5, fontweight="normal")
    axes.set_xlim(left=0)
