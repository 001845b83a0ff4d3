"""Linear layer with a fused epilogue: ``activation(x · Wᵀ + bias) + residual``, plain, gated, of quantised weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.grouped import GROUPED, WEIGHT_GROUP, quantize_groups, ungrouped
from attntune.ops.int8 import INT8_GROUP, dequantized, quantize_weight, rounded, sums_by_group
from attntune.ops.padding import before_end, zero_past_end
from attntune.ops.workload import (
    FLOAT_DTYPES,
    TensorSpec,
    Workload,
    as_dtype,
    example_lengths,
    one_of,
    positive,
    random_operand,
    require,
)

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")
#: Multiply-adds up to which a reference is computed whole: some seconds.
_WHOLE = 1 << 33


@dataclass(frozen=True)
class Linear(Workload):
    """``y = activation(x · weightᵀ + bias) + residual``; gated: ``activation(x · gateᵀ) ⊙ (x · upᵀ)``, then the same.

    Shapes: x (rows, in_features), weight (out_features, in_features) constant, bias (out_features,) constant,
    residual (rows, out_features) → y (rows, out_features). ``rows`` is the product of all leading dimensions.

    Gated (Shazeer, "GLU Variants Improve Transformer", 2020): weight and bias have 2·out_features rows, first the gate,
    then what it multiplies.

    With ``weight_dtype="int8"`` the weight is symmetric int8 with one float32 scale an output feature, scale
    (rows of weight,) constant, after the weight; x is quantised as the kernel runs, symmetrically, every
    :data:`attntune.ops.int8.INT8_GROUP` consecutive values of a row (the last group may be shorter), by
    ``q = round(x · 127 / max|x|)``.
    The sum of integer products is exact within a group; those of the groups are scaled and added in float32. (One scale
    for a whole row costs SmolLM2-135M 4.5 % of perplexity, for 64 values 1 %: a few features are large in every row.)

    With ``weight_dtype="uint4"`` or ``"uint8"`` the weight is quantised by groups, as :mod:`attntune.ops.grouped` has
    it: scale and minimum (rows of weight, groups) float16, constant, follow the weight. x stays as it is; or, with
    ``x_dtype="int8"``, is quantised as above, every :data:`attntune.ops.grouped.WEIGHT_GROUP` values.

    With ``seq``, the rows are those of sequences padded to seq positions, and lengths (rows/seq,) int32, the last
    operand, says where each ends: rows from there on are not computed, whatever x holds in them, and are zero in y.
    """

    op: ClassVar[str] = "linear"

    rows: int
    in_features: int
    out_features: int
    bias: bool = True
    activation: str = ""
    residual: bool = False
    dtype: str = "float32"
    gated: bool = False
    weight_dtype: str = ""
    """``""`` means ``dtype``; or ``"int8"``, ``"uint4"`` or ``"uint8"``."""
    x_dtype: str = ""
    """``"int8"``: x is quantised by the groups of a weight that is quantised by groups."""
    out_dtype: str = ""
    """Of y; ``""`` means ``dtype``."""
    seq: int = 0
    """Positions of a padded sequence; 0: no lengths."""

    def __post_init__(self) -> None:
        positive(self.op, rows=self.rows, in_features=self.in_features, out_features=self.out_features)
        one_of(self.op, "activation", self.activation, ACTIVATIONS)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        one_of(self.op, "weight_dtype", self.weight_dtype, ("", "int8", *GROUPED))
        one_of(self.op, "x_dtype", self.x_dtype, ("", "int8"))
        one_of(self.op, "out_dtype", self.out_dtype, ("", *FLOAT_DTYPES))
        require(
            self.seq >= 0 and (self.seq == 0 or self.rows % self.seq == 0),
            f"linear: expected rows ({self.rows}) to be a multiple of seq, got {self.seq}",
        )
        require(
            not self.grouped or self.dtype == "float32",
            f"linear: expected dtype float32 with {self.weight_dtype} weights, got {self.dtype}",
        )
        require(
            self.grouped or not self.x_dtype,
            f"linear: expected weights of {' or '.join(GROUPED)} with x_dtype {self.x_dtype!r}, "
            f"got {self.weight_dtype or self.dtype}",
        )
        if self.out_dtype == self.dtype:
            object.__setattr__(self, "out_dtype", "")

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> Linear:
        """From a model's call: x (…, in_features), weight, its scales if it is quantised, then bias and residual."""
        x, weight = args[0], args[1]
        require(
            x.shape[-1] == weight.shape[1],
            f"linear: expected x (…, {weight.shape[1]}) for weight {weight.shape}, got {x.shape}",
        )
        gated = bool(attrs.get("gated", False))
        require(
            not attrs.get("lengths") or len(x.shape) == 3,
            f"linear: expected x (batch, seq, in_features) with lengths, got {x.shape}",
        )
        require(not gated or weight.shape[0] % 2 == 0, f"linear: expected an even gated weight, got {weight.shape}")
        return cls(
            rows=math.prod(x.shape[:-1]),
            in_features=weight.shape[1],
            out_features=weight.shape[0] // (2 if gated else 1),
            bias=bool(attrs["bias"]),
            activation=str(attrs.get("activation", "")),
            residual=bool(attrs.get("residual", False)),
            dtype=x.dtype,
            gated=gated,
            weight_dtype="int8" if weight.dtype == "int8" else str(attrs.get("weight_dtype", "")),
            x_dtype=str(attrs.get("x_dtype", "")),
            out_dtype=str(attrs.get("out_dtype", "")),
            seq=x.shape[1] if attrs.get("lengths") else 0,
        )

    @property
    def weight_rows(self) -> int:
        """Rows of the weight: out_features, twice that where gated."""
        return self.out_features * (2 if self.gated else 1)

    @property
    def quantized(self) -> bool:
        """Whether the weight is int8."""
        return self.weight_dtype == "int8"

    @property
    def grouped(self) -> bool:
        """Whether the weight is quantised by groups."""
        return self.weight_dtype in GROUPED

    @property
    def weight_groups(self) -> int:
        """Scales of a row of a weight that is quantised by groups."""
        return math.ceil(self.in_features / WEIGHT_GROUP)

    @property
    def compute_dtype(self) -> str:
        """See :class:`Workload`."""
        return "int8" if self.quantized or self.x_dtype else self.dtype

    @property
    def x_group(self) -> int:
        """Consecutive values of a row of quantised x that share one scale."""
        return WEIGHT_GROUP if self.grouped else INT8_GROUP

    @property
    def groups(self) -> int:
        """Scales of a row of quantised x."""
        return math.ceil(self.in_features / self.x_group)

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X and weight (a byte an element, whatever its bits), then what of scale … lengths the variant has."""
        specs = [
            TensorSpec("x", (self.rows, self.in_features), self.dtype),
            TensorSpec(
                "weight", (self.weight_rows, self.in_features),
                "uint8" if self.grouped else self.weight_dtype or self.dtype, constant=True,
            ),
        ]  # fmt: skip
        if self.quantized:
            specs.append(TensorSpec("scale", (self.weight_rows,), "float32", constant=True))
        if self.grouped:
            shape = (self.weight_rows, self.weight_groups)
            specs += [TensorSpec(name, shape, "float16", constant=True) for name in ("scale", "minimum")]
        if self.bias:
            specs.append(TensorSpec("bias", (self.weight_rows,), self.dtype, constant=True))
        if self.residual:
            specs.append(TensorSpec("residual", (self.rows, self.out_features), self.dtype))
        if self.seq:
            specs.append(TensorSpec("lengths", (self.rows // self.seq,), "int32"))
        return tuple(specs)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (rows, out_features)."""
        return (TensorSpec("y", (self.rows, self.out_features), self.out_dtype or self.dtype),)

    def compute(self) -> list[Any]:
        """Tensor expression: quantisation of x where the weight is int8, ``matmul``, then the epilogue ``y``."""
        from tvm import te

        from attntune.ops import math as tmath

        operand = {spec.name: te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs()}
        x, weight = operand["x"], operand["weight"]
        k = te.reduce_axis((0, self.in_features), name="k")
        shape = (self.rows, self.weight_rows)
        if self.quantized:
            scaled = sums_by_group(x, weight, self.x_group)

            def product(i: Any, j: Any) -> Any:
                return scaled[i, j] * operand["scale"][j]
        else:

            def element(j: Any, k: Any) -> Any:
                value = weight[j, k].astype("float32")
                if not self.grouped:
                    return value
                scale, minimum = (
                    operand[name][j, k // WEIGHT_GROUP].astype("float32") for name in ("scale", "minimum")
                )
                return value * scale + minimum

            factor = rounded(x, self.x_group) if self.x_dtype else x
            sums = te.compute(
                shape, lambda i, j: te.sum(factor[i, k].astype("float32") * element(j, k), axis=k), name="matmul"
            )

            def product(i: Any, j: Any) -> Any:
                return sums[i, j]

        def biased(i: Any, j: Any) -> Any:
            value = product(i, j)
            return value + operand["bias"][j].astype("float32") if self.bias else value

        def epilogue(i: Any, j: Any) -> Any:
            value = biased(i, j)
            if self.activation:
                with tmath.rounded_to(self.outputs()[0].dtype):
                    value = getattr(tmath, self.activation)(value)
            if self.gated:
                value = value * biased(i, j + self.out_features)
            if self.residual:
                value = value + operand["residual"][i, j].astype("float32")
            value = value.astype(self.outputs()[0].dtype)
            return before_end(value, i, self.seq, operand["lengths"]) if self.seq else value

        return [*operand.values(), te.compute((self.rows, self.out_features), epilogue, name="y")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy; the quantisation of x in float32, as the definition has it."""
        operand = dict(zip((spec.name for spec in self.inputs()), inputs, strict=True))
        x, weight = np.asarray(operand["x"], np.float64), np.asarray(operand["weight"], np.float64)
        if self.quantized or self.x_dtype:
            x = dequantized(x, self.x_group)
        if self.quantized:
            weight = weight * np.asarray(operand["scale"], np.float64)[:, None]
        if self.grouped:
            weight = ungrouped(weight, operand["scale"], operand["minimum"])
        y = x @ weight.T
        if self.bias:
            y = y + np.asarray(operand["bias"], np.float64)
        gate = activation_reference(self.activation, y[:, : self.out_features])
        y = gate * y[:, self.out_features :] if self.gated else gate
        if self.residual:
            y = y + np.asarray(operand["residual"], np.float64)
        return (zero_past_end(y, self.seq, operand["lengths"]) if self.seq else y,)

    def reference_sample(self, *inputs: np.ndarray) -> Iterator[tuple[tuple[Any, ...], tuple[np.ndarray, ...]]]:
        """Of large layers one row of every 16, each time at another place among them; every column of it."""
        if self.seq or self.rows * self.in_features * self.weight_rows <= _WHOLE:
            yield from super().reference_sample(*inputs)
            return
        first = np.arange(0, self.rows, 16)
        rows = np.minimum(first + 7 * (first // 16) % 16, self.rows - 1)
        one = self.replace(rows=len(rows))
        names = (spec.name for spec in self.inputs())
        part = [x[rows] if name in ("x", "residual") else x for name, x in zip(names, inputs, strict=True)]
        yield (rows,), one.reference(*part)

    def flops(self) -> int:
        """Multiply-adds of the product; the epilogue is not counted."""
        return 2 * self.rows * self.in_features * self.weight_rows

    def bytes_moved(self) -> int:
        """See :class:`Workload`; two weights of 4 bits share a byte."""
        packed = self.weight_rows * self.in_features // 2 if self.weight_dtype == "uint4" else 0
        return super().bytes_moved() - packed

    def tolerance(self) -> tuple[float, float]:
        """Rounding of a dot product grows with the root of its length for random operands."""
        rtol, atol = super().tolerance()
        if self.dtype == "float32":
            atol *= max(1.0, math.sqrt(self.in_features) / 8) * (4.0 if self.gated else 1.0)
        return rtol, atol

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Normal operands, weights scaled by 1/√in_features; quantised weights with what undoes it.

        Rows of x past their sequence's end are NaN.
        """
        rng = np.random.default_rng(seed)
        values: list[np.ndarray] = []
        for spec in self.inputs():
            if spec.name == "lengths":
                lengths = example_lengths(rng, spec.shape[0], self.seq)
                values[0].reshape(-1, self.seq, self.in_features)[np.arange(self.seq) >= lengths[:, None]] = np.nan
                values.append(lengths)
            elif not (self.quantized or self.grouped):
                values.append(random_operand(rng, spec))
            elif spec.name == "weight":
                weight = rng.standard_normal(spec.shape, np.float32) / np.float32(math.sqrt(self.in_features))
                values += (
                    quantize_groups(weight, GROUPED[self.weight_dtype]) if self.grouped else quantize_weight(weight)
                )
            elif spec.name not in ("scale", "minimum"):
                values.append(as_dtype(rng.standard_normal(spec.shape, np.float32), spec.dtype))
        return tuple(values)


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
