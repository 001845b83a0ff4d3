"""What ``attntune run`` makes of a model that writes, on the model of NumPy that has no compiler."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_generation import CONTEXT, VOCAB, Toy

from attntune.cli.run_generation import Options, run_arrays, run_generation
from attntune.errors import InputError
from attntune.runtime.generation import Generated
from attntune.runtime.sequences import limit
from attntune.runtime.text import Codec, stream_text

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """One letter a token; token 0, which ends a text, is none."""
    where = tmp_path_factory.mktemp("artifact")
    letters = {"-": 0, **{chr(ord("a") + i - 1): i for i in range(1, VOCAB)}}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(where / "tokenizer.json"))
    return Codec(where)


def test_text_is_that_of_the_tokens(capsys, codec):
    toy = Toy(2)
    expected = codec.decode(toy.greedy(codec.encode("ab"), 10))
    reply = run_generation(toy, codec, ["ab"], [], Options(max_new_tokens=10), live=False)
    assert reply.document["texts"] == [expected]
    assert reply.text == expected
    assert capsys.readouterr().out == ""
    live = run_generation(toy, codec, ["ab"], [], Options(max_new_tokens=10), live=True)
    assert live.text == ""
    said = capsys.readouterr()
    assert said.out == expected + "\n"
    assert "prefill 2 tokens" in said.err
    assert json.dumps(reply.document)


def test_several_texts_are_named_and_beams_are_searched(codec):
    toy = Toy(2)
    reply = run_generation(toy, codec, ["ab", "c"], [], Options(max_new_tokens=6), live=False)
    assert reply.text.splitlines() == [f"{name} -> {text}" for name, text in zip(["ab", "c"], reply.document["texts"],
                                                                                strict=True)]  # fmt: skip
    reply = run_generation(toy, codec, ["ab"], [], Options(max_new_tokens=6, beams=3), live=False)
    assert len(reply.document["scores"]) == 1


def test_beams_of_the_model_are_searched_and_that_is_said(capsys, codec):
    toy = Toy(2)
    asked = run_generation(toy, codec, ["ab"], [], Options(max_new_tokens=6, beams=3), live=True)
    assert "as the model says" not in capsys.readouterr().err
    toy.manifest["generation"]["beams"] = 3
    reply = run_generation(toy, codec, ["ab"], [], Options(max_new_tokens=6), live=True)
    assert (reply.text, reply.document["scores"]) == (asked.text, asked.document["scores"])
    assert "3 beams, as the model says" in capsys.readouterr().err
    toy.manifest["generation"]["beams"] = 9
    run_generation(toy, codec, ["ab"], [], Options(max_new_tokens=6), live=True)
    assert "the model says 9 beams, compiled is a batch of 8" in capsys.readouterr().err
    for options in (Options(max_new_tokens=6, beams=1), Options(max_new_tokens=6, stop=("zz",))):
        assert "scores" not in run_generation(toy, codec, ["ab"], [], options, live=False).document


def test_a_row_ends_at_its_stop_string_while_others_go_on(codec):
    toy = Toy(4, stop=())
    prompts = [codec.encode("ab"), codec.encode("d")]
    whole = [codec.decode(toy.greedy(prompt, 9, stop=())) for prompt in prompts]
    stop = whole[0][3:5]
    timings = Generated([[], []])
    texts = ["", ""]
    for row, piece in stream_text(toy, codec, prompts, stop=[stop], max_new_tokens=9, timings=timings):
        texts[row] += piece
    assert texts == [text.partition(stop)[0] for text in whole]
    assert codec.decode(timings.tokens[0]) == whole[0].partition(stop)[0] + stop


def test_without_a_number_the_cache_is_the_limit(codec):
    toy = Toy(1, stop=())
    assert limit(toy) == CONTEXT
    reply = run_generation(toy, codec, ["abc"], [], Options(), live=False)
    assert reply.document["new_tokens"] == CONTEXT - 3


def test_token_ids_are_written_on_from(capsys, tmp_path):
    toy = Toy(2, stop=())
    arrays = {"input_ids": np.array([[1, 2, 3], [4, 0, 0]]), "lengths": np.array([3, 1])}
    expected = [toy.greedy([1, 2, 3], 6, stop=()), toy.greedy([4], 6, stop=())]
    reply = run_arrays(toy, arrays, Options(max_new_tokens=6), tmp_path / "out" / "tokens.npz")
    assert reply.document["tokens"] == expected
    assert reply.text.splitlines() == [" ".join(map(str, row)) for row in expected]
    with np.load(tmp_path / "out" / "tokens.npz") as written:
        assert written["tokens"].tolist() == expected
        assert written["lengths"].tolist() == [6, 6]
    assert "decode" in capsys.readouterr().err
    assert len(run_arrays(toy, arrays, Options(beams=2), None).document["tokens"][0]) == CONTEXT - 3
    for wrong, message in (
        ({"ids": arrays["input_ids"]}, r"expected arrays \['input_ids'\] to write on from, got \['ids'\]"),
        ({"input_ids": np.ones((2, 3))}, "of integers and as many lengths, got float64"),
    ):
        with pytest.raises(InputError, match=message):
            run_arrays(toy, wrong, Options(max_new_tokens=2), None)
    with pytest.raises(InputError, match="without --stop, --chat"):
        run_arrays(toy, arrays, Options(stop=("a",)), None)


def test_what_does_not_fit_is_said(codec, tmp_path):
    toy = Toy()
    for options, audio, message in (
        (Options(beams=2, stop=("a",)), [], "without --stop"),
        (Options(chat=True), [], "no chat template"),
        (Options(), [tmp_path / "a.wav"], "expected --text"),
    ):
        with pytest.raises(InputError, match=message):
            run_generation(toy, codec, [] if audio else ["a"], audio, options, live=False)
    assert Options(top_k=3, chat=True).asked() == ["--top-k", "--chat"]
    assert not toy.calls
