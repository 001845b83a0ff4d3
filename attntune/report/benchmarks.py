"""Benchmarks as Markdown: tables of kernels and of models, generated from their raw samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attntune.engines.comparison import Comparison, Outcome, geometric_mean, paired_ratio
from attntune.engines.kernel_comparison import OURS, KernelComparison, KernelResult
from attntune.errors import ReportError
from attntune.ops import workload_from_key

Case = tuple[str, str, str]

_MOMENT = (
    "*% of the moment's*: of what the cores did as the same limit was measured again beside each round, multiply-adds "
    "in registers or, from cold caches, memory read; medians over rounds, with a 95 % interval. "
)


def kernel_section(found: KernelComparison, raw: str) -> str:
    """Title, how it was taken, a summary by group and state of the caches, and every case."""
    others = [name for name in found.engines if name != OURS]
    lines = [
        f"## {found.suite}: {_dtypes(found)}, {_where(found)}, {found.time[:10]}",
        "",
        f"{_machine(found)}; {_peaks(found.peaks)}. {_MOMENT if _beside(found) else ''}"
        f"{found.settings.get('rounds')} interleaved rounds, each "
        "engine in a process of its own; ratios are medians over rounds of the other's time over attntune's, above 1 "
        "attntune is faster, with a 95 % "
        f"interval. Engines: {_engines(found)}. Raw samples: [`{raw}`]({raw}).",
        "",
    ]
    lines += [*_summary(found, others), ""]
    lines += ["<details><summary>Every case</summary>", "", *_cases(found, others), "", "</details>"]
    if problems := _problems(found):
        lines += ["", "Not timed:", "", *problems]
    return "\n".join(lines) + "\n"


def _summary(found: KernelComparison, others: Sequence[str]) -> list[str]:
    beside = _beside(found)
    head = ["group", "caches", "kernels", "% of peak (geometric mean)", "lowest"]
    head += ["% of the moment's (geometric mean)", "lowest"] if beside else []
    for name in others:
        title = found.engines[name].get("title", name)
        head += [f"{title} ÷ attntune (geometric mean)", "lowest"]
    if len(others) > 1:
        head += ["best of these ÷ attntune (geometric mean)", "lowest"]
    rows = []
    groups = dict.fromkeys((group, cache) for group, _, cache in found.cases())
    for group, cache in groups:
        cases = [case for case in found.cases() if (case[0], case[2]) == (group, cache)]
        ours = [r for case in cases if (r := found.result(OURS, case)) is not None and r.rounds]
        shares = [limit[1] for r in ours if (limit := r.limit(found.peaks)) is not None]
        if not ours:
            continue
        row = [group, cache, str(len(ours))]
        row += _percents(shares)
        row += _percents([share.value for r in ours if (share := r.share()) is not None]) if beside else []
        for name in others:
            ratios = [(ratio.value, case[1]) for case in cases if (ratio := found.ratio(name, case)) is not None]
            row += _mean_and_lowest(ratios)
        if len(others) > 1:
            row += _mean_and_lowest([(best, case[1]) for case in cases if (best := _best_ratio(found, others, case))])
        rows.append(row)
    return table(head, rows)


def _mean_and_lowest(ratios: Sequence[tuple[float, str]]) -> list[str]:
    if not ratios:
        return ["", ""]
    low, at = min(ratios)
    return [f"{geometric_mean(value for value, _ in ratios):.2f}×", f"{low:.2f}× ({at})"]


def _best_ratio(found: KernelComparison, others: Sequence[str], case: Case) -> float | None:
    """Of the fastest of the others."""
    ratios = [ratio.value for name in others if (ratio := found.ratio(name, case)) is not None]
    return min(ratios, default=None)


def _cases(found: KernelComparison, others: Sequence[str]) -> list[str]:
    beside = _beside(found)
    head = ["group", "case", "caches", "attntune, µs", "rate", "% of peak"]
    head += ["% of the moment's", "schedule"] if beside else ["schedule"]
    for name in others:
        title = found.engines[name].get("title", name)
        head += [f"{title} ÷ attntune", f"{title}'s way"]
    rows = []
    for case in found.cases():
        ours = found.result(OURS, case)
        if ours is None or not ours.rounds:
            continue
        bound, share = ours.limit(found.peaks) or ("", math.nan)
        of_peak = f"{_percent(share)} {bound}" if bound else ""
        row = [*case, f"{ours.median_secs * 1e6:.1f}", _rate(ours, bound), of_peak]
        if beside:
            at = ours.share()
            row.append("" if at is None else f"{_percent(at.value)} [{100 * at.low:.0f}, {100 * at.high:.0f}]")
        row.append(ours.way)
        for name in others:
            theirs, ratio = found.result(name, case), found.ratio(name, case)
            shown = "" if ratio is None else f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]"
            row += [shown, theirs.way if theirs is not None else ""]
        rows.append(row)
    return table(head, rows)


def _rate(result: KernelResult, bound: str) -> str:
    workload = workload_from_key(result.workload)
    if bound == "memory":
        return f"{workload.bytes_moved() / result.median_secs / 1e9:.1f} GB/s"
    return _flops(workload.flops() / result.median_secs)


def _problems(found: KernelComparison) -> list[str]:
    """What was not timed, cases of one reason together."""
    reasons: dict[tuple[str, str, str, str], list[str]] = {}
    for result in found.results:
        if result.outcome is not Outcome.OK:
            at = (result.group, result.engine, str(result.outcome), " ".join(result.message.split())[:200])
            labels = reasons.setdefault(at, [])
            if result.label not in labels:
                labels.append(result.label)
    merged: dict[tuple[str, str, str], list[str]] = {}
    for (group, engine, outcome, _), labels in reasons.items():
        merged.setdefault((group, engine, outcome), []).extend(labels)
    first = {at[:3]: at[3] for at in reversed(reasons)}
    left_out = [
        f"- {engine}: {' '.join(reason.split())[:200]}" for engine, reason in found.settings.get("left_out", {}).items()
    ]
    return left_out + [
        f"- {group}, {engine}, {outcome.replace('_', ' ')}: {len(labels)} kernels ({', '.join(labels[:3])}"
        f"{', …' if len(labels) > 3 else ''}); {first[group, engine, outcome]}"
        for (group, engine, outcome), labels in merged.items()
    ]


def encoder_section(found: Mapping[str, Comparison]) -> str:
    """One table for each comparison, by the file that holds its raw samples."""
    lines = ["## encoder: models end to end", ""]
    for raw, comparison in found.items():
        own = str(comparison.engines.get(OURS, {}).get("precision", "float32"))
        others = [name for name in comparison.engine_names() if name != OURS]
        lines += [
            f"{comparison.model}, attntune in {own}, {comparison.threads} threads, {comparison.time[:10]}, "
            f"{comparison.machine.get('cpu_model', 'unknown CPU')}, {comparison.settings.get('rounds')} rounds; "
            f"[`{raw}`]({raw}). Times of the others are ratios to attntune's.",
            "",
        ]
        rows = []
        best: list[float] = []
        for case in comparison.cases():
            ours = comparison.result(OURS, case)
            if ours is None or not ours.rounds:
                rows.append([case.label(), "" if ours is None else str(ours.outcome)])
                continue
            row = [case.label(), f"{ours.median_secs * 1e3:.2f}"]
            fair = []
            for name in others:
                ratio, theirs = comparison.ratio(name, case), comparison.result(name, case)
                if ratio is None:
                    row.append("" if theirs is None else str(theirs.outcome).replace("_", " "))
                    continue
                row.append(f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]")
                if comparison.engines.get(name, {}).get("precision", "float32") == own:
                    fair.append(ratio.value)
            row.append(f"{min(fair):.2f}×" if fair else "")
            best += [min(fair)] if fair else []
            rows.append(row)
        head = ["case", "attntune, ms", *(comparison.title(name) for name in others), f"best in {own}"]
        lines += [*table(head, [[*row, *[""] * (len(head) - len(row))] for row in rows]), ""]
        if best:
            lines += [f"Against the best in {own}: geometric mean {geometric_mean(best):.2f}×.", ""]
    return "\n".join(lines)


def tuning_section(document: Mapping[str, Any], raw: str) -> str:
    """How long each search took, what it gained over the defaults, and whether the results agree end to end."""
    lines = [
        f"## tuning: {document['model']}, {document['threads']} threads, {document['time'][:10]}",
        "",
        f"Shapes {', '.join(document['shapes'])}; {document['machine'].get('cpu_model', 'unknown CPU')}. Times "
        "of kernels are from the final rounds of each run; those of the model from interleaved rounds, in processes of "
        "their own, with ratios to the last search's: medians over rounds, with a 95 % interval. "
        f"Raw samples: [`{raw}`]({raw}).",
        "",
    ]
    rows = [
        [
            run.get("name") or f"seed {run['seed']}", f"{run['secs']:.0f} s", str(run["trials"]), str(run["workloads"]),
            f"{geometric_mean(run['default_over_tuned']):.3f}×",
        ]
        for run in document["runs"]
    ]  # fmt: skip
    lines += table(["search", "took", "trials", "kernels", "default ÷ tuned (geometric mean)"], rows)
    names = list(document["end_to_end"][0]["rounds"]) if document["end_to_end"] else []
    rows = []
    for row in document["end_to_end"]:
        rounds = {name: [statistics.median(turn) for turn in row["rounds"][name]] for name in names}
        cells = []
        for name in names:
            ratio = paired_ratio(rounds[name], rounds[names[-1]])
            cell = f"{statistics.median(rounds[name]) * 1e3:.2f} ms"
            cells.append(
                cell if name == names[-1] else f"{cell}, {ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]"
            )
        rows.append([row["shape"], *cells])
    lines += ["", *table(["batch × seq", *names], rows)]
    return "\n".join(lines) + "\n"


def generation_section(document: Mapping[str, Any], raw: str) -> str:
    """One table for each prompt: tokens a second of every writer, and how often attntune writes while it writes one."""
    writers, heard = document["writers"], bool(document.get("heard"))
    lines = [
        f"## {'transcription' if heard else 'generation'}: {document['model']}, {document['threads']} threads, "
        f"{document['time'][:10]}",
        "",
        f"{document['machine'].get('cpu_model', 'unknown CPU')}; one sequence, greedy, at most "
        f"{document['new_tokens']} new tokens, {document['settings']['rounds']} interleaved rounds, each writer in a "
        "process of its own; medians, "
        "ratios of paired rounds with a 95 % interval: how many times as fast as the writer attntune is. "
        f"Raw samples: [`{raw}`]({raw}).",
        "",
    ]
    for label, samples in document["samples"].items():
        ours = [name for name in samples if name.startswith(OURS)]
        prompt = document["prompt_tokens"][label]
        phases = (("encoder on", "prefill_secs", 0), ("whole of", "step_secs", 0)) if heard else (
            ("prefill of", "prefill_secs", prompt), ("decode after", "step_secs", 1)
        )  # fmt: skip
        for phase, field, tokens in phases:
            head = [f"{phase} {label}", "ms" if heard else "tokens/s"]
            head += [f"{writers[name]['title']} is" for name in ours]
            rows = []
            for name, rounds in samples.items():
                times = [turn[field] for turn in rounds]
                median = statistics.median(times)
                row = [writers[name]["title"], f"{median * 1e3:.0f}" if heard else f"{tokens / median:.1f}"]
                for own in ours:
                    if name.startswith(OURS):
                        row.append("")
                        continue
                    ratio = paired_ratio(times, [turn[field] for turn in samples[own]])
                    row.append(f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]")
                rows.append(row)
            lines += [*table(head, rows), ""]
        first = document["tokens"][label]
        agreeing = [
            f"{writers[name]['title']} {_common(first[name], first[OURS])}" for name in first if name != OURS
        ]  # fmt: skip
        lines += [
            f"First tokens in common with attntune float32, of {document['new_tokens']}: {', '.join(agreeing)}.",
            "",
        ]
    lines += [f"- {name}: {reason}" for name, reason in document["left_out"].items()]
    return "\n".join(lines).rstrip() + "\n"


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens agree before the first that differs."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def update_page(page: Path, name: str, section: str, *, by: str = "scripts/benchmark") -> None:
    """Put a section that ``by`` generated into a page, between its marks; at the end where the page has none yet.

    Raises:
        ReportError: the page has one of the two marks only.
    """
    begin, end = f"<!-- begin {name} (generated by {by}) -->", f"<!-- end {name} -->"
    text = page.read_text() if page.exists() else "# Measurements\n"
    if (begin in text) != (end in text):
        raise ReportError(f"{page}: expected both marks of section {name!r} or none, found one of {begin} and {end}")
    block = f"{begin}\n{section.strip()}\n{end}"
    if begin in text:
        before, _, rest = text.partition(begin)
        text = before + block + rest.partition(end)[2]
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    page.write_text(text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table's lines."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _beside(found: KernelComparison) -> bool:
    """Whether the machine was measured beside the rounds."""
    return any(result.limits for result in found.results)


def _percents(shares: Sequence[float]) -> list[str]:
    """Geometric mean and lowest."""
    return [_percent(geometric_mean(shares)), _percent(min(shares))] if shares else ["", ""]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _dtypes(found: KernelComparison) -> str:
    return ", ".join(dict.fromkeys(r.group.split()[0] for r in found.results if r.rounds)) or "nothing timed"


def _peaks(peaks: Mapping[str, Any]) -> str:
    if not peaks:
        return "peaks not measured"
    rates = [f"{_flops(rate)} {dtype}" for dtype, rate in peaks.get("flops_per_sec", {}).items()]
    how = peaks.get("source", "the better of two measurements, before and after")
    return f"measured peaks {', '.join(rates)}, {peaks.get('read_bytes_per_sec', 0) / 1e9:.1f} GB/s read ({how})"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:.0f} GFLOP/s"


def _where(found: KernelComparison) -> str:
    return str(found.machine["target"]["name"]) if "gpu" in found.machine else f"{found.threads} threads"


def _machine(found: KernelComparison) -> str:
    """The CPU; of a comparison on a GPU, that, its driver and its limits."""
    if "gpu" not in found.machine:
        return str(found.machine.get("cpu_model", "unknown CPU"))
    gpu = found.machine["gpu"]
    name = gpu.get("name") or found.settings.get("device") or "unknown GPU"
    limits = [
        f"{what} {gpu[key]}{unit}"
        for what, key, unit in (("driver", "driver", ""), ("SM clock", "sm_clock_mhz", " MHz"),
                                ("power limit", "power_limit_watts", " W"))
        if gpu.get(key)
    ]  # fmt: skip
    return ", ".join([name, *limits])


def _engines(found: KernelComparison) -> str:
    return ", ".join(f"{e.get('title', name)} {e.get('version', '')}".strip() for name, e in found.engines.items())
