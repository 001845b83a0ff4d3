"""A learned model of which configs are fast: kernel ridge regression averaged with gradient-boosted trees.

The smooth model generalises from a dozen trials, the trees find the cliffs (registers spilled, a cache outgrown) once
there are more. On six synthetic matrix products like those of the tests (4480 configs each, median of 5 seeds,
geometric mean) the best after 24 trials was 1.18 times the optimum, with trees alone 1.29, at random 1.35; after 48
trials 1.05, 1.05 and 1.26.

As in Ansor (Zheng et al., OSDI 2020) what is predicted is cost *relative to the best of its group*, where a group is
one workload. Absolute times differ by orders of magnitude between workloads; what makes a config good does not, so
groups whose features have the same meaning share one model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Samples = Sequence[tuple[Sequence[float], float | None]]
"""Features and seconds (None: failed) of the trials of one group."""

#: Below this many trials a model only memorises.
MIN_SAMPLES = 8
#: Slower than this many times the best is all the same: bad.
_WORST_RATIO = 16.0
#: A failed config counts as this much slower than the slowest that worked.
_FAILURE_RATIO = 2.0
#: How much a trial of another workload counts beside one of the workload asked about.
_FOREIGN_WEIGHT = 0.5
#: Trials the smooth model keeps, the newest: its cost grows with their cube.
_KERNEL_SAMPLES = 600
_KERNEL_WIDTH = 1.5
_KERNEL_NOISE = 0.1
_ROUNDS = 80
_PARAMETERS: dict[str, Any] = {
    "objective": "regression",
    "learning_rate": 0.15,
    "num_leaves": 15,
    "min_data_in_leaf": 2,
    "lambda_l2": 0.1,
    "feature_fraction": 0.8,
    "max_bin": 63,
    "num_threads": 1,
    "deterministic": True,
    "force_col_wise": True,
    "feature_pre_filter": False,
    "verbosity": -1,
}


class CostModel:
    """Fitted to measured trials; :meth:`predict` ranks configs, lower is faster.

    Deterministic: the same samples and seed give the same predictions.
    """

    def __init__(self, rows: np.ndarray, labels: np.ndarray, weights: np.ndarray, seed: int) -> None:
        import lightgbm

        data = lightgbm.Dataset(rows, labels, weight=weights)
        self._trees = lightgbm.train({**_PARAMETERS, "seed": seed}, data, _ROUNDS)
        self._smooth = _KernelRidge(rows[-_KERNEL_SAMPLES:], labels[-_KERNEL_SAMPLES:], weights[-_KERNEL_SAMPLES:])

    @classmethod
    def fit(cls, groups: Mapping[str, Samples], seed: int = 0, focus: str | None = None) -> CostModel | None:
        """Fit to the trials of one or many workloads.

        Args:
            groups: trials by workload; features must have the same meaning in all of them.
            seed: of the trees' random choices.
            focus: the group predictions are wanted for; the others count less.

        Returns:
            The model, or None if there are fewer than :data:`MIN_SAMPLES` trials or they are all alike.
        """
        rows: list[Sequence[float]] = []
        labels: list[float] = []
        weights: list[float] = []
        for name in sorted(groups, key=lambda name: name == focus):
            scores = relative_log_costs([cost for _, cost in groups[name]])
            rows += [features for features, _ in groups[name]]
            labels += scores
            # What is near the best must be ranked well; how bad the bad ones are does not matter.
            weights += [(1.0 if focus in (None, name) else _FOREIGN_WEIGHT) / (0.5 + score) for score in scores]
        if len(rows) < MIN_SAMPLES or max(labels) - min(labels) < 1e-9:
            return None
        return cls(np.asarray(rows, np.float64), np.asarray(labels), np.asarray(weights), seed)

    def predict(self, rows: Sequence[Sequence[float]]) -> list[float]:
        """Log of the expected cost relative to the group's best, for each row of features."""
        if not rows:
            return []
        table = np.asarray(rows, np.float64)
        mean = (self._trees.predict(table, num_threads=1) + self._smooth.predict(table)) / 2
        return [float(value) for value in mean]


class _KernelRidge:
    """Weighted kernel ridge regression with a Gaussian kernel, over features on a signed log scale."""

    def __init__(self, rows: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> None:
        scaled = _log_scale(rows)
        self._centre, spread = scaled.mean(0), scaled.std(0)
        # A feature that never varied says nothing about the rows where it will.
        self._scale = np.where(spread > 1e-9, 1 / np.maximum(spread, 1e-9), 0.0)
        self._points = (scaled - self._centre) * self._scale
        self._mean = float(np.average(labels, weights=weights))
        kernel = self._kernel(self._points) + np.diag(_KERNEL_NOISE / weights)
        self._coefficients = np.linalg.solve(kernel, labels - self._mean)

    def predict(self, rows: np.ndarray) -> np.ndarray:
        points = (_log_scale(rows) - self._centre) * self._scale
        return self._mean + np.asarray(self._kernel(points) @ self._coefficients)

    def _kernel(self, points: np.ndarray) -> np.ndarray:
        squares = (points**2).sum(1)[:, None] + (self._points**2).sum(1)[None] - 2 * points @ self._points.T
        varying = max(1, int((self._scale > 0).sum()))
        return np.asarray(np.exp(-np.maximum(squares, 0.0) / (2 * varying * _KERNEL_WIDTH**2)))


def _log_scale(rows: np.ndarray) -> np.ndarray:
    return np.asarray(np.sign(rows) * np.log2(1 + np.abs(rows)))


def relative_log_costs(costs: Sequence[float | None]) -> list[float]:
    """``log(cost / best)`` within one group, clipped; a failure counts as slower than all that worked.

    ``[1.0, 2.0, None]`` → ``[0.0, 0.69, 1.39]``.
    """
    known = [cost for cost in costs if cost is not None]
    if not known:
        return [math.log(_FAILURE_RATIO)] * len(costs)
    best = min(known)
    clipped = [None if cost is None else min(math.log(cost / best), math.log(_WORST_RATIO)) for cost in costs]
    failed = max(score for score in clipped if score is not None) + math.log(_FAILURE_RATIO)
    return [failed if score is None else score for score in clipped]
