"""The whole of scripts/gpu_check on an emulated device, with NumPy for PyTorch; stopped, and gone on with."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu import EMULATION, HELPERS, EmulatedRunner, needs_nvcc

from attntune.database.journal import Journal
from attntune.engines.compare_kernels import KernelOptions
from attntune.engines.comparison import Outcome
from attntune.engines.cuda_kernel_engines import AttntuneCudaKernels, TorchFlash, fused_linear
from attntune.engines.cuda_suites import Part, parts
from attntune.engines.gpu_check import GpuCheck, GpuSettings, failures
from attntune.engines.kernel_comparison import KernelCase, KernelComparison
from attntune.errors import TargetError
from attntune.measure.cuda_device import detect_cuda
from attntune.measure.runner import Runner
from attntune.measure.trial import MeasureOptions
from attntune.measure.worker import IsolatedProcess
from attntune.ops import Linear, RMSNorm
from attntune.report.gpu_check import write_page
from attntune.target import PRESETS, cuda_target

ROOT = Path(__file__).parents[2]
PART = Part(
    "linear-tiny", (KernelCase("bfloat16", "16×32→24", Linear(16, 32, 24, dtype="bfloat16")),), ("cublas", "flash")
)
PEAKS = {"flops_per_sec": {"bfloat16": 1e12}, "read_bytes_per_sec": 1e11, "source": "made up"}
QUICK = KernelOptions(rounds=2, turn_secs=1e-4, max_samples=2, pause_secs=0.0, caches=("hot",))
MEASURE = MeasureOptions(samples=3, warmup_secs=1e-6, min_sample_secs=1e-6, builders=1, run_timeout_secs=60)


class QuickKernels(AttntuneCudaKernels):
    sample_secs = 1e-6


@pytest.fixture(scope="module")
def settings(emulation_folder, tmp_path_factory):
    """Of a run in an empty folder."""
    if torch.version.cuda:
        pytest.skip("PyTorch's build for CUDA takes the emulated device's libcudart for NVIDIA's")
    sys.path.append(HELPERS)
    from numpy_kernels import NumpyKernels

    def process(**options):
        on_device = "numpy_kernels" not in str(options) and "TorchFlash" not in str(options)
        preload = [*([("emulation:install", emulation_folder)] if on_device else []), *options.pop("preload", ())]
        folders = [EMULATION, HELPERS, str(Path(__file__).parent)]
        return IsolatedProcess(**options, preload=preload, plugin_paths=folders)

    EmulatedRunner.folder = emulation_folder
    results, kernels = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("kernels")
    corners = [RMSNorm(4, 64), RMSNorm(3, 17)]
    table = {"attntune": QuickKernels, "cublas": NumpyKernels, "flash": TorchFlash}
    with EmulatedRunner(MEASURE) as runner:
        yield GpuSettings(
            dataclasses.replace(PRESETS["sm_86"], cores=1), "an emulated device", results, [PART], corners,
            lambda: LentRunner(runner), QUICK, kernels, process, table, lambda _: PEAKS,
            models=(),
        )  # fmt: skip
    EmulatedRunner.folder = ""
    sys.path.remove(HELPERS)


class LentRunner(Runner):
    """Another's, which stays open: its workers take seconds to start."""

    def __init__(self, lender, interrupted=False):
        self.lender, self.options, self.interrupted = lender, lender.options, interrupted

    def measure(self, trials):
        for record in self.lender.measure(trials):
            yield record
            if self.interrupted:
                raise KeyboardInterrupt

    def race(self, trials, rounds):
        return self.lender.race(trials, rounds)


def no_more(*_, **__):
    raise AssertionError("expected nothing to be run again")


@pytest.fixture(scope="module")
def ran(settings):
    """The settings after a run that was interrupted after its first check and after the first trial of tuning."""
    first = GpuCheck(settings)
    next(iter(first.check()))
    assert [path.name for path in settings.results.glob("*.json")] == ["check-rms_norm.json"]

    # What was checked is not checked again: there is no runner.
    checked = list(GpuCheck(dataclasses.replace(settings, runner=no_more)).check())
    assert [path.name for path in checked] == ["check-rms_norm.json", "check-linear-tiny.json"]

    def interrupted():
        return LentRunner(settings.runner().lender, interrupted=True)

    with pytest.raises(KeyboardInterrupt):
        list(GpuCheck(dataclasses.replace(settings, runner=interrupted)).tune(1.0))
    measured = len(Journal(settings.results / "tuning.jsonl").load())
    spent = json.loads((settings.results / "tuning.json").read_text())["secs"]
    assert measured == 1
    assert spent > 0
    list(GpuCheck(settings).tune(spent / 60 + 0.04))
    list(GpuCheck(settings).compare())
    return settings


@needs_nvcc
def test_default_kernels_are_checked(ran):
    document = json.loads((ran.results / "check-rms_norm.json").read_text())
    assert [record["status"] for record in document["records"]] == ["correct"] * 2
    assert failures(ran.results / "check-rms_norm.json") == []
    found = KernelComparison.load(ran.results / "check-linear-tiny.json")
    apart = {result.engine: result.max_rel_difference for result in found.results}
    assert apart["attntune"] is None
    assert 0 < apart["cublas"] < 0.01


@needs_nvcc
def test_whole_models_are_checked(settings, tmp_path):
    models = (("llama", "float16"), ("t5", "float16"))
    target = dataclasses.replace(PRESETS["sm_90a"], cores=1)  # as the emulated device calls itself
    alone = dataclasses.replace(
        settings, target=target, results=tmp_path, corners=[], parts=[], models=models, runner=no_more
    )  # fmt: skip
    (path,) = GpuCheck(alone).check()
    found, _ = json.loads(path.read_text())["models"]
    assert found["cosine"] > 0.999
    assert found["differing"] == []
    (line,) = failures(path)
    assert "t5 float16: unknown model 't5'; expected one of ['bert', 'llama', 'rnn', 'whisper']" in line
    page = write_page(tmp_path, [], []).read_text()
    assert "| llama | float16 | 0.99" in page
    assert "| t5 | float16 | failed |" in page
    again = dataclasses.replace(alone, process=no_more)
    assert list(GpuCheck(again).check()) == [path]


@needs_nvcc
def test_tuning_goes_on_without_repeating_trials(ran):
    records = [record for record in Journal(ran.results / "tuning.jsonl").load() if not record.final]
    assert len(records) > 1
    assert len({record.config for record in records}) == len(records)
    spent = json.loads((ran.results / "tuning.json").read_text())["secs"] / 60
    assert list(GpuCheck(dataclasses.replace(ran, runner=no_more)).tune(spent)) == []


@needs_nvcc
def test_kernels_are_compared_with_engines_that_can_start(ran):
    found = KernelComparison.load(ran.results / "linear-tiny.json")
    assert {(r.engine, r.outcome) for r in found.results} == {("attntune", Outcome.OK), ("cublas", Outcome.OK)}
    assert all(len(result.rounds) == QUICK.rounds for result in found.results)
    assert "finds none" in found.settings["left_out"]["flash"]
    page = write_page(ran.results, ["rms_norm"], [PART.name]).read_text()
    assert "| RMSNormCUDA | corner workloads | 2 | 2 |" in page
    assert "| linear-tiny | benchmark shapes | 1 | 1 |" in page
    assert "an emulated device" in page
    assert "NumPy ÷ attntune" in page
    assert "(made up)" in page


@needs_nvcc
def test_what_is_finished_is_not_repeated_until_it_changes(ran):
    again = GpuCheck(dataclasses.replace(ran, runner=no_more, process=no_more, peaks=no_more))
    assert len([*again.check(), *again.compare()]) == 3
    other = GpuCheck(dataclasses.replace(ran, runner=no_more, process=no_more, device="another"))
    with pytest.raises(AssertionError, match="run again"):
        list(other.check())


@needs_nvcc
def test_a_wrong_element_outside_the_sample_is_found(ran, tmp_path, monkeypatch):
    from numpy_kernels import NumpyKernels, WrongPastTheSample

    monkeypatch.setattr(
        Linear, "reference_sample", lambda w, *operands: [((slice(0, 3),), (w.reference(*operands)[0][:3],))]
    )
    table = {"attntune": WrongPastTheSample, "cublas": NumpyKernels}
    part = dataclasses.replace(PART, engines=("cublas",))
    wrong = GpuCheck(dataclasses.replace(ran, table=table, results=tmp_path, parts=[part]))
    (path,) = wrong.compare()
    (line,) = failures(path)
    assert "16×32→24: wrong_result: the whole output differs by" in line


@needs_nvcc
def test_the_target_comes_from_the_device(settings):
    target, _ = detect_cuda(settings.process)
    assert target.key() == "cuda/sm_90a/4"
    with pytest.raises(TargetError, match=r"8\.0 \(sm_80\), .*; got one of 7\.5"):
        cuda_target(7, 5, 80)


LAYERS = (
    Linear(5, 17, 33, activation="gelu", residual=True), Linear(7, 24, 9, activation="gelu_tanh"),
    Linear(6, 30, 41, activation="silu", gated=True, residual=True), Linear(3, 8, 5, bias=False, activation="relu"),
)  # fmt: skip


@pytest.mark.parametrize("workload", LAYERS, ids=str)
def test_the_layer_that_torch_compiles_is_the_workload(workload):
    operands = workload.example_inputs(3)
    found = fused_linear(torch, workload)(*map(torch.from_numpy, operands))
    np.testing.assert_allclose(found.numpy(), workload.reference(*operands)[0], rtol=1e-4, atol=1e-4)


def test_without_a_gpu_it_says_so(tmp_path):
    ended = subprocess.run(
        [sys.executable, "scripts/gpu_check.py", "--results", str(tmp_path / "r")], cwd=ROOT, capture_output=True,
        text=True, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert ended.returncode == 2
    assert "expected a CUDA device to run kernels on, found none" in ended.stderr
    assert not (tmp_path / "r").exists()


def test_parts_are_what_is_to_be_judged():
    found = {part.name: part for part in parts()}
    assert len(found) == 13
    assert {case.workload.activation for case in found["fused-linear-bfloat16"].cases} == {"", "gelu", "silu"}
    workloads = [case.workload for case in found["attention-bfloat16-128-causal"].cases]
    assert {w.batch * w.q_len for w in workloads} == {16384}
    assert {w.heads * w.head_dim for w in workloads} == {2048}
    assert all(w.causal and w.layout == "bhsd" for w in workloads)
