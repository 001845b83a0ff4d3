"""Layer normalisation over the last axis, with an optional residual added first.

Source: Ba, Kiros, Hinton, "Layer Normalization" (2016).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.padding import before_end, zero_past_end
from attntune.ops.reduction import Reduction
from attntune.ops.workload import (
    FLOAT_DTYPES,
    TensorSpec,
    Workload,
    example_lengths,
    one_of,
    positive,
    random_operand,
    require,
)


@dataclass(frozen=True)
class LayerNorm(Workload):
    """``(h - mean(h)) / √(var(h) + eps) · weight + bias`` with ``h = x + residual``.

    Shapes: x (rows, features), residual (rows, features), weight (features,) constant, bias (features,) constant →
    y (rows, features). ``rows`` is the product of all leading dimensions. The variance is the biased one, summed over
    deviations from the mean (two passes), which stays accurate where E[h²] - E[h]² cancels. With ``seq``, lengths
    (rows/seq,) int32 is the last operand, and y is zero past the end of sequences, as in :class:`attntune.ops.Linear`.
    """

    op: ClassVar[str] = "layer_norm"

    rows: int
    features: int
    eps: float = 1e-12
    residual: bool = False
    dtype: str = "float32"
    out_dtype: str = ""
    """Of y; ``""`` means ``dtype``."""
    seq: int = 0
    """Positions of a padded sequence; 0: no lengths."""

    def __post_init__(self) -> None:
        positive(self.op, rows=self.rows, features=self.features)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        one_of(self.op, "out_dtype", self.out_dtype, ("", *FLOAT_DTYPES))
        require(
            self.seq >= 0 and (self.seq == 0 or self.rows % self.seq == 0),
            f"layer_norm: expected rows ({self.rows}) to be a multiple of seq, got {self.seq}",
        )
        require(self.eps > 0, f"layer_norm: expected eps > 0, got {self.eps!r}")

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> LayerNorm:
        """From a model's call: x (…, features), residual as ``attrs`` says, weight, bias, lengths as they say."""
        x, weight = args[0], args[2 if attrs.get("residual") else 1]
        require(
            not attrs.get("lengths") or len(x.shape) == 3,
            f"layer_norm: expected x (batch, seq, features) with lengths, got {x.shape}",
        )
        require(
            x.shape[-1:] == weight.shape,
            f"layer_norm: expected x (…, {weight.shape[0]}) for weight {weight.shape}, got {x.shape}",
        )
        return cls(
            rows=math.prod(x.shape[:-1]),
            features=x.shape[-1],
            eps=float(attrs["eps"]),
            residual=bool(attrs.get("residual", False)),
            dtype=x.dtype,
            out_dtype=str(attrs.get("out_dtype", "")),
            seq=x.shape[1] if attrs.get("lengths") else 0,
        )

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X, residual where the variant has it, weight, bias, lengths where the variant has them."""
        rows = TensorSpec("x", (self.rows, self.features), self.dtype)
        added = (TensorSpec("residual", rows.shape, self.dtype),) if self.residual else ()
        ends = (TensorSpec("lengths", (self.rows // self.seq,), "int32"),) if self.seq else ()
        return (rows, *added, *affine_specs(self.features, self.dtype), *ends)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (rows, features)."""
        return (TensorSpec("y", (self.rows, self.features), self.out_dtype or self.dtype),)

    def compute(self) -> list[Any]:
        """The definition with plain reductions."""
        return self.expression(Reduction())

    def expression(self, reduction: Reduction) -> list[Any]:
        """The definition over any reduction strategy: stage ``row`` (what is normalised), then :func:`normalized`."""
        from tvm import te

        specs = self.inputs()
        operands = [te.placeholder(spec.shape, spec.dtype, spec.name) for spec in specs]
        row = te.compute(
            (self.rows, self.features),
            lambda i, j: (
                operands[0][i, j].astype("float32") + operands[1][i, j].astype("float32")
                if self.residual
                else operands[0][i, j].astype("float32")
            ),
            name="row",
        )
        at = 2 if self.residual else 1
        ends = (self.seq, operands[-1]) if self.seq else None
        dtype = self.outputs()[0].dtype
        return [*operands, normalized(row, operands[at], operands[at + 1], self.eps, dtype, reduction, ends)]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        x, *residual, weight, bias = (np.asarray(value, np.float64) for value in inputs[: 4 if self.residual else 3])
        y = normalized_reference(x + residual[0] if residual else x, weight, bias, self.eps)
        return (zero_past_end(y, self.seq, inputs[-1]) if self.seq else y,)

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Normal operands; rows of x past their sequence's end are NaN."""
        rng = np.random.default_rng(seed)
        values = [random_operand(rng, spec) for spec in self.inputs()]
        if self.seq:
            values[-1] = example_lengths(rng, self.rows // self.seq, self.seq)
            values[0].reshape(-1, self.seq, self.features)[np.arange(self.seq) >= values[-1][:, None]] = np.nan
        return tuple(values)

    def flops(self) -> int:
        """Eight per element: one for the mean, three for the variance, four to normalise; one more for a residual."""
        return self.rows * self.features * (9 if self.residual else 8)


def affine_specs(features: int, dtype: str) -> tuple[TensorSpec, TensorSpec]:
    """Weight (features,) and bias (features,) of a normalisation."""
    return TensorSpec("weight", (features,), dtype, constant=True), TensorSpec(
        "bias", (features,), dtype, constant=True
    )


def normalized(
    row: Any,
    weight: Any,
    bias: Any,
    eps: float,
    dtype: str,
    reduction: Reduction,
    ends: tuple[int, Any] | None = None,
) -> Any:
    """The tensor expression of normalising float32 ``row`` (…, features) over its last axis.

    ``ends``: positions of a padded sequence, and lengths; see :func:`before_end`.

    Stages: ``total`` and ``mean``, ``squares`` and ``scale`` (all (…,), float32), ``y`` in ``dtype``.
    """
    from tvm import te, tirx

    *lead, features = (int(extent) for extent in row.shape)
    per_feature = tirx.const(1.0 / features, "float32")
    total = reduction.sum("total", lead, features, lambda i, k: row[(*i, k)])
    mean = te.compute(lead, lambda *i: total[i] * per_feature, name="mean")
    squares = reduction.sum("squares", lead, features, lambda i, k: (row[(*i, k)] - mean[i]) * (row[(*i, k)] - mean[i]))
    one = tirx.const(1.0, "float32")
    scale = te.compute(
        lead, lambda *i: one / tirx.sqrt(squares[i] * per_feature + tirx.const(eps, "float32")), name="scale"
    )

    def element(*at: Any) -> Any:
        i, j = at[:-1], at[-1]
        value = (row[at] - mean[i]) * scale[i] * weight[j].astype("float32") + bias[j].astype("float32")
        value = value.astype(dtype)
        return value if ends is None else before_end(value, i[0], *ends)

    return te.compute((*lead, features), element, name="y")


def normalized_reference(row: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """Float64 normalisation over the last axis."""
    centred = row - row.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + eps) * weight + bias)
