"""What ``scripts/gpu_check`` found, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attntune.database.record import Status, TuningRecord
from attntune.engines.comparison import Outcome
from attntune.engines.gpu_models import problems
from attntune.engines.kernel_comparison import OURS, KernelComparison
from attntune.report.benchmarks import kernel_section, table, update_page

_SCRIPT = "scripts/gpu_check"


def write_page(folder: Path, corners: Sequence[str], parts: Sequence[str]) -> Path:
    """Write ``README.md`` in the folder of results from the files that are there.

    Args:
        folder: of the results.
        corners: operators whose corner workloads are checked.
        parts: names of benchmark parts.
    """
    page = folder / "README.md"
    checked = [path for op in corners if (path := folder / f"check-{op}.json").exists()]
    defaults = [path for part in parts if (path := folder / f"check-{part}.json").exists()]
    if checked or defaults:
        update_page(page, "checks", _checks(checked, defaults), by=_SCRIPT)
    models = folder / "check-models.json"
    if models.exists():
        update_page(page, "models", _models(json.loads(models.read_text())), by=_SCRIPT)
    for part in parts:
        path = folder / f"{part}.json"
        if path.exists():
            update_page(page, part, kernel_section(KernelComparison.load(path), path.name), by=_SCRIPT)
    return page


def _checks(corners: Sequence[Path], parts: Sequence[Path]) -> str:
    """Default configs by template: how many are right, how far off the worst is, what is wrong."""
    documents: list[Mapping[str, Any]] = [json.loads(path.read_text()) for path in corners]
    records = [TuningRecord.from_json(fields) for document in documents for fields in document["records"]]
    compared = [KernelComparison.load(path) for path in parts]
    devices = [str(document["device"]) for document in documents] + [str(c.settings.get("device")) for c in compared]
    lines = [
        "## checks: default configs against the float64 reference", "",
        f"On {', '.join(dict.fromkeys(devices))}. Errors are shares of the reference's largest value.", "",
    ]  # fmt: skip
    rows, problems = [], []
    for template in dict.fromkeys(record.template for record in records):
        own = [record for record in records if record.template == template]
        rows.append([template.partition(":")[2], "corner workloads", *_counted(own), ""])
    for record in records:
        if record.status is not Status.CORRECT:
            problems.append(f"- `{record.workload}` {record.config}: {record.status}: {_short(record.message)}")
    for comparison in compared:
        ours = [result for result in comparison.results if result.engine == OURS]
        right = [result for result in ours if result.outcome is Outcome.OK]
        apart = [r.max_rel_difference for r in comparison.results if r.max_rel_difference is not None]
        worst = max((r.max_rel_error for r in ours if r.max_rel_error is not None), default=None)
        rows.append([
            comparison.suite.removeprefix("check-"), "benchmark shapes", str(len(ours)), str(len(right)), _share(worst),
            _share(max(apart, default=None)),
        ])  # fmt: skip
        problems += [
            f"- {r.group} {r.label}: {r.outcome}: {_short(r.message)}" for r in ours if r.outcome is not Outcome.OK
        ]
    head = ["what", "kernels of", "checked", "right", "largest error", "largest difference from PyTorch, everywhere"]
    lines += table(head, rows)
    unsupported = sum(len(document["unsupported"]) for document in documents)
    if unsupported:
        lines += ["", f"{unsupported} corner workloads have no template for CUDA."]
    if problems:
        lines += ["", "Wrong or failed:", "", *problems]
    return "\n".join(lines) + "\n"


def _models(document: Mapping[str, Any]) -> str:
    """Whole models against the CPU."""
    lines = [
        "## whole models: results of the device against the CPU's in float32", "",
        f"On {document['device']}. Small models with seeded weights, every entry, generation and beam search.", "",
    ]  # fmt: skip
    rows = [
        [row["model"], row["precision"], "failed", _short(row["error"])]
        if row.get("error")
        else [row["model"], row["precision"], f"{row['cosine']:.7f}", "" if row["differing"] else "the same"]
        for row in document["models"]
    ]
    lines += table(["model", "precision", "least cosine of a row", "tokens"], rows)
    wrong = problems(document["models"])
    if wrong:
        lines += ["", "Wrong or failed:", "", *(f"- {_short(line)}" for line in wrong)]
    return "\n".join(lines) + "\n"


def _counted(records: Sequence[TuningRecord]) -> list[str]:
    right = [record for record in records if record.status is Status.CORRECT]
    worst = max((r.max_rel_error for r in records if r.max_rel_error is not None), default=None)
    return [str(len(records)), str(len(right)), _share(worst)]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _short(message: str) -> str:
    return " ".join(message.split())[:300]
