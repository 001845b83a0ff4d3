"""Whole models for CUDA: built without a GPU, run on the emulated device, and what a machine without a GPU is told."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu import EMULATION, needs_nvcc

import attntune
from attntune.errors import ArtifactError, CompileError, InputError
from attntune.measure.worker import IsolatedProcess
from attntune.models.precision import supported
from attntune.runtime.tuned_model import TunedModel
from attntune.target import PRESETS

sys.path.append(EMULATION)
import emulated_models

TARGET = "cuda:sm_90a"
#: Each family once; float32 goes by the generic template, of whose many threads the emulated device is slow.
BUILDS = {"bert": "float32", "llama": "float16", "whisper": "bfloat16"}


@pytest.fixture(scope="module")
def emulator(emulation_folder):
    """A process that compiles for a CUDA device that is this CPU, and runs on it."""
    with IsolatedProcess(
        threads=1, plugin_paths=[EMULATION], preload=[("emulation:install", emulation_folder)]
    ) as process:
        yield process


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
            shapes, entries = emulated_models.SHAPES[name], emulated_models.ENTRIES[name]
            tuned = TunedModel(attntune.compile(emulated_models.model(name), shapes=shapes, entries=entries))
            found[name] = emulated_models.ask(tuned, name)
        return found[name]

    return answer


def assert_close(found, expected, precision):
    """Tokens too: these models' likeliest tokens are likeliest by far."""
    assert found.keys() == expected.keys()
    for what, values in expected.items():
        if values.dtype.kind == "i":
            assert found[what].tolist() == values.tolist(), what
        elif precision == "float32":
            np.testing.assert_allclose(found[what], values, rtol=1e-4, atol=1e-4 * np.abs(values).max(), err_msg=what)
        else:
            rows = found[what].reshape(-1, values.shape[-1]), values.reshape(-1, values.shape[-1])
            norms = np.linalg.norm(rows[0], axis=-1) * np.linalg.norm(rows[1], axis=-1)
            assert ((rows[0] * rows[1]).sum(-1) / norms).min() > 0.999, what
            assert found[what].dtype == values.dtype


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
            emulated_models.model("bert"), target=target, precision="float16", shapes=[(1, 8)],
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
        assert "ArtifactError: tiny bert in" in ended.stderr
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


def test_only_known_forms_of_code():
    with pytest.raises(CompileError, match=r"expected cuda_code to be one of \('cubin', 'ptx', 'source'\), got 'sass'"):
        attntune.compile(emulated_models.model("bert"), target=TARGET, cuda_code="sass")


def test_precisions_of_cuda_targets():
    target = PRESETS["sm_90a"]
    assert all(supported(name, target) == (name, "") for name in ("float32", "bfloat16", "float16"))
    for name in ("int8", "int4"):
        lower, reason = supported(name, target)
        assert lower == "bfloat16"
        assert reason == f"no CUDA template multiplies quantised weights: bfloat16 instead of {name}"
    assert supported("float16", PRESETS["znver4"])[0] == "float32"
