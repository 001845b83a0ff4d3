"""Weights quantised by groups: 4 or 8 bits an element, a scale and a minimum for 32 consecutive values of a row.

GGUF's types Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 (llama.cpp, ggml-quants.c) are of this form, and what such a file
held is found again in its dequantised values, exactly; Q4_K's and Q5_K's but for the rounding of their scales to
float16.
"""

from __future__ import annotations

import math

import numpy as np

#: Consecutive values of a row that share one scale and one minimum.
WEIGHT_GROUP = 32
#: Bits by the name that workloads have for them.
GROUPED = {"uint4": 4, "uint8": 8}

#: Groups that are searched at a time: they and what is computed of them stay in the caches.
_CHUNK = 4096
#: Of the largest magnitude of a group: what float32 arithmetic may have cost values that lie on a grid.
_ON_GRID = np.float32(2.0**-21)
#: Steps in which a group's values may lie between the least and the greatest; fewer where a quantiser left some unused.
_STEPS = (15.0, 14.0, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0)
#: Parts of a group's range that the grid spans, the rest being clipped.
_SHRUNK = (0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)


def quantize_groups(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A float weight (rows, columns) as ``q · scale + minimum`` by groups of :data:`WEIGHT_GROUP`.

    Values that lie on a grid of 16 steps (4 bits), or of 32 or 255 (8 bits), are found again exactly. Of others the
    grid with the least squared error is searched with 4 bits: from the least to the greatest value or clipped at both
    ends, then fitted to what it rounds to. With 8 bits it is symmetric: 128 stands for 0. The last group of a row may
    be short.

    Returns:
        q (rows, columns) uint8, scale and minimum (rows, groups) float16.

    Raises:
        ValueError: a value is not finite or beyond what a float16 minimum holds.
    """
    rows, width = weight.shape
    groups = math.ceil(width / WEIGHT_GROUP)
    padded = np.pad(np.asarray(weight, np.float32), ((0, 0), (0, groups * WEIGHT_GROUP - width)), mode="edge")
    values = padded.reshape(rows * groups, WEIGHT_GROUP)
    if not np.abs(values).max(initial=0.0) < np.finfo(np.float16).max / 2:
        raise ValueError("expected finite values of a magnitude below 32,000")
    quantized = np.empty(values.shape, np.uint8)
    scale, minimum = (np.empty(len(values), np.float16) for _ in range(2))
    for first in range(0, len(values), _CHUNK):
        part = slice(first, first + _CHUNK)
        quantized[part], scale[part], minimum[part] = (_eight_bits if bits == 8 else _four_bits)(values[part])
    whole = quantized.reshape(rows, -1)[:, :width]
    return np.ascontiguousarray(whole), scale.reshape(rows, groups), minimum.reshape(rows, groups)


def ungrouped(weight: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """What q (rows, columns), scale and minimum (rows, groups) stand for, in float64."""
    step, least = (
        np.repeat(np.asarray(part, np.float64), WEIGHT_GROUP, axis=1)[:, : weight.shape[1]] for part in (scale, minimum)
    )
    return np.asarray(weight, np.float64) * step + least


def _eight_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of groups (groups, 32): q, scale and minimum."""
    best = _Best(values, 255)
    # Q8_0: symmetric.
    step = best.largest() / np.float32(127)
    best.offer(step, _as_stored(step) * np.float32(-128))
    best.offer_stored(5)
    return best.found


def _four_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of groups (groups, 32): the grid they lie on, or the best that is found."""
    best = _Best(values, 15)
    best.offer_stored(4)
    rest = best.unsettled()
    if not len(rest):
        return best.found
    least, range_ = best.least[rest], (best.greatest - best.least)[rest]
    for steps in _STEPS:
        best.fit(range_ / np.float32(steps), least, rest)
    for part in _SHRUNK:
        kept = range_ * np.float32(part)
        best.fit(kept / np.float32(15), least + (range_ - kept) / np.float32(2), rest)
    return best.found


class _Best:
    """The best of the grids offered, by group."""

    def __init__(self, values: np.ndarray, top: int) -> None:
        self.values, self.top = values, top
        self.least, self.greatest = values.min(axis=1), values.max(axis=1)
        count = len(values)
        self.found = np.zeros(values.shape, np.uint8), np.zeros(count, np.float16), np.zeros(count, np.float16)
        self.error = np.full(count, np.inf, np.float32)

    def largest(self) -> np.ndarray:
        """The largest magnitude of each group."""
        largest: np.ndarray = np.maximum(self.greatest, -self.least)
        return largest

    def offer_stored(self, bits: int) -> None:
        """The grids of GGUF's types Q4_1 and Q4_0, or Q5_1 and Q5_0, for what is not settled."""
        if len(rest := self.unsettled()):
            self.offer((self.greatest - self.least)[rest] / np.float32((1 << bits) - 1), self.least[rest], rest)
        if len(rest := self.unsettled()):
            # The lower half of the grid holds the value of the greatest magnitude; the scale has the sign this needs.
            largest = np.where(-self.least > self.greatest, self.least, self.greatest)[rest]
            step = largest / np.float32(-(1 << bits - 1))
            self.offer(step, -_as_stored(step) * np.float32(1 << bits - 1), rest)

    def unsettled(self) -> np.ndarray:
        """Groups whose values do not lie on the grid found."""
        return np.flatnonzero(self.error > WEIGHT_GROUP * (_ON_GRID * self.largest()) ** 2)

    def offer(self, scale: np.ndarray, minimum: np.ndarray, which: np.ndarray | None = None) -> None:
        """The grid of ``scale`` and ``minimum`` (groups,) float32, for all groups or for those of ``which``."""
        values = self.values if which is None else self.values[which]
        scale, minimum = scale.astype(np.float16), minimum.astype(np.float16)
        quantized = _rounded(values, scale, minimum, self.top)
        off = quantized * scale.astype(np.float32)[:, None]
        off += minimum.astype(np.float32)[:, None]
        off -= values
        error = np.einsum("gk,gk->g", off, off)
        at = np.arange(len(self.values)) if which is None else which
        better = error < self.error[at]
        at = at[better]
        self.error[at] = error[better]
        self.found[0][at] = quantized[better]
        self.found[1][at] = scale[better]
        self.found[2][at] = minimum[better]

    def fit(self, scale: np.ndarray, minimum: np.ndarray, which: np.ndarray) -> None:
        """Offer the scale and minimum that suit best what the given ones round the groups of ``which`` to."""
        values = self.values[which]
        steps = _rounded(values, scale, minimum, self.top)
        mean = values.mean(axis=1)
        center = steps.mean(axis=1)
        steps -= center[:, None]
        spread = np.maximum(np.einsum("gk,gk->g", steps, steps), np.float32(1e-12))
        scale = np.einsum("gk,gk->g", steps, values - mean[:, None]) / spread
        self.offer(scale, mean - scale * center, which)


def _as_stored(scale: np.ndarray) -> np.ndarray:
    """What float16 makes of it, in float32."""
    rounded: np.ndarray = scale.astype(np.float16).astype(np.float32)
    return rounded


def _rounded(values: np.ndarray, scale: np.ndarray, minimum: np.ndarray, top: int) -> np.ndarray:
    """The nearest steps of a grid, 0 … ``top``, as float32."""
    scale, minimum = scale.astype(np.float32), minimum.astype(np.float32)
    steps: np.ndarray = values - minimum[:, None]
    steps /= np.where(scale == 0, np.float32(1), scale)[:, None]
    np.rint(steps, out=steps)
    np.clip(steps, 0, top, out=steps)
    return steps
