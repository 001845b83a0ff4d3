"""Root-mean-square normalisation over the last axis, with an optional residual added first.

Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.reduction import Reduction
from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, require


@dataclass(frozen=True)
class RMSNorm(Workload):
    """``h / √(mean(h²) + eps) · weight`` with ``h = x + residual``.

    Shapes: x (rows, features), residual (rows, features), weight (features,) constant → y (rows, features). ``rows`` is
    the product of all leading dimensions.
    """

    op: ClassVar[str] = "rms_norm"

    rows: int
    features: int
    eps: float = 1e-5
    residual: bool = False
    dtype: str = "float32"
    out_dtype: str = ""
    """Of y; ``""`` means ``dtype``."""

    def __post_init__(self) -> None:
        positive(self.op, rows=self.rows, features=self.features)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        one_of(self.op, "out_dtype", self.out_dtype, ("", *FLOAT_DTYPES))
        require(self.eps > 0, f"rms_norm: expected eps > 0, got {self.eps!r}")

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> RMSNorm:
        """From a model's call: x (…, features), residual as ``attrs`` says, weight."""
        x, weight = args[0], args[-1]
        require(
            x.shape[-1:] == weight.shape,
            f"rms_norm: expected x (…, {weight.shape[0]}) for weight {weight.shape}, got {x.shape}",
        )
        return cls(
            rows=math.prod(x.shape[:-1]),
            features=x.shape[-1],
            eps=float(attrs["eps"]),
            residual=bool(attrs.get("residual", False)),
            dtype=x.dtype,
            out_dtype=str(attrs.get("out_dtype", "")),
        )

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X, residual where the variant has it, weight."""
        rows = TensorSpec("x", (self.rows, self.features), self.dtype)
        added = (TensorSpec("residual", rows.shape, self.dtype),) if self.residual else ()
        return (rows, *added, TensorSpec("weight", (self.features,), self.dtype, constant=True))

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (rows, features)."""
        return (TensorSpec("y", (self.rows, self.features), self.out_dtype or self.dtype),)

    def compute(self) -> list[Any]:
        """The definition with plain reductions."""
        return self.expression(Reduction())

    def expression(self, reduction: Reduction) -> list[Any]:
        """The definition over any reduction strategy: stages ``row``, ``squares``, ``scale``, ``y``."""
        from tvm import te, tirx

        operands = [te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs()]
        weight, dtype = operands[-1], self.outputs()[0].dtype
        row = te.compute(
            (self.rows, self.features),
            lambda i, j: (
                operands[0][i, j].astype("float32") + operands[1][i, j].astype("float32")
                if self.residual
                else operands[0][i, j].astype("float32")
            ),
            name="row",
        )
        squares = reduction.sum("squares", [self.rows], self.features, lambda i, k: row[(*i, k)] * row[(*i, k)])
        one, eps = tirx.const(1.0, "float32"), tirx.const(self.eps, "float32")
        per_feature = tirx.const(1.0 / self.features, "float32")
        scale = te.compute([self.rows], lambda i: one / tirx.sqrt(squares[i] * per_feature + eps), name="scale")
        y = te.compute(
            (self.rows, self.features),
            lambda i, j: (row[i, j] * scale[i] * weight[j].astype("float32")).astype(dtype),
            name="y",
        )
        return [*operands, y]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        x, *residual, weight = (np.asarray(value, np.float64) for value in inputs)
        row = x + residual[0] if residual else x
        return (row / np.sqrt((row * row).mean(axis=-1, keepdims=True) + self.eps) * weight,)

    def flops(self) -> int:
        """Four per element: square, sum, two products; one more for a residual."""
        return self.rows * self.features * (5 if self.residual else 4)
