"""How well a language model expects a text: perplexity over windows of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attntune.errors import InputError

#: Rows of logits in float64 at a time.
_ROWS = 64
#: ``exp`` of more is no float.
_LARGEST = 709.0


@dataclass(frozen=True)
class Perplexity:
    """Of one text."""

    value: float
    """``exp`` of the mean negative log-likelihood of a predicted token, in nats."""
    tokens: int
    """That were predicted: all but the first of each window."""
    window: int


def perplexity(tuned: Any, tokens: Sequence[int], window: int | None = None) -> Perplexity:
    """Perplexity of a text under a decoder, each window of it on its own.

    Args:
        tuned: a loaded artifact whose entry ``forward`` gives logits (batch, seq, vocab) for input_ids (batch, seq).
        tokens: ids of the text.
        window: tokens that are seen together; the longest that was compiled by default. A last one of a single token
            is left out, as nothing in it is predicted.

    Raises:
        InputError: ``forward`` was not compiled or gives no logits, fewer than two tokens, or a window out of range.
    """
    outputs = [spec["name"] for spec in tuned.require("forward")["outputs"]]
    inputs = [spec["name"] for spec in tuned.require("forward")["inputs"]]
    if outputs != ["logits"] or inputs != ["input_ids"]:
        raise InputError(
            f"{tuned.manifest['name']}: expected forward to give logits for input_ids, as a decoder does; "
            f"got {outputs} for {inputs}"
        )
    longest = max(b["dims"]["seq"] for b in tuned.manifest["buckets"] if b["entry"] == "forward")
    size = longest if window is None else window
    if not 2 <= size <= longest:
        raise InputError(f"expected a window of 2 to {longest} tokens, the longest that was compiled; got {size}")
    if len(tokens) < 2:
        raise InputError(f"expected a text of at least 2 tokens, got {len(tokens)}")
    ids = np.asarray(tokens, np.int64)
    windows = [ids[at : at + size] for at in range(0, len(ids), size)]
    predicted = [window for window in windows if len(window) > 1]
    total = sum(_surprise(tuned.run("forward", input_ids=part[None])[0, :-1], part[1:]) for part in predicted)
    count = sum(len(part) - 1 for part in predicted)
    mean = total / count
    return Perplexity(math.exp(mean) if mean < _LARGEST else math.inf, count, size)


def _surprise(logits: np.ndarray, following: np.ndarray) -> float:
    """Sum of -log p of ``following`` (rows,) under logits (rows, vocab)."""
    total = 0.0
    for at in range(0, len(following), _ROWS):
        rows = np.asarray(logits[at : at + _ROWS], np.float64)
        top = rows.max(axis=1)
        normaliser = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
        total += float((normaliser - rows[np.arange(len(rows)), following[at : at + _ROWS]]).sum())
    return total
