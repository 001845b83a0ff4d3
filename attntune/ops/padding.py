"""Rows of sequences padded to one length: which of them are there, in expressions and in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np


def before_end(value: Any, row: Any, seq: int, lengths: Any) -> Any:
    """The expression ``value`` of ``row`` (batch·seq), or zero where its sequence has ended; lengths (batch,) int32."""
    from tvm import tirx

    inside = row % seq < lengths[row // seq]
    return tirx.if_then_else(inside, value, tirx.const(0, value.ty.dtype if hasattr(value, "ty") else value.dtype))


def zero_past_end(rows: np.ndarray, seq: int, lengths: np.ndarray) -> np.ndarray:
    """Rows (batch·seq, features) with zeros where their sequence has ended."""
    inside = np.arange(seq) < np.asarray(lengths)[:, None]
    return np.where(inside.reshape(-1, 1), rows, 0.0)
