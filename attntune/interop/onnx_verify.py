"""Whether an ONNX file computes what the model does: ONNX Runtime against the float64 reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attntune.errors import ExportError
from attntune.interop.reference import evaluate, sample_inputs

if TYPE_CHECKING:
    from attntune.models.model import Model

#: Batch×seq of :func:`verify_onnx`: one token, odd lengths, a usual one.
SHAPES: tuple[Mapping[str, int], ...] = ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 17}, {"batch": 2, "seq": 64})


@dataclass(frozen=True)
class ParityCase:
    """One comparison; ``dims`` such as ``{"batch": 3, "seq": 17}``."""

    dims: Mapping[str, int]
    mask: str
    output: str
    max_abs_error: float
    scale: float
    """Largest absolute value of the reference."""


@dataclass(frozen=True)
class Parity:
    """Every comparison made of one file."""

    path: str
    tolerance: float
    cases: tuple[ParityCase, ...]

    @property
    def max_abs_error(self) -> float:
        """The worst of all cases."""
        return max(case.max_abs_error for case in self.cases)

    @property
    def ok(self) -> bool:
        """Whether every case is within ``tolerance`` times the larger of 1 and the reference's largest value."""
        return all(case.max_abs_error <= self.tolerance * max(1.0, case.scale) for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready fields, with ``max_abs_error`` and ``ok``."""
        return {**asdict(self), "max_abs_error": self.max_abs_error, "ok": self.ok}


def verify_onnx(
    path: str | Path,
    model: Model,
    *,
    entry: str = "forward",
    shapes: Sequence[Mapping[str, int]] = SHAPES,
    masks: Sequence[str] = ("full", "ragged", "empty_row"),
    tolerance: float = 1e-4,
    seed: int = 0,
    threads: int = 1,
) -> Parity:
    """Run an exported file in ONNX Runtime (default optimizations) and compare with the float64 reference.

    Args:
        path: of the ``.onnx`` file.
        model: what it was exported from.
        entry: the entry it was exported from.
        shapes: values of the symbolic axes.
        masks: kinds of attention mask, see :func:`attntune.interop.sample_inputs`.
        tolerance: maximum absolute error, times the reference's largest value where that exceeds 1.
        seed: of the inputs.
        threads: of ONNX Runtime.

    Raises:
        ExportError: onnxruntime is missing or rejects the file. An error out of tolerance does not raise: see
            :attr:`Parity.ok`.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ExportError("verifying ONNX needs ONNX Runtime: pip install 'attntune[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own, all derived from RuntimeError or Exception
        raise ExportError(f"ONNX Runtime {onnxruntime.__version__} rejects {path}: {error}") from error
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    cases = []
    for dims in shapes:
        for mask in masks:
            inputs = sample_inputs(model, dims, entry=entry, mask=mask, seed=seed)
            got = session.run(names, {name: value for name, value in inputs.items() if name in wanted})
            expected = evaluate(model, inputs, entry)
            cases += [
                ParityCase(dict(dims), mask, name, _max_abs_error(value, expected[name]),
                           float(np.abs(expected[name]).max()))
                for name, value in zip(names, got, strict=True)
            ]  # fmt: skip
    return Parity(str(path), tolerance, tuple(cases))


def _max_abs_error(got: np.ndarray, expected: np.ndarray) -> float:
    error = float(np.abs(got.astype(np.float64) - expected).max())
    return error if np.isfinite(error) else float("inf")
