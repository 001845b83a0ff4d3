"""ONNX twins of decoder-only models: whole, prefill and decoding step with caches going in and coming out."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from attntune.engines.graph import ModelGraph
from attntune.engines.torch_reference import torch_reference
from attntune.interop import evaluate, export_onnx, sample_inputs
from attntune.interop.onnx_export import OPSETS
from attntune.models import decoder
from attntune.models.decoder import DecoderConfig, random_weights
from attntune.models.model import Entry, InputSpec, OpCall

ROTARY = DecoderConfig(61, 32, 2, 4, 2, 8, 48, 40, "rms", 1e-5, "silu", True, rope="half")
CONFIGS = {
    "half": ROTARY,
    "interleaved": DecoderConfig(
        61, 32, 1, 4, 4, 8, 48, 40, "rms", 1e-5, "silu", True, rope="interleaved", qkv_bias=True
    ),
    "normed heads in a window": DecoderConfig(
        61, 32, 2, 4, 2, 8, 48, 40, "rms", 1e-3, "silu", True, rope="half", head_norm=True, window=3
    ),
    "learned": DecoderConfig(
        61, 32, 2, 4, 4, 8, 48, 40, "layer", 1e-5, "gelu_tanh", False,
        qkv_bias=True, output_bias=True, feed_forward_bias=True,
    ),
}  # fmt: skip
DIMS = {"batch": 3, "seq": 5, "context": 12}


def model_of(name):
    return decoder.build(CONFIGS[name], random_weights(CONFIGS[name], seed=3), name, family="test")


def inputs_of(model, entry):
    """Sequences that are being filled: one new, one in the middle, one whose last rows do not fit."""
    inputs = sample_inputs(model, DIMS, entry=entry)
    new = inputs["input_ids"].shape[1]
    if "lengths" in inputs:
        inputs["lengths"] = np.array([new, 9, DIMS["context"] + (2 if new > 1 else 0)], np.int32)
    if "last" in inputs:
        inputs["last"] = np.array([new - 1, 2, 0])
    return inputs


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("style", sorted(OPSETS))
@pytest.mark.parametrize("entry", ["forward", "prefill", "decode", "attend"])
def test_onnx_runtime_computes_what_the_reference_does(tmp_path, name, style, entry):
    model = model_of(name)
    inputs = inputs_of(model, entry)
    path = export_onnx(model, tmp_path / "m.onnx", attention=style, entry=entry)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    expected = evaluate(model, inputs, entry)
    assert set(names) == set(expected)
    assert any(n.startswith("next_key_cache.") for n in names) == (entry in ("prefill", "decode"))
    for output, value in zip(names, session.run(names, inputs), strict=True):
        np.testing.assert_allclose(value, expected[output], rtol=1e-4, atol=2e-5, err_msg=output)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("entry", ["forward", "prefill", "decode", "attend"])
def test_pytorch_computes_what_the_reference_does(name, entry):
    model = model_of(name)
    inputs = inputs_of(model, entry)
    expected = evaluate(model, inputs, entry)
    for output, value in torch_reference(model, inputs, entry).items():
        np.testing.assert_allclose(value, expected[output], rtol=1e-9, atol=1e-10, err_msg=output)


def test_a_tied_projection_is_written_once(tmp_path):
    model = model_of("half")
    path = export_onnx(model, tmp_path / "m.onnx", entry="decode")
    sizes = [numpy_helper.to_array(tensor).size for tensor in onnx.load(path).graph.initializer]
    assert sizes.count(61 * 32) == 1


@pytest.mark.parametrize("style", sorted(OPSETS))
def test_choosing_tokens_in_every_twin(tmp_path, style):
    logits = InputSpec("logits", ("batch", 61), "float32")
    outputs = (
        InputSpec("best", ("batch",), "int64"),
        InputSpec("values", ("batch", 4), "float32"),
        InputSpec("indices", ("batch", 4), "int64"),
    )
    given = (("logits",), (("batch", 61),), ("float32",))
    calls = (
        OpCall("argmax", {}, *given, ("best",), (("batch",),), ("int64",)),
        OpCall(
            "top_k", {"k": 4}, *given, ("values", "indices"), (("batch", 4),) * 2, ("float32", "int64")
        ),
    )  # fmt: skip
    model = ModelGraph("choice", {}, {}, {"forward": Entry((logits,), outputs)}, {"forward": calls})
    inputs = {"logits": np.random.default_rng(0).standard_normal((3, 61)).astype(np.float32)}
    expected = evaluate(model, inputs)
    twin = torch_reference(model, inputs, dtype="float32")
    path = export_onnx(model, tmp_path / "m.onnx", attention=style)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for spec, value in zip(outputs, session.run(None, inputs), strict=True):
        np.testing.assert_array_equal(value, expected[spec.name].astype(spec.dtype))
        np.testing.assert_array_equal(twin[spec.name], value)
