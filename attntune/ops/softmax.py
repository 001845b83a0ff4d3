"""Softmax over the last axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.reduction import Reduction
from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive


@dataclass(frozen=True)
class Softmax(Workload):
    """``exp(x - max(x)) / Σ exp(x - max(x))`` along features.

    Shapes: x (rows, features) → y (rows, features). An element at -inf gives exactly 0; a row that is -inf throughout
    gives NaN, as in PyTorch.
    """

    op: ClassVar[str] = "softmax"

    rows: int
    features: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        positive(self.op, rows=self.rows, features=self.features)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> Softmax:
        """From a model's call: x (…, features); ``attrs`` is empty."""
        x = args[0]
        return cls(rows=math.prod(x.shape[:-1]), features=x.shape[-1], dtype=x.dtype)

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X (rows, features)."""
        return (TensorSpec("x", (self.rows, self.features), self.dtype),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (rows, features)."""
        return (TensorSpec("y", (self.rows, self.features), self.dtype),)

    def compute(self) -> list[Any]:
        """The definition with plain reductions."""
        return self.expression(Reduction())

    def expression(self, reduction: Reduction) -> list[Any]:
        """The definition over any reduction strategy, float32 inside.

        Stages: ``wide`` (x in float32, where it is narrower), ``top`` (row maximum), ``power`` (exponentials),
        ``total``, ``inverse`` and ``y``.
        """
        from tvm import te, tirx

        from attntune.ops import math as tmath

        shape = (self.rows, self.features)
        x = te.placeholder(shape, self.dtype, "x")
        wide = x
        if self.dtype != "float32":
            # A stage of its own: TVM's bfloat16 passes do not reach a cast inside the exponential's let-expressions.
            wide = te.compute(shape, lambda i, j: x[i, j].astype("float32"), name="wide")
        lead = (self.rows,)
        top = reduction.max("top", lead, self.features, lambda i, k: wide[(*i, k)])
        log2e = tirx.const(math.log2(math.e), "float32")
        power = te.compute(shape, lambda i, j: tmath.exp2_nonpositive((wide[i, j] - top[i]) * log2e), name="power")
        total = reduction.sum("total", lead, self.features, lambda i, k: power[(*i, k)])
        inverse = te.compute(lead, lambda i: tirx.const(1.0, "float32") / total[i], name="inverse")
        return [x, te.compute(shape, lambda i, j: (power[i, j] * inverse[i]).astype(self.dtype), name="y")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        x = np.asarray(inputs[0], np.float64)
        power = np.exp(x - x.max(axis=-1, keepdims=True))
        return (power / power.sum(axis=-1, keepdims=True),)

    def flops(self) -> int:
        """Five per element: maximum, difference, exponential (counted as one), sum, product."""
        return 5 * self.rows * self.features

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Standard normal logits; where there is room, some masked (-inf) and some large enough to overflow exp."""
        (x,) = super().example_inputs(seed)
        x = x.copy()
        if self.features > 1:
            x[:, 0] = -np.inf
        if self.rows > 1:
            x[-1] = x[-1] * 4 + 100
        return (x,)
