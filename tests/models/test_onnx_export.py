import json

import numpy as np
import onnx
import pytest
from graphs import HEADS, tiny_bert, zoo
from onnx import numpy_helper

from attntune.errors import ExportError, InputError
from attntune.interop import evaluate, export_onnx, read_metadata, sample_inputs, tuning_metadata, verify_onnx
from attntune.interop.onnx_export import OPSETS
from attntune.models.model import OpCall

STYLES = sorted(OPSETS)
DIMS = ({"batch": 1, "seq": 1, "kv": 1}, {"batch": 3, "seq": 7, "kv": 11})


@pytest.mark.parametrize("style", STYLES)
def test_every_operator_and_variant_matches_the_float64_reference(tmp_path, style):
    model = zoo()
    path = export_onnx(model, tmp_path / "zoo.onnx", attention=style)
    parity = verify_onnx(path, model, shapes=DIMS)
    worst = max(parity.cases, key=lambda case: case.max_abs_error)
    assert parity.max_abs_error < 2e-5, worst
    assert {case.mask for case in parity.cases} == {"full", "ragged", "empty_row"}
    assert len(parity.cases) == len(DIMS) * 3 * len(model.entries["forward"].outputs)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("entry", ["forward", "embed"])
def test_encoder_in_every_style(tmp_path, style, entry):
    model = tiny_bert()
    path = export_onnx(model, tmp_path / "m.onnx", attention=style, entry=entry)
    parity = verify_onnx(path, model, entry=entry, shapes=({"batch": 5, "seq": 20},))
    assert parity.ok
    assert parity.max_abs_error < 2e-5
    proto = onnx.load(path)
    ops = {node.op_type for node in proto.graph.node}
    if style == "standard":
        assert proto.opset_import[0].version in (23, 24)
        assert {"Attention", "Gelu"} <= ops
        assert not {"Softmax", "Erf"} & ops
    elif style == "decomposed":
        assert [(o.domain, o.version) for o in proto.opset_import] == [("", 17)]
        assert {"MatMul", "Softmax", "Erf", "LayerNormalization"} <= ops
    else:
        assert "MultiHeadAttention" in ops


def test_additive_bias_of_minus_infinity_masks_keys(tmp_path):
    model = zoo()
    inputs = sample_inputs(model, DIMS[1], mask="ragged")
    inputs["full_bias"][0, :, :, 2] = -np.inf
    inputs["full_bias"][1] = np.finfo(np.float32).min
    expected = evaluate(model, inputs)
    for style in STYLES:
        path = export_onnx(model, tmp_path / f"{style}.onnx", attention=style)
        got = run(path, inputs)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, atol=2e-5, err_msg=f"{style} {name}")


def run(path, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    return dict(zip(names, session.run(names, {n: v for n, v in inputs.items() if n in wanted}), strict=True))


def test_axes_are_dynamic_and_weights_keep_their_names(tmp_path):
    model = tiny_bert()
    proto = onnx.load(export_onnx(model, tmp_path / "m.onnx"))
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}
    assert shapes == {key: ["batch", "seq"] for key in ("input_ids", "attention_mask", "token_type_ids")}
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for name, value in model.weights.items():
        np.testing.assert_array_equal(stored[name], value)


def test_metadata_says_how_the_model_was_tuned(tmp_path):
    choices = {
        '{"op":"linear"}': {"config": {"rows": 8}, "source": "exact", "median_secs": 1e-3},
        '{"op":"softmax"}': {"config": {"rows": 1}, "source": "default"},
    }
    tuning = tuning_metadata("cpu/znver4/2", choices)
    path = export_onnx(tiny_bert(), tmp_path / "m.onnx", attention="standard", metadata=tuning)
    read = read_metadata(path)
    assert read["model"] == "tiny-bert"
    assert read["attention"] == "standard"
    assert read["tuning"] == json.loads(json.dumps(tuning))
    assert read["tuning"]["kernels"][1] == {
        "workload": '{"op":"softmax"}', "config": {"rows": 1}, "source": "default", "median_secs": None,
    }  # fmt: skip
    proto = onnx.load(path)
    assert (proto.producer_name, proto.producer_version) == ("attntune", read["version"])
    assert "tuning" not in read_metadata(export_onnx(tiny_bert(), tmp_path / "n.onnx"))


def test_large_weights_go_to_a_file_beside_the_model(tmp_path):
    model = tiny_bert()
    path = tmp_path / "m.onnx"
    for _ in range(2):  # a second export replaces the first
        export_onnx(model, path, external_data_bytes=1000)
    data = path.with_name("m.onnx.data")
    large = sum(value.nbytes for value in model.weights.values() if value.nbytes >= 1024)
    assert large <= data.stat().st_size < 2 * large
    assert path.stat().st_size < large
    assert verify_onnx(path, model, shapes=({"batch": 2, "seq": 5},)).max_abs_error < 2e-5
    export_onnx(model, path)
    assert not data.exists()


def test_unknown_operator_style_and_entry_are_named(tmp_path):
    model = tiny_bert()
    strange = OpCall("rotary", {}, ("last_hidden_state",), (("batch", "seq", 32),), ("float32",), ("r",),
                     (("batch", "seq", 32),), ("float32",))  # fmt: skip
    model.entry_calls["forward"] += (strange,)
    with pytest.raises(ExportError, match=r"'rotary'.*attention.*linear.*softmax"):
        export_onnx(model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"'fused'.*decomposed.*standard"):
        export_onnx(model, tmp_path / "m.onnx", attention="fused")
    with pytest.raises(ExportError, match=r"'generate'.*embed.*forward"):
        export_onnx(model, tmp_path / "m.onnx", entry="generate")
    assert not list(tmp_path.iterdir())


def test_verification_notices_a_different_model(tmp_path):
    model = tiny_bert()
    path = export_onnx(model, tmp_path / "m.onnx")
    model.weights["layers.1.qkv.weight"][0] += 0.1
    parity = verify_onnx(path, model, shapes=({"batch": 2, "seq": 5},), masks=("full",))
    assert not parity.ok
    assert parity.to_json()["ok"] is False
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"broken\.onnx"):
        verify_onnx(tmp_path / "broken.onnx", model)


def test_reference_names_a_missing_or_misshapen_input():
    model = tiny_bert()
    inputs = sample_inputs(model, {"batch": 2, "seq": 5}, mask="ragged")
    assert inputs["attention_mask"][-1].sum() < 5
    with pytest.raises(InputError, match="attention_mask"):
        evaluate(model, {"input_ids": inputs["input_ids"]})
    with pytest.raises(InputError, match="seq=5"):
        evaluate(model, {**inputs, "attention_mask": inputs["attention_mask"][:, :4]})
    assert evaluate(model, inputs)["last_hidden_state"].shape[-1] == HEADS * 8
