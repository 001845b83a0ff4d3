"""Whether an engine computed the same: what each precision may differ by, and by how much one result does.

float32 is held to an absolute error. Rounding to bfloat16 or int8 at every layer cannot meet that, so results at those
precisions are held to the direction and the length of every output row (its last axis): embeddings are compared by
cosine, and a cosine alone would not see a result that is wrong by a factor. Either way both figures are reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from attntune.errors import EngineError

FLOAT32 = "float32"


@dataclass(frozen=True)
class Parity:
    """How far a result may be from the float64 reference; None: reported, not demanded."""

    max_abs_error: float | None = None
    """Times the reference's largest value where that exceeds 1."""
    min_cosine: float | None = None
    """Of each row with the reference's."""
    max_norm_error: float | None = None
    """Of each row's length, relative to the reference's."""

    def text(self) -> str:
        """``max abs error <= 0.0001``, for reports."""
        limits = (
            ("max abs error <=", self.max_abs_error),
            ("row cosine >=", self.min_cosine),
            ("row norm within", self.max_norm_error),
        )
        return ", ".join(f"{name} {limit:g}" for name, limit in limits if limit is not None)


#: Demands by precision; a comparison's ``tolerance`` replaces float32's. The limit on the norm only has to catch a
#: result that is wrong by a factor: rounding moved the worst row of the engines measured by 2 to 4 %. Not every model
#: meets that of 4 bits: of 8×128 random tokens, all-MiniLM-L6-v2's worst is off by 54 % (cosine 0.954): wrong.
PARITY: Mapping[str, Parity] = {
    FLOAT32: Parity(max_abs_error=1e-4),
    "float16": Parity(min_cosine=0.999, max_norm_error=0.25),
    "bfloat16": Parity(min_cosine=0.999, max_norm_error=0.25),
    "int8": Parity(min_cosine=0.99, max_norm_error=0.25),
    "int8_float32": Parity(min_cosine=0.99, max_norm_error=0.25),
    "int4": Parity(min_cosine=0.95, max_norm_error=0.25),
    "w4a8": Parity(min_cosine=0.95, max_norm_error=0.25),
}


def parity_of(precision: str, tolerance: float) -> Parity:
    """Demands of ``precision``; ``tolerance`` is float32's. Raises :class:`EngineError` for a precision unknown."""
    if precision not in PARITY:
        raise EngineError(f"unknown precision {precision!r}; expected one of {sorted(PARITY)}")
    return Parity(max_abs_error=tolerance) if precision == FLOAT32 else PARITY[precision]


@dataclass(frozen=True)
class Agreement:
    """How near a result is to the reference."""

    max_abs_error: float = 0.0
    """Over all outputs; infinite where one is missing, misshapen or not finite."""
    min_cosine: float = 1.0
    """Of the worst row of all outputs."""
    problem: str = ""
    """What is demanded and not met; empty when nothing is."""


def agreement(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], parity: Parity) -> Agreement:
    """Compare outputs by name with float64 references of the same names and shapes."""
    worst, cosine, problems = 0.0, 1.0, []
    for name, reference in expected.items():
        value = got.get(name)
        if value is None or value.shape != reference.shape:
            shape = None if value is None else value.shape
            problems.append(f"{name}: expected shape {reference.shape}, got {shape}")
            worst, cosine = float("inf"), 0.0
            continue
        value = value.astype(np.float64)
        error = float(np.abs(value - reference).max(initial=0.0))
        error = error if np.isfinite(error) else float("inf")
        row_cosine, norm_error = _rows(value, reference) if np.isfinite(error) else (0.0, float("inf"))
        worst, cosine = max(worst, error), min(cosine, row_cosine)
        if parity.max_abs_error is not None:
            limit = parity.max_abs_error * max(1.0, float(np.abs(reference).max(initial=0.0)))
            if error > limit:
                problems.append(f"{name}: max abs error {error:.3g}, expected at most {limit:.3g}")
        if parity.min_cosine is not None and row_cosine < parity.min_cosine:
            problems.append(f"{name}: a row has cosine {row_cosine:.5f}, expected at least {parity.min_cosine:g}")
        if parity.max_norm_error is not None and norm_error > parity.max_norm_error:
            problems.append(
                f"{name}: the norm of a row is off by {norm_error:.3g}, expected at most {parity.max_norm_error:g}"
            )
    return Agreement(worst, cosine, "; ".join(problems))


def _rows(value: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Smallest cosine and largest relative error of the norm over rows.

    A row of zeros, such as a query that attends to nothing gives, has no direction: there the result must be zero too,
    and any length it has instead counts relative to the longest row.
    """
    if reference.size == 0:
        return 1.0, 0.0
    value, reference = (np.atleast_1d(array).reshape(-1, array.shape[-1] if array.ndim else 1)
                        for array in (value, reference))  # fmt: skip
    norm, expected = np.linalg.norm(value, axis=1), np.linalg.norm(reference, axis=1)
    zero = expected == 0.0
    scale = np.where(zero, expected.max() or 1.0, expected)
    cosine = np.einsum("ij,ij->i", value, reference) / np.where(zero | (norm == 0.0), 1.0, norm * expected)
    return float(np.where(zero, 1.0, cosine).min()), float((np.abs(norm - expected) / scale).max())
