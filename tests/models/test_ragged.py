"""Padding that is not computed: ragged entries against those that compute it, and when the runtime goes to them."""

import dataclasses

import numpy as np
import pytest

from attntune.compiler import compile
from attntune.engines.torch_reference import torch_reference
from attntune.interop import evaluate, export_onnx, sample_inputs, verify_onnx
from attntune.models.bert import BertConfig, random_model
from attntune.runtime import TunedModel

CONFIG = BertConfig(61, 48, 2, 3, 100, 40, 2, "gelu", 1e-12, pooling=True)
LENGTHS = np.array([17, 1, 0, 32, 9])


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, "tiny")


@pytest.fixture(scope="module")
def tuned(model):
    entries = ["forward", "forward_ragged", "embed", "embed_ragged"]
    return TunedModel(compile(model, shapes=[(2, 32), (4, 32)], entries=entries))


def inputs(lengths, seq=32):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 61, (len(lengths), seq))
    return {"input_ids": ids, "attention_mask": (np.arange(seq) < lengths[:, None]).astype(np.int64)}


def whole(given):
    """All inputs of an entry, those left out at what stands for them."""
    ids = given["input_ids"]
    return {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids), **given}


class Counted(TunedModel):
    """Notes the entries that run."""

    def _run(self, entry, *rest):
        self.ran.append(entry)
        return super()._run(entry, *rest)


def test_rows_of_padding_are_zero_and_the_others_those_of_the_dense_entry(model, tuned):
    given = inputs(LENGTHS)
    got = tuned(**given)
    expected = evaluate(model, whole(given))["last_hidden_state"]
    seen = given["attention_mask"] != 0
    np.testing.assert_allclose(got[seen], expected[seen], rtol=1e-4, atol=1e-4)
    assert not got[~seen].any()
    embedding = tuned.run("embed", **given)
    np.testing.assert_allclose(embedding, evaluate(model, whole(given), "embed")["sentence_embedding"], atol=1e-5)


def test_sequences_shorter_than_the_compiled_shape(model, tuned):
    given = inputs(np.array([11, 11, 11]), seq=11)
    del given["attention_mask"]
    got = tuned(**given)
    np.testing.assert_allclose(got, evaluate(model, whole(given))["last_hidden_state"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mask", "entry"),
    [
        (np.ones((2, 32)), "forward"),
        (np.arange(32) < np.array([[32], [31]]), "forward_ragged"),
        (np.arange(32) >= np.array([[0], [5]]), "forward"),
        (np.ones((2, 31)), "forward_ragged"),
        (None, "forward"),
    ],
    ids=["nothing to skip", "padded right", "padded left", "shorter", "no mask"],
)
def test_when_the_padding_is_skipped(model, mask, entry):
    entries = ["forward", "forward_ragged"]
    tuned = Counted(compile(model, shapes=[(2, 32)], entries=entries))
    tuned.ran = []
    ids = np.ones((2, 32 if mask is None else mask.shape[1]), np.int64)
    given = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask.astype(np.int64)})
    got = tuned(**given)
    assert tuned.ran == [entry]
    seen = whole(given)["attention_mask"] != 0
    expected = evaluate(model, whole(given))["last_hidden_state"]
    np.testing.assert_allclose(got[seen], expected[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("precision", "cosine"), [("bfloat16", 0.999), ("int8", 0.99)])
def test_other_precisions(model, precision, cosine):
    artifact = compile(model, shapes=[(4, 32)], entries=["embed", "embed_ragged"], precision=precision)
    given = inputs(LENGTHS[[0, 1, 3, 4]])
    got = TunedModel(artifact).run("embed", **given)
    expected = evaluate(model, whole(given), "embed")["sentence_embedding"]
    assert (got * expected).sum(1).min() >= cosine


@pytest.mark.parametrize("entry", ["forward_ragged", "embed_ragged"])
def test_twins(model, entry, tmp_path):
    dims = {"batch": 5, "seq": 32}
    given = sample_inputs(model, dims, entry=entry, mask="empty_row")
    expected = evaluate(model, given, entry)
    for name, value in torch_reference(model, given, entry).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-10)
    path = export_onnx(model, tmp_path / "ragged.onnx", entry=entry)
    parity = verify_onnx(path, model, entry=entry, shapes=(dims,))
    assert parity.ok, parity.max_abs_error


def test_without_the_ragged_entry_all_is_computed(model):
    tuned = TunedModel(compile(model, shapes=[(2, 32)], entries=["forward"]))
    given = inputs(LENGTHS[:2])
    expected = evaluate(model, whole(given))["last_hidden_state"]
    np.testing.assert_allclose(tuned(**given), expected, rtol=1e-4, atol=1e-4)


def test_every_encoder_says_which_entry_skips_padding(model):
    for name, entry in model.entries.items():
        if entry.ragged:
            ragged = model.entries[entry.ragged]
            assert ragged.inputs[:-1] == entry.inputs, name
            assert dataclasses.replace(ragged, inputs=entry.inputs, on_request=False, ragged=entry.ragged) == entry
