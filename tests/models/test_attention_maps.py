"""Attention weights of whole models: against PyTorch, drawn, and from the command line."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import oracle
import pytest

import attntune
from attntune import cli
from attntune.errors import InputError, ReportError
from attntune.interop import export_onnx, verify_onnx
from attntune.report.attention_maps import AttentionMap, attention_maps, write

SENTENCE = "The animal didn't cross the street because it was too tired."
TOKENS = re.findall(r"\[?\w+\]?|[^\w\s]", f"[CLS] {SENTENCE.lower()} [SEP]")
LAYERS, HEADS = 6, 12


@pytest.fixture(scope="module")
def attending(minilm, tmp_path_factory):
    """An artifact with the entry ``attend``."""
    artifact = attntune.compile(minilm, shapes=[(2, 24)], entries=["attend"])
    return artifact.save(tmp_path_factory.mktemp("attend") / "minilm.attn")


def test_weights_equal_pytorchs_sum_to_one_and_are_zero_on_padding(attending, minilm, minilm_dir):
    ids, mask = oracle.tokens(3, 19, minilm.config["vocab_size"], ragged=True, seed=5)
    mask[0] = 1
    hidden, *maps = attntune.load(attending).run("attend", input_ids=ids, attention_mask=mask)
    expected_hidden, expected = oracle.bert_attention(minilm_dir, ids, mask)
    assert len(maps) == len(expected) == LAYERS
    assert np.abs(hidden - expected_hidden).max() <= 1e-4
    for weights, wanted in zip(maps, expected, strict=True):
        assert weights.shape == (3, HEADS, 19, 19)
        assert np.abs(weights - wanted).max() <= 1e-5
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
        assert not np.moveaxis(weights, -1, 1)[mask == 0].any()


def test_an_artifact_without_the_entry_says_how_to_get_it(tuned_minilm):
    assert tuned_minilm.entries == ("forward", "embed")
    with pytest.raises(InputError, match=r"unknown entry 'attend'.*--entries forward,embed,attend"):
        tuned_minilm.run("attend", input_ids=np.zeros((1, 4), np.int64))
    with pytest.raises(InputError, match=r"unknown entry 'generate': expected one of \['embed', 'forward'\]"):
        tuned_minilm.run("generate", input_ids=np.zeros((1, 4), np.int64))


def test_twin_gives_the_weights_too(tmp_path, minilm):
    path = export_onnx(minilm, tmp_path / "attend.onnx", entry="attend")
    parity = verify_onnx(path, minilm, entry="attend", shapes=[{"batch": 2, "seq": 7}], masks=("ragged", "empty_row"))
    assert {case.output for case in parity.cases} == {"last_hidden_state", *(f"attention.{i}" for i in range(LAYERS))}
    assert parity.ok
    assert parity.max_abs_error < 1e-4


def ask(capsys, *words, code=0):
    found = cli.main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return json.loads(captured.out) if code == 0 else captured.err


class Page(HTMLParser):
    """Checks that every element is closed in its order, and keeps the text of the token spans."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tokens, self.data = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert not any(name in ("src", "href") for name, _ in attrs), "the page must be self-contained"
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "span" and "data-at" in self.open[-1][1]:
            self.tokens.append(data)
        if self.open and self.open[-1][0] == "script":
            self.data += data


def test_command_line_draws_what_it_attends_to(capsys, tmp_path, attending, minilm_dir):
    drawn = tmp_path / "it.html"
    document = ask(capsys, "run", attending, "--text", SENTENCE, "--attention", drawn, "--query", "it")
    assert document["tokens"] == [TOKENS]
    assert {"animal", "tired"} <= {found["token"] for found in document["top"][:3]}
    page = Page(drawn.read_text())
    assert page.tokens == [*TOKENS, *TOKENS]
    (stored,) = json.loads(re.search(r"const maps = (\[.*?\]);\n", page.data)[1])
    assert (stored["layers"], stored["heads"], stored["selected"]) == (LAYERS, HEADS, TOKENS.index("it"))
    # A model's directory is compiled for the sentence.
    again = ask(capsys, "run", minilm_dir, "--text", SENTENCE, "--attention", tmp_path / "it.png", "--query", "it")
    assert [found["token"] for found in again["top"]] == [found["token"] for found in document["top"]]
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_command_line_names_what_is_wrong(capsys, tmp_path, attending, minilm_artifact):
    words = ["--text", SENTENCE, "--attention"]
    assert "compile it with --entries" in ask(capsys, "run", minilm_artifact, *words, tmp_path / "a.html", code=2)
    assert "'dog'" in ask(capsys, "run", attending, *words, tmp_path / "a.html", "--query", "dog", code=2)
    assert ".html or .png" in ask(capsys, "run", attending, *words, tmp_path / "a.pdf", code=2)
    assert not list(tmp_path.iterdir())


def test_alignment_of_two_sequences(tmp_path):
    rng = np.random.default_rng(0)
    raw = rng.random((2, 1, 4, 6)).astype(np.float32)
    outputs = {"logits": np.zeros((2, 4, 9)), "cross_attention.0": raw / raw.sum(-1, keepdims=True)}
    target, source = ["<s>", "j'", "</script>"], ["I", "am", "<b>", "&", "."]
    (found,) = attention_maps(outputs, 1, {"cross_attention": target, "source": source})
    assert (found.kind, found.queries, found.keys) == ("cross_attention", tuple(target), tuple(source))
    np.testing.assert_array_equal(found.weights, outputs["cross_attention.0"][1][None][:, :, :3, :5])
    page = Page(write(tmp_path / "a.html", [found], title="a < b").read_text())
    assert page.tokens == [*target, *source]
    write(tmp_path / "a.png", [found])
    assert [token for token, _, _ in found.top(0, 4, skip_special=False)] == [
        source[at] for at in np.argsort(-found.mean[0])[:4]
    ]
    with pytest.raises(ReportError, match=r"one attention map for a \.png, got 2"):
        write(tmp_path / "b.png", [found, found])
    with pytest.raises(ReportError, match="expected attention weights among the outputs"):
        attention_maps({"logits": np.zeros(3)}, 0, {})
    with pytest.raises(ReportError, match=r"expected weights \(layers, heads, 3, 5\)"):
        AttentionMap("cross_attention", found.weights[0], found.queries, found.keys)


def test_an_encoder_decoder_writes_first_and_is_aligned_then(capsys, tmp_path):
    from attntune.models.rnn import RNNConfig, random_model

    config = RNNConfig(30, 40, 8, 12, 16, 16, attention=True)
    model = random_model(config, "tiny")
    target = ["", "<start>", "<end>", *(chr(0x1780 + index) for index in range(37))]
    model.vocabulary = {
        "source": {"tokens": ["", *"abcdefghijklmnopqrstuvwxyz", "?", "!", "-"], "lowercase": True, "unknown": None},
        "target": {"tokens": target, "separator": ""},
    }
    shapes = [{"batch": 2, "source": 8, "seq": 6}]
    artifact = attntune.compile(model, shapes=shapes, entries=["encode", "decode", "attend"])
    path = artifact.save(tmp_path / "tiny.attn")
    words = ["--text", "abc", "--text", "Hello"]
    document = ask(capsys, "run", path, *words, "--attention", tmp_path / "a.html")
    written = document["tokens"]
    assert all(1 <= len(row) <= 6 and set(row) <= set(target) for row in written)
    assert Page((tmp_path / "a.html").read_text()).tokens == [*written[0], *"abc", *written[1], *"hello"]
    # What each row attended to is what the decoder gave, one token after another.
    tuned = attntune.load(path)
    ids = np.array([[1, 2, 3]])
    lengths = np.array([3], np.int32)
    memory = tuned.run("encode", input_ids=ids, source_lengths=lengths)
    state, token, steps = tuned.state("decode")["state"], 1, []
    for _ in written[0]:
        logits, state, weights = tuned.run(
            "decode", input_ids=np.array([[token]]), source_lengths=lengths, state=state, memory=memory
        )
        token = int(logits[0].argmax())
        steps.append(weights[0, 0, 0, :3])
    decoded = [1, *(target.index(symbol) for symbol in written[0][:-1])]
    _, maps = tuned.run("attend", input_ids=ids, source_lengths=lengths, decoder_input_ids=np.array([decoded]))
    np.testing.assert_allclose(maps[0, 0], np.array(steps), atol=1e-5)
    # A picture has no Khmer glyphs everywhere; it is drawn nonetheless.
    ask(capsys, "run", path, "--text", "abc", "--attention", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
