"""The closed loop on an emulated device: builds, checks, times, races, records; and what a kernel that fails does."""

import re
from pathlib import Path

import pytest
from gpu import EmulatedRunner, needs_nvcc

import attntune
from attntune.database.journal import Journal
from attntune.database.record import Status
from attntune.errors import CompileError, TargetError
from attntune.measure.builder import build_trial
from attntune.measure.cuda_runner import CudaRunner
from attntune.measure.trial import MeasureOptions, Trial
from attntune.measure.worker import IsolatedProcess
from attntune.ops import Linear, RMSNorm
from attntune.target import PRESETS
from attntune.templates import template_for

HELPERS = str(Path(__file__).parents[1] / "helpers")
TARGET = PRESETS["sm_86"]
NORM = RMSNorm(4, 64)
OPTIONS = MeasureOptions(samples=3, warmup_secs=1e-6, min_sample_secs=1e-6, builders=1, run_timeout_secs=60)


@pytest.fixture
def runner(emulation_folder, monkeypatch):
    monkeypatch.setattr(EmulatedRunner, "folder", emulation_folder)
    with EmulatedRunner(OPTIONS) as runner:
        yield runner


def trial_of(workload, template=None, **knobs):
    used = template_for(workload, TARGET)
    config = used.default(workload, TARGET).replace(**knobs)
    return Trial(workload, TARGET, template or used.reference_name(), config)


@needs_nvcc
def test_tuning_runs_and_resumes(runner, tmp_path):
    options = {"target": TARGET, "database": tmp_path / "tuning.jsonl", "runner": runner, "peaks": {}, "seed": 1}
    summary = attntune.tune(NORM, trials=3, **options)
    records = Journal(tmp_path / "tuning.jsonl").load()
    assert [record.status for record in records] == [Status.CORRECT] * len(records)
    assert {record.target for record in records} == {"cuda/sm_86/84"}
    assert summary.trials == 3
    default = template_for(NORM, TARGET).default(NORM, TARGET)
    fastest = min((record for record in records if not record.final), key=lambda record: record.median_secs)
    # Emulated times are noise: where they put the default ahead by far, it has no rival to race.
    assert fastest.config == default or any(record.final for record in records)
    assert attntune.tune(NORM, trials=1, **options).resumed == 3


@needs_nvcc
def test_a_wrong_kernel_is_not_timed(runner):
    (record,) = runner.measure([trial_of(NORM, template="broken_cuda_templates:Wrong")])
    assert record.status is Status.WRONG_RESULT
    assert not record.run_secs


@needs_nvcc
def test_a_spilling_kernel_is_rejected_before_it_runs(tmp_path):
    trial = trial_of(NORM, template="broken_cuda_templates:Spilling")
    with (
        IsolatedProcess(threads=1, plugin_paths=[HELPERS]) as builder,
        pytest.raises(CompileError, match=r"kernel 'main_kernel' spills registers \(255 in use\)"),
    ):
        builder.call("attntune.measure.builder:build_trial", trial, str(tmp_path / "k.so"))
    with CudaRunner(MeasureOptions(builders=1, plugin_paths=(HELPERS,))) as runner:
        (record,) = runner.measure([trial])
    assert record.status is Status.BUILD_ERROR
    assert "spills registers" in record.message
    # What the assembler said stays in the record.
    report = r"\(255 registers, \d+ bytes spilled, \d+ bytes of stack, 0 bytes of shared memory, 32 threads\)"
    assert re.search(report, record.message)


@needs_nvcc
def test_a_built_trial_carries_what_its_kernels_take(tmp_path):
    built = build_trial(trial_of(Linear(64, 64, 64, dtype="float16")), str(tmp_path / "k.so"))
    (kernel,) = built.resources.values()
    assert kernel["registers"] > 0
    assert kernel["spill_bytes"] == 0
    assert kernel["shared_bytes"] > 0


def test_a_cpu_target_is_refused():
    with CudaRunner(OPTIONS) as runner, pytest.raises(TargetError, match="expected a CUDA target, got cpu/znver4"):
        list(runner.measure([Trial(NORM, PRESETS["znver4"], "", template_for(NORM, TARGET).default(NORM, TARGET))]))
