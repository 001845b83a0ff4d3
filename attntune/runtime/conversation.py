"""A conversation with a model that writes: messages in its chat template, read once and kept in its cache."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from attntune.errors import InputError
from attntune.runtime.generation import Generated
from attntune.runtime.prompt_cache import PromptCache
from attntune.runtime.sampling import Sampling
from attntune.runtime.sequences import limit
from attntune.runtime.text import Codec, stream_text


@dataclass
class Turn:
    """What was said, and what the model answered."""

    text: str
    generated: Generated
    """Token ids of the answer, times, and how much of the conversation was read anew."""
    answer: str = ""
    ended: str = "interrupted"
    """``"stop"``: by a stop token or string; ``"length"``: after as many tokens as were allowed; ``"interrupted"``."""


class Conversation:
    """Messages by turns. Each turn's prompt is the whole conversation, of which only what is new is prefilled.

    An answer's tokens are in the cache as they were written. Where the template or the tokenizer makes other tokens of
    its text, the conversation is read again from the first that differs: an answer is always that to the messages, as
    a call of ``generate`` without a cache would give it.

    Args:
        tuned: a model with a chat template and a key-value cache.
        codec: of the model; by default that of its artifact.
        system: what the conversation begins with; without, what the template begins with by itself.
        context: tokens that the conversation may have at least; by default those of the largest compiled cache.

    Raises:
        InputError: the model has no chat template or no key-value cache.
    """

    def __init__(
        self, tuned: Any, codec: Codec | None = None, *, system: str | None = None, context: int | None = None
    ) -> None:
        self._tuned = tuned
        self._codec = codec or Codec(tuned.folder)
        self._codec.chat_template()
        self._answering: Generator[str, None, None] | None = None
        self.cache = PromptCache(tuned, context)
        self.context = min(limit(tuned), self.cache.context)
        """Tokens that the conversation may have, the template's included."""
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[Turn] = []

    def say(
        self, text: str, *, max_new_tokens: int = 256, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> Generator[str, None, None]:
        """Say ``text`` and get the answer in pieces, as they are written.

        The turn is recorded, in :attr:`messages` and :attr:`turns`, when the answer has ended or is no longer read
        (the iterator is closed, an exception such as an interrupt comes, or something else is said): then it is what
        was written until then. A turn of which nothing was written is not recorded.

        Args:
            text: of the user's message.
            max_new_tokens: of the answer at most; no more than the context has room for in any case.
            sampling: how tokens are drawn; greedy by default. A seed holds for each answer anew.
            stop: strings before which the answer ends.

        Raises:
            InputError: the conversation leaves no room for an answer in the context, or the template refuses it; at
                once, and the conversation is as before.
        """
        if self._answering is not None:
            self._answering.close()
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._codec.chat(messages)
        length = len(self._tuned.manifest["generation"]["start"]) + len(prompt)
        if length >= self.context:
            raise InputError(
                f"expected a conversation within {self.context} tokens, the answer included; with this message it has "
                f"{length} without; say less, begin a new one, or compile with a larger context"
            )
        turn = Turn(text, Generated([[]], prompt_tokens=len(prompt)))
        most = min(max_new_tokens, self.context - length)
        pieces = stream_text(
            self._tuned, self._codec, [prompt], stop=stop, timings=turn.generated, max_new_tokens=most,
            sampling=sampling, cache=self.cache,
        )  # fmt: skip
        self._answering = self._answer(turn, messages, pieces, most)
        return self._answering

    def _answer(
        self, turn: Turn, messages: list[dict[str, str]], pieces: Iterator[tuple[int, str]], most: int
    ) -> Generator[str, None, None]:
        try:
            for _, piece in pieces:
                turn.answer += piece
                yield piece
            turn.ended = "length" if turn.generated.new_tokens == most else "stop"
        finally:
            if turn.answer or turn.ended != "interrupted":
                self.messages = [*messages, {"role": "assistant", "content": turn.answer}]
                self.turns.append(turn)
