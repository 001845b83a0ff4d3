"""Whole models for CUDA: built without a GPU, run on the emulated device, and what a machine without a GPU is told."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu import EMULATION, needs_nvcc

import attntune
from attntune.engines.gpu_models import COSINES, MODELS, ask, least_cosine, problems, small_model
from attntune.errors import ArtifactError, CompileError, InputError
from attntune.measure.cuda_device import detect_cuda
from attntune.measure.worker import IsolatedProcess
from attntune.models.precision import supported
from attntune.runtime.cuda import OnDevice
from attntune.runtime.tuned_model import TunedModel
from attntune.target import PRESETS

TARGET = "cuda:sm_90a"
#: Each family once; float32 goes by the generic template, of whose many threads the emulated device is slow.
BUILDS = {"bert": "float32", "llama": "float16", "whisper": "bfloat16", "rnn": "float32"}


@pytest.fixture(scope="module")
def runtime(emulation_folder):
    """A process that runs on the emulated device with TVM's runtime alone."""
    preload = [("emulation:load_driver", emulation_folder)]
    with IsolatedProcess(threads=1, plugin_paths=[EMULATION], preload=preload) as process:
        yield process


@pytest.fixture(scope="module")
def built(emulator, tmp_path_factory):
    """By name: an artifact for the emulated device, and by which templates."""
    folder, found = tmp_path_factory.mktemp("models"), {}

    def build(name, **options):
        options = {"precision": BUILDS[name], **options}
        key = f"{name}-{'-'.join(options.values())}"
        if key not in found:
            arguments = (name, TARGET, str(folder / key))
            found[key] = (
                str(folder / key),
                *emulator.call("emulated_models:compile_model", *arguments, **options, timeout_secs=120),
            )
        return found[key]

    return build


@pytest.fixture(scope="module")
def expected():
    """By name, what the CPU answers in float32."""
    found = {}

    def answer(name):
        if name not in found:
            entries, shapes = MODELS[name]
            found[name] = ask(TunedModel(attntune.compile(small_model(name), shapes=shapes, entries=entries)), name)
        return found[name]

    return answer


def assert_close(found, expected, precision):
    """Tokens too: these models' likeliest tokens are likeliest by far."""
    assert found.keys() == expected.keys()
    assert all(found[what].dtype == values.dtype for what, values in expected.items())
    cosine, differing = least_cosine(found, expected)
    assert cosine >= COSINES[precision]
    assert differing == []
    if precision == "float32":
        for what, values in expected.items():
            np.testing.assert_allclose(found[what], values, rtol=1e-4, atol=1e-4 * np.abs(values).max(), err_msg=what)


@needs_nvcc
class TestWholeModels:
    @pytest.mark.parametrize("name", BUILDS)
    def test_it_answers_as_the_cpu_does(self, built, runtime, expected, name):
        path, *_ = built(name)
        found = runtime.call("emulated_models:answers", path, name, timeout_secs=120)
        assert_close(found, expected(name), BUILDS[name])
        manifest = json.loads(Path(path, "manifest.json").read_text())
        assert manifest["target"]["name"] == "sm_90a"
        assert (manifest["precision"], manifest["cuda_code"]) == (BUILDS[name], "cubin")

    def test_templates_of_their_own_take_what_counts(self, built):
        _, templates, generic = built("llama")
        assert {"AttentionCUDA", "KVAppendCUDA", "LinearCUDA", "RMSNormCUDA"} < templates
        assert generic <= {"embedding", "select_rows"}
        _, templates, generic = built("whisper")
        assert {"AttentionCUDA", "KVAppendCUDA", "LinearCUDA", "LayerNormCUDA"} < templates
        assert not generic & {"attention", "kv_append", "layer_norm", "linear"}
        _, templates, _ = built("rnn")
        assert {"AdditiveAttentionCUDA", "GRUSequenceCUDA"} < templates

    def test_source_is_compiled_where_it_is_loaded(self, built, emulator, expected):
        path, *_ = built("llama", cuda_code="source")
        found = emulator.call("emulated_models:compiled_when_loaded", path, "llama", timeout_secs=120)
        assert_close(found, expected("llama"), "float16")

    def test_many_threads_get_what_one_gets_without_a_compiler(self, built, runtime):
        same, compilers = runtime.call("emulated_models:asked_by_many", built("llama")[0], "llama", 4, timeout_secs=120)
        assert same
        assert compilers == []

    def test_tensors_on_the_device_are_read(self, built, runtime):
        same, (message,) = runtime.call("emulated_models:on_the_device", built("bert")[0], timeout_secs=120)
        assert same
        assert "input 'input_ids' has dtype float32; expected int64 (batch, seq)" in message

    def test_a_cache_on_the_host_is_refused(self, built, runtime):
        with pytest.raises(InputError, match=r"'key_cache.0' is ndarray; expected float16 .* on the device as state"):
            runtime.call("emulated_models:refuse_host_state", built("llama")[0], timeout_secs=120)

    def test_kernels_are_queued_on_the_stream_of_the_call(self, built, runtime):
        queued, behind, waited, after = runtime.call("emulated_models:streams", built("llama")[0])
        assert queued == [0x10, 0x10, 0x20, 0]
        assert behind == [(0x10, 0x20), (0x20, 0)]
        assert waited == [0]
        assert after == 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Built by nvcc in this process, which has no driver."""

    def build(target, code):
        artifact = attntune.compile(
            small_model("bert"), target=target, precision="float16", shapes=[(1, 8)],
            entries=["forward"], cuda_code=code,
        )  # fmt: skip
        return artifact.save(tmp_path_factory.mktemp("cuda") / f"{code}.attn")

    return build


@needs_nvcc
class TestArtifacts:
    @pytest.mark.parametrize(
        ("code", "inside", "outside"),
        [
            ("cubin", (b"sm_90a",), (b".visible .entry",)),
            ("ptx", (b".visible .entry", b".target sm_80"), ()),
            ("source", (b"__global__ void",), (b".visible .entry",)),
        ],
    )
    def test_it_carries_what_was_asked_for(self, saved, code, inside, outside):
        path = saved("cuda:sm_80" if code == "ptx" else TARGET, code)
        library = Path(path, "kernels.so").read_bytes()
        assert all(text in library for text in inside)
        assert not any(text in library for text in outside)
        if code == "cubin":
            assert library.count(b"\x7fELF") == 2  # the library's own, and the cubin's

    def test_without_a_driver_it_says_what_was_expected(self, saved):
        path = saved(TARGET, "cubin")
        program = f"import attntune; attntune.load({str(path)!r})"
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "ArtifactError: small bert in" in ended.stderr
        assert "was compiled for CUDA devices of compute capability 9.0 (sm_90a): expected " in ended.stderr

    def test_another_device_is_named(self, saved, runtime):
        path = saved("cuda:sm_80", "cubin")
        with pytest.raises(
            ArtifactError, match=r"expected a device of compute capability 8.0 to 8.9, cuda:0 .* has 9.0"
        ):
            runtime.call("emulated_models:answers", str(path), "bert")

    def test_ptx_runs_on_later_devices(self, runtime):
        check = "attntune.runtime.cuda:check_device"
        runtime.call(check, PRESETS["sm_80"], "ptx", "it")
        runtime.call(check, PRESETS["sm_90a"], "cubin", "it")
        with pytest.raises(ArtifactError, match=r"capability 10.0 or later, cuda:0 .* has 9.0"):
            runtime.call(check, PRESETS["sm_100"], "ptx", "it")
        with pytest.raises(ArtifactError, match="expected such a device as cuda:1, found none"):
            runtime.call(check, PRESETS["sm_90a"], "cubin", "it", 1)


class TestTorch:
    """Tensors of torch: what does not take a device is tried on those of the CPU."""

    class Memory:
        device = SimpleNamespace(index=0)

        def imported(self, value):
            return value

    @pytest.fixture
    def values(self):
        return torch.arange(64).reshape(4, 16)

    def given(self, values, rows, shape):
        inside = (slice(0, rows.stop - rows.start), slice(0, values.shape[1]))
        return OnDevice(values, self.Memory()).laid_out(rows, inside, shape)

    def test_whole_tensors_are_read_in_place(self, values):
        assert self.given(values, slice(0, 4), (4, 16)).data_ptr() == values.data_ptr()
        assert self.given(values, slice(2, 4), (2, 16)).data_ptr() == values[2].data_ptr()

    def test_others_are_laid_into_a_buckets_shape(self, values):
        padded = self.given(values[:, :9], slice(1, 4), (4, 16))
        assert torch.equal(padded[:3, :9], values[1:4, :9])
        assert padded[3].any() == padded[:, 9:].any() == torch.tensor(False)
        assert torch.equal(self.given(values.T, slice(0, 16), (16, 4)), values.T)
        assert self.given(values.T, slice(0, 16), (16, 4)).is_contiguous()
        odd = torch.arange(33)[1:].reshape(2, 16)
        moved = self.given(odd, slice(0, 2), (2, 16))
        assert moved.data_ptr() % 64 == 0
        assert torch.equal(moved, odd)

    def test_dtypes_are_changed_on_the_device(self, values):
        found = OnDevice(values.to(torch.int32), self.Memory()).astype(np.dtype(np.int64))
        assert found.value.dtype == torch.int64
        assert OnDevice(values.to(torch.bfloat16), self.Memory()).dtype.name == "bfloat16"
        assert OnDevice.of(values, self.Memory()) is None  # it lies on the CPU

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
    def test_on_a_gpu_torchs_stream_and_memory_are_used(self, tmp_path):
        target, _ = detect_cuda()
        artifact = attntune.compile(
            small_model("bert"), target=target, precision="float16", shapes=[(2, 8)], entries=["forward"]
        )
        tuned = attntune.load(artifact.save(tmp_path / "bert.attn"))
        ids = torch.randint(0, 50, (3, 7))
        expected = tuned(input_ids=ids)
        assert expected.device.type == "cpu"
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            on_device = ids.cuda(non_blocking=True)
            found = tuned(input_ids=on_device)
            doubled = found * 2
        stream.synchronize()
        assert found.is_cuda
        assert torch.equal(doubled.cpu(), expected * 2)


def test_only_known_forms_of_code():
    with pytest.raises(CompileError, match=r"expected cuda_code to be one of \('cubin', 'ptx', 'source'\), got 'sass'"):
        attntune.compile(small_model("bert"), target=TARGET, cuda_code="sass")


def test_precisions_of_cuda_targets():
    target = PRESETS["sm_90a"]
    assert all(supported(name, target) == (name, "") for name in ("float32", "bfloat16", "float16"))
    for name in ("int8", "int8_float32", "int4", "w4a8"):
        lower, reason = supported(name, target)
        assert lower == "bfloat16"
        assert reason == f"no CUDA template multiplies quantised weights: bfloat16 instead of {name}"
    assert supported("float16", PRESETS["znver4"])[0] == "float32"


def test_what_differs_is_told():
    right = {"logits": np.ones((2, 3)), "tokens": np.array([1, 2])}
    assert least_cosine(right, right) == (1.0, [])
    cosine, differing = least_cosine({"logits": np.full((2, 3), np.nan), "tokens": np.array([1, 3])}, right)
    assert (cosine, differing) == (-1.0, ["tokens"])
    row = {"model": "llama", "precision": "float16"}
    assert problems([{**row, "cosine": 0.9995, "differing": []}]) == []
    assert problems([{**row, "cosine": 0.9, "differing": ["tokens"]}, {**row, "error": "no device"}]) == [
        "llama float16: cosine 0.900000, expected 0.999 at least, other tokens", "llama float16: no device"
    ]  # fmt: skip
