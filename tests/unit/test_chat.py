"""Conversations on the model of NumPy: by call, through a pipe, and in a terminal."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_generation import CONTEXT, VOCAB, Toy

from attntune import cli
from attntune.cli import open_model as home
from attntune.errors import InputError
from attntune.runtime.conversation import Conversation
from attntune.runtime.sampling import Sampling
from attntune.runtime.text import Codec

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'refused' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m['content'] }}-{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One letter a token; token 0, a dash, ends a message."""
    where = tmp_path_factory.mktemp("artifact")
    letters = {"-": 0, **{chr(ord("a") + i - 1): i for i in range(1, VOCAB)}}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(where / "tokenizer.json"))
    (where / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return where


def alone(toy, codec, messages, most, stop=(0,)):
    """The answer of a model that reads the whole conversation."""
    return codec.decode(toy.greedy(codec.chat(messages), most, stop))


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_those_to_the_whole_conversation(folder, seed):
    toy, codec = Toy(seed), Codec(folder)
    conversation = Conversation(toy, codec, system="c")
    messages = [{"role": "system", "content": "c"}]
    for text in ("ab", "d", "fe"):
        messages.append({"role": "user", "content": text})
        answer = "".join(conversation.say(text, max_new_tokens=3))
        assert answer == alone(toy, codec, messages, 3)
        messages.append({"role": "assistant", "content": answer})
        turn = conversation.turns[-1]
        assert (turn.text, turn.answer) == (text, answer)
        assert turn.ended == ("length" if len(answer) == 3 else "stop")
        assert turn.generated.prompt_tokens == len(codec.chat(messages[:-1]))
    assert conversation.messages == messages
    # All of the turn before; where its answer was cut, all but the last token.
    assert [turn.generated.reused_tokens for turn in conversation.turns] == [
        0, *(turn.generated.prompt_tokens + turn.generated.new_tokens - (turn.ended == "length")
             for turn in conversation.turns[:-1]),
    ]  # fmt: skip


def test_what_is_not_read_to_its_end_is_kept_as_far_as_it_was(folder):
    toy, codec = Toy(1, stop=()), Codec(folder)
    conversation = Conversation(toy, codec)
    pieces = conversation.say("ab", max_new_tokens=8)
    shown = next(pieces) + next(pieces)
    later = "".join(conversation.say("c", max_new_tokens=2))
    assert [turn.ended for turn in conversation.turns] == ["interrupted", "length"]
    assert [message["content"] for message in conversation.messages] == ["ab", shown, "c", later]
    assert later == alone(toy, codec, conversation.messages[:-1], 2, stop=())
    assert list(pieces) == []
    # Of what was never begun nothing is left.
    conversation.say("d")
    conversation.say("e", max_new_tokens=1).close()
    assert len(conversation.messages) == 4


def test_a_full_conversation_is_refused_and_goes_on(folder):
    toy, codec = Toy(2, stop=()), Codec(folder)
    conversation = Conversation(toy, codec)
    # No more than there is room for.
    assert len("".join(conversation.say("abcdef" * 3, max_new_tokens=9))) == CONTEXT - 19
    assert conversation.turns[-1].ended == "length"
    messages, held, calls = list(conversation.messages), list(conversation.cache.tokens), len(toy.calls)
    for text, message in (
        ("a", "within 24 tokens, the answer included; with this message it has 27"),
        ("refused", "no"),
    ):
        with pytest.raises(InputError, match=message):
            conversation.say(text)
    assert (conversation.messages, conversation.cache.tokens, len(toy.calls)) == (messages, held, calls)
    shorter = Conversation(toy, codec)
    shorter.messages = messages[:1]
    with pytest.raises(InputError, match="max_new_tokens of at least 1"):
        shorter.say("a", max_new_tokens=0)
    assert len("".join(shorter.say("a", max_new_tokens=2))) == 2


def test_stop_strings_and_draws(folder):
    toy, codec = Toy(4, stop=()), Codec(folder)
    whole = "".join(Conversation(toy, codec).say("ab", max_new_tokens=9))
    conversation = Conversation(toy, codec)
    assert "".join(conversation.say("ab", max_new_tokens=9, stop=[whole[3:5]])) == whole.partition(whole[3:5])[0]
    assert conversation.turns[-1].ended == "stop"
    drawn = ["".join(Conversation(toy, codec).say("ab", max_new_tokens=9, sampling=Sampling(2.0, seed=seed)))
             for seed in (0, 0, 1)]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


def test_models_without_template_or_cache_are_refused(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match="no chat template"):
        Conversation(Toy(), Codec(tmp_path))
    toy = Toy()
    toy.manifest["entries"]["encode"] = {"inputs": [], "outputs": [], "updates": {}}
    with pytest.raises(InputError, match="expected a decoder with a key-value cache"):
        Conversation(toy, Codec(folder))


@pytest.fixture
def ask(folder, monkeypatch, capsys):
    """`attntune run MODEL --chat WORDS` with lines on standard input; exit code, output and errors."""

    def run(lines, *words, toy=None):
        monkeypatch.setattr(home, "open_model", lambda path, precision=None: (toy or Toy(2), folder))
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = cli.main(["run", str(folder), "--chat", *words])
        return code, *capsys.readouterr()

    return run


def test_a_line_is_a_turn(ask, folder):
    toy, codec = Toy(2), Codec(folder)
    messages, expected = [{"role": "system", "content": "f"}], []
    for text in ("ab", "d"):
        messages.append({"role": "user", "content": text})
        expected.append(alone(toy, codec, messages, 4))
        messages.append({"role": "assistant", "content": expected[-1]})
    code, out, err = ask(["ab", "", "d"], "--system", "f", "--max-new-tokens", "4")
    assert (code, out) == (0, "".join(f"{answer}\n" for answer in expected))
    assert [" reused; decode" in line for line in err.splitlines()] == [False, True]
    code, out, err = ask(["ab", "d"], "--system", "f", "--max-new-tokens", "4", "--json")
    document = json.loads(out)
    assert (code, document["system"], document["context"]) == (0, "f", CONTEXT)
    assert [(turn["text"], turn["answer"]) for turn in document["turns"]] == list(
        zip(("ab", "d"), expected, strict=True)
    )
    assert [turn["reused_tokens"] > 0 for turn in document["turns"]] == [False, True]
    assert err.count("tokens/s") == 4


def test_a_turn_that_fails_is_said_and_the_others_are_kept(ask):
    code, out, err = ask(["ab", "abcdefabcdefabcdefab", "d"], "--json", "--max-new-tokens", "3")
    turns = json.loads(out)["turns"]
    assert code == 2
    assert [list(turn)[:2] for turn in turns] == [["text", "answer"], ["text", "error"], ["text", "answer"]]
    assert "error: expected a conversation within 24 tokens" in err
    assert turns[2]["reused_tokens"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--beams", "2"], "a conversation keeps one cache"),
        (["--max-new-tokens", "0"], "--max-new-tokens of at least 1"),
        (["--temperature", "-1"], "a temperature of at least 0"),
        (["--attention", "a.html"], "expected --attention with --text"),
    ],
)
def test_what_no_conversation_has_is_said_at_once(ask, words, message):
    toy = Toy()
    code, out, err = ask(["ab"], *words, toy=toy)
    assert (code, out, toy.calls) == (2, "", [])
    assert message in err


def test_a_system_message_needs_a_chat(capsys, folder):
    assert cli.main(["run", str(folder), "--text", "a", "--system", "b"]) == 2
    assert "expected --system with --chat" in capsys.readouterr().err


SLOW = """
import signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
from test_generation import Toy
from attntune.cli import main, open_model
signal.signal(signal.SIGINT, signal.default_int_handler)
class Slow(Toy):
    def run(self, entry, **inputs):
        if entry == "decode":
            time.sleep(float(sys.argv[1]))
        return super().run(entry, **inputs)
open_model.open_model = lambda path, precision=None: (Slow(2, stop=()), Path(path))
sys.exit(main(sys.argv[2:]))
"""


def child(folder, pause, stdin, *words):
    command = [sys.executable, "-c", SLOW, str(Path(__file__).parent), str(pause), "run", str(folder), "--chat", *words]
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_pipe(folder):
    process = child(folder, 0, subprocess.PIPE, "--max-new-tokens", "3")
    out, err = process.communicate("ab\nd\n", timeout=60)
    assert process.returncode == 0, err
    assert [len(line) for line in out.splitlines()] == [3, 3]
    assert err.count("cut, no more tokens allowed") == 2


def test_an_interrupt_ends_the_answer_in_a_terminal(folder):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = child(folder, 0.2, theirs, "--max-new-tokens", "12")
    try:
        os.write(ours, b"ab\n")
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        answer = first + process.stdout.readline().rstrip("\n")
        assert 1 <= len(answer) < 12
        # Nothing is being answered: the conversation goes on all the same.
        os.write(ours, b"c\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        os.write(ours, b"\x04")
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
    assert process.returncode == 0, err
    assert err.count("; stopped") == 2
    assert err.startswith("> ")
