"""The largest elements of each row, and where they are: what greedy decoding, sampling and beam search start from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.reduction import Reduction
from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, random_operand, require


@dataclass(frozen=True)
class ArgMax(Workload):
    """The index of the largest element of each row; of equal ones, the first.

    Shapes: x (rows, features) → index (rows,) int64. ``rows`` is the product of all leading dimensions.
    """

    op: ClassVar[str] = "argmax"

    rows: int
    features: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        positive(self.op, rows=self.rows, features=self.features)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> ArgMax:
        """From a model's call: x (…, features)."""
        return cls(math.prod(args[0].shape[:-1]), args[0].shape[-1], args[0].dtype)

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X (rows, features)."""
        return (TensorSpec("x", (self.rows, self.features), self.dtype),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Index (rows,)."""
        return (TensorSpec("index", (self.rows,), "int64"),)

    def compute(self) -> list[Any]:
        """The definition with plain reductions."""
        return self.expression(Reduction())

    def expression(self, reduction: Reduction) -> list[Any]:
        """The definition over any reduction strategy: ``top``, ``before`` (minus the first index of it), ``index``."""
        from tvm import te, tirx

        x = te.placeholder((self.rows, self.features), self.dtype, "x")
        top = reduction.max("top", [self.rows], self.features, lambda i, k: x[(*i, k)].astype("float32"))
        zero, none = tirx.const(0, "int32"), tirx.const(-self.features, "int32")
        before = reduction.max(
            "before",
            [self.rows],
            self.features,
            lambda i, k: tirx.Select(x[(*i, k)].astype("float32") == top[i], zero - k, none),
        )
        return [x, te.compute((self.rows,), lambda i: (0 - before[i]).astype("int64"), name="index")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """NumPy; int64."""
        return (np.asarray(inputs[0], np.float64).argmax(axis=-1),)

    def flops(self) -> int:
        """One comparison an element."""
        return self.rows * self.features

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Normal rows of one decimal, so that some have their largest value twice."""
        return (ties(random_operand(np.random.default_rng(seed), self.inputs()[0])),)


@dataclass(frozen=True)
class TopK(Workload):
    """The ``k`` largest elements of each row, largest first; of equal ones, the first.

    Shapes: x (rows, features) → values (rows, k) of x's dtype, indices (rows, k) int64. ``rows`` is the product of all
    leading dimensions.
    """

    op: ClassVar[str] = "top_k"

    rows: int
    features: int
    k: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        positive(self.op, rows=self.rows, features=self.features, k=self.k)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        require(self.k <= self.features, f"top_k: expected k <= features ({self.features}), got {self.k}")

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> TopK:
        """From a model's call: x (…, features)."""
        return cls(math.prod(args[0].shape[:-1]), args[0].shape[-1], int(attrs["k"]), args[0].dtype)

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X (rows, features)."""
        return (TensorSpec("x", (self.rows, self.features), self.dtype),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Values and indices, (rows, k) each."""
        shape = (self.rows, self.k)
        return TensorSpec("values", shape, self.dtype), TensorSpec("indices", shape, "int64")

    def compute(self) -> list[Any]:
        """By rank, how many elements come before each: quadratic in features, a meaning and no way to compute it."""
        from tvm import te, tirx

        x = te.placeholder((self.rows, self.features), self.dtype, "x")
        c = te.reduce_axis((0, self.features), "c")
        wide = te.compute((self.rows, self.features), lambda i, j: x[i, j].astype("float32"), name="wide")

        def comes_before(i: Any, j: Any) -> Any:
            one, zero = tirx.const(1, "int32"), tirx.const(0, "int32")
            first = tirx.Select(tirx.And(wide[i, c] == wide[i, j], c < j), one, zero)
            return tirx.Select(wide[i, c] > wide[i, j], one, first)

        rank = te.compute(
            (self.rows, self.features), lambda i, j: te.sum(comes_before(i, j), axis=c), name="rank"
        )  # fmt: skip
        a, b = te.reduce_axis((0, self.features), "a"), te.reduce_axis((0, self.features), "b")
        zero, origin = tirx.const(0.0, "float32"), tirx.const(0, "int64")
        picked = te.compute(
            (self.rows, self.k),
            lambda i, j: te.sum(tirx.Select(rank[i, a] == j, wide[i, a], zero), axis=a),
            name="picked",
        )
        indices = te.compute(
            (self.rows, self.k),
            lambda i, j: te.sum(tirx.Select(rank[i, b] == j, b.astype("int64"), origin), axis=b),
            name="indices",
        )
        values = te.compute((self.rows, self.k), lambda i, j: picked[i, j].astype(self.dtype), name="values")
        return [x, values, indices]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """NumPy; values float64, indices int64."""
        x = np.asarray(inputs[0], np.float64)
        indices = np.argsort(-x, axis=-1, kind="stable")[:, : self.k]
        return np.take_along_axis(x, indices, axis=-1), indices

    def flops(self) -> int:
        """One comparison an element."""
        return self.rows * self.features

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Normal rows of one decimal, so that some have values twice."""
        return (ties(random_operand(np.random.default_rng(seed), self.inputs()[0])),)


def ties(x: np.ndarray) -> np.ndarray:
    """``x`` with one decimal."""
    return np.round(x.astype(np.float32), 1).astype(x.dtype)
