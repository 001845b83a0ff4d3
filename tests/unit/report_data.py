"""Made-up records and comparisons with known statistics, for tests of the report."""

import math
from datetime import UTC, datetime, timedelta

import numpy as np

from attntune.database.record import Status, TuningRecord
from attntune.engines.comparison import Case, Comparison, Outcome, Result
from attntune.ops import Attention, LayerNorm, Linear
from attntune.search.space import Config

TARGET = "cpu/znver4/2"
START = datetime(2026, 1, 1, tzinfo=UTC)
MACHINE = {
    "cpu_model": "AMD EPYC 9R14", "cores": 2, "logical_cores": 2, "load_average": 0.4, "governor": "unknown",
    "versions": {"attntune": "0.1.0", "tvm": "0.27.0.post1", "llvm": "20"},
}  # fmt: skip
PEAKS = {"flops_per_sec": {"float32": 215e9}, "read_bytes_per_sec": 55e9, "copy_bytes_per_sec": 40e9}
WORKLOADS = (
    (Linear(rows=128, in_features=384, out_features=1152), 1.0e-3),
    (Linear(rows=128, in_features=384, out_features=1536, activation="gelu"), 1.4e-3),
    (Attention(batch=1, heads=12, q_len=128, kv_len=128, head_dim=32, packed=True, mask=True), 4e-4),
    (LayerNorm(rows=128, features=384, residual=True), 1.5e-5),
)


def record(workload, i, secs, status=Status.CORRECT, **fields):
    return TuningRecord(
        workload=workload.key(), target=TARGET, config=Config.of(tile=i),
        status=status, run_secs=tuple(secs * f for f in (0.98, 1.0, 1.03)) if secs else (), is_default=i == 0,
        machine={**MACHINE, "load_average": 0.1 * i},
        **{"time": (START + timedelta(seconds=1.5 * i)).isoformat(), "template": "test:Template", **fields},
    )  # fmt: skip


def tuning_records(trials=24, final=True):
    """Each workload's default, random trials of which every seventh fails, and a final in turns."""
    found = []
    for n, (workload, default_secs) in enumerate(WORKLOADS):
        rng = np.random.default_rng(n)
        best = (0, default_secs)
        for i in range(trials):
            secs = default_secs if i == 0 else default_secs * math.exp(rng.normal(0.15 - 0.02 * i, 0.2))
            if i % 7 == 6:
                status = (Status.TIMEOUT, Status.WRONG_RESULT, Status.BUILD_ERROR)[i // 7 % 3]
                found.append(record(workload, i, None, status, message="no"))
                continue
            found.append(record(workload, i, secs))
            best = min(best, (i, secs), key=lambda pair: pair[1])
        if final:
            at = (START + timedelta(seconds=100)).isoformat()
            found += [
                record(workload, 0, default_secs * 1.02, final=True, time=at),
                record(workload, best[0], best[1] * 1.01, final=True, time=at),
            ]
    return found


def comparison(rounds=9):
    """attntune faster than ONNX Runtime; slower than PyTorch at 1×512; torch.compile not installed."""
    rng = np.random.default_rng(0)
    medians = {
        "attntune": {(1, 128): 14.2e-3, (8, 128): 123e-3, (1, 512): 85e-3},
        "onnxruntime": {(1, 128): 21.6e-3, (8, 128): 174e-3, (1, 512): 115e-3},
        "pytorch": {(1, 128): 24.5e-3, (8, 128): 124e-3, (1, 512): 70e-3},
    }
    results = []
    for batch, seq in medians["attntune"]:
        case = Case({"batch": batch, "seq": seq})
        drift = np.exp(rng.normal(0, 0.08, rounds))
        for engine, secs in medians.items():
            samples = tuple(tuple(secs[batch, seq] * d * np.exp(rng.normal(0, 0.02, 5))) for d in drift)
            samples = tuple(tuple(float(s) for s in turn) for turn in samples)
            variant = "onnxruntime" if engine == "onnxruntime" else ""
            results.append(Result(engine, case, Outcome.OK, samples, 3.2e-6, variant))
        results.append(Result("torch-compile", case, Outcome.UNAVAILABLE, message="needs a C++ compiler: install g++"))
    engines = {
        "attntune": {"title": "attntune", "version": "0.1.0"},
        "onnxruntime": {"title": "ONNX Runtime", "version": "1.32.0", "variants": ["decomposed", "onnxruntime"],
                        "rejected": {}},
        "pytorch": {"title": "PyTorch", "version": "2.13.0", "mode": "eager"},
        "torch-compile": {"title": "torch.compile"},
    }  # fmt: skip
    settings = {"rounds": rounds, "turn_secs": 0.25, "warmup": 2, "pause_secs": 0.05}
    return Comparison(
        "all-MiniLM-L6-v2", "forward", 2, tuple(results), engines, settings, MACHINE, "2026-01-01T00:00:00"
    )
