"""What the records say of each kernel: winner against default, share of the machine's peak, the tuning curve."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from attntune.database.query import select
from attntune.database.record import Status, TuningRecord
from attntune.errors import WorkloadError
from attntune.ops import Workload, workload_from_key


@dataclass(frozen=True)
class Roofline:
    """How near a kernel is to what the machine was measured to do."""

    bound: str
    """``compute`` or ``memory``: what limits the kernel at the measured peaks."""
    percent: float
    """Of that peak. Above 100 for ``memory`` when operands stay in cache, as they do in ``hot`` measurements."""
    rate: float
    """FLOP/s when bound by compute, bytes/s when by memory."""


@dataclass(frozen=True)
class CurvePoint:
    """After one trial of a search."""

    trial: int
    """From 1."""
    elapsed_secs: float | None
    """Since the first record; None where records carry no time."""
    secs: float | None
    """Median of this trial; None when it failed."""
    best_secs: float | None
    """Best so far."""


@dataclass(frozen=True)
class Kernel:
    """One workload on one target by one template, with hot or cold caches."""

    workload: str
    label: str
    target: str
    dtype: str
    flops: int
    bytes_moved: int
    trials: int
    statuses: Mapping[str, int]
    winner: TuningRecord | None
    default: TuningRecord | None
    """The default's record from the round that decided, else its latest; None when it was never right."""
    curve: tuple[CurvePoint, ...]
    searched_default_secs: float | None
    """Median of the default among the trials of ``curve``; a final measures it anew."""
    calls: int | None = None
    """In one run of the model, where a summary tells."""

    @property
    def speedup(self) -> float | None:
        """Default time / winner's time."""
        if self.winner is None or self.default is None or not self.default.run_secs:
            return None
        return self.default.median_secs / self.winner.median_secs

    def roofline(self, peaks: Mapping[str, Any] | None, record: TuningRecord | None = None) -> Roofline | None:
        """Of ``record`` (the winner, when None) against ``peaks``, as ``measure_peaks`` gives them; None if unknown."""
        record = record or self.winner
        rates = (peaks or {}).get("flops_per_sec", {})
        if record is None or not record.run_secs or self.dtype not in rates or not self.flops:
            return None
        bandwidth = peaks.get("read_bytes_per_sec") if peaks else None
        compute_secs = self.flops / rates[self.dtype]
        memory_secs = self.bytes_moved / bandwidth if bandwidth else 0.0
        secs = record.median_secs
        if compute_secs >= memory_secs:
            return Roofline("compute", 100 * compute_secs / secs, self.flops / secs)
        return Roofline("memory", 100 * memory_secs / secs, self.bytes_moved / secs)


def summarize(records: Iterable[TuningRecord], summary: Mapping[str, Any] | None = None) -> tuple[Kernel, ...]:
    """One :class:`Kernel` per workload, target, template and state of the caches, in the order of their first records.

    Args:
        records: of one or more journals, in journal order.
        summary: :meth:`TuningSummary.to_json`; tells how often a model calls each workload.
    """
    groups: dict[tuple[str, str, str, str], list[TuningRecord]] = {}
    for record in records:
        groups.setdefault((record.workload, record.target, record.template, record.cache), []).append(record)
    calls = {row["workload"]: row["calls"] for row in (summary or {}).get("results", ())}
    return tuple(_kernel(key, target, group, calls.get(key)) for (key, target, _, _), group in groups.items())


def _kernel(key: str, target: str, records: Sequence[TuningRecord], calls: int | None) -> Kernel:
    try:
        workload: Workload | None = workload_from_key(key)
    except WorkloadError:  # an operator of somebody's plugin: its records are still worth a row
        workload = None
    trials = [record for record in records if not record.final]
    winner = select(records)
    return Kernel(
        workload=key,
        label=short_label(key) + ("" if records[0].cache == "hot" else f" {records[0].cache}"),
        target=target,
        dtype=workload.compute_dtype if workload else "",
        flops=workload.flops() if workload else 0,
        bytes_moved=workload.bytes_moved() if workload else 0,
        trials=len({record.config.key() for record in trials}),
        statuses=Counter(str(record.status) for record in trials),
        winner=winner,
        default=_default(records, winner),
        curve=tuning_curve(trials),
        searched_default_secs=next((r.median_secs for r in trials if r.is_default and r.run_secs), None),
        calls=calls,
    )


def _default(records: Sequence[TuningRecord], winner: TuningRecord | None) -> TuningRecord | None:
    right = [record for record in records if record.is_default and record.status is Status.CORRECT]
    if winner is not None and winner.final:
        same_round = [record for record in right if record.final and record.time == winner.time]
        right = same_round or right
    return right[-1] if right else None


def tuning_curve(trials: Sequence[TuningRecord]) -> tuple[CurvePoint, ...]:
    """Best so far after each trial; failed trials count as trials."""
    start = _when(trials[0]) if trials else None
    best: float | None = None
    points = []
    for number, record in enumerate(trials, 1):
        secs = record.median_secs if record.status is Status.CORRECT else None
        if secs is not None:
            best = secs if best is None else min(best, secs)
        now = _when(record)
        elapsed = (now - start).total_seconds() if now and start else None
        points.append(CurvePoint(number, elapsed, secs, best))
    return tuple(points)


def _when(record: TuningRecord) -> datetime | None:
    try:
        return datetime.fromisoformat(record.time)
    except ValueError:
        return None


def short_label(key: str) -> str:
    """A workload in a few words, for axes and tables: ``linear 128×384→1536 gelu``."""
    try:
        workload = workload_from_key(key)
    except WorkloadError:
        return key
    fields = dataclasses.asdict(workload)
    dtype = fields.pop("dtype", "float32")
    words = {"linear": _linear_words, "attention": _attention_words}.get(workload.op, _plain_words)(fields)
    return " ".join([workload.op.replace("_", " "), *words, *([dtype] if dtype != "float32" else [])])


def _linear_words(f: Mapping[str, Any]) -> list[str]:
    words = [f"{f['rows']}×{f['in_features']}→{f['out_features']}"]
    words += [f["activation"]] if f.get("activation") else []
    words += ["gated"] if f.get("gated") else []
    words += ["+residual"] if f.get("residual") else []
    return words + ([f"in sequences of {f['seq']}"] if f.get("seq") else [])


def _attention_words(f: Mapping[str, Any]) -> list[str]:
    heads = f"{f['heads']}h" if f["heads"] == f["kv_heads"] else f"{f['heads']}/{f['kv_heads']}h"
    length = f"{f['q_len']}" if f["q_len"] == f["kv_len"] else f"{f['q_len']}→{f['kv_len']}"
    words = [f"{f['batch']}×{length}", heads, f"d{f['head_dim']}"]
    words += [name for name in ("causal", "mask") if f.get(name)]
    return words + (["bias"] if f.get("bias_heads") else [])


def _plain_words(fields: Mapping[str, Any]) -> list[str]:
    # An optional size is 0 where the variant does not have it.
    sizes = [str(v) for v in fields.values() if isinstance(v, int) and not isinstance(v, bool) and v != 0]
    flags = [f"+{name}" for name, v in fields.items() if v is True and name != "normalize"]
    return ["×".join(sizes), *flags]


def peaks_for(peaks: Mapping[str, Any] | None, target: str, targets: int) -> Mapping[str, Any] | None:
    """The peaks of one target: ``peaks`` itself when there is one target only, else the entry under its key."""
    if peaks is None:
        return None
    if "flops_per_sec" in peaks:
        return peaks if targets == 1 else None
    return peaks.get(target)
