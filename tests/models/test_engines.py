import sys

import numpy as np
import pytest
from graphs import tiny_bert, zoo

from attntune.engines import ENGINES, ModelSource, engine
from attntune.engines.graph import ModelGraph
from attntune.engines.parity import agreement, parity_of
from attntune.engines.torch_reference import MAKERS, TorchModel, torch_reference
from attntune.errors import EngineError
from attntune.interop import evaluate, export_onnx, sample_inputs
from attntune.interop.onnx_ops import EMITTERS
from attntune.ops import REGISTRY

DIMS = {"batch": 3, "seq": 7, "kv": 11}


def source_of(model, folder, entry="forward"):
    ModelGraph.of(model, entry).save(folder / "graph")
    styles = ("decomposed", "standard", "onnxruntime")
    onnx = {style: str(export_onnx(model, folder / f"{style}.onnx", attention=style)) for style in styles}
    outputs = tuple(spec.name for spec in model.entries[entry].outputs)
    return ModelSource(entry, outputs, graph=str(folder / "graph"), onnx=onnx)


def test_every_operator_has_a_twin():
    assert set(MAKERS) == set(REGISTRY)
    assert set(EMITTERS) == set(REGISTRY)


@pytest.mark.parametrize("mask", ["full", "ragged", "empty_row"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
def test_torch_and_numpy_agree_on_every_operator_and_variant(mask, dtype, tolerance):
    model = zoo()
    inputs = sample_inputs(model, DIMS, mask=mask)
    expected = evaluate(model, inputs)
    got = torch_reference(model, inputs, dtype=dtype)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=tolerance, rtol=0, err_msg=name)


def test_torch_follows_masking_biases():
    model = zoo()
    inputs = sample_inputs(model, DIMS, mask="ragged")
    inputs["full_bias"][0, :, :, 2] = -np.inf
    inputs["shared_bias"][:, :, 3] = np.finfo(np.float32).min
    expected = evaluate(model, inputs)
    for name, value in torch_reference(model, inputs).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-12, err_msg=name)


@pytest.mark.parametrize("mask", ["full", "ragged", "empty_row"])
def test_torch_without_branches_on_values_gives_the_same(mask):
    import torch

    model = zoo()
    inputs = sample_inputs(model, DIMS, mask=mask)
    got = TorchModel(model, inspect=False)(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    for name, value in evaluate(model, inputs).items():
        np.testing.assert_allclose(got[name].numpy(), value, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ["onnxruntime", "pytorch"])
def test_engines_run_and_bind_the_same_model(tmp_path, name):
    model = tiny_bert()
    runner = ENGINES[name]()
    runner.load(source_of(model, tmp_path), threads=1)
    for mask in ("full", "ragged"):
        inputs = sample_inputs(model, {"batch": 2, "seq": 9}, mask=mask)
        expected = evaluate(model, inputs)
        call = runner.bind(inputs)
        call()
        got = runner.run(inputs)
        assert got.keys() == expected.keys()
        np.testing.assert_allclose(got["last_hidden_state"], expected["last_hidden_state"], atol=2e-5)
    assert runner.describe()["version"]
    if name == "onnxruntime":
        assert runner.bound_variant() in ("decomposed", "standard", "onnxruntime")


def test_onnxruntime_reports_files_it_rejects(tmp_path):
    source = source_of(tiny_bert(), tmp_path)
    (tmp_path / "standard.onnx").write_bytes(b"junk")
    runner = ENGINES["onnxruntime"]()
    runner.load(source, threads=1)
    assert list(runner.describe()["rejected"]) == ["standard"]
    with pytest.raises(EngineError, match="rejects every file"):
        runner.load(ModelSource("forward", (), onnx={"standard": str(tmp_path / "standard.onnx")}), threads=1)


@pytest.mark.parametrize(("name", "needs"), [("attntune", "artifact"), ("onnxruntime", "onnx"), ("pytorch", "graph")])
def test_engines_name_the_source_they_lack(name, needs):
    with pytest.raises(EngineError, match=needs):
        ENGINES[name]().load(ModelSource("forward", ("y",)), threads=1)


def test_graph_survives_its_file(tmp_path):
    import ml_dtypes

    model = tiny_bert()
    model.weights["word"] = model.weights["word"].astype(ml_dtypes.bfloat16)
    graph = ModelGraph.of(model, "embed")
    graph.save(tmp_path)
    again = ModelGraph.load(tmp_path)
    assert (again.name, again.entries, again.calls("embed")) == (graph.name, graph.entries, graph.calls("embed"))
    assert again.weights.keys() == graph.weights.keys()
    for name, value in graph.weights.items():
        assert again.weights[name].dtype == value.dtype
        np.testing.assert_array_equal(again.weights[name], value)
    with pytest.raises(EngineError, match=r"graph\.json"):
        ModelGraph.load(tmp_path / "nowhere")


def test_unknown_and_missing_engines_say_what_to_do(monkeypatch):
    with pytest.raises(EngineError, match=r"'tensorrt'.*attntune.*onnxruntime.*pytorch"):
        engine("tensorrt")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("onnxruntime", "onnxruntime"), ("pytorch", "torch"), ("torch-compile", "torch")):
        reason = engine(name).unavailable()
        assert reason is not None
        assert package in reason
        assert "pip install" in reason
    assert engine("attntune").unavailable() is None


def test_unknown_operator_is_named():
    from attntune.models.model import OpCall

    model = tiny_bert()
    strange = OpCall("rotary", {}, ("last_hidden_state",), ((1,),), ("float32",), ("r",), ((1,),), ("float32",))
    model.entry_calls["forward"] += (strange,)
    with pytest.raises(EngineError, match=r"'rotary'.*attention"):
        torch_reference(model, sample_inputs(tiny_bert(), {"batch": 1, "seq": 3}))


@pytest.mark.parametrize("name", ["openvino", "openvino-bf16", "pytorch-bf16", "zentorch", "zentorch-bf16"])
def test_optional_engines_meet_the_parity_of_their_precision(tmp_path, name):
    if (reason := ENGINES[name].unavailable()) is not None:
        pytest.skip(reason)
    model = tiny_bert()
    runner = ENGINES[name]()
    runner.load(source_of(model, tmp_path), threads=1)
    inputs = sample_inputs(model, {"batch": 2, "seq": 9}, mask="ragged")
    runner.bind(inputs)()
    found = agreement(runner.run(inputs), evaluate(model, inputs), parity_of(runner.precision, 1e-4))
    assert found.problem == ""
    assert runner.describe()["version"]


def test_metaschedule_says_how_little_it_found(tmp_path):
    if (reason := ENGINES["metaschedule"].unavailable()) is not None:
        pytest.skip(reason)
    from dataclasses import replace

    with pytest.raises(EngineError, match="tuning_secs"):
        ENGINES["metaschedule"]().load(source_of(tiny_bert(), tmp_path), threads=1)
    runner = ENGINES["metaschedule"]()
    runner.load(replace(source_of(tiny_bert(), tmp_path), tuning_secs=5.0), threads=1)
    assert runner.describe()["tuning"] == "5 s for each shape"
