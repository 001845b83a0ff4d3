"""Text in and text out of a model that writes: its tokenizer or symbols, its chat template, and text as it is written.

An artifact holds ``tokenizer.json`` and, of chat models, ``tokenizer_config.json``; or else ``vocabulary.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import InputError
from attntune.runtime.generation import Generated, stream
from attntune.runtime.vocabulary import VOCABULARY, Vocabulary

_BROKEN = "\ufffd"


class Codec:
    """Text to token ids and back.

    Args:
        folder: of the artifact; what is not in it is looked for beside it.
        tokenizer: a ``tokenizer.json`` to use instead.

    Raises:
        InputError: there is neither a tokenizer nor a vocabulary, or the ``tokenizers`` package is missing.
    """

    def __init__(self, folder: Path, tokenizer: Path | None = None) -> None:
        self._folders = [folder, folder.parent] if tokenizer is None else [tokenizer.parent, folder]
        path = tokenizer or self._file("tokenizer.json")
        vocabulary = self._file(VOCABULARY) if path is None else None
        if path is None and vocabulary is None:
            raise InputError(f"expected tokenizer.json or {VOCABULARY} in {folder}; name one with --tokenizer")
        self.vocabulary = Vocabulary.load(vocabulary) if vocabulary else None
        self._tokenizer = _tokenizer(path) if path else None

    def _file(self, name: str) -> Path | None:
        return next((folder / name for folder in self._folders if (folder / name).is_file()), None)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; ``special``: with what the tokenizer puts around it."""
        if self._tokenizer is None:
            raise InputError("expected a model with a tokenizer.json; this one's symbols only go in as a source")
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; U+FFFD stands for half a character."""
        if self._tokenizer is None:
            assert self.vocabulary is not None
            return self.vocabulary.decode(ids)
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def sources(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Inputs of an encoder: input_ids (batch, source) int64, padded with zeros, source_lengths (batch,) int32."""
        if self.vocabulary is not None:
            ids, lengths = self.vocabulary.encode(texts)
            return {"input_ids": ids, "source_lengths": lengths}
        rows = [self.encode(text) for text in texts]
        if not all(rows):
            raise InputError("expected texts of at least one token")
        padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        return {"input_ids": padded, "source_lengths": np.array([len(row) for row in rows], np.int32)}

    def chat_template(self) -> tuple[str, dict[str, str]]:
        """The model's chat template, in Jinja's language, and the special tokens it may name.

        Raises:
            InputError: the model has none.
        """
        path = self._file("tokenizer_config.json")
        config = json.loads(path.read_text(encoding="utf-8")) if path else {}
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((item["template"] for item in template if item.get("name") == "default"), None)
        if not isinstance(template, str):
            raise InputError("this model has no chat template; prompt it without --chat")
        return template, {name: _content(value) for name, value in config.items() if name.endswith("_token") and value}

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        The model's template is run in a sandbox: it came with the weights.

        Args:
            messages: ``role`` (system, user, assistant) and ``content`` of each.

        Raises:
            InputError: the model has no chat template, or the template refuses the messages.
        """
        template, special = self.chat_template()
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise InputError("chat templates need jinja2: pip install 'attntune[models]'") from None

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            text = environment.from_string(template).render(
                messages=list(messages), add_generation_prompt=True, **special
            )
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses the conversation: {error}") from None
        return self.encode(text, special=False)


class TextStream:
    """Text of one sequence as its tokens come: never half a character, never part of a stop string.

    Args:
        codec: of the model.
        stop: strings before which the text ends.
    """

    def __init__(self, codec: Codec, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise InputError("expected stop strings of at least one character")
        self._codec, self._stop = codec, tuple(stop)
        self._ids: list[int] = []
        self._start = self._read = 0
        self._held = ""
        self.text = ""
        """What has been given out."""
        self.stopped = False
        """Whether a stop string was written."""

    def push(self, token: int) -> str:
        """What can be shown now that ``token`` was written."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._give(self._decoded(whole=False), last=False)

    def flush(self) -> str:
        """The rest, after the last token."""
        return "" if self.stopped else self._give(self._decoded(whole=True), last=True)

    def _decoded(self, *, whole: bool) -> str:
        """Text of tokens not yet read. Some tokens before go along: a tokenizer may drop a text's first space."""
        before = self._codec.decode(self._ids[self._start : self._read])
        after = self._codec.decode(self._ids[self._start :])
        if not whole and (after.endswith(_BROKEN) or len(after) <= len(before)):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _give(self, new: str, *, last: bool) -> str:
        text = self._held + new
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            shown, self._held, self.stopped = text[: min(ends)], "", True
        else:
            kept = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
            shown, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError("text needs the tokenizers package: pip install 'attntune[models]'") from None
    if not path.is_file():
        raise InputError(f"expected a tokenizer.json at {path}, found nothing there")
    found = Tokenizer.from_file(str(path))
    found.no_padding()
    found.no_truncation()
    return found


def stream_text(
    tuned: Any, codec: Codec, prompts: Sequence[Sequence[int]], *, stop: Sequence[str] = (),
    timings: Generated | None = None, **options: Any,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Pairs of row and piece of text as they are written; whatever the pieces join to is the row's text.

    Args:
        tuned: see :func:`attntune.runtime.generation.stream`.
        codec: of the model.
        prompts: token ids by row.
        stop: strings before which a row's text ends.
        timings: where the row's token ids, up to the one that completed a stop string, and times are put.
        options: more of :func:`attntune.runtime.generation.stream`, whose errors come at once.
    """
    rows = [TextStream(codec, stop) for _ in prompts]
    tokens = stream(tuned, prompts, timings=timings, **options)
    return _pieces(tokens, rows, timings)


def _pieces(
    tokens: Iterator[tuple[int, int]], rows: Sequence[TextStream], timings: Generated | None
) -> Iterator[tuple[int, str]]:
    for row, token in tokens:
        shown = rows[row]
        if shown.stopped:
            continue
        if timings is not None:
            timings.tokens[row].append(token)
        if piece := shown.push(token):
            yield row, piece
        if all(text.stopped for text in rows):
            return
    for row, shown in enumerate(rows):
        if piece := shown.flush():
            yield row, piece
