"""Marian and T5 in Hugging Face directories: against plain PyTorch, their twins, and what is refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import text_oracle
import torch
from checkpoints import MARIAN, T5, T5_11, marian_tensors, t5_tensors, write

from attntune.compiler import compile
from attntune.engines.torch_reference import torch_reference
from attntune.errors import ModelError
from attntune.interop import evaluate, export_onnx, sample_inputs
from attntune.models import from_pretrained
from attntune.runtime import load

#: As long as a vector of the smallest target: longer ones take kernels that take long to compile.
SOURCE, LENGTHS = 8, (5, 8, 3)
SEQ = 8
CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "marian": (MARIAN, marian_tensors, text_oracle.marian),
    "t5 1.0": (T5, t5_tensors, text_oracle.t5),
    "t5 1.1": (T5_11, t5_tensors, text_oracle.t5),
}


@dataclass
class Case:
    config: dict[str, Any]
    tensors: dict[str, Any]
    oracle: Any
    model: Any
    tuned: Any
    attends: Any

    def run(self, source, target):
        """Logits (target, vocab), and weights by kind and layer."""
        return self.oracle(self.tensors, self.config, source, target)

    def logits(self, source):
        return lambda target: self.run(source, target)[0]


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request, tmp_path_factory):
    config, make, oracle = CASES[request.param]
    tensors = make(config, seed=4)
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    model = from_pretrained(write(folder, config, tensors))
    # Rows of a batch that are not asked for are left empty.
    small, large = ({"batch": 3, "source": SOURCE, "seq": seq, "context": 72} for seq in (1, SEQ))
    tuned = load(compile(model, shapes=[small], entries=["encode", "prefill", "decode"]).save(folder / "m.attn"))
    attends = load(compile(model, shapes=[large], entries=["attend"]).save(folder / "a.attn"))
    return Case(
        config, {name: torch.from_numpy(value) for name, value in tensors.items()}, oracle, model, tuned, attends
    )


@pytest.fixture(scope="module")
def sources():
    rng = np.random.default_rng(7)
    return [rng.integers(2, 60, length).tolist() for length in LENGTHS]


def padded(sources):
    ids = np.zeros((len(sources), max(map(len, sources))), np.int64)
    for row, source in enumerate(sources):
        ids[row, : len(source)] = source
    return {"input_ids": ids, "source_lengths": np.array([len(source) for source in sources], np.int32)}


def test_logits_and_weights_match_pytorch(case, sources):
    targets = np.random.default_rng(8).integers(2, 60, (len(sources), SEQ))
    outputs = case.attends.run("attend", **padded(sources), decoder_input_ids=targets)
    names = [spec.name for spec in case.model.entry("attend").outputs]
    found = dict(zip(names, outputs, strict=True))
    for row, source in enumerate(sources):
        logits, maps = case.run(source, targets[row].tolist())
        expected = logits.numpy()
        np.testing.assert_allclose(found["logits"][row], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        for kind, layers in maps.items():
            for index, weights in enumerate(layers):
                _, queries, keys = weights.shape
                got = found[f"{kind}.{index}"][row, :, :queries, :keys]
                np.testing.assert_allclose(got, weights.numpy(), rtol=1e-3, atol=1e-4, err_msg=f"{kind}.{index}")


def test_a_cache_writes_what_recomputation_does(case, sources):
    generation = case.model.generation
    found = case.tuned.generate([[] for _ in sources], source=padded(sources), max_new_tokens=60).tokens
    for source, tokens in zip(sources, found, strict=True):
        expected = text_oracle.greedy(case.logits(source), generation.start, generation.stop, generation.suppress, 60)
        assert tokens == expected
    assert max(map(len, found)) >= 50
    alone = [case.tuned.generate([[]], source=padded([source]), max_new_tokens=60).tokens[0] for source in sources]
    assert alone == found


def test_beam_search_is_that_of_the_definition(case, sources):
    generation = case.model.generation
    found = case.tuned.generate([[]], source=padded(sources[:1]), max_new_tokens=9, beams=3)
    tokens, score = text_oracle.beams(
        case.logits(sources[0]), generation.start, generation.stop, generation.suppress, 9, 3
    )
    assert found.tokens == [tokens]
    assert found.scores[0] == pytest.approx(score, rel=1e-3)


@pytest.mark.parametrize("entry", ["encode", "prefill", "decode", "forward", "attend"])
def test_the_twins_of_every_entry_match(case, entry, tmp_path):
    dims = {"batch": 3, "source": 9, "seq": 1 if entry == "decode" else 4, "context": 52}
    inputs = sample_inputs(case.model, dims, entry=entry, mask="ragged")
    if "lengths" in inputs:
        inputs["lengths"] = np.array([dims["seq"], 9, 50], np.int32)
    expected = evaluate(case.model, inputs, entry)
    session = onnxruntime.InferenceSession(
        export_onnx(case.model, tmp_path / "m.onnx", entry=entry), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    assert set(names) == set(expected)
    assert any(name.startswith("next_key_cache.") for name in names) == (entry in ("prefill", "decode"))
    for name, value in zip(names, session.run(names, inputs), strict=True):
        np.testing.assert_allclose(
            value, expected[name], rtol=1e-4, atol=1e-4 * max(1.0, np.abs(expected[name]).max()), err_msg=name
        )
    for name, value in torch_reference(case.model, inputs, entry).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_a_bias_of_distances_is_that_of_the_buckets():
    """Of the sizes of every published T5: 32 buckets, up to a distance of 128."""
    from attntune.models.t5 import by_distance

    buckets = np.arange(32, dtype=np.float32)[:, None]
    both = by_distance(buckets, 128, 128)[0].astype(int).tolist()
    starts = [8, 12, 16, 23, 32, 46, 64, 91]
    side = [min(d, 8) - 1 + sum(d >= start for start in starts) + (d < 8) for d in range(129)]
    assert both == [*reversed(side), *(16 + each for each in side[1:])]
    past = by_distance(buckets, 128, 0)[0].astype(int).tolist()
    assert past[-17:] == list(range(16, -1, -1))
    assert past[:16] == [31] * 16
    assert sorted(set(past)) == list(range(32))


def test_tied_tensors_are_one_array_wherever_they_are(tmp_path):
    model = from_pretrained(write(tmp_path / "a", MARIAN, marian_tensors(MARIAN)))
    assert model.weights["encoder.table"] is model.weights["decoder.table"] is model.weights["head.weight"]
    assert model.generation.start == (66,)
    assert (model.generation.stop, model.generation.suppress, model.generation.max_length) == ((0,), (66,), 72)
    apart = {**MARIAN, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 71}
    other = from_pretrained(write(tmp_path / "b", apart, marian_tensors(apart)))
    assert other.weights["encoder.table"].shape == (67, 48)
    assert other.weights["head.weight"] is other.weights["decoder.table"]
    assert other.weights["decoder.table"].shape == (71, 48)
    tensors = t5_tensors(T5)
    shared = tensors.pop("shared.weight")
    model = from_pretrained(write(tmp_path / "c", T5, {**tensors, "decoder.embed_tokens.weight": shared}))
    assert model.weights["encoder.table"] is model.weights["decoder.table"] is model.weights["head.weight"]
    assert "source" not in model.max_lengths


@pytest.mark.parametrize(
    ("config", "make", "change", "message"),
    [
        (MARIAN, marian_tensors, {"model.decoder.layers.1.encoder_attn.q_proj.bias": None},
         r"1\.encoder_attn\.q_proj\.bias is missing"),
        (MARIAN, marian_tensors, {"model.encoder.layers.0.fc1.weight": np.ones((80, 47), np.float32)},
         r"fc1\.weight has shape \(80, 47\), expected \(80, 48\)"),
        (MARIAN, marian_tensors, {"model.encoder.layer_norm.weight": np.ones(48, np.float32)},
         r"model\.encoder\.layer_norm\.weight is not known"),
        (T5, t5_tensors, {"decoder.block.1.layer.1.EncDecAttention.k.weight": None},
         r"decoder\.block\.1\.layer\.1\.EncDecAttention\.k\.weight is missing"),
        (T5, t5_tensors, {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": None},
         r"relative_attention_bias\.weight is missing"),
        (T5_11, t5_tensors, {"lm_head.weight": None}, r"lm_head\.weight is missing"),
        (T5_11, t5_tensors, {"encoder.block.0.layer.1.DenseReluDense.wi_1.weight": None}, r"wi_1\.weight is missing"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(tmp_path, config, make, change, message):
    tensors = {name: value for name, value in {**make(config), **change}.items() if value is not None}
    with pytest.raises(ModelError, match=message):
        from_pretrained(write(tmp_path, config, tensors))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            MARIAN,
            {"activation_function": "mish"},
            "activation_function 'mish' is not supported; .*swish",
        ),
        (MARIAN, {"normalize_before": True}, "normalize_before True is not supported; expected False"),
        (MARIAN, {"static_position_embeddings": False}, "static_position_embeddings False is not supported"),
        (MARIAN, {"decoder_ffn_dim": 99}, "decoder_ffn_dim 99 is not supported; expected 'encoder_ffn_dim 80'"),
        (MARIAN, {"d_model": None}, r"config\.json of a marian model lacks \['d_model'\]"),
        (MARIAN, {"eos_token_id": None}, r"of a marian model lacks \['eos_token_id'\]"),
        (MARIAN, {"num_beams": 0.5}, "num_beams .* is not supported; expected 'a whole number of at least 1'"),
        (MARIAN, {"bad_words_ids": [[66], [3, 4]]}, "bad_words_ids .* is not supported; expected 'words of one token'"),
        (T5, {"feed_forward_proj": "gated-mish"}, "feed_forward_proj 'gated-mish' is not supported; expected one of"),
        (T5, {"is_encoder_decoder": False}, "is_encoder_decoder False is not supported; expected True"),
        (T5, {"relative_attention_max_distance": 4}, "relative_attention_num_buckets 8 is not supported"),
        (T5, {"d_kv": None, "d_ff": None}, r"config\.json of a t5 model lacks \['d_kv', 'd_ff'\]"),
    ],
)
def test_a_field_that_is_not_supported_is_named(tmp_path, config, change, message):
    make = marian_tensors if config is MARIAN else t5_tensors
    folder = write(tmp_path, config, make(config))
    Path(folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=message):
        from_pretrained(folder)


def test_the_beam_search_of_the_authors_is_known(tmp_path):
    folder = write(tmp_path, {**MARIAN, "num_beams": 6}, marian_tensors(MARIAN))
    assert from_pretrained(folder).generation.beams == 6
    Path(folder / "generation_config.json").write_text(json.dumps({"num_beams": 4, "length_penalty": 0.8}))
    found = from_pretrained(folder).generation
    assert (found.beams, found.length_penalty) == (4, 0.8)


def test_the_usual_shapes_have_room_for_the_beams(tmp_path):
    model = from_pretrained(write(tmp_path, {**MARIAN, "num_beams": 6}, marian_tensors(MARIAN)))
    assert {shape["batch"] for shape in model.shapes} == {1, 4, 6}
