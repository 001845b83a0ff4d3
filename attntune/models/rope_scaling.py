"""Rotary positions for texts longer than a model was first trained on: how frequencies are scaled, and what else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attntune.models.config import require_fields, unsupported
from attntune.ops.rope import frequencies

_SOURCE = "config.json: rope_scaling"
#: Turns in the context of the first training from which on a pair keeps its frequency, and up to which it is scaled
#: whole; YaRN's own.
FAST, SLOW = 32.0, 1.0


@dataclass(frozen=True)
class RopeScaling:
    """What is changed of rotary positions."""

    factors: tuple[float, ...] = ()
    """What the frequency of each pair of elements is divided by, (head_dim/2,); empty: by nothing."""
    magnitude: float = 1.0
    """What cosines and sines are multiplied by."""


def from_config(scaling: Mapping[str, Any], head_dim: int, theta: float, positions: int) -> RopeScaling:
    """As ``rope_scaling`` of a Hugging Face config asks.

    ``linear``: all frequencies are divided by ``factor`` (Chen et al., "Position Interpolation", 2023). ``llama3``:
    those whose period is long beside the context of the first training, none whose period is short, between them some
    of both. ``yarn``: see :func:`yarn`.

    Args:
        scaling: fields of ``rope_scaling`` or ``rope_parameters``.
        head_dim: of the heads that are rotated.
        theta: the base of frequencies.
        positions: the config's ``max_position_embeddings``.

    Raises:
        ModelError: naming what is missing or unsupported.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeScaling()
    if kind not in ("linear", "llama3", "yarn"):
        raise unsupported("rope_scaling", dict(scaling), "one of type 'linear', 'llama3' or 'yarn', or none")
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    require_fields(scaling, kind, *names, source=_SOURCE)
    if kind == "yarn":
        return _yarn_from_config(scaling, head_dim, theta, positions)
    numbers = _positive(scaling, *names)
    if kind == "linear":
        return RopeScaling((numbers[0],) * (head_dim // 2))
    factor, low, high, trained = numbers
    if low >= high:
        raise unsupported("rope_scaling", dict(scaling), "low_freq_factor below high_freq_factor")
    turns = trained * frequencies(head_dim, theta) / (2 * np.pi)
    return RopeScaling(_partly(np.clip((turns - low) / (high - low), 0.0, 1.0), factor))


def yarn(
    head_dim: int, theta: float, factor: float, trained: float, *, fast: float = FAST, slow: float = SLOW,
    whole: bool = True, magnitude: float | None = None,
) -> RopeScaling:  # fmt: skip
    """Frequencies that turn often in the context of the first training stay, those that hardly do are divided.

    Between the pairs that turn ``fast`` and ``slow`` times the share goes evenly from pair to pair. Source: Peng et
    al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023), as transformers and llama.cpp have
    it.

    Args:
        head_dim: of the heads that are rotated.
        theta: the base of frequencies.
        factor: how much longer texts are.
        trained: tokens of that context.
        fast: turns.
        slow: turns.
        whole: whether the two pairs are rounded outwards to whole ones.
        magnitude: in place of 0.1 · log(factor) + 1.
    """

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(fast), pair_that_turns(slow)
    if whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    kept = 1.0 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return RopeScaling(_partly(kept, factor), yarn_magnitude(factor) if magnitude is None else magnitude)


def yarn_magnitude(factor: float, share: float = 1.0) -> float:
    """``share`` · 0.1 · log(factor) + 1; 1 for texts that are no longer."""
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0


def _yarn_from_config(scaling: Mapping[str, Any], head_dim: int, theta: float, positions: int) -> RopeScaling:
    given = {name: value for name, value in scaling.items() if value is not None}
    (factor,) = _positive(scaling, "factor")
    magnitude = None
    if "attention_factor" in given:
        (magnitude,) = _positive(scaling, "attention_factor")
    elif given.get("mscale") and given.get("mscale_all_dim"):
        shares = _positive(scaling, "mscale", "mscale_all_dim")
        magnitude = yarn_magnitude(factor, shares[0]) / yarn_magnitude(factor, shares[1])
    defaults = {"original_max_position_embeddings": positions, "beta_fast": FAST, "beta_slow": SLOW}
    trained, fast, slow = _positive({**defaults, **given}, *defaults)
    return yarn(
        head_dim, theta, factor, trained, fast=fast, slow=slow, whole=bool(given.get("truncate", True)),
        magnitude=magnitude,
    )  # fmt: skip


def _positive(scaling: Mapping[str, Any], *names: str) -> list[float]:
    numbers = [scaling[name] for name in names]
    if not all(isinstance(number, int | float) and number > 0 for number in numbers):
        raise unsupported("rope_scaling", dict(scaling), f"positive numbers for {', '.join(names)}")
    return [float(number) for number in numbers]


def _partly(kept: np.ndarray, factor: float) -> tuple[float, ...]:
    """Divisors of frequencies of which the share ``kept`` (head_dim/2,) stays and the rest is divided by ``factor``."""
    return tuple((1.0 / (kept + (1.0 - kept) / factor)).tolist())
