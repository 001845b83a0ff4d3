"""What attention's scores gain by the distance from a query to a key, one learned number a head and distance.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (T5, 2020),
section 2.1. The paper's buckets of distances are resolved where a model is loaded: here every distance has an entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, random_operand, require


@dataclass(frozen=True)
class RelativeBias(Workload):
    """``bias[b, h, i, j] = table[h, j - p + zero]``, the index clamped to the table; p is where query i stands.

    Shapes: rows (batch, q_len) int64, table (heads, distances) constant → bias (1, heads, q_len, kv_len), the operand
    of :class:`attntune.ops.Attention` by that name, with kv_len = q_len and p = i.

    With ``lengths``, as over a cache: rows, table, lengths (batch,) int32, keys (batch, heads, kv_len, head_dim) → bias
    (batch, heads, q_len, kv_len) with p = lengths[b] - q_len + i: the queries are the last ones of their sequence.

    Of rows and keys only the shape counts; their values are not read.
    """

    op: ClassVar[str] = "relative_bias"

    batch: int
    q_len: int
    heads: int
    distances: int
    zero: int
    """Which column of the table is for a key at the query's own position."""
    lengths: bool = False
    kv_len: int = 0
    """0 means ``q_len``; other numbers with ``lengths``."""
    head_dim: int = 0
    """Of keys; with ``lengths``."""
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.kv_len == 0:
            object.__setattr__(self, "kv_len", self.q_len)
        positive(
            self.op, batch=self.batch, q_len=self.q_len, heads=self.heads, distances=self.distances,
            kv_len=self.kv_len,
        )  # fmt: skip
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        require(
            0 <= self.zero < self.distances,
            f"relative_bias: expected zero within {self.distances} distances, got {self.zero}",
        )
        require(
            (self.lengths and self.head_dim > 0) or (self.head_dim == 0 and self.kv_len == self.q_len),
            "relative_bias: expected keys' kv_len and head_dim with lengths, and only then; got "
            f"lengths {self.lengths}, kv_len {self.kv_len}, head_dim {self.head_dim}",
        )

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> RelativeBias:
        """From a model's call: rows, table; then lengths and keys if ``attrs`` say so."""
        rows, table, *rest = args
        keys = rest[1].shape if attrs.get("lengths") else (0, 0, 0, 0)
        return cls(
            batch=rows.shape[0], q_len=rows.shape[1], heads=table.shape[0], distances=table.shape[1],
            zero=int(attrs["zero"]), lengths=bool(attrs.get("lengths", False)), kv_len=keys[2], head_dim=keys[3],
            dtype=table.dtype,
        )  # fmt: skip

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Rows, table; with lengths also lengths and keys."""
        specs = [
            TensorSpec("rows", (self.batch, self.q_len), "int64"),
            TensorSpec("table", (self.heads, self.distances), self.dtype, constant=True),
        ]
        if self.lengths:
            specs.append(TensorSpec("lengths", (self.batch,), "int32"))
            specs.append(TensorSpec("keys", (self.batch, self.heads, self.kv_len, self.head_dim), self.dtype))
        return tuple(specs)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Bias (1|batch, heads, q_len, kv_len)."""
        batch = self.batch if self.lengths else 1
        return (TensorSpec("bias", (batch, self.heads, self.q_len, self.kv_len), self.dtype),)

    def compute(self) -> list[Any]:
        """One elementwise stage ``bias``."""
        from tvm import te

        operand = {spec.name: te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs()}

        def element(b: Any, h: Any, i: Any, j: Any) -> Any:
            at = operand["lengths"][b] - self.q_len + i if self.lengths else i
            column = te.max(te.min(j - at + self.zero, self.distances - 1), 0)
            return operand["table"][h, column]

        return [*operand.values(), te.compute(self.outputs()[0].shape, element, name="bias")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        operand = dict(zip((spec.name for spec in self.inputs()), inputs, strict=True))
        at = np.arange(self.q_len)[None, :, None]
        if self.lengths:
            at = at + operand["lengths"].astype(np.int64)[:, None, None] - self.q_len
        columns = np.clip(np.arange(self.kv_len) - at + self.zero, 0, self.distances - 1)
        found = np.asarray(operand["table"], np.float64)[:, columns]
        return (np.ascontiguousarray(found.swapaxes(0, 1)),)

    def flops(self) -> int:
        """One per element, for the copy."""
        batch, heads, rows, columns = self.outputs()[0].shape
        return batch * heads * rows * columns

    def bytes_moved(self) -> int:
        """Rows and keys do not move."""
        return sum(s.bytes for s in (*self.inputs(), *self.outputs()) if s.name not in ("rows", "keys"))

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Lengths from the longest down, to the queries alone; keys of NaN would do."""
        rng = np.random.default_rng(seed)
        values = {spec.name: random_operand(rng, spec) for spec in self.inputs()}
        if self.lengths:
            most = max(self.kv_len, self.q_len)
            values["lengths"] = np.array([max(most - 3 * b, self.q_len) for b in range(self.batch)], np.int32)
        return tuple(values.values())
