"""A Vision Transformer trained here on digits: tuned against PyTorch; its loader's errors, its twin, its patch rows."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import attntune
from attntune import cli
from attntune.errors import InputError, ModelError
from attntune.interop import export_onnx, verify_onnx
from attntune.models import from_pretrained

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_vit_digits.py"
EPOCHS = 16


@pytest.fixture(scope="module")
def script():
    """The training script as a module."""
    spec = importlib.util.spec_from_file_location("train_vit_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory):
    """The PyTorch model after a shorter training, its directory, and the digits it never saw."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data, held_out = script.digits()
        model = script.train(data, epochs=EPOCHS)
    finally:
        torch.set_num_threads(threads)
    directory = tmp_path_factory.mktemp("vit") / "vit-digits"
    script.save(model, held_out, directory)
    return model, directory, held_out


@pytest.fixture(scope="module")
def tuned(trained):
    """Both entries at two batch sizes."""
    artifact = attntune.compile(
        from_pretrained(trained[1]), shapes=[{"batch": 1}, {"batch": 8}], entries=["forward", "attend"]
    )
    return attntune.load(artifact.save(trained[1].with_name("vit-digits.attn")))


def test_it_reads_held_out_digits_as_pytorch_does(script, trained, tuned):
    model, _, held_out = trained
    logits = tuned(pixel_values=held_out.pixels)
    expected = script.predict(model, held_out.pixels)
    assert logits.shape == (360, 10)
    assert script.accuracy(logits, held_out) >= 0.97
    np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))
    assert np.abs(logits - expected).max() <= 1e-4


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_lower_precisions_read_them_too(script, trained, precision):
    model, directory, held_out = trained
    artifact = attntune.compile(from_pretrained(directory), shapes=[{"batch": 8}], precision=precision)
    logits = attntune.load(artifact.save(directory.with_name(f"{precision}.attn")))(pixel_values=held_out.pixels)
    assert (logits.argmax(1) == script.predict(model, held_out.pixels).argmax(1)).mean() >= 0.99


def test_attention_of_every_layer_equals_pytorchs(trained, tuned):
    model, _, held_out = trained
    logits, *maps = tuned.run("attend", pixel_values=held_out.pixels[:11])
    with torch.inference_mode():
        expected_logits, expected = model(torch.from_numpy(held_out.pixels[:11]))
    assert np.abs(logits - expected_logits.numpy()).max() <= 1e-4
    assert len(maps) == len(expected)
    for weights, wanted in zip(maps, expected, strict=True):
        assert weights.shape == (11, 4, 17, 17)
        assert np.abs(weights - wanted.numpy()).max() <= 1e-5


def test_command_line_reads_images_and_draws_their_attention(capsys, trained, tuned, tmp_path):
    path = str(trained[1].with_name("vit-digits.attn"))
    assert cli.main(["run", path, "--inputs", str(trained[1] / "held_out.npz"), "--json"]) == 0
    named = [found["label"] for found in json.loads(capsys.readouterr().out)["classes"]]
    assert np.mean([label == str(digit) for label, digit in zip(named, trained[2].labels, strict=True)]) >= 0.97
    np.savez(tmp_path / "two.npz", pixel_values=trained[2].pixels[:2])
    words = ["--inputs", f"{tmp_path}/two.npz", "--attention", f"{tmp_path}/two.html", "--json"]
    assert cli.main(["run", path, *words]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"][1][:3] == ["[class]", "0,0", "0,1"]
    assert (tmp_path / "two.html").read_text().count("<section") == 2


@pytest.mark.parametrize("entry", ["forward", "attend"])
def test_twin_matches(trained, tmp_path, entry):
    model = from_pretrained(trained[1])
    path = export_onnx(model, tmp_path / "vit.onnx", entry=entry)
    parity = verify_onnx(path, model, entry=entry, shapes=[{"batch": 1}, {"batch": 3}], masks=("full",))
    assert parity.ok
    assert parity.max_abs_error < 1e-4


def test_wrong_images_are_named(tuned):
    with pytest.raises(InputError, match=r"'pixel_values' has shape \(1, 1, 8, 9\); expected axis 3 \(8\) to be 8"):
        tuned(pixel_values=np.zeros((1, 1, 8, 9), np.float32))
    with pytest.raises(InputError, match=r"has dtype float64; expected float32 \(batch, 1, 8, 8\)"):
        tuned(pixel_values=np.zeros((1, 1, 8, 8)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported; expected one of"),
        ({"image_size": [8, 8]}, r"image_size \[8, 8\] is not supported; expected one integer"),
        ({"patch_size": 3}, "image_size 8 is not a multiple of patch_size 3"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"num_hidden_layers": 5}, r"vit\.encoder\.layer\.4\..* is missing"),
        ({"num_hidden_layers": 3}, r"vit\.encoder\.layer\.3\..* is unknown"),
        ({"id2label": {"0": "no"}}, r"classifier\.weight has shape \(10, 64\), expected \(1, 64\)"),
        ({"layer_norm_eps": None}, "layer_norm_eps None is not supported; expected a number"),
    ],
)
def test_unsupported_configs_are_named(trained, tmp_path, fields, message):
    directory = shutil.copytree(trained[1], tmp_path / "vit")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ModelError, match=message):
        from_pretrained(directory)


def test_a_missing_field_is_named(trained, tmp_path):
    directory = shutil.copytree(trained[1], tmp_path / "vit")
    config = json.loads((directory / "config.json").read_text())
    del config["patch_size"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json of a vit model lacks \['patch_size'\]"):
        from_pretrained(directory)


def test_queries_without_bias(trained, script, tmp_path):
    """``qkv_bias: false`` is a bias of zeros."""
    import copy

    from safetensors.torch import load_file, save_file

    directory = shutil.copytree(trained[1], tmp_path / "vit")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "qkv_bias": False}))
    projections = ("query.bias", "key.bias", "value.bias")
    tensors = {k: v for k, v in load_file(directory / "model.safetensors").items() if not k.endswith(projections)}
    save_file(tensors, directory / "model.safetensors")
    model = copy.deepcopy(trained[0])
    for name, parameter in model.named_parameters():
        if name.endswith(projections):
            parameter.data.zero_()
    loaded = attntune.compile(from_pretrained(directory), shapes=[{"batch": 4}])
    pixels = trained[2].pixels[:4]
    logits = attntune.load(loaded.save(tmp_path / "vit.attn"))(pixel_values=pixels)
    assert np.abs(logits - script.predict(model, pixels)).max() <= 1e-4
