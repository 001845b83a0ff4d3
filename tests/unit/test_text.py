"""Text as it is written: characters of several tokens, stop strings, chat templates."""

from __future__ import annotations

import json

import pytest

from attntune.errors import InputError
from attntune.runtime.text import Codec, TextStream

tokenizers = pytest.importorskip("tokenizers")

TEXT = "naïve café 🦙 ends. END, then more"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer with a token for every byte."""
    where = tmp_path_factory.mktemp("artifact")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|user|>", "<|answer|>"])
    made.save(str(where / "tokenizer.json"))
    return where


def pieces(codec, text, stop=()):
    shown = TextStream(codec, stop)
    return [*(shown.push(token) for token in codec.encode(text)), shown.flush()], shown


def test_no_half_characters(folder):
    codec = Codec(folder)
    given, shown = pieces(codec, TEXT)
    assert "".join(given) == shown.text == TEXT
    assert len(given) == len(TEXT.encode()) + 1
    assert not any("\ufffd" in piece for piece in given)
    # What ends within a character shows so at the end only.
    shown = TextStream(codec)
    half = codec.encode("🦙")[:3]
    assert [shown.push(token) for token in half] == ["", "", ""]
    assert "\ufffd" in shown.flush()


def test_text_ends_before_a_stop_string(folder):
    given, shown = pieces(Codec(folder), TEXT, ["END,", "never"])
    assert "".join(given) == shown.text == "naïve café 🦙 ends. "
    assert shown.stopped
    # What only began like one is shown after all.
    given, shown = pieces(Codec(folder), "an EN", ["END"])
    assert given[-1] == "EN"
    assert (shown.text, shown.stopped) == ("an EN", False)
    with pytest.raises(InputError, match="at least one character"):
        TextStream(Codec(folder), [""])


def test_chat_templates_are_sandboxed(folder):
    codec = Codec(folder)
    config = folder / "tokenizer_config.json"
    config.unlink(missing_ok=True)
    with pytest.raises(InputError, match="no chat template"):
        codec.chat([{"role": "user", "content": "hi"}])
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|answer|>{% endif %}"
    )
    config.write_text(json.dumps({"bos_token": {"content": "<|user|>"}, "chat_template": template}))
    expected = codec.encode("<|user|>hi<|answer|>")
    assert codec.chat([{"role": "user", "content": "hi"}]) == expected
    assert len(expected) == 4
    for wrong in ("{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{% if %}"):
        config.write_text(json.dumps({"chat_template": wrong}))
        with pytest.raises(InputError, match="chat template refuses"):
            codec.chat([{"role": "user", "content": "hi"}])


def test_sources_are_padded_and_counted(folder, tmp_path):
    made = Codec(folder).sources(["ab", "abcd"])
    assert made["input_ids"].shape == (2, 4)
    assert made["source_lengths"].tolist() == [2, 4]
    with pytest.raises(InputError, match=r"expected tokenizer\.json or vocabulary\.json"):
        Codec(tmp_path / "nothing")
    fields = {
        "source": {"tokens": ["<pad>", "<unk>", "a", "b"]},
        "target": {"tokens": ["-", "AH", "B"], "separator": " "},
    }
    (tmp_path / "vocabulary.json").write_text(json.dumps(fields))
    codec = Codec(tmp_path)
    assert codec.sources(["ab"])["input_ids"].tolist() == [[2, 3]]
    assert codec.decode([1, 2]) == "AH B"
    _, shown = [TextStream(codec) for _ in range(2)]
    assert [shown.push(1), shown.push(2), shown.flush()] == ["AH", " B", ""]
