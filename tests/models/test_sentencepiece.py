"""SentencePiece files made byte by byte: their tokens against the likeliest of all ways to spell a text."""

import json
import struct
from itertools import pairwise, product

import numpy as np
import pytest
from checkpoints import LLAMA, MARIAN, T5, llama_tensors, marian_tensors, t5_tensors, write
from hypothesis import given, settings
from hypothesis import strategies as st

from attntune import cli
from attntune.compiler import compile
from attntune.errors import ModelError
from attntune.models import from_pretrained
from attntune.models.sentencepiece import read_sentencepiece
from attntune.runtime import load
from attntune.runtime.text import Codec

#: Text, log probability.
WORDS = {
    "▁the": -2.0, "▁a": -2.5, "▁cat": -4.0, "▁c": -5.0, "at": -3.5, "s": -2.2, "▁sat": -4.5, "▁": -3.0, "c": -6.0,
    "a": -5.5, "t": -5.0, "h": -6.5, "e": -4.8, "the": -6.0, "ts": -5.5, ".": -3.1,
}  # fmt: skip
TEXTS = ["the cat sat", "  cats  that  the", "a.", "hat chat tst"]


def varint(value):
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def model_file(path, words=WORDS, special=(("<pad>", 3), ("</s>", 3), ("<unk>", 2)), kind=1):
    """A ``.spm`` file: pieces, the trainer's kind of model, and a normaliser without a table."""
    data = b"".join(field(1, field(1, text) + field(2, 0.0) + field(3, type_)) for text, type_ in special)
    data += b"".join(field(1, field(1, text) + field(2, score)) for text, score in words.items())
    path.write_bytes(data + field(2, field(3, kind) + field(40, 2)) + field(3, field(1, "identity") + field(3, 1)))


def likeliest(text):
    """Pieces of the best of all ways to cut a text whose every character is known."""
    pieces = []
    for word in text.split():
        spelled = "▁" + word
        ways = []
        for cuts in product((False, True), repeat=len(spelled) - 1):
            parts, start = [], 0
            for at, cut in enumerate([*cuts, True], 1):
                if cut:
                    parts.append(spelled[start:at])
                    start = at
            if all(part in WORDS for part in parts):
                ways.append((sum(WORDS[part] for part in parts), parts))
        pieces += max(ways)[1]
    return pieces


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A T5 directory with ``spiece.model``."""
    folder = tmp_path_factory.mktemp("t5")
    config = {**T5, "num_layers": 1, "num_decoder_layers": 1}
    write(folder, config, t5_tensors(config))
    model_file(folder / "spiece.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 3}))
    return folder


def encoder(model, folder):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(model.tokenizer)
    return Codec(folder)


def test_t5s_tokens_are_the_likeliest_then_the_end(t5, tmp_path):
    codec = encoder(from_pretrained(t5), tmp_path)
    names = ["<pad>", "</s>", "<unk>", *WORDS, "<extra_id_2>", "<extra_id_1>", "<extra_id_0>"]
    for text in TEXTS:
        ids = codec.encode(text)
        assert [names[index] for index in ids] == [*likeliest(text), "</s>"]
        assert codec.decode(ids) == " ".join(text.split())
    assert [names[i] for i in codec.encode("the <extra_id_0> xyz a")] == [
        "▁the", "<extra_id_0>", "▁", "<unk>", "▁a", "</s>"
    ]  # fmt: skip
    assert from_pretrained(t5).vocabulary is None


def test_marians_ids_are_those_of_its_vocabulary(tmp_path):
    model_file(tmp_path / "source.spm", special=(("<unk>", 2), ("<s>", 3), ("</s>", 3)))
    names = ["</s>", "<unk>", ">>fra<<", *reversed(WORDS), "▁chat", "é", "<pad>"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    model = from_pretrained(write(tmp_path, MARIAN, marian_tensors(MARIAN)))
    codec = encoder(model, tmp_path / "made")
    for text in TEXTS[:3]:
        ids = codec.encode(text)
        assert [names[index] for index in ids] == [*likeliest(text), "</s>"]
    assert [names[i] for i in codec.encode(">>fra<< the x")] == [">>fra<<", "▁the", "▁", "<unk>", "</s>"]
    assert codec.decode([names.index(piece) for piece in ("▁the", "▁chat", "é", ".", "</s>")]) == "the chaté."


def test_text_to_text_from_the_command_line(t5, tmp_path, capsys):
    """A directory compiled, run and drawn."""
    artifact = compile(
        from_pretrained(t5), shapes=[{"batch": 1, "source": 8, "seq": 1, "context": 8}],
        entries=["encode", "prefill", "decode", "attend"],
    ).save(tmp_path / "m.attn")  # fmt: skip

    def ask(*words):
        assert cli.main(["run", str(artifact), "--text", TEXTS[0], *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    document = ask("--max-new-tokens", 6)
    tuned = load(artifact)
    ids = np.array([Codec(tuned.folder).encode(TEXTS[0])])
    source = {"input_ids": ids, "source_lengths": np.array([ids.shape[1]], np.int32)}
    assert document["tokens"] == tuned.generate([[]], source=source, max_new_tokens=6).tokens
    assert document["texts"] == [Codec(tuned.folder).decode(document["tokens"][0]).lstrip()]
    ask("--attention", tmp_path / "maps.html")
    assert ">cat</span>" in (tmp_path / "maps.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), r"spiece\.model is not a SentencePiece model"),
        (lambda path: path.write_bytes(b""), "it has no pieces"),
        (lambda path: model_file(path, kind=2), r"spiece\.model: model_type 2 is not supported; expected '1"),
        (lambda path: model_file(path, special=(("<pad>", 3),)), "expected a piece for what is unknown, and </s>"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(t5, tmp_path, change, message):
    for file in t5.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path / "spiece.model")
    with pytest.raises(ModelError, match=message):
        from_pretrained(tmp_path)


def test_a_vocabulary_with_gaps_is_refused(tmp_path):
    model_file(tmp_path / "source.spm")
    (tmp_path / "vocab.json").write_text(json.dumps({"</s>": 0, "<unk>": 2}))
    with pytest.raises(ModelError, match=r"vocab\.json: expected pieces with ids from 0 on without gaps"):
        from_pretrained(write(tmp_path, MARIAN, marian_tensors(MARIAN)))


#: Pieces of a BPE model, the best first; a letter's score is never asked for.
PAIRS = ["▁t", "he", "▁the", "at", "▁c", "▁cat", "aa", "aaa", "▁▁", "th", "hat", "ta", "▁a"]
BPE = {piece: -float(rank) for rank, piece in enumerate([*PAIRS, *"▁thecas"])}


def joined(text):
    """SentencePiece's BPE, as it is defined: of all neighbours that are a piece together, the best first."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        ways = [(-BPE[a + b], at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in BPE]
        if not ways:
            return symbols
        _, at = min(ways)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The codec of a Llama directory with ``tokenizer.model``, of pieces, of a byte, and of one that was added."""
    folder = tmp_path_factory.mktemp("llama")
    write(folder, LLAMA, llama_tensors(LLAMA))
    special = (("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{code:02X}>", 6) for code in (0xC3, 0xA9)))
    model_file(folder / "tokenizer.model", BPE, special, kind=2)
    more = {str(len(BPE) + len(special)): {"content": "<|user|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": more}))
    codec = encoder(from_pretrained(folder), folder / "made")
    return codec, [*(name for name, _ in special), *BPE, "<|user|>"]


@settings(deadline=None, max_examples=200)
@given(text=st.text("thecas ", min_size=1).filter(str.strip))
def test_llamas_tokens_are_joined_best_first(bpe, text):
    codec, names = bpe
    text = " ".join(text.split())
    ids = codec.encode(text)
    assert [names[index] for index in ids] == ["<s>", *joined(text)]
    assert codec.decode(ids) == text


def test_what_no_piece_spells_is_bytes_or_unknown(bpe):
    codec, names = bpe
    assert [names[i] for i in codec.encode("thé<|user|>x")] == [
        "<s>", "▁t", "h", "<0xC3>", "<0xA9>", "<|user|>", "▁", "<unk>"
    ]  # fmt: skip


def test_scores_and_kinds_are_read(tmp_path):
    model_file(tmp_path / "m.spm")
    found = read_sentencepiece(tmp_path / "m.spm")
    assert [piece for piece, _, kind in found.pieces if kind == 1] == list(WORDS)
    np.testing.assert_allclose([score for _, score, kind in found.pieces if kind == 1], list(WORDS.values()))
    assert (found.prefix, found.squeeze, found.charsmap) == (True, True, b"")
