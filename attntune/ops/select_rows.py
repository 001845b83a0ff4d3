"""One row of each sequence: the last token's hidden state before a vocabulary projection, a class token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, random_operand, require


@dataclass(frozen=True)
class SelectRows(Workload):
    """``y[b] = x[b, index[b]]``; an index outside [0, seq) is clamped. With ``row``, ``y[b] = x[b, row]``.

    Shapes: x (batch, seq, features), without ``row`` also index (batch,) int64 → y (batch, features).
    """

    op: ClassVar[str] = "select_rows"

    batch: int
    seq: int
    features: int
    dtype: str = "float32"
    out_dtype: str = ""
    """Of y; ``""`` means ``dtype``."""
    row: int = -1
    """The same row of every sequence; -1: an operand says which."""

    def __post_init__(self) -> None:
        positive(self.op, batch=self.batch, seq=self.seq, features=self.features)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        one_of(self.op, "out_dtype", self.out_dtype, ("", *FLOAT_DTYPES))
        require(-1 <= self.row < self.seq, f"select_rows: expected row below seq ({self.seq}), got {self.row}")

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> SelectRows:
        """From a model's call: x, and index unless ``attrs`` name a row."""
        x, row = args[0], int(attrs.get("row", -1))
        batch, seq, features = x.shape
        return cls(batch, seq, features, dtype=x.dtype, out_dtype=str(attrs.get("out_dtype", "")), row=row)

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X, and index where the variant has it."""
        x = TensorSpec("x", (self.batch, self.seq, self.features), self.dtype)
        return (x, TensorSpec("index", (self.batch,), "int64")) if self.row < 0 else (x,)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (batch, features)."""
        return (TensorSpec("y", (self.batch, self.features), self.out_dtype or self.dtype),)

    def compute(self) -> list[Any]:
        """One elementwise stage ``y``."""
        from tvm import te, tirx

        x, *index = (te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs())
        last, first = tirx.const(self.seq - 1, "int64"), tirx.const(0, "int64")

        def element(b: Any, j: Any) -> Any:
            at = te.max(te.min(index[0][b], last), first) if index else self.row
            return x[b, at, j].astype("float32").astype(self.outputs()[0].dtype)

        return [x, *index, te.compute((self.batch, self.features), element, name="y")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        x, *index = inputs
        at = np.clip(index[0], 0, self.seq - 1) if index else self.row
        return (np.asarray(x, np.float64)[np.arange(self.batch), at],)

    def flops(self) -> int:
        """One per element, for the copy."""
        return self.batch * self.features

    def bytes_moved(self) -> int:
        """One row of each sequence is read and written."""
        x, *index = self.inputs()
        return x.bytes // self.seq + sum(spec.bytes for spec in index) + self.outputs()[0].bytes

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Indices over the sequence, last and first included, and one past the end from batch 3 on."""
        rng = np.random.default_rng(seed)
        index = rng.integers(0, self.seq, self.batch, dtype=np.int64)
        index[0] = self.seq - 1
        if self.batch > 1:
            index[-1] = 0
        if self.batch > 2:
            index[1] = self.seq
        x = random_operand(rng, self.inputs()[0])
        return (x, index) if self.row < 0 else (x,)
