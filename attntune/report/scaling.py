"""Latency against length and threads, as a table and as curves, from the raw samples of ``engines/scaling.py``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attntune.engines.comparison import Ratio, paired_ratio
from attntune.report.benchmarks import table
from attntune.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, picture, plain_log_axis

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)


@dataclass(frozen=True)
class Point:
    """One model at one shape with one number of threads."""

    model: str
    dims: Mapping[str, int]
    threads: int
    flops: int
    dependent_steps: int
    median_secs: float
    quartiles_secs: tuple[float, float]
    speed_up: Ratio | None
    """How many times as fast as with the first number of threads, paired by round; None for that number itself."""
    peak: float
    """Floating-point operations per second that the machine can do with as many threads."""

    @property
    def flops_per_sec(self) -> float:
        """The rate reached."""
        return self.flops / self.median_secs

    @property
    def share(self) -> float:
        """Of the peak, 0 to 1."""
        return self.flops_per_sec / self.peak


def points(document: Mapping[str, Any]) -> list[Point]:
    """Every point of a document that :func:`attntune.engines.scaling.scaling` returned."""
    found = []
    for name, rows in document["models"].items():
        for row in rows:
            medians = {int(n): [statistics.median(turn) for turn in turns] for n, turns in row["rounds"].items()}
            first = document["threads"][0]
            for count in document["threads"]:
                samples = [secs for turn in row["rounds"][str(count)] for secs in turn]
                low, high = np.quantile(samples, [0.25, 0.75])
                found.append(Point(
                    name, row["dims"], count, row["flops"], row["dependent_steps"], statistics.median(samples),
                    (float(low), float(high)),
                    None if count == first else paired_ratio(medians[first], medians[count]),
                    document["peaks"][str(count)]["flops_per_sec"]["float32"],
                ))  # fmt: skip
    return found


def scaling_section(document: Mapping[str, Any], titles: Mapping[str, str], heading: str) -> str:
    """How it was taken, and a table with one line for each model and shape."""
    threads = document["threads"]
    settings, found = document["settings"], points(document)
    peaks = ", ".join(f"{document['peaks'][str(n)]['flops_per_sec']['float32'] / 1e9:.0f} GFLOP/s" for n in threads)
    counts = " and ".join(map(str, threads))
    tuned = f"tuned for {settings['tuning_secs']:g} s each" if settings["tuning_secs"] else "default schedules"
    lines = [
        f"### {heading}",
        "",
        f"{document['machine'].get('cpu_model', 'unknown CPU')}, {document['time'][:10]}; {counts} threads, measured "
        f"float32 peaks {peaks}; {tuned}; {settings['rounds']} interleaved rounds. Times are medians with "
        "quartiles; speed-ups are medians over rounds, with a 95 % interval.",
        "",
    ]
    dims = list(found[0].dims)
    head = ["encoder", " × ".join(dims), "MFLOP", "dependent steps"]
    for count in threads:
        head += [f"{_threads(count)}, ms", f"GFLOP/s ({count})", f"% of peak ({count})"]
    head += [f"{_threads(count)}: speed-up" for count in threads[1:]]
    rows = []
    for start in range(0, len(found), len(threads)):
        group = found[start : start + len(threads)]
        first = group[0]
        row = [
            titles.get(first.model, first.model), "×".join(map(str, first.dims.values())), f"{first.flops / 1e6:.4g}",
            str(first.dependent_steps),
        ]  # fmt: skip
        for point in group:
            low, high = point.quartiles_secs
            row += [
                f"{1e3 * point.median_secs:.3g} [{1e3 * low:.3g}, {1e3 * high:.3g}]",
                f"{point.flops_per_sec / 1e9:.3g}", f"{100 * point.share:.0f}",
            ]  # fmt: skip
        ratios = [point.speed_up for point in group if point.speed_up is not None]
        row += [f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]" for ratio in ratios]
        rows.append(row)
    return "\n".join([*lines, *table(head, rows)]) + "\n"


def plot_scaling(
    documents: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], along: str, path: Path, **fixed: int
) -> None:
    """One row of panels for each document: latency, speed-up by threads, share of the peak, all against ``along``.

    Args:
        documents: by what stands over their panels.
        titles: of models.
        along: the dimension on the horizontal axis.
        path: the PNG to write.
        fixed: values of other dimensions; points with others are left out.
    """
    with picture(path, (11.5, 3.5 * len(documents))) as figure:
        panels = figure.subplots(len(documents), 3, squeeze=False)
        for axes, (heading, document) in zip(panels, documents.items(), strict=True):
            kept = [p for p in points(document) if all(p.dims[dim] == size for dim, size in fixed.items())]
            most = max(document["threads"])
            _panel(axes[0], kept, titles, along)
            axes[0].set_yscale("log")
            plain_log_axis(axes[0].yaxis)
            axes[0].set(ylabel="latency, ms (log scale)", title=f"{heading}\nLatency ({_styles(document)})")
            _ratio_panel(axes[1], kept, titles, along, most)
            axes[1].set(ylabel=f"time of 1 thread / time of {most}", title=f"What {_threads(most)} bring")
            _share_panel(axes[2], [p for p in kept if p.threads == most], titles, along)
            axes[2].set(ylabel=f"% of the measured peak of {_threads(most)}", title="Arithmetic rate")
            for panel in axes:
                panel.set(xscale="log", xlabel=f"{along} length")
                ticks = sorted({p.dims[along] for p in kept})
                panel.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7.5)
                panel.minorticks_off()
                panel.grid(visible=True, axis="y")
        axes[0].legend(loc="upper left", fontsize=8)


def _series(found: Sequence[Point]) -> dict[str, tuple[str, list[Point]]]:
    """Model → its colour and its points."""
    names = dict.fromkeys(point.model for point in found)
    return {
        name: (colour, [p for p in found if p.model == name])
        for name, colour in zip(names, _COLOURS, strict=False)
    }  # fmt: skip


def _panel(axes: Any, found: Sequence[Point], titles: Mapping[str, str], along: str) -> None:
    for name, (colour, own) in _series(found).items():
        counts = sorted({p.threads for p in own})
        for count in counts:
            line = [p for p in own if p.threads == count]
            x = [p.dims[along] for p in line]
            axes.plot(
                x, [1e3 * p.median_secs for p in line], color=colour, marker="o", markersize=3.5,
                linestyle="-" if count == counts[-1] else "--",
                label=titles.get(name, name) if count == counts[-1] else None,
            )  # fmt: skip
            low, high = zip(*(p.quartiles_secs for p in line), strict=True)
            axes.fill_between(x, [1e3 * v for v in low], [1e3 * v for v in high], color=colour, alpha=0.2, linewidth=0)


def _ratio_panel(axes: Any, found: Sequence[Point], titles: Mapping[str, str], along: str, most: int) -> None:
    for name, (colour, own) in _series(found).items():
        pairs = [(p, p.speed_up) for p in own if p.threads == most and p.speed_up is not None]
        x, y = [p.dims[along] for p, _ in pairs], [ratio.value for _, ratio in pairs]
        spread = [[r.value - r.low for _, r in pairs], [r.high - r.value for _, r in pairs]]
        axes.errorbar(x, y, spread, color=colour, marker="o", markersize=3.5, capsize=2.5, label=titles.get(name, name))
    axes.axhline(1.0, color=GREY, linewidth=1.0)
    axes.axhline(most, color=GREY, linewidth=1.0, linestyle=":")
    axes.set_ylim(0, most * 1.15)


def _share_panel(axes: Any, found: Sequence[Point], titles: Mapping[str, str], along: str) -> None:
    for name, (colour, own) in _series(found).items():
        axes.plot([p.dims[along] for p in own], [100 * p.share for p in own], color=colour, marker="o", markersize=3.5,
                  label=titles.get(name, name))  # fmt: skip
    axes.set_ylim(0, 100)


def _styles(document: Mapping[str, Any]) -> str:
    *fewer, most = (_threads(count) for count in sorted(document["threads"]))
    return f"solid: {most}; dashed: {', '.join(fewer)}" if fewer else most


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
