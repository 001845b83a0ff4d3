"""BERT's input layer: word, position and token-type embeddings summed, then layer-normalised.

Source: Devlin et al., "BERT" (2018), figure 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.layer_norm import affine_specs, normalized, normalized_reference
from attntune.ops.reduction import Reduction
from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, random_operand, require


@dataclass(frozen=True)
class EmbeddingNorm(Workload):
    """``LayerNorm(word[input_ids] + position[0…seq) + type[token_type_ids])``.

    Shapes: input_ids (batch, seq) int64, token_type_ids (batch, seq) int64, then constants word (vocab, features),
    position (positions, features), type (types, features), weight (features,), bias (features,) →
    y (batch, seq, features).

    Kernels assume 0 <= input_ids < vocab and 0 <= token_type_ids < types and read out of bounds otherwise: clamping
    would hide a wrong tokenizer. Whoever calls a kernel with ids from outside checks them first, as the runtime does.
    """

    op: ClassVar[str] = "embedding_norm"

    batch: int
    seq: int
    vocab: int
    positions: int
    types: int
    features: int
    eps: float = 1e-12
    dtype: str = "float32"

    def __post_init__(self) -> None:
        positive(
            self.op, batch=self.batch, seq=self.seq, vocab=self.vocab, positions=self.positions, types=self.types,
            features=self.features,
        )  # fmt: skip
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        require(self.eps > 0, f"embedding_norm: expected eps > 0, got {self.eps!r}")
        require(
            self.seq <= self.positions,
            f"embedding_norm: expected seq <= positions ({self.positions}), got seq = {self.seq}",
        )

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> EmbeddingNorm:
        """From a model's call: input_ids, token_type_ids, word, position, type, weight, bias."""
        ids, _, word, position, type_ = args[:5]
        return cls(
            batch=ids.shape[0], seq=ids.shape[1], vocab=word.shape[0], positions=position.shape[0],
            types=type_.shape[0], features=word.shape[1], eps=float(attrs["eps"]), dtype=word.dtype,
        )  # fmt: skip

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Ids, tables, weight, bias."""
        ids = (self.batch, self.seq)
        return (
            TensorSpec("input_ids", ids, "int64"),
            TensorSpec("token_type_ids", ids, "int64"),
            TensorSpec("word", (self.vocab, self.features), self.dtype, constant=True),
            TensorSpec("position", (self.positions, self.features), self.dtype, constant=True),
            TensorSpec("type", (self.types, self.features), self.dtype, constant=True),
            *affine_specs(self.features, self.dtype),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (batch, seq, features)."""
        return (TensorSpec("y", (self.batch, self.seq, self.features), self.dtype),)

    def compute(self) -> list[Any]:
        """The definition with plain reductions."""
        return self.expression(Reduction())

    def expression(self, reduction: Reduction) -> list[Any]:
        """The definition over any reduction strategy: stage ``row`` (the sum), then ``layer_norm.normalized``."""
        from tvm import te

        operands = [te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs()]
        ids, type_ids, word, position, type_, weight, bias = operands
        row = te.compute(
            (self.batch, self.seq, self.features),
            lambda b, s, f: (
                word[ids[b, s], f].astype("float32")
                + position[s, f].astype("float32")
                + type_[type_ids[b, s], f].astype("float32")
            ),
            name="row",
        )
        return [*operands, normalized(row, weight, bias, self.eps, self.dtype, reduction)]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        ids, type_ids = inputs[:2]
        word, position, type_, weight, bias = (np.asarray(value, np.float64) for value in inputs[2:])
        row = word[ids] + position[: self.seq] + type_[type_ids]
        return (normalized_reference(row, weight, bias, self.eps),)

    def flops(self) -> int:
        """Two per element for the sum, eight for the normalisation."""
        return 10 * self.batch * self.seq * self.features

    def bytes_moved(self) -> int:
        """Of the tables only the rows that are looked up move, each once."""
        ids, type_ids, word, position, type_, weight, bias = self.inputs()
        looked_up = (
            min(self.vocab, self.batch * self.seq) * word.bytes // self.vocab
            + self.seq * position.bytes // self.positions
            + type_.bytes
        )
        return sum(spec.bytes for spec in (ids, type_ids, weight, bias, *self.outputs())) + looked_up

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Ids over the whole tables, first and last entry included."""
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, self.vocab, (self.batch, self.seq), dtype=np.int64)
        ids[0, 0] = self.vocab - 1
        ids[-1, -1] = 0
        type_ids = rng.integers(0, self.types, (self.batch, self.seq), dtype=np.int64)
        type_ids[-1, -1] = self.types - 1
        return (ids, type_ids, *(random_operand(rng, spec) for spec in self.inputs()[2:]))
