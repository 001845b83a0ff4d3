"""What records say of the machine, and its measured peaks."""

import dataclasses
import json

import pytest

from attntune.errors import TargetError
from attntune.host import user_cache_dir
from attntune.measure import machine
from attntune.target import PRESETS, native


def test_machine_state_is_complete_and_json_ready():
    state = machine.machine_state(native())
    assert json.loads(json.dumps(state)) == state
    assert set(state) == {
        "cpu_model", "cores", "logical_cores", "load_average", "governor", "versions", "target",
    }  # fmt: skip
    assert state["cores"] == native().cores
    assert state["cpu_model"]
    assert set(state["versions"]) == {"attntune", "tvm", "llvm"}
    assert state["versions"]["llvm"]


def test_peaks_are_of_the_right_kind():
    # Bandwidth is of buffers four times as large as the last cache, which some machines have 260 MiB of.
    target = dataclasses.replace(native(), l3_bytes=16 * 1024**2)
    peaks = machine.measure_peaks(target)
    flops = peaks["flops_per_sec"]
    assert ("bfloat16" in flops) == target.has("avx512bf16")
    assert ("int8" in flops) == (target.has("avx2") or target.has("avx512bw"))
    assert set(flops) <= {"float32", "bfloat16", "int8"}
    assert all(value > 1e8 for value in flops.values())
    assert peaks["read_bytes_per_sec"] > 1e7
    assert peaks["copy_bytes_per_sec"] > 1e7
    assert json.loads(json.dumps(peaks)) == peaks


def test_peaks_of_another_machine_cannot_be_measured():
    with pytest.raises(TargetError, match="expected a CPU target"):
        machine.measure_peaks(PRESETS["sm_80"])
    foreign = dataclasses.replace(native(), features=(*native().features, "of-tomorrow"))
    with pytest.raises(TargetError, match="of-tomorrow"):
        machine.measure_peaks(foreign)


def test_peaks_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / "attntune"
    measured = []

    def measure(target):
        measured.append(target)
        return {"flops_per_sec": {"float32": float(len(measured))}}

    monkeypatch.setattr(machine, "measure_peaks", measure)
    target = native()
    assert machine.cached_peaks(target, measure=False) is None
    first = machine.cached_peaks(target)
    assert machine.cached_peaks(target) == first
    assert machine.cached_peaks(target, measure=False) == first
    assert len(measured) == 1
    fewer = target.with_cores(target.cores + 1)
    assert machine.cached_peaks(fewer) != first
    assert machine.cached_peaks(target, refresh=True) == {"flops_per_sec": {"float32": 3.0}}
    assert machine.cached_peaks(target) == {"flops_per_sec": {"float32": 3.0}}


def test_a_damaged_or_unwritable_cache_costs_only_time(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "measure_peaks", lambda target: {"flops_per_sec": {}})
    monkeypatch.setattr(machine, "user_cache_dir", lambda: tmp_path)
    (tmp_path / "peaks.json").write_text("{torn")
    assert machine.cached_peaks(native()) == {"flops_per_sec": {}}
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(machine, "user_cache_dir", lambda: tmp_path / "file")
    assert machine.cached_peaks(native()) == {"flops_per_sec": {}}
