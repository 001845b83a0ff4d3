"""Root-mean-square normalisation of each head of the queries and keys of a packed projection.

Sources: Henry et al., "Query-Key Normalization for Transformers" (2020); Qwen3 (2025) has it before the rotation.
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
class HeadNorm(Workload):
    """``x / √(mean(x²) + eps) · weight`` head by head for queries and keys; values stay.

    Shapes: qkv (rows, (heads + 2·kv_heads)·head_dim), all query heads, then keys, then values; weight (heads +
    kv_heads, head_dim) constant → y, shaped as qkv. ``rows`` is the product of all leading dimensions.
    """

    op: ClassVar[str] = "head_norm"

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float = 1e-6
    dtype: str = "float32"

    def __post_init__(self) -> None:
        positive(self.op, rows=self.rows, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        require(self.eps > 0, f"head_norm: expected eps > 0, got {self.eps!r}")

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> HeadNorm:
        """From a model's call: qkv (…, (heads + 2·kv_heads)·head_dim), weight."""
        qkv, weight = args
        heads, kv_heads, head_dim = attrs["heads"], attrs["kv_heads"], attrs["head_dim"]
        width = (heads + 2 * kv_heads) * head_dim
        require(qkv.shape[-1] == width, f"head_norm: expected a last axis of {width}, got {qkv.shape}")
        shape = (heads + kv_heads, head_dim)
        require(weight.shape == shape, f"head_norm: expected a weight {shape}, got {weight.shape}")
        return cls(
            rows=math.prod(qkv.shape[:-1]), heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            eps=float(attrs["eps"]), dtype=qkv.dtype,
        )  # fmt: skip

    @property
    def normed(self) -> int:
        """Heads that are normalised: the queries' and the keys'."""
        return self.heads + self.kv_heads

    @property
    def width(self) -> int:
        """Of a row of qkv."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Qkv, weight."""
        return (
            TensorSpec("qkv", (self.rows, self.width), self.dtype),
            TensorSpec("weight", (self.normed, self.head_dim), self.dtype, constant=True),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y, shaped as qkv."""
        return (TensorSpec("y", (self.rows, self.width), self.dtype),)

    def compute(self) -> list[Any]:
        """Stages ``squares``, ``scale`` and ``y``."""
        from tvm import te, tirx

        qkv, weight = (te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs())

        def element(i: Any, j: Any) -> Any:
            return qkv[i, j].astype("float32")

        def square(at: tuple[Any, ...], k: Any) -> Any:
            i, head = at
            return element(i, head * self.head_dim + k) * element(i, head * self.head_dim + k)

        squares = Reduction().sum("squares", [self.rows, self.normed], self.head_dim, square)
        one, eps = tirx.const(1.0, "float32"), tirx.const(self.eps, "float32")
        share = tirx.const(1.0 / self.head_dim, "float32")
        scale = te.compute(
            (self.rows, self.normed), lambda i, h: one / tirx.sqrt(squares[i, h] * share + eps), name="scale"
        )

        def result(i: Any, j: Any) -> Any:
            head = te.min(j // self.head_dim, self.normed - 1)
            scaled = element(i, j) * scale[i, head] * weight[head, j % self.head_dim].astype("float32")
            return tirx.Select(j < self.normed * self.head_dim, scaled, element(i, j)).astype(self.dtype)

        return [qkv, weight, te.compute((self.rows, self.width), result, name="y")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        qkv, weight = (np.asarray(value, np.float64) for value in inputs)
        heads = qkv.reshape(self.rows, -1, self.head_dim)
        normed, kept = heads[:, : self.normed], heads[:, self.normed :]
        scaled = normed / np.sqrt((normed * normed).mean(axis=-1, keepdims=True) + self.eps) * weight
        return (np.concatenate([scaled, kept], axis=1).reshape(self.rows, self.width),)

    def flops(self) -> int:
        """Four per normalised element: square, sum, two products."""
        return 4 * self.rows * self.normed * self.head_dim
