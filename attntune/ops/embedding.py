"""Embedding: rows of a table picked by token id, scaled, with position embeddings added if a model has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.grouped import GROUPED, WEIGHT_GROUP, quantize_groups, ungrouped
from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, random_operand, require


@dataclass(frozen=True)
class Embedding(Workload):
    """``y[b, i] = scale · table[ids[b, i]] + position[p]``.

    Shapes: ids (batch, seq) int64, table (vocab, features) constant; where the variant has them position
    (positions, features) constant and lengths (batch,) int32 → y (batch, seq, features).

    ``p = position_offset + i``; with ``lengths`` it is ``position_offset + lengths[b] - seq + i``: the tokens are then
    the last ones of sequences that are lengths[b] long by now. p is clamped to the table.

    With ``weight_dtype`` the table is quantised by groups, as :mod:`attntune.ops.grouped` has it: scale and minimum
    (vocab, groups) float16, constant, follow it.

    Kernels assume 0 <= ids < vocab and read out of bounds otherwise; whoever calls a kernel with ids from outside
    checks them first, as the runtime does.
    """

    op: ClassVar[str] = "embedding"

    batch: int
    seq: int
    vocab: int
    features: int
    positions: int = 0
    """Rows of the position table; 0 means none."""
    lengths: bool = False
    position_offset: int = 0
    scale: float = 1.0
    dtype: str = "float32"
    out_dtype: str = ""
    """Of y; ``""`` means ``dtype``."""
    weight_dtype: str = ""
    """Of the table; ``""`` means ``dtype``; or ``"uint4"`` or ``"uint8"``."""

    def __post_init__(self) -> None:
        positive(self.op, batch=self.batch, seq=self.seq, vocab=self.vocab, features=self.features)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        one_of(self.op, "out_dtype", self.out_dtype, ("", *FLOAT_DTYPES))
        one_of(self.op, "weight_dtype", self.weight_dtype, ("", *GROUPED))
        require(
            not self.weight_dtype or self.dtype == "float32",
            f"embedding: expected dtype float32 with a {self.weight_dtype} table, got {self.dtype}",
        )
        require(self.positions >= 0, f"embedding: expected positions >= 0, got {self.positions}")
        require(
            self.positions > 0 or not (self.lengths or self.position_offset),
            "embedding: expected lengths and position_offset only with a position table",
        )
        require(
            self.position_offset >= 0, f"embedding: expected position_offset >= 0, got {self.position_offset}"
        )  # fmt: skip

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> Embedding:
        """From a model's call: ids, table, what a quantised one is scaled by, then what ``attrs`` say."""
        ids, table = args[:2]
        stored = str(attrs.get("weight_dtype", ""))
        rest = args[4 if stored else 2 :]
        has_position = bool(attrs.get("position", False))
        return cls(
            batch=ids.shape[0], seq=ids.shape[1], vocab=table.shape[0], features=table.shape[1],
            positions=rest[0].shape[0] if has_position else 0, lengths=bool(attrs.get("lengths", False)),
            position_offset=int(attrs.get("position_offset", 0)), scale=float(attrs.get("scale", 1.0)),
            dtype="float32" if stored else table.dtype, out_dtype=str(attrs.get("out_dtype", "")), weight_dtype=stored,
        )  # fmt: skip

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Ids, table (a byte an element if quantised), then scale, minimum, position and lengths if there are such."""
        stored = "uint8" if self.weight_dtype else self.dtype
        specs = [
            TensorSpec("ids", (self.batch, self.seq), "int64"),
            TensorSpec("table", (self.vocab, self.features), stored, constant=True),
        ]
        if self.weight_dtype:
            shape = (self.vocab, math.ceil(self.features / WEIGHT_GROUP))
            specs += [TensorSpec(name, shape, "float16", constant=True) for name in ("scale", "minimum")]
        if self.positions:
            specs.append(TensorSpec("position", (self.positions, self.features), self.dtype, constant=True))
        if self.lengths:
            specs.append(TensorSpec("lengths", (self.batch,), "int32"))
        return tuple(specs)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (batch, seq, features)."""
        return (TensorSpec("y", (self.batch, self.seq, self.features), self.out_dtype or self.dtype),)

    def position_of(self, lengths: Any, b: Any, i: Any) -> Any:
        """The row of the position table for token ``i`` of sequence ``b``, as an expression; before clamping."""
        first = lengths[b] - self.seq if self.lengths else 0
        return first + i + self.position_offset

    def compute(self) -> list[Any]:
        """One elementwise stage ``y``."""
        from tvm import te, tirx

        operand = {spec.name: te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs()}
        ids, table, dtype = operand["ids"], operand["table"], self.outputs()[0].dtype

        def element(b: Any, i: Any, j: Any) -> Any:
            value = table[ids[b, i], j].astype("float32")
            if self.weight_dtype:
                scale, minimum = (
                    operand[name][ids[b, i], j // WEIGHT_GROUP].astype("float32") for name in ("scale", "minimum")
                )
                value = value * scale + minimum
            if self.scale != 1.0:
                value = value * tirx.const(self.scale, "float32")
            if self.positions:
                at = self.position_of(operand.get("lengths"), b, i)
                at = te.max(te.min(at, self.positions - 1), 0)
                value = value + operand["position"][at, j].astype("float32")
            return value.astype(dtype)

        return [*operand.values(), te.compute(self.outputs()[0].shape, element, name="y")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        operand = dict(zip((spec.name for spec in self.inputs()), inputs, strict=True))
        table = np.asarray(operand["table"], np.float64)
        if self.weight_dtype:
            table = ungrouped(table, operand["scale"], operand["minimum"])
        y = self.scale * table[operand["ids"]]
        if self.positions:
            at = np.arange(self.seq)[None, :] + self.position_offset
            if self.lengths:
                at = at + operand["lengths"].astype(np.int64)[:, None] - self.seq
            at = np.clip(at, 0, self.positions - 1)
            y = y + np.asarray(operand["position"], np.float64)[at]
        return (y,)

    def flops(self) -> int:
        """One per element for the scale, one for the position; at least one, for the copy."""
        return self.batch * self.seq * self.features * max(1, (self.scale != 1.0) + bool(self.positions))

    def bytes_moved(self) -> int:
        """Of the tables only the rows that are looked up move, each once."""
        rows = self.batch * self.seq
        total = sum(spec.bytes for spec in self.outputs()) + 8 * rows
        for spec in self.inputs()[1:]:
            count = spec.shape[0]
            stored = spec.bytes // 2 if spec.name == "table" and self.weight_dtype == "uint4" else spec.bytes
            total += stored * min(rows, count) // count
        return total

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Ids over the whole table, first and last entry included; lengths from the longest that fits down."""
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, self.vocab, (self.batch, self.seq), dtype=np.int64)
        ids[0, 0] = self.vocab - 1
        ids[-1, -1] = 0
        values: list[np.ndarray] = [ids]
        for spec in self.inputs()[1:]:
            if spec.name == "lengths":
                most = max(self.positions - self.position_offset, self.seq)
                values.append(np.array([max(most - 3 * b, 1) for b in range(self.batch)], np.int32))
            elif spec.name == "table" and self.weight_dtype:
                table = rng.standard_normal(spec.shape, np.float32)
                values += quantize_groups(table, GROUPED[self.weight_dtype])
            elif spec.name not in ("scale", "minimum"):
                values.append(random_operand(rng, spec))
        return tuple(values)
