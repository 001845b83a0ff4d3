"""RNN encoder-decoders: g2p-en against its own code, netra-transliterate against PyTorch, and what both promise."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attntune.compiler import compile
from attntune.engines.torch_recurrent import MAKERS
from attntune.engines.torch_reference import torch_reference
from attntune.errors import InputError, ModelError
from attntune.interop import evaluate, export_onnx, verify_onnx
from attntune.models import from_pretrained, rnn
from attntune.models.keras import _Inert, _PlainData
from attntune.models.model import OpCall
from attntune.runtime import load
from attntune.runtime.vocabulary import Vocabulary


def package(name: str, requirement: str) -> Path:
    """A package's folder, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"install the test model: pip install --no-deps {requirement}"
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def g2p_dir() -> Path:
    return package("g2p_en", "g2p-en==2.1.0")


@pytest.fixture(scope="module")
def netra_dir() -> Path:
    return package("khmer_transliterator", "netra-transliterate==1.0.1 h5py") / "weights"


@pytest.fixture(scope="module")
def g2p(g2p_dir, tmp_path_factory):
    model = from_pretrained(g2p_dir)
    shapes = [{"batch": batch, "source": 16, "seq": 8} for batch in (1, 4)]
    return load(compile(model, shapes=shapes).save(tmp_path_factory.mktemp("rnn") / "g2p.attn"))


@pytest.fixture(scope="module")
def netra_model(netra_dir):
    return from_pretrained(netra_dir)


@pytest.fixture(scope="module")
def netra(netra_model, tmp_path_factory):
    shapes = [{"batch": batch, "source": 25, "seq": 12} for batch in (1, 4)]
    artifact = compile(netra_model, shapes=shapes, entries=list(netra_model.entries))
    return load(artifact.save(tmp_path_factory.mktemp("rnn") / "netra.attn"))


def generate(tuned, words):
    """Greedy tokens of each word, all of them decoded together; with attention also its weights, step by step."""
    vocabulary = Vocabulary.load(tuned.folder / "vocabulary.json")
    generation = tuned.manifest["generation"]
    ids, lengths = vocabulary.encode(words)
    encoded = tuned.run("encode", input_ids=ids, source_lengths=lengths)
    attends = any(spec["name"] == "memory" for spec in tuned.manifest["entries"]["decode"]["inputs"])
    extra = {"memory": encoded, "source_lengths": lengths} if attends else {}
    state = tuned.state("decode", len(words), source=ids.shape[1])["state"] if attends else encoded
    tokens = [list(generation["start"]) for _ in words]
    maps = []
    for _ in range(generation["max_length"] - 1):
        last = np.array([row[-1] for row in tokens])[:, None]
        logits, state, *weights = tuned.run("decode", input_ids=last, state=state, **extra)
        maps += [value.copy() for value in weights]
        for row, logit in zip(tokens, logits, strict=True):
            if row[-1] not in generation["stop"]:
                row.append(int(logit.argmax()))
        if all(row[-1] in generation["stop"] for row in tokens):
            break
    cut = [[token for token in row[1:] if token not in generation["stop"]] for row in tokens]
    return [vocabulary.symbols(row) for row in cut], maps


# -- one fixed context vector -----------------------------------------------------------------------------------------


def packages_own(directory: Path):
    """The package's class, run from its source without the imports it needs for other things."""
    tree = ast.parse((directory / "g2p.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    namespace = {
        "np": np, "os": os, "dirname": str(directory), "construct_homograph_dictionary": dict,
        "cmudict": SimpleNamespace(dict=dict),
    }  # fmt: skip
    exec(builtins.compile(tree, "g2p.py", "exec"), namespace)
    return namespace["G2p"]()


def test_phonemes_of_200_words_are_those_of_the_packages_own_code(g2p, g2p_dir):
    lines = (g2p_dir / "homographs.en").read_text(encoding="utf-8").splitlines()
    words = sorted({line.split("|")[0].lower() for line in lines if line and not line.startswith("#")})
    words = [word for word in words if word.isalpha() and len(word) <= 15][:200]
    assert len(words) == 200
    own = packages_own(g2p_dir)
    for at in range(0, len(words), 4):
        found, _ = generate(g2p, words[at : at + 4])
        assert found == [own.predict(word) for word in words[at : at + 4]]


def test_logits_are_those_of_the_packages_own_code(g2p, g2p_dir):
    """Its own cells and loops; the output layer, which its ``predict`` keeps to itself, from its arrays."""
    own = packages_own(g2p_dir)
    vocabulary = Vocabulary.load(g2p.folder / "vocabulary.json")
    for word in ("attention", "transformer"):
        symbols = own.predict(word)
        target = [own.p2idx[symbol] for symbol in ["<s>", *symbols]][:8]
        encoded = own.encode(word)
        h = own.gru(
            encoded, encoded.shape[1], own.enc_w_ih, own.enc_w_hh, own.enc_b_ih, own.enc_b_hh,
            h0=np.zeros((1, own.enc_w_hh.shape[-1]), np.float32),
        )[:, -1]  # fmt: skip
        expected = []
        for token in target:
            h = own.grucell(own.dec_emb[[token]], h, own.dec_w_ih, own.dec_w_hh, own.dec_b_ih, own.dec_b_hh)
            expected.append(h @ own.fc_w.T + own.fc_b)
        ids, lengths = vocabulary.encode([word])
        logits = g2p.run("forward", input_ids=ids, source_lengths=lengths, decoder_input_ids=np.array([target]))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(logits[0], np.concatenate(expected), rtol=1e-3, atol=1e-4 * scale)


def test_one_by_one_equals_together_and_padding_changes_nothing(g2p):
    words = ["a", "encyclopaedia", "bahdanau"]
    assert generate(g2p, words)[0] == [generate(g2p, [word])[0][0] for word in words]


def test_decoding_equals_the_whole_target_at_once(g2p, netra):
    for tuned, word in ((g2p, "transformer"), (netra, "srolanh")):
        vocabulary = Vocabulary.load(tuned.folder / "vocabulary.json")
        ids, lengths = vocabulary.encode([word])
        start = tuned.manifest["generation"]["start"]
        symbols = generate(tuned, [word])[0][0]
        given = [*start, *(vocabulary.target["tokens"].index(symbol) for symbol in symbols)]
        whole = np.array([given])
        logits = tuned.run("forward", input_ids=ids, source_lengths=lengths, decoder_input_ids=whole[:, :8])
        assert logits.argmax(-1)[0].tolist()[: len(given) - 1] == given[1:9][: logits.shape[1]]


# -- additive attention -----------------------------------------------------------------------------------------------


def keras_in_torch(path: Path, source: np.ndarray, target: np.ndarray):
    """The network of the file written out in PyTorch, from Keras's own arrays: probabilities and attention weights."""
    import h5py

    with zipfile.ZipFile(path) as archive:
        file = h5py.File(io.BytesIO(archive.read("model.weights.h5")))

    def arrays(group):
        held = file[f"layers/{group}/vars"]
        return [torch.from_numpy(np.asarray(held[str(i)])) for i in range(len(held))]

    def gru(group, x, backwards=False):
        kernel, recurrent, bias = arrays(group)
        h = torch.zeros(x.shape[0], recurrent.shape[0])
        outputs = []
        for t in reversed(range(x.shape[1])) if backwards else range(x.shape[1]):
            xz, xr, xh = (x[:, t] @ kernel + bias[0]).chunk(3, -1)
            hz, hr, hh = (h @ recurrent + bias[1]).chunk(3, -1)
            z, r = torch.sigmoid(xz + hz), torch.sigmoid(xr + hr)
            h = z * h + (1 - z) * torch.tanh(xh + r * hh)
            outputs.append(h)
        return torch.stack(outputs[::-1] if backwards else outputs, 1)

    x = arrays("embedding")[0][torch.from_numpy(source)]
    both = torch.cat(
        [gru("bidirectional/forward_layer/cell", x), gru("bidirectional/backward_layer/cell", x, True)], -1
    )
    weight, bias = arrays("time_distributed/layer")
    memory = both @ weight + bias
    states = gru("gru/cell", arrays("embedding_1")[0][torch.from_numpy(target)])
    scores = (torch.tanh(states[:, :, None] + memory[:, None]) * arrays("additive_attention")[0]).sum(-1)
    shares = torch.softmax(scores, -1)
    weight, bias = arrays("dense")
    logits = torch.cat([states, shares @ memory], -1) @ weight + bias
    return logits.numpy(), shares.numpy()


def test_transliteration_is_the_packages_known_output(netra):
    found, maps = generate(netra, ["srolanh", "brodae"])
    assert ["".join(symbols) for symbols in found] == ["ស្រឡាញ់", "ប្រដែ"]
    assert all(step.shape == (2, 1, 1, 25) for step in maps)
    np.testing.assert_allclose(np.concatenate(maps).sum(-1), 1.0, atol=1e-5)


def test_logits_and_attention_match_the_network_in_pytorch(netra, netra_dir):
    rng = np.random.default_rng(0)
    source, target = rng.integers(0, 28, (3, 25)), rng.integers(0, 81, (3, 12))
    expected, shares = keras_in_torch(next(netra_dir.glob("*.keras")), source, target)
    logits, weights = netra.run(
        "attend", input_ids=source, source_lengths=np.full(3, 25, np.int32), decoder_input_ids=target
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(weights[:, 0], shares, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_generation_loop_runs_it_too(netra, g2p, beams):
    for tuned, word, expected in ((netra, "srolanh", "ស្រឡាញ់"), (g2p, "attention", "AH0 T EH1 N SH AH0 N")):
        vocabulary = Vocabulary.load(tuned.folder / "vocabulary.json")
        ids, lengths = vocabulary.encode([word])
        source = {"input_ids": ids, "source_lengths": lengths}
        stop = tuned.manifest["generation"]["stop"]
        found = tuned.generate([[]], source=source, beams=beams, max_new_tokens=20)
        assert vocabulary.decode([token for token in found.tokens[0] if token not in stop]) == expected


# -- any encoder-decoder ----------------------------------------------------------------------------------------------

SMALL = {
    "fixed": rnn.RNNConfig(11, 13, 6, 7, 9, 9),
    "attention": rnn.RNNConfig(11, 13, 6, 7, 5, 9, bidirectional=True, attention=True),
}


@pytest.mark.parametrize("kind", SMALL)
def test_compiled_entries_match_the_reference_at_ragged_lengths(kind, tmp_path):
    model = rnn.random_model(SMALL[kind])
    tuned = load(compile(model, shapes=[{"batch": 4, "source": 8, "seq": 8}]).save(tmp_path / "m.attn"))
    rng = np.random.default_rng(1)
    inputs = {
        "input_ids": rng.integers(0, 11, (3, 6)),
        "source_lengths": np.array([6, 1, 3], np.int32),
        "decoder_input_ids": rng.integers(0, 13, (3, 5)),
    }
    expected = evaluate(model, inputs)["logits"]
    np.testing.assert_allclose(tuned(**inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("op", ["gru_sequence", "lstm_sequence"])
def test_pytorchs_twin_of_a_layer_is_pytorchs_own_layer(op, reverse):
    kind, states = {"gru_sequence": (torch.nn.GRU, 1), "lstm_sequence": (torch.nn.LSTM, 2)}[op]
    layer = kind(5, 7, batch_first=True, bidirectional=reverse).double()
    suffix = "l0_reverse" if reverse else "l0"
    weights = [getattr(layer, f"{name}_{suffix}") for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]
    x, first = torch.randn(3, 6, 5, dtype=torch.float64), torch.randn(1 + reverse, states, 3, 7, dtype=torch.float64)
    given = first.transpose(0, 1).contiguous().unbind(0)
    outputs, last = layer(x, given[0] if states == 1 else tuple(given))
    attrs = {"reverse": reverse, "lengths": False, "initial": True, "bias": True}
    call = OpCall(op, attrs, (), (), (), (), (), ())
    projected = torch.nn.functional.linear(x, weights[0], weights[1])
    got, *ends = MAKERS[op](call)({}, projected, weights[2], weights[3], *first[-1].unbind(0))
    torch.testing.assert_close(got, outputs[..., 7 * reverse :])
    for end, expected in zip(ends, [last] if states == 1 else last, strict=True):
        torch.testing.assert_close(end, expected[-1])


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("entry", ["forward", "encode"])
def test_the_pytorch_twin_matches_at_ragged_lengths(kind, entry):
    model = rnn.random_model(SMALL[kind])
    inputs = {
        "input_ids": np.arange(18).reshape(3, 6) % 11,
        "source_lengths": np.array([6, 1, 3], np.int32),
        "decoder_input_ids": np.arange(15).reshape(3, 5) % 13,
    }
    inputs = {spec.name: inputs[spec.name] for spec in model.entries[entry].inputs}
    expected = evaluate(model, inputs, entry)
    for name, value in torch_reference(model, inputs, entry).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("kind", SMALL)
def test_the_onnx_twin_of_every_entry_matches(kind, tmp_path):
    model = rnn.random_model(SMALL[kind])
    for entry in model.entries:
        path = export_onnx(model, tmp_path / f"{entry}.onnx", entry=entry)
        parity = verify_onnx(path, model, entry=entry, shapes=({"batch": 3, "source": 7, "seq": 4},))
        assert parity.ok, (entry, parity.max_abs_error)


def test_the_onnx_twins_of_the_real_ones_match(g2p_dir, netra_model, tmp_path):
    for model in (from_pretrained(g2p_dir), netra_model):
        for entry in model.entries:
            path = export_onnx(model, tmp_path / f"{model.name}-{entry}.onnx", entry=entry)
            shape = {"batch": 2, "source": 25, "seq": 6}
            parity = verify_onnx(path, model, entry=entry, shapes=(shape,), masks=("full", "ragged"))
            assert parity.ok, (model.name, entry, parity.max_abs_error)


def test_what_does_not_fit_is_named(g2p_dir, tmp_path):
    with np.load(g2p_dir / "checkpoint20.npz") as stored:
        arrays = dict(stored)
    lacking = {name: value for name, value in arrays.items() if name != "fc_b"}
    np.savez(tmp_path / "lacking.npz", **lacking)
    with pytest.raises(ModelError, match="fc_b"):
        from_pretrained(tmp_path / "lacking.npz")
    np.savez(tmp_path / "narrow.npz", **{**arrays, "fc_b": arrays["fc_b"][:-1]})
    with pytest.raises(ModelError, match=r"decoder\.output\.bias has shape \(73,\), expected \(74,\)"):
        from_pretrained(tmp_path / "narrow.npz")
    with pytest.raises(ModelError, match="expected one checkpoint"):
        from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no attention"):
        rnn.RNNConfig(11, 13, 6, 7, 5, 9, bidirectional=True)


@pytest.mark.parametrize(
    ("layer", "option", "value"),
    [
        ("gru_7", "reset_after", False),
        ("embedding_8", "mask_zero", True),
        ("bidirectional_3", "merge_mode", "sum"),
        ("concatenate_7", "axis", 1),
        ("dense_13", "use_bias", False),
    ],
)
def test_an_unsupported_keras_option_is_named(netra_dir, tmp_path, layer, option, value):
    with zipfile.ZipFile(next(netra_dir.glob("*.keras"))) as archive:
        config, weights = json.loads(archive.read("config.json")), archive.read("model.weights.h5")
    for found in config["config"]["layers"]:
        if found["config"]["name"] == layer:
            found["config"][option] = value
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights)
    with pytest.raises(ModelError, match=f"{layer}: {option} {value!r} is not supported"):
        from_pretrained(tmp_path / "m.keras")


class Dangerous:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_read_as_data_and_runs_nothing(tmp_path):
    data = pickle.dumps({"tokenizer": Dangerous(tmp_path / "written"), "length": 25})
    found = _PlainData(io.BytesIO(data)).load()
    assert found["length"] == 25
    assert isinstance(found["tokenizer"], _Inert)
    assert not (tmp_path / "written").exists()


def test_a_vocabulary_names_what_it_cannot_encode(netra):
    vocabulary = Vocabulary.load(netra.folder / "vocabulary.json")
    with pytest.raises(InputError, match="at most 25"):
        vocabulary.encode(["a" * 26])
    with pytest.raises(InputError, match="symbols"):
        vocabulary.encode(["ស"])
    ids, lengths = vocabulary.encode(["Srolanh!"])
    assert lengths.tolist() == [25]
    assert "".join(vocabulary.source_symbols(ids[0])) == "srolanh"
