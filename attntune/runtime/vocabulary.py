"""Symbols of a small model, such as letters and phonemes: what goes in and what comes out, in an artifact's JSON file.

``vocabulary.json``::

    {"source": {"tokens": ["<pad>", "a", …], "lowercase": true, "unknown": 1, "end": [2], "length": 0},
     "target": {"tokens": […], "separator": " "}}

``tokens`` are symbols by id. Of the source: ``unknown`` is the id of what is not among them (null: it is left out),
``end`` follows the text, and a positive ``length`` is what every text is padded to, with zeros that count as text. Of
the target: ``separator`` stands between symbols.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import InputError

VOCABULARY = "vocabulary.json"


@dataclass(frozen=True)
class Vocabulary:
    """Text to ids and ids to text."""

    source: Mapping[str, Any]
    target: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read ``vocabulary.json``; raises :class:`InputError` when it is not one."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            found = cls(fields["source"], fields["target"])
            if not (found.source["tokens"] and found.target["tokens"]):
                raise KeyError("tokens")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"expected a vocabulary with source and target tokens in {path}: {error!r}") from None
        return found

    def to_json(self) -> dict[str, Any]:
        """What :meth:`load` reads."""
        return {"source": dict(self.source), "target": dict(self.target)}

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (batch, source) int64, padded with zeros, and lengths (batch,) int32.

        Raises:
            InputError: a text has no symbol that is known, or more than the model takes.
        """
        ids = {token: index for index, token in enumerate(self.source["tokens"])}
        unknown, length = self.source.get("unknown"), int(self.source.get("length", 0))
        rows = []
        for text in texts:
            given = text.lower() if self.source.get("lowercase") else text
            row = [ids.get(symbol, unknown) for symbol in given]
            known = [index for index in row if index is not None]
            if not known:
                raise InputError(f"expected a text of the model's symbols, got {text!r}")
            known += self.source.get("end", [])
            if length and len(known) > length:
                raise InputError(f"expected at most {length} symbols, got {len(known)} in {text!r}")
            rows.append(known)
        width = length or max(map(len, rows))
        padded = np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        return padded, np.array([length or len(row) for row in rows], np.int32)

    def symbols(self, ids: Sequence[int]) -> list[str]:
        """The target's symbols of ``ids``."""
        return [str(self.target["tokens"][index]) for index in ids]

    def source_symbols(self, ids: Sequence[int]) -> list[str]:
        """The source's symbols of ``ids``, for the columns of an alignment."""
        return [str(self.source["tokens"][index]) for index in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""
        return str(self.target.get("separator", "")).join(self.symbols(ids))
