"""The Transformer of 2017 with ANNalog's weights, against PyTorch from the checkpoint's own tensors."""

import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attntune import cli
from attntune.compiler import compile
from attntune.errors import InputError, ModelError
from attntune.interop import export_onnx, verify_onnx
from attntune.models import from_pretrained
from attntune.runtime import load
from attntune.runtime.text import Codec

HEADS = 8
SOURCES = ["CCO", "CC(=O)Oc1ccccc1C(=O)O", "CN1C=NC2=C1C(=O)N(C)C(=O)N2C"]


@pytest.fixture(scope="module")
def directory():
    found = importlib.util.find_spec("annalog")
    assert found is not None, "install the test model: pip install --no-deps annalog==1.0.6"
    assert found.origin is not None
    return Path(found.origin).parent / "ckpt_and_vocab"


@pytest.fixture(scope="module")
def model(directory):
    return from_pretrained(directory)


@pytest.fixture(scope="module")
def tuned(directory, tmp_path_factory):
    """Compiled from the command line: batch, length of the source, length of the target."""
    path = tmp_path_factory.mktemp("annalog") / "m.attn"
    assert cli.main(["compile", str(directory), "--shapes", "1x32x102,4x32x102xseq=1", "--output", str(path)]) == 0
    return load(path)


def test_lengths_that_the_model_does_not_have_are_named(capsys, directory, tmp_path):
    for shapes, message in (
        ("1x32", "expected values for ['source'] of entry 'encode', got {'batch': 1, 'seq': 32}; give batch x source"),
        ("1x200x32", "expected source between 1 and 102, got 200"),
        ("1x32x103", "expected target between 1 and 102, got 103"),
    ):
        assert cli.main(["compile", str(directory), "--shapes", shapes, "-o", str(tmp_path / "m.attn")]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def checkpoint(directory):
    return torch.load(directory / "Lev_extended.pt", map_location="cpu", weights_only=True)


@torch.inference_mode()
def oracle(t, source, target):
    """Logits (seq, vocab) of one pair of token lists, nothing padded."""

    def linear(x, name):
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"])

    def embed(ids, side):
        table = t[f"{side}.tok_embedding.weight"]
        return table[torch.tensor(ids)] * table.shape[1] ** 0.5 + t[f"{side}.pos_embedding.weight"][: len(ids)]

    def attend(x, memory, name, causal=False):
        q, k, v = (
            linear(value, f"{name}.fc_{part}").unflatten(-1, (HEADS, -1)).transpose(0, 1)
            for value, part in ((x, "q"), (memory, "k"), (memory, "v"))
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        return linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), f"{name}.fc_o")

    def feed_forward(x, name):
        return linear(linear(x, f"{name}.fc_1").relu(), f"{name}.fc_2")

    memory = embed(source, "encoder")
    for i in range(3):
        at = f"encoder.layers.{i}"
        memory = norm(memory + attend(memory, memory, f"{at}.self_attention"), f"{at}.self_attn_layer_norm")
        memory = norm(memory + feed_forward(memory, f"{at}.positionwise_feedforward"), f"{at}.ff_layer_norm")
    x = embed(target, "decoder")
    for i in range(3):
        at = f"decoder.layers.{i}"
        x = norm(x + attend(x, x, f"{at}.self_attention", causal=True), f"{at}.self_attn_layer_norm")
        x = norm(x + attend(x, memory, f"{at}.encoder_attention"), f"{at}.enc_attn_layer_norm")
        x = norm(x + feed_forward(x, f"{at}.positionwise_feedforward"), f"{at}.ff_layer_norm")
    return linear(x, "decoder.fc_out")


def greedy(t, source, generation, most):
    """What the oracle writes, recomputing everything at every token."""
    written = list(generation.start)
    while len(written) <= most:
        logits = oracle(t, source, written)[-1].clone()
        logits[list(generation.suppress)] = -torch.inf
        if (token := int(logits.argmax())) in generation.stop:
            break
        written.append(token)
    return written[len(generation.start) :]


def best_of_beams(t, source, generation, beams, most):
    """The likeliest sequence by length-normalised beam search, recomputing everything for every beam."""
    opened, finished = [(0.0, ())], []
    for length in range(1, most + 1):
        options = []
        for total, tokens in opened:
            scores = oracle(t, source, [*generation.start, *tokens])[-1].double().log_softmax(-1)
            scores[list(generation.suppress)] = -torch.inf
            values, ids = scores.topk(2 * beams)
            options += [
                (total + value, (*tokens, token)) for value, token in zip(values.tolist(), ids.tolist(), strict=True)
            ]
        options.sort(key=lambda option: -option[0])
        opened = []
        for total, tokens in options:
            if tokens[-1] in generation.stop:
                finished.append((total / length, tokens[:-1]))
            elif len(opened) < beams:
                opened.append((total, tokens))
        if len(finished) >= beams and max(t for t, _ in opened) / most < sorted(f for f, _ in finished)[-beams]:
            break
    else:
        finished += [(total / most, tokens) for total, tokens in opened]
    return max(finished)


def ids_of(tuned, source):
    """Token ids of one source, without padding."""
    found = Codec(tuned.folder).sources([source])
    return found["input_ids"][0, : int(found["source_lengths"][0])].tolist()


def test_logits_match_pytorch(model, checkpoint, tuned, tmp_path):
    shapes = [{"batch": 1, "source": 32, "seq": 16}]
    whole = load(compile(model, shapes=shapes, entries=["forward"]).save(tmp_path / "m.attn"))
    source, target = ids_of(tuned, SOURCES[1]), [2, 7, 9, 8, 7, 11, 20, 7]
    got = whole(
        input_ids=np.array([source]), source_lengths=np.array([len(source)], np.int32),
        decoder_input_ids=np.array([target]),
    )  # fmt: skip
    expected = oracle(checkpoint, source, target).numpy()
    np.testing.assert_allclose(got[0], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("source", SOURCES)
def test_greedy_is_pytorchs_token_for_token(model, checkpoint, tuned, source):
    found = tuned.generate([[]], source=Codec(tuned.folder).sources([source]), max_new_tokens=60)
    expected = greedy(checkpoint, ids_of(tuned, source), model.generation, 60)
    assert found.tokens == [expected[:60]]
    assert len(expected) > 0


def test_beam_search_finds_what_recomputing_everything_finds(model, checkpoint, tuned):
    source = SOURCES[2]
    found = tuned.generate([[]], source=Codec(tuned.folder).sources([source]), max_new_tokens=40, beams=4)
    score, tokens = best_of_beams(checkpoint, ids_of(tuned, source), model.generation, 4, 40)
    assert found.tokens == [list(tokens)]
    assert found.scores[0] == pytest.approx(score, rel=1e-3)


def test_longer_than_its_positions_is_an_error(tuned):
    with pytest.raises(InputError, match=r"expected prompt and new tokens within 102, got 1 \+ 102"):
        tuned.generate([[]], source=Codec(tuned.folder).sources(SOURCES[:1]), max_new_tokens=102)


def test_a_batch_of_different_lengths_is_one_by_one(tuned):
    codec = Codec(tuned.folder)
    together = tuned.generate([[], [], []], source=codec.sources(SOURCES), max_new_tokens=40).tokens
    alone = [tuned.generate([[]], source=codec.sources([s]), max_new_tokens=40).tokens[0] for s in SOURCES]
    assert together == alone


@pytest.mark.parametrize("entry", ["encode", "prefill", "decode", "forward", "attend"])
def test_the_onnx_twin_of_every_entry_matches(model, entry, tmp_path):
    path = export_onnx(model, tmp_path / "m.onnx", entry=entry)
    parity = verify_onnx(path, model, entry=entry, shapes=({"batch": 2, "source": 9, "seq": 3, "context": 12},))
    assert parity.ok, (entry, parity.max_abs_error)


def test_a_vocabulary_that_lacks_a_token_is_named(directory, tmp_path):
    (tmp_path / "m.pt").symlink_to(directory / "Lev_extended.pt")
    (tmp_path / "vocab.pkl").write_bytes(pickle.dumps({"itos": ["<pad>", "<eos>", "<unk>", "C"]}))
    with pytest.raises(ModelError, match=r"expected the tokens \['<sos>'\] in 'itos'"):
        from_pretrained(tmp_path)


def test_command_line_draws_the_alignment(capsys, directory, tmp_path):
    drawn = tmp_path / "m.html"
    words = ["run", str(directory), "--text", "CCO", "--attention", str(drawn), "--query", "O", "--max-new-tokens", "8"]
    assert cli.main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (written,) = document["tokens"]
    assert "O" in written
    assert {found["token"] for found in document["top"]} <= {"C", "O"}
    page = drawn.read_text()
    assert page.count("<section") == 3
    assert "&lt;sos&gt;" in page
    assert cli.main([*words, "--beams", "2"]) == 2
    assert "without --beams" in capsys.readouterr().err
