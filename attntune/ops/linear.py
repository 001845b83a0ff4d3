"""Linear layer with a fused epilogue: ``activation(x · Wᵀ + bias) + residual``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, require

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class Linear(Workload):
    """``y = activation(x · weightᵀ + bias) + residual``.

    Shapes: x (rows, in_features), weight (out_features, in_features) constant, bias (out_features,) constant,
    residual (rows, out_features) → y (rows, out_features). ``rows`` is the product of all leading dimensions.
    """

    op: ClassVar[str] = "linear"

    rows: int
    in_features: int
    out_features: int
    bias: bool = True
    activation: str = ""
    residual: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        positive(self.op, rows=self.rows, in_features=self.in_features, out_features=self.out_features)
        one_of(self.op, "activation", self.activation, ACTIVATIONS)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> Linear:
        """From a model's call: x (…, in_features), weight, then bias and residual as ``attrs`` say."""
        x, weight = args[0], args[1]
        require(
            x.shape[-1] == weight.shape[1],
            f"linear: expected x (…, {weight.shape[1]}) for weight {weight.shape}, got {x.shape}",
        )
        return cls(
            rows=math.prod(x.shape[:-1]),
            in_features=weight.shape[1],
            out_features=weight.shape[0],
            bias=bool(attrs["bias"]),
            activation=str(attrs.get("activation", "")),
            residual=bool(attrs.get("residual", False)),
            dtype=x.dtype,
        )

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X, weight, then bias and residual where the variant has them."""
        specs = [
            TensorSpec("x", (self.rows, self.in_features), self.dtype),
            TensorSpec("weight", (self.out_features, self.in_features), self.dtype, constant=True),
        ]
        if self.bias:
            specs.append(TensorSpec("bias", (self.out_features,), self.dtype, constant=True))
        if self.residual:
            specs.append(TensorSpec("residual", (self.rows, self.out_features), self.dtype))
        return tuple(specs)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (rows, out_features)."""
        return (TensorSpec("y", (self.rows, self.out_features), self.dtype),)

    def compute(self) -> list[Any]:
        """Tensor expression with the weight as it comes, (out_features, in_features)."""
        from tvm import te

        weight = te.placeholder((self.out_features, self.in_features), self.dtype, "weight")
        return self.expression(weight, lambda j, k: weight[j, k])

    def expression(self, weight: Any, element: Any, columns: int | None = None) -> list[Any]:
        """The definition over any layout of the weight: ``element(j, k)`` reads weight (out j, in k).

        Templates call this with a packed placeholder; stages are named ``matmul`` and ``y``. ``columns`` is the width
        of ``matmul`` where the layout is padded past out_features; ``y`` never is.
        """
        from tvm import te

        from attntune.ops import math as tmath

        x = te.placeholder((self.rows, self.in_features), self.dtype, "x")
        k = te.reduce_axis((0, self.in_features), name="k")
        product = te.compute(
            (self.rows, columns or self.out_features),
            lambda i, j: te.sum(x[i, k] * element(j, k), axis=k),
            name="matmul",
        )
        operands = [x, weight]
        if self.bias:
            bias = te.placeholder((self.out_features,), self.dtype, "bias")
            operands.append(bias)
        if self.residual:
            residual = te.placeholder((self.rows, self.out_features), self.dtype, "residual")
            operands.append(residual)

        def epilogue(i: Any, j: Any) -> Any:
            value = product[i, j]
            if self.bias:
                value = value + bias[j]
            if self.activation:
                value = getattr(tmath, self.activation)(value)
            if self.residual:
                value = value + residual[i, j]
            return value

        return [*operands, te.compute((self.rows, self.out_features), epilogue, name="y")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        operands = iter(np.asarray(value, np.float64) for value in inputs)
        x, weight = next(operands), next(operands)
        y = x @ weight.T
        if self.bias:
            y = y + next(operands)
        y = activation_reference(self.activation, y)
        if self.residual:
            y = y + next(operands)
        return (y,)

    def flops(self) -> int:
        """Multiply-adds of the product; the epilogue is not counted."""
        return 2 * self.rows * self.in_features * self.out_features

    def tolerance(self) -> tuple[float, float]:
        """Rounding of a dot product grows with the root of its length for random operands."""
        rtol, atol = super().tolerance()
        return rtol, atol * max(1.0, math.sqrt(self.in_features) / 8)


def activation_reference(name: str, x: np.ndarray) -> np.ndarray:
    """Float64 activation by name (see :data:`ACTIVATIONS`)."""
    if name == "relu":
        return np.asarray(np.maximum(x, 0.0))
    if name == "gelu":
        from scipy.special import erf

        return np.asarray(0.5 * x * (1.0 + erf(x * math.sqrt(0.5))), np.float64)
    if name == "gelu_tanh":
        return np.asarray(0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))))
    if name == "silu":
        return np.asarray(x / (1.0 + np.exp(-x)))
    return x
