"""Attention in float64 NumPy: what every schedule is checked against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from attntune.ops.attention import Attention

#: Scores (batch · heads · queries · keys) up to which :func:`sample` computes everything: some 0.1 GB, some seconds.
SAMPLED_SCORES = 1 << 22
_SCORES_AT_A_TIME = 1 << 24
"""Scores that are held at a time, if need be those of one head: 0.1 GB, a few times over."""
_RUNS = 4
"""Runs of queries that are sampled of each head: the first, the last, and others between."""


def reference(w: Attention, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
    """Out and, if ``w`` has them, the weights; shapes as ``w.outputs()``."""
    operands = dict(zip((spec.name for spec in w.inputs()), inputs, strict=True))
    query, key, value = _by_head(w, operands)
    context = np.zeros_like(query)
    weights = np.zeros((w.batch, w.heads, w.q_len, w.kv_len)) if w.weights else None
    bounds = pairwise(operands["offsets"]) if w.ragged else ((0, None),)
    for b, (start, end) in enumerate(bounds):
        rows = slice(start, end)
        parts = [x[:, :, rows] for x in (query, key, value)]
        scores = w.batch * parts[0].shape[2] * parts[1].shape[2]
        together = max(1, _SCORES_AT_A_TIME // max(scores, 1))
        for first in range(0, w.heads if scores else 0, together):
            heads = slice(first, first + together)
            shares = _weights(w, operands, parts[0][:, heads], parts[1][:, heads], heads, b)
            context[:, heads, rows] = shares @ parts[2][:, heads]
            if weights is not None:
                weights[:, heads] = shares
    out = context if w.layout == "bhsd" else context.transpose(0, 2, 1, 3)
    out = np.ascontiguousarray(out).reshape(w.outputs()[0].shape)
    return (out,) if weights is None else (out, weights)


def _by_head(w: Attention, operands: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Query, key and value as (batch, heads, length, head_dim); a ragged batch as one sequence."""
    names = ("query", "key", "value")
    if w.packed:
        q_width, kv_width = w.heads * w.head_dim, w.kv_heads * w.head_dim
        found = np.split(np.asarray(operands["qkv"], np.float64), [q_width, q_width + kv_width], axis=-1)
    else:
        found = [np.asarray(operands[name], np.float64) for name in names]
    batch = 1 if w.ragged else w.batch
    found = [
        x if w.heads_apart(name) else x.reshape(batch, -1, x.shape[-1] // w.head_dim, w.head_dim).transpose(0, 2, 1, 3)
        for name, x in zip(names, found, strict=True)
    ]
    group = w.heads // w.kv_heads
    return [found[0], *(x.repeat(group, axis=1) for x in found[1:])]


def _weights(
    w: Attention, operands: Mapping[str, np.ndarray], query: np.ndarray, key: np.ndarray, of: slice, b: int
) -> np.ndarray:
    """The softmax (batch, heads, queries, keys) of the heads ``of``; of sequence ``b`` alone in a ragged batch."""
    from attntune.ops.attention import FLOOR

    scores = query @ key.swapaxes(-1, -2) * w.scaling
    i = np.arange(query.shape[2])[:, None]
    j = np.arange(key.shape[2])[None, :]
    lengths = np.asarray(operands.get("lengths", [w.kv_len]), np.int64)[:, None, None, None]
    at = i + w.causal_offset
    if w.lengths == "kv":
        at = at + lengths - w.q_len
    if w.softcap:
        scores = w.softcap * np.tanh(scores / w.softcap)
    if w.bias_heads:
        bias = np.asarray(operands["bias"], np.float64)
        scores = scores + (bias[:, of] if w.bias_heads > 1 else bias)
    if w.alibi:
        scores = scores + np.asarray(operands["slopes"], np.float64)[None, of, None, None] * (j - at)
    if w.score_mod:
        modify = w.modification()
        batch = np.arange(b, b + scores.shape[0])[:, None, None, None]
        heads = np.arange(w.heads)[None, of, None, None]
        scores = getattr(modify, "reference", modify)(scores, batch, heads, i, j)
    allowed = np.ones(scores.shape, bool)
    if w.mask:
        allowed &= (np.asarray(operands["mask"]) != 0)[:, None, None, :]
    if w.lengths:
        allowed &= j < lengths
    if w.lengths == "qkv":
        allowed &= i < lengths
    if w.causal:
        allowed &= j <= at
    if w.window:
        allowed &= j > at - w.window
    scores = np.where(allowed, scores, -np.inf)
    powers: np.ndarray = np.exp(scores - np.maximum(scores.max(axis=-1, keepdims=True), FLOOR))
    shares: np.ndarray = powers / np.maximum(powers.sum(axis=-1, keepdims=True), 1e-30)
    return shares


def sample(w: Attention, *inputs: np.ndarray) -> Iterator[tuple[tuple[Any, ...], tuple[np.ndarray, ...]]]:
    """Parts of :func:`reference`: all where it is small, else runs of consecutive queries of every head.

    Rows of attention depend on one query each, so a part costs what its own queries cost.
    """
    from attntune.ops.attention import Attention

    assert isinstance(w, Attention)
    small = w.batch * w.heads * w.q_len * w.kv_len <= SAMPLED_SCORES
    if small or w.packed or w.ragged or w.lengths or w.score_mod:
        expected = reference(w, *inputs)
        yield (...,) * len(expected), expected
        return
    operands = dict(zip((spec.name for spec in w.inputs()), inputs, strict=True))
    rng = np.random.default_rng(0)
    length = min(w.q_len, max(1, SAMPLED_SCORES // (w.batch * w.heads * w.kv_len * _RUNS)))
    for b in range(w.batch):
        for h in range(w.heads):
            last = w.q_len - length
            for start in sorted({0, last, *rng.integers(0, last + 1, _RUNS - 2).tolist()}):
                rows = slice(start, start + length)
                expected = reference(*_rows(w, operands, b, h, rows))
                out = (b, h, rows) if w.layout == "bhsd" else (b, rows, slice(h * w.head_dim, (h + 1) * w.head_dim))
                yield (out, (b, h, rows))[: len(expected)], tuple(part[0, 0] for part in expected)


def _rows(w: Attention, operands: Mapping[str, np.ndarray], b: int, h: int, rows: slice) -> tuple[Any, ...]:
    """One head's workload for some of its queries, and its operands."""
    at = h // (w.heads // w.kv_heads)

    def part(name: str, head: int, length: slice) -> np.ndarray:
        x = operands[name]
        x = x[b, head] if w.heads_apart(name) else x[b, :, head * w.head_dim : (head + 1) * w.head_dim]
        return x[None, None, length]

    every = slice(None)
    values = [part("query", h, rows), part("key", at, every), part("value", at, every)]
    if w.mask:
        values.append(operands["mask"][b : b + 1])
    if w.bias_heads:
        bias = operands["bias"][b if w.bias_batch > 1 else 0, h if w.bias_heads > 1 else 0]
        values.append(bias[None, None, every if w.bias_q else rows])
    if w.alibi:
        values.append(operands["slopes"][h : h + 1])
    one = w.replace(
        batch=1, heads=1, kv_heads=1, q_len=rows.stop - rows.start, layout="bhsd", kv_layout="",
        bias_batch=min(w.bias_batch, 1), bias_heads=min(w.bias_heads, 1), causal_offset=w.causal_offset + rows.start,
    )  # fmt: skip
    return one, *values
