"""all-MiniLM-L6-v2 in ONNX and PyTorch, against Hugging Face's own formulas and against attntune's artifact."""

import numpy as np
import oracle
import pytest

from attntune.engines.compare import CompareOptions, compare
from attntune.engines.comparison import Outcome
from attntune.engines.torch_reference import torch_reference
from attntune.interop import evaluate, export_onnx, sample_inputs, verify_onnx

DIMS = {"batch": 3, "seq": 77}


@pytest.mark.parametrize("style", ["decomposed", "standard", "onnxruntime"])
@pytest.mark.parametrize("entry", ["forward", "embed"])
def test_onnx_twin(minilm, tmp_path, style, entry):
    path = export_onnx(minilm, tmp_path / "minilm.onnx", attention=style, entry=entry)
    parity = verify_onnx(path, minilm, entry=entry, shapes=(DIMS,), masks=("ragged",), threads=2)
    assert parity.max_abs_error < 2e-5


def test_references_agree_with_pytorchs_formulas(minilm, minilm_dir):
    inputs = sample_inputs(minilm, DIMS, mask="ragged")
    ids, mask, types = (inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    expected = oracle.bert(minilm_dir, ids, mask, types)
    for values in (evaluate(minilm, inputs), torch_reference(minilm, inputs)):
        np.testing.assert_allclose(values["last_hidden_state"], expected, atol=2e-5)


def test_artifact_is_compared_with_the_twins(minilm, minilm_artifact):
    options = CompareOptions(rounds=2, turn_secs=0.01, max_calls=3, pause_secs=0.0, masks=("ragged",))
    found = compare(minilm, minilm_artifact, [{"batch": 1, "seq": 16}, {"batch": 2, "seq": 30}],
                    ("onnxruntime", "pytorch"), threads=1, options=options)  # fmt: skip
    assert found.engine_names() == ("attntune", "onnxruntime", "pytorch")
    for result in found.results:
        assert result.outcome is Outcome.OK, result.message
        assert result.max_abs_error <= 1e-4
    assert all(found.ratio(name, case) for name in ("onnxruntime", "pytorch") for case in found.cases())
