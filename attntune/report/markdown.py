"""The text of a report: tables of what was measured, what was not faster, and on which machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attntune.engines.comparison import BASELINE, Comparison, Outcome, Ratio, Result, geometric_mean
from attntune.report.kernels import Kernel, peaks_for


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> list[str]:
    """A Markdown table; ``align`` has one of ``l`` and ``r`` per column (the first left, others right by default)."""
    align = align or "l" + "r" * (len(header) - 1)
    marks = [":---" if side == "l" else "---:" for side in align]
    cells = [header, marks, *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells] + [""]


def milliseconds(secs: float) -> str:
    """Three significant digits: ``21.6``."""
    return f"{secs * 1e3:#.3g}".rstrip(".")


def microseconds(secs: float | None) -> str:
    """Three significant digits, or a dash."""
    return "–" if secs is None else f"{secs * 1e6:,.0f}" if secs >= 1e-4 else f"{secs * 1e6:.3g}"


def _timed(result: Result) -> str:
    low, high = result.quartiles_secs
    return f"{milliseconds(result.median_secs)} ({milliseconds(low)}–{milliseconds(high)})"


def _ratio(ratio: Ratio) -> str:
    text = f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]"
    return {"faster": f"**{text}**", "slower": f"{text} (slower)", "tied": f"{text} (tied)"}[ratio.verdict]


def headline(comparison: Comparison) -> list[str]:
    """The best of all engines at attntune's precision, then each: geometric mean of the ratios, range, verdicts."""
    cases, peers = comparison.cases(), comparison.peers()
    best = [found[1] for case in cases if (found := comparison.best_peer(case)) is not None]
    lines = []
    if best and len(peers) > 1:
        lines.append(_headline(f"the best of all {comparison.precision(BASELINE)} engines in each case", best))
    for name in peers:
        if ratios := [ratio for case in cases if (ratio := comparison.ratio(name, case)) is not None]:
            lines.append(_headline(comparison.title(name), ratios))
    return lines


def _headline(whom: str, ratios: Sequence[Ratio]) -> str:
    values = [ratio.value for ratio in ratios]
    verdicts = Counter(ratio.verdict for ratio in ratios)
    mean = geometric_mean(values)
    word = f"{mean:.2f}× as fast as" if mean >= 1 else f"slower than ({mean:.2f}× the speed of)"
    return (
        f"- attntune is **{word} {whom}** in the geometric mean of {len(ratios)} cases "
        f"(from {min(values):.2f}× to {max(values):.2f}×; faster in {verdicts['faster']}, "
        f"tied in {verdicts['tied']}, slower in {verdicts['slower']})."
    )


def comparison_section(comparison: Comparison, plot: str | None) -> list[str]:
    """Speed and parity of one comparison, and what was not timed."""
    missing = {r.engine for r in comparison.results if r.outcome is Outcome.UNAVAILABLE}
    names = [name for name in comparison.engine_names() if name not in missing]
    peers = [name for name in comparison.peers() if name in names]
    elsewhere = [name for name in names if name != BASELINE and name not in peers]
    lines = [f"## {comparison.model}, `{comparison.entry}`, {comparison.threads} threads", ""]
    if plot:
        lines += [f"![Latency, and time relative to attntune]({plot}.png)", ""]
    own = [*(name for name in names if name == BASELINE), *peers]
    if own:
        lines += [
            f"Engines that compute in {comparison.precision(BASELINE)}. Median ms (interquartile range). Then",
            "how many times as long as attntune each engine takes, with a 95 % interval: above 1, attntune is faster.",
            "Last, the same of whichever other engine is the fastest in that case.",
            "",
            *_speed_table(comparison, own, peers, best=True),
        ]
    for precision in dict.fromkeys(comparison.precision(name) for name in elsewhere):
        group = [name for name in elsewhere if comparison.precision(name) == precision]
        lines += [f"Engines that compute in {precision}, which is not the same task:", ""]
        lines += _speed_table(comparison, group, group, best=False)
    return lines + _parity(comparison, names) + _engines(comparison) + _untimed(comparison)


def _speed_table(comparison: Comparison, timed: Sequence[str], others: Sequence[str], best: bool) -> list[str]:
    cases = comparison.cases()
    relative = BASELINE in comparison.engine_names()
    header = [" × ".join(cases[0].dims) if cases else "case", *(f"{comparison.title(name)}, ms" for name in timed)]
    if relative:
        header += [f"{comparison.title(name)} / attntune" for name in others]
        header += ["best other / attntune"] if best else []
    rows = []
    for case in cases:
        row = [case.label()]
        for name in timed:
            result = comparison.result(name, case)
            row.append("–" if result is None else _timed(result) if result.rounds else _outcome(result.outcome))
        if relative:
            ratios = [comparison.ratio(name, case) for name in others]
            row += ["–" if ratio is None else _ratio(ratio) for ratio in ratios]
            if best:
                found = comparison.best_peer(case)
                row.append("–" if found is None else f"{_ratio(found[1])} {comparison.title(found[0])}")
        rows.append(row)
    return table(header, rows)


def _parity(comparison: Comparison, names: Sequence[str]) -> list[str]:
    lines = ["Maximum absolute error against the float64 reference, and the smallest cosine of an output row with the",
             "reference's, both of which were known before timing:", ""]  # fmt: skip
    rows = []
    for case in comparison.cases():
        found = [comparison.result(name, case) for name in names]
        rows.append([case.label(), *("–" if r is None else _agreement(r) for r in found)])
    lines += table(["case", *(comparison.title(name) for name in names)], rows)
    demanded = comparison.settings.get("parity")
    if isinstance(demanded, Mapping):
        lines += ["Demanded: " + "; ".join(f"{precision}: {text}" for precision, text in demanded.items()) + ".", ""]
    return lines


def _agreement(result: Result) -> str:
    if result.max_abs_error is None:
        return "–"
    return f"{result.max_abs_error:.1e}" + ("" if result.min_cosine is None else f", cos {_cosine(result.min_cosine)}")


def _cosine(value: float) -> str:
    """As many nines as it has: ``0.99987``, ``1 - 2e-13``."""
    return f"{value:.5f}" if value < 0.99999 else f"1 - {max(1.0 - value, 0.0):.0e}"


def _outcome(outcome: Outcome) -> str:
    return {"wrong_result": "wrong result", "failed": "failed", "unavailable": "not installed"}.get(outcome, outcome)


def _engines(comparison: Comparison) -> list[str]:
    lines = []
    missing = {r.engine for r in comparison.results if r.outcome is Outcome.UNAVAILABLE}
    for name in comparison.engine_names():
        if name in missing:
            continue
        info = {k: v for k, v in comparison.engines.get(name, {}).items() if k not in ("title", "version") and v}
        chosen = Counter(r.variant for r in comparison.results if r.engine == name and r.variant)
        if chosen:
            info["fastest variant"] = ", ".join(f"{variant} in {count}" for variant, count in chosen.items())
        version = comparison.engines.get(name, {}).get("version", "")
        details = "; ".join(f"{key}: {_flat(value)}" for key, value in info.items())
        lines.append(f"- {comparison.title(name)} {version}".rstrip() + (f": {details}" if details else ""))
    return ["Engines:", "", *lines, ""]


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} ({v})" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _untimed(comparison: Comparison) -> list[str]:
    seen = dict.fromkeys((r.engine, r.outcome, r.message) for r in comparison.results if not r.rounds)
    if not seen:
        return []
    lines = [f"- {comparison.title(name)}: {_outcome(outcome)}: {message.splitlines()[0] if message else ''}"
             for name, outcome, message in seen]  # fmt: skip
    return ["Not timed:", "", *lines, ""]


def negative_section(comparisons: Sequence[Comparison], kernels: Sequence[Kernel]) -> list[str]:
    """Where attntune is no faster than an engine of its precision, and kernels that tuning did not improve."""
    slower: list[str] = []
    tied: list[str] = []
    for comparison in comparisons:
        for name in comparison.peers():
            for case in comparison.cases():
                ratio = comparison.ratio(name, case)
                if ratio is None or ratio.verdict == "faster":
                    continue
                line = (f"- {comparison.model} `{comparison.entry}` at {case.label()}: {comparison.title(name)} takes "
                        f"{ratio.value:.2f}× attntune's time [{ratio.low:.2f}, {ratio.high:.2f}]")  # fmt: skip
                (slower if ratio.verdict == "slower" else tied).append(line)
    kept = [k for k in kernels if k.winner is not None and k.winner.is_default and k.trials > 1]
    wrong = [k for k in kernels if k.winner is None]
    lines = ["## Where attntune is not faster", ""]
    if comparisons:
        lines += ["Slower than another engine:", "", *(slower or ["- in no case measured"]), ""]
        lines += ["No clear difference:", "", *tied, ""] if tied else []
    if kept:
        names = ", ".join(k.label for k in kept)
        lines += [f"Tuning found nothing better than the default schedule for {len(kept)} kernels: {names}.", ""]
    if wrong:
        lines += [f"No schedule was right for: {', '.join(k.label for k in wrong)}.", ""]
    return lines


def kernel_section(kernels: Sequence[Kernel], peaks: Mapping[str, Any] | None, plot: str | None) -> list[str]:
    """One row per kernel: default, tuned, share of peak."""
    targets = len({k.target for k in kernels})
    lines = ["## Kernels", ""]
    if plot:
        lines += [f"![Percent of measured peak per kernel]({plot}.png)", ""]
    lines += [
        "Median microseconds of the default schedule and of the winner, each alone, operands in cache unless it says"
    ]
    lines += [
        "cold. The peak is the one that limits the kernel: multiply-add rate, or memory bandwidth (which kernels whose"
    ]
    lines += ["operands stay in cache may exceed)."]
    header = ["kernel", *(["target"] if targets > 1 else []), "calls", "default, µs", "tuned, µs", "speed-up",
              "% of peak", "rate", "trials"]  # fmt: skip
    rows = []
    for k in kernels:
        roof = k.roofline(peaks_for(peaks, k.target, targets))
        default = k.default.median_secs if k.default is not None else None
        unit = "" if roof is None else "GFLOP/s" if roof.bound == "compute" else "GB/s"
        rows.append(
            [
                k.label,
                *([k.target] if targets > 1 else []),
                "–" if k.calls is None else str(k.calls),
                microseconds(default),
                microseconds(k.winner.median_secs if k.winner else None),
                "–" if k.speedup is None else f"{k.speedup:.2f}×",
                "–" if roof is None else f"{roof.percent:.0f} ({roof.bound})",
                "–" if roof is None else f"{roof.rate / 1e9:,.0f} {unit}",
                str(k.trials),
            ]
        )
    return [*lines, "", *table(header, rows)]


def tuning_section(
    kernels: Sequence[Kernel], summary: Mapping[str, Any] | None, plots: Sequence[str], shown: int
) -> list[str]:
    """How the search went: curves, and how trials ended."""
    statuses: Counter[str] = Counter()
    for kernel in kernels:
        statuses.update(kernel.statuses)
    lines = ["## Tuning", ""]
    if summary:
        seconds, trials = summary.get("elapsed_secs"), summary.get("trials")
        lines += [f"Searcher `{summary.get('searcher')}`, seed {summary.get('seed')}: {trials} new trials in "
                  f"{seconds:.0f} s; {summary.get('resumed', 0)} known from earlier runs."
                  if isinstance(seconds, int | float) else f"Searcher `{summary.get('searcher')}`.", ""]  # fmt: skip
        if summary.get("speedup"):
            lines += [
                f"All tuned kernels of one run together are {summary['speedup']:.2f}× as fast as the defaults.",
                "",
            ]
    for name in plots:
        what = "second" if name.endswith("seconds") else "trial"
        lines += [f"![Best so far per {what}]({name}.png)", ""]
    if plots and shown < len(kernels):
        lines += [f"Drawn: the {shown} kernels that weigh most of {len(kernels)}.", ""]
    total = sum(statuses.values())
    ended = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in statuses.most_common())
    return [*lines, f"{total} trials: {ended}.", ""]


def machine_section(machines: Sequence[Mapping[str, Any]], peaks: Mapping[str, Any] | None) -> list[str]:
    """The machines that measured, load over the measurements, and measured peaks."""
    lines = ["## Machine", ""]
    rows = [
        ["CPU", _distinct(m.get("cpu_model") for m in machines)],
        ["cores used", _distinct(m.get("cores") for m in machines)],
        ["logical cores", _distinct(m.get("logical_cores") for m in machines)],
        ["frequency governor", _distinct(m.get("governor") for m in machines)],
        ["load average (1 min) while measuring", _range(m.get("load_average") for m in machines)],
    ]
    for package in ("attntune", "tvm", "llvm"):
        rows.append([f"{package} version", _distinct((m.get("versions") or {}).get(package) for m in machines)])
    if peaks and "flops_per_sec" in peaks:
        rows += [
            [f"measured {d} multiply-add peak", f"{f / 1e9:,.0f} GFLOP/s"] for d, f in peaks["flops_per_sec"].items()
        ]
        for key, name in (("read_bytes_per_sec", "read"), ("copy_bytes_per_sec", "copy")):
            rows += [[f"measured memory bandwidth, {name}", f"{peaks[key] / 1e9:,.1f} GB/s"]] if key in peaks else []
    return lines + table(["", ""], rows, "ll")


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(v) for v in values if v not in (None, ""))) or "unknown"


def _range(values: Iterable[Any]) -> str:
    known = [float(v) for v in values if isinstance(v, int | float)]
    if not known:
        return "unknown"
    return f"{min(known):.2f}" if min(known) == max(known) else f"{min(known):.2f} to {max(known):.2f}"


def method_section(comparisons: Sequence[Comparison]) -> list[str]:
    """How the figures were taken, so that a reader can judge them."""
    lines = [
        "## How it was measured", "",
        "- Nothing was timed before its result had matched a float64 reference on the same inputs.",
        "- Absolute times are labels of one machine at one time, which other work may share; ratios are results.",
    ]  # fmt: skip
    for comparison in comparisons:
        s = comparison.settings
        when = f" ({comparison.time})" if comparison.time else ""
        lines.append(
            f"- {comparison.model}{when}: each engine in a process of its own with {comparison.threads} threads; "
            f"{s.get('rounds', '?')} rounds in turns, {s.get('warmup', '?')} warm-up calls and about "
            f"{s.get('turn_secs', '?')} s of timed calls in each, {s.get('pause_secs', '?')} s between turns. "
            "Ratios are medians of the per-round ratios of medians; intervals by bootstrap over rounds."
        )
    return [*lines, ""]
