"""Additive attention: scores by a small network of query and key, softmax, weighted sum.

Source: Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2014), section
3.1, with the products of queries and keys with their matrices done beforehand (Keras's ``AdditiveAttention``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import TensorSpec, Workload, one_of, positive, random_operand, require

#: Stands for minus infinity among scores.
LOWEST = -3.0e38


@dataclass(frozen=True)
class AdditiveAttention(Workload):
    """``softmax_j(Σ_d scale[d] · tanh(query[i, d] + key[j, d])) · value`` over the positions j that are seen.

    Shapes: query (batch, q_len, dim), key (batch, kv_len, dim), value (batch, kv_len, features), scale (dim,) constant
    (v in the paper; ones without it), mask (batch, kv_len) int64: 0 is not seen, lengths (batch,) int32: nothing from
    there on is seen → context (batch, q_len, features), weights (batch, q_len, kv_len) float32. Where nothing is seen
    both are zero; what is not seen is not read into the result, whatever it holds.
    """

    op: ClassVar[str] = "additive_attention"

    batch: int
    q_len: int
    kv_len: int
    dim: int
    features: int
    scale: bool = True
    mask: bool = False
    lengths: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("batch", "q_len", "kv_len", "dim", "features")}
        positive(self.op, **sizes)
        one_of(self.op, "dtype", self.dtype, ("float32",))

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> AdditiveAttention:
        """From a model's call: query (batch, q_len, dim), or (batch, dim) of one query; key, value, and so on."""
        query, key, value = args[:3]
        require(
            query.shape[-1] == key.shape[-1] and key.shape[:2] == value.shape[:2],
            f"additive_attention: expected query (…, dim), key (batch, kv_len, dim), value (batch, kv_len, features), "
            f"got {query.shape}, {key.shape}, {value.shape}",
        )
        return cls(
            batch=query.shape[0],
            q_len=query.shape[1] if len(query.shape) == 3 else 1,
            kv_len=key.shape[1],
            dim=key.shape[2],
            features=value.shape[2],
            scale=bool(attrs.get("scale", True)),
            mask=bool(attrs.get("mask", False)),
            lengths=bool(attrs.get("lengths", False)),
            dtype=query.dtype,
        )

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Query, key, value, then scale, mask and lengths where the variant has them."""
        specs = [
            TensorSpec("query", (self.batch, self.q_len, self.dim), self.dtype),
            TensorSpec("key", (self.batch, self.kv_len, self.dim), self.dtype),
            TensorSpec("value", (self.batch, self.kv_len, self.features), self.dtype),
        ]
        if self.scale:
            specs.append(TensorSpec("scale", (self.dim,), self.dtype, constant=True))
        if self.mask:
            specs.append(TensorSpec("mask", (self.batch, self.kv_len), "int64"))
        if self.lengths:
            specs.append(TensorSpec("lengths", (self.batch,), "int32"))
        return tuple(specs)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Context and weights."""
        return (
            TensorSpec("context", (self.batch, self.q_len, self.features), self.dtype),
            TensorSpec("weights", (self.batch, self.q_len, self.kv_len), "float32"),
        )

    def seen(self, operand: Mapping[str, Any], b: Any, j: Any) -> Any:
        """The expression for whether key ``j`` of sequence ``b`` is seen; None where all are."""
        from tvm import tirx

        conditions = []
        if self.mask:
            conditions.append(operand["mask"][b, j] != tirx.const(0, "int64"))
        if self.lengths:
            conditions.append(j < operand["lengths"][b])
        return conditions[0] if len(conditions) == 1 else tirx.all(*conditions) if conditions else None

    def compute(self) -> list[Any]:
        """Stages ``scores``, ``top``, ``share``, ``total``, ``weights``, ``context``."""
        from tvm import te, tirx

        from attntune.ops import math as tmath

        def f32(value: float) -> Any:
            return tirx.const(value, "float32")

        operand = {spec.name: te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs()}
        query, key, value = operand["query"], operand["key"], operand["value"]

        def where(b: Any, j: Any, chosen: Any, other: float) -> Any:
            seen = self.seen(operand, b, j)
            return chosen if seen is None else tirx.Select(seen, chosen, f32(other))

        def term(b: Any, i: Any, j: Any, d: Any) -> Any:
            energy = tmath.tanh(query[b, i, d] + key[b, j, d])
            return operand["scale"][d] * energy if self.scale else energy

        shape = (self.batch, self.q_len, self.kv_len)
        d = te.reduce_axis((0, self.dim), name="d")
        scores = te.compute(shape, lambda b, i, j: te.sum(term(b, i, j, d), axis=d), name="scores")
        j_max, j_sum, j_all = (te.reduce_axis((0, self.kv_len), name=name) for name in ("j_max", "j_sum", "j_all"))
        top = te.compute(
            shape[:2], lambda b, i: te.max(where(b, j_max, scores[b, i, j_max], LOWEST), axis=j_max), name="top"
        )
        share = te.compute(
            shape, lambda b, i, j: where(b, j, tmath.exp(scores[b, i, j] - top[b, i]), 0.0), name="share"
        )
        total = te.compute(shape[:2], lambda b, i: te.sum(share[b, i, j_sum], axis=j_sum), name="total")
        weights = te.compute(shape, lambda b, i, j: share[b, i, j] / te.max(total[b, i], f32(1e-30)), name="weights")
        context = te.compute(
            (self.batch, self.q_len, self.features),
            lambda b, i, f: te.sum(where(b, j_all, weights[b, i, j_all] * value[b, j_all, f], 0.0), axis=j_all),
            name="context",
        )
        return [*operand.values(), context, weights]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        given = {spec.name: np.asarray(value) for spec, value in zip(self.inputs(), inputs, strict=True)}
        query, key, value = (np.asarray(given[name], np.float64) for name in ("query", "key", "value"))
        scale = np.asarray(given["scale"], np.float64) if self.scale else np.ones(self.dim)
        seen = given["mask"] != 0 if self.mask else np.ones((self.batch, self.kv_len), bool)
        if self.lengths:
            seen = seen & (np.arange(self.kv_len) < given["lengths"][:, None])
        key, value = np.where(seen[:, :, None], key, 0.0), np.where(seen[:, :, None], value, 0.0)
        scores = np.tanh(query[:, :, None, :] + key[:, None, :, :]) @ scale
        scores = np.where(seen[:, None, :], scores, LOWEST)
        share = np.where(seen[:, None, :], np.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
        weights = share / np.maximum(share.sum(axis=-1, keepdims=True), 1e-30)
        return weights @ value, weights

    def flops(self) -> int:
        """About twenty for each tanh and its sum, ten for each weight, two for each product of the sum."""
        return self.batch * self.q_len * self.kv_len * (20 * self.dim + 10 + 2 * self.features)

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Ragged; the first sequence full; with three or more, the last sees nothing. What is not seen is NaN."""
        rng = np.random.default_rng(seed)
        given = {spec.name: random_operand(rng, spec) for spec in self.inputs()}
        seen = np.ones((self.batch, self.kv_len), bool)
        ends = rng.integers(1, self.kv_len + 1, self.batch)
        ends[0] = self.kv_len
        if self.batch >= 3:
            ends[-1] = 0
        if self.lengths:
            given["lengths"] = ends.astype(np.int32)
            seen &= np.arange(self.kv_len) < ends[:, None]
        if self.mask:
            given["mask"] = rng.integers(0, 2, (self.batch, self.kv_len))
            given["mask"][0] = 1
            seen &= given["mask"] != 0
        given["key"][~seen] = np.nan
        given["value"][~seen] = np.nan
        return tuple(given.values())
