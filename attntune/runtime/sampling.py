"""Which token comes next: the likeliest, or one drawn from what temperature, top-k and top-p leave.

Sources: top-k: Fan et al., "Hierarchical Neural Story Generation" (2018); top-p: Holtzman et al., "The Curious Case of
Neural Text Degeneration" (2020). Applied in the order Hugging Face's ``generate`` applies them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attntune.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 0.0
    """Scores are divided by it; 0: always the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities together reach p."""
    seed: int | None = None
    """Of the draws; each row of a batch has draws of its own. None: different at every call."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"expected a temperature of at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"expected top_k of at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"expected top_p within (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class Suppressed:
    """Tokens that are not written."""

    always: tuple[int, ...] = ()
    first: tuple[int, ...] = ()
    """Not as the first."""

    def at(self, step: int) -> list[int]:
        """Those not to be written after ``step`` others."""
        return [*self.always, *(self.first if step == 0 else ())]


class Sampler:
    """Draws one token for each row of logits."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self.sampling = sampling
        seeds = np.random.SeedSequence(sampling.seed).spawn(rows)
        self._draws = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Tokens (rows,) int64 of logits (rows, vocab)."""
        if self.sampling.temperature == 0:
            return np.asarray(logits.argmax(axis=-1), np.int64)
        chosen = np.empty(len(logits), np.int64)
        for row, (scores, draws) in enumerate(zip(logits, self._draws, strict=True)):
            tokens, chances = candidates(scores, self.sampling)
            chosen[row] = tokens[min(int(np.searchsorted(np.cumsum(chances), draws.random())), len(tokens) - 1)]
        return chosen


def candidates(scores: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that may be drawn, likeliest first, and their probabilities (float64, summing to 1); scores (vocab,)."""
    scores = scores.astype(np.float64) / sampling.temperature
    kept = sampling.top_k if 0 < sampling.top_k < len(scores) else len(scores)
    tokens = np.argpartition(-scores, kept - 1)[:kept] if kept < len(scores) else np.arange(len(scores))
    tokens = tokens[np.argsort(-scores[tokens], kind="stable")]
    chances = np.exp(scores[tokens] - scores[tokens[0]])
    chances /= chances.sum()
    if sampling.top_p < 1:
        # As many as it takes to reach p, the one that crosses it included.
        enough = int(np.searchsorted(np.cumsum(chances), sampling.top_p)) + 1
        tokens, chances = tokens[:enough], chances[:enough]
        chances = chances / chances.sum()
    return tokens, chances


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, float64, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
