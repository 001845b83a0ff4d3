"""``attntune run --chat`` without ``--text``: a conversation, one line of standard input a turn."""

from __future__ import annotations

import sys
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from attntune.cli.common import Reply, note
from attntune.cli.run_generation import MOST, Options, speed, times
from attntune.errors import InputError

if TYPE_CHECKING:
    from attntune.runtime import TunedModel
    from attntune.runtime.conversation import Conversation, Turn
    from attntune.runtime.text import Codec

_MARKER = "> "


def converse(tuned: TunedModel, codec: Codec, options: Options, *, live: bool) -> Reply:
    """Answer line by line until standard input ends. The key-value cache is kept from turn to turn.

    In a terminal an interrupt ends the answer being written, not the conversation. A message that leaves no room for
    an answer is refused, the conversation goes on as it was before, and the exit code is 2.

    Args:
        tuned: a model with ``generation`` in its manifest.
        codec: of the model.
        options: see :class:`Options`; all but beams.
        live: print answers as they are written.
    """
    from attntune.runtime.conversation import Conversation
    from attntune.runtime.sampling import Sampling

    if (options.beams or 1) > 1:
        raise InputError("expected --chat with --text, or without --beams: a conversation keeps one cache")
    most = MOST if options.max_new_tokens is None else options.max_new_tokens
    if most < 1:
        raise InputError(f"expected --max-new-tokens of at least 1, got {most}")
    asked = {
        "max_new_tokens": most,
        "sampling": Sampling(options.temperature, options.top_k, options.top_p, options.seed),
        "stop": options.stop,
    }
    conversation = Conversation(tuned, codec, system=options.system)
    terminal = sys.stdin.isatty()
    said: list[dict[str, Any]] = []
    while True:
        try:
            line = _ask(terminal)
            if line.strip():
                said.append(_turn(conversation, line, asked, terminal, live))
        except EOFError:
            break
        except KeyboardInterrupt:
            if not terminal:
                raise
            note("\nCtrl-D ends the conversation")
        except UnicodeDecodeError as error:
            raise InputError(f"expected UTF-8 text on standard input: {error}") from None
    if terminal:
        note("")
    document = {"system": options.system, "context": conversation.context, "turns": said}
    return Reply(document, "", exit_code=2 if any("error" in turn for turn in said) else 0)


def _ask(terminal: bool) -> str:
    """The next line; the marker stays out of an output that is kept."""
    if not terminal:
        return input()
    if sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 -- lines can be edited and called back once it is imported
        return input(_MARKER)
    print(_MARKER, end="", file=sys.stderr, flush=True)
    return input()


def _turn(conversation: Conversation, line: str, asked: dict[str, Any], terminal: bool, live: bool) -> dict[str, Any]:
    """Say one line; what was said and answered, for the document."""
    before = len(conversation.turns)
    start_secs = time.perf_counter()
    try:
        with closing(conversation.say(line, **asked)) as answer:
            for piece in answer:
                if live:
                    print(piece, end="", flush=True)
    except InputError as error:
        note(f"error: {error}")
        return {"text": line, "error": str(error)}
    except KeyboardInterrupt:
        if not terminal:
            raise
    if live:
        print(flush=True)
    if len(conversation.turns) == before:
        note("stopped before the answer began; the message is forgotten")
        return {"text": line, "ended": "interrupted"}
    turn = conversation.turns[-1]
    note(_statistics(turn, time.perf_counter() - start_secs))
    return _document(turn)


def _statistics(turn: Turn, seconds: float) -> str:
    ended = {"length": "; cut, no more tokens allowed", "interrupted": "; stopped"}.get(turn.ended, "")
    return speed(turn.generated, False, seconds) + ended


def _document(turn: Turn) -> dict[str, Any]:
    found = turn.generated
    return {
        "text": turn.text,
        "answer": turn.answer,
        "ended": turn.ended,
        "tokens": found.tokens[0],
        "prompt_tokens": found.prompt_tokens,
        "reused_tokens": found.reused_tokens,
        "new_tokens": found.new_tokens,
        **times(found),
    }
