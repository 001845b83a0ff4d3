"""Scaled dot-product attention over (batch, seq, heads, head_dim), with no separate transposes.

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2; grouped heads: Ainslie et al., "GQA" (2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, random_operand, require

#: Score of a key that may not be attended to; far below any real score, and far above the lowest float32.
MASKED = -1.0e30
#: Where the running maximum of a row starts: above MASKED, so that a wholly masked row sums to zero, not to its length.
FLOOR = -1.0e29


@dataclass(frozen=True)
class Attention(Workload):
    """``softmax(scale · Q Kᵀ + bias, masked) · V``.

    Shapes, packed: qkv (batch, q_len, (heads + 2·kv_heads)·head_dim), all query heads, then keys, then values.
    Otherwise: query (batch, q_len, heads·head_dim), key and value (batch, kv_len, kv_heads·head_dim).
    Then mask (batch, kv_len) int64, nonzero where a key may be attended to, and bias (bias_batch, bias_heads, q_len,
    kv_len), added to the scaled scores. Result: out (batch, q_len, heads·head_dim).

    ``causal`` lets query i see keys j <= i + causal_offset. A query that may see no key gives zeros.
    """

    op: ClassVar[str] = "attention"

    batch: int
    heads: int
    q_len: int
    kv_len: int
    head_dim: int
    kv_heads: int = 0
    """0 means ``heads``."""
    packed: bool = False
    causal: bool = False
    causal_offset: int = 0
    mask: bool = False
    bias_batch: int = 0
    """0 means no bias; else 1 or ``batch``."""
    bias_heads: int = 0
    """0 means no bias; else 1 or ``heads``."""
    scale: float | None = None
    """None means 1/√head_dim."""
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.kv_heads == 0:
            object.__setattr__(self, "kv_heads", self.heads)
        positive(
            self.op, batch=self.batch, heads=self.heads, kv_heads=self.kv_heads,
            q_len=self.q_len, kv_len=self.kv_len, head_dim=self.head_dim,
        )  # fmt: skip
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        one_of(self.op, "bias_batch", self.bias_batch, (0, 1, self.batch))
        one_of(self.op, "bias_heads", self.bias_heads, (0, 1, self.heads))
        require(
            self.heads % self.kv_heads == 0,
            f"attention: expected heads ({self.heads}) to be a multiple of kv_heads ({self.kv_heads})",
        )
        require(
            (self.bias_batch == 0) == (self.bias_heads == 0),
            "attention: expected bias_batch and bias_heads to be both zero or both set",
        )
        require(
            not self.packed or self.q_len == self.kv_len,
            f"attention: expected packed qkv to have q_len == kv_len, got {self.q_len} and {self.kv_len}",
        )

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> Attention:
        """From a model's call: qkv, or query, key and value; then mask and bias as ``attrs`` say."""
        packed = bool(attrs["packed"])
        first = args[0]
        batch, q_len = first.shape[0], first.shape[1]
        kv_len = q_len if packed else args[1].shape[1]
        width = attrs["heads"] + 2 * attrs["kv_heads"] if packed else attrs["heads"]
        require(
            first.shape[2] == width * attrs["head_dim"],
            f"attention: expected a last axis of {width * attrs['head_dim']}, got {first.shape}",
        )
        bias = args[-1].shape if attrs.get("bias") else (0, 0)
        return cls(
            batch=batch, heads=attrs["heads"], kv_heads=attrs["kv_heads"], q_len=q_len, kv_len=kv_len,
            head_dim=attrs["head_dim"], packed=packed, causal=bool(attrs.get("causal", False)),
            mask=bool(attrs.get("mask", False)), bias_batch=bias[0], bias_heads=bias[1], scale=attrs.get("scale"),
            dtype=first.dtype,
        )  # fmt: skip

    @property
    def scaling(self) -> float:
        """What scores are multiplied by."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Qkv, or query, key and value; then mask and bias where the variant has them."""
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.packed:
            specs = [TensorSpec("qkv", (self.batch, self.q_len, q_width + 2 * kv_width), self.dtype)]
        else:
            specs = [
                TensorSpec("query", (self.batch, self.q_len, q_width), self.dtype),
                TensorSpec("key", (self.batch, self.kv_len, kv_width), self.dtype),
                TensorSpec("value", (self.batch, self.kv_len, kv_width), self.dtype),
            ]
        if self.mask:
            specs.append(TensorSpec("mask", (self.batch, self.kv_len), "int64"))
        if self.bias_heads:
            specs.append(TensorSpec("bias", (self.bias_batch, self.bias_heads, self.q_len, self.kv_len), self.dtype))
        return tuple(specs)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Out (batch, q_len, heads·head_dim)."""
        return (TensorSpec("out", (self.batch, self.q_len, self.heads * self.head_dim), self.dtype),)

    def compute(self) -> list[Any]:
        """Three stages and the reductions between them: scores, softmax, weighted sum."""
        from tvm import te, tirx

        from attntune.ops import math as tmath

        operands = {spec.name: te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs()}
        q_width, kv_width, dim = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.head_dim
        group = self.heads // self.kv_heads
        if self.packed:
            query = key = value = operands["qkv"]
            key_at, value_at = q_width, q_width + kv_width
        else:
            query, key, value = operands["query"], operands["key"], operands["value"]
            key_at = value_at = 0
        scores_shape = (self.batch, self.heads, self.q_len, self.kv_len)
        rows_shape = scores_shape[:3]
        masked = tirx.const(MASKED, "float32")

        d = te.reduce_axis((0, dim), name="d")
        products = te.compute(
            scores_shape,
            lambda b, h, i, j: te.sum(
                query[b, i, h * dim + d] * key[b, j, key_at + (h // group) * dim + d], axis=d
            ),
            name="products",
        )  # fmt: skip

        def score(b: Any, h: Any, i: Any, j: Any) -> Any:
            value_ = products[b, h, i, j] * tirx.const(self.scaling, self.dtype)
            if self.bias_heads:
                value_ = value_ + operands["bias"][
                    b if self.bias_batch > 1 else 0, h if self.bias_heads > 1 else 0, i, j
                ]  # fmt: skip
            if self.mask:
                value_ = tirx.Select(operands["mask"][b, j] != 0, value_, masked)
            if self.causal:
                value_ = tirx.Select(j <= i + self.causal_offset, value_, masked)
            return value_

        scores = te.compute(scores_shape, score, name="scores")
        j_max = te.reduce_axis((0, self.kv_len), name="j_max")
        peak = te.compute(rows_shape, lambda b, h, i: te.max(scores[b, h, i, j_max], axis=j_max), name="peak")
        weights = te.compute(
            scores_shape,
            lambda b, h, i, j: tmath.exp(scores[b, h, i, j] - te.max(peak[b, h, i], tirx.const(FLOOR, "float32"))),
            name="weights",
        )
        j_sum = te.reduce_axis((0, self.kv_len), name="j_sum")
        total = te.compute(rows_shape, lambda b, h, i: te.sum(weights[b, h, i, j_sum], axis=j_sum), name="total")
        j_out = te.reduce_axis((0, self.kv_len), name="j_out")
        context = te.compute(
            (self.batch, self.heads, self.q_len, dim),
            lambda b, h, i, e: te.sum(
                weights[b, h, i, j_out] * value[b, j_out, value_at + (h // group) * dim + e], axis=j_out
            ),
            name="context",
        )
        out = te.compute(
            (self.batch, self.q_len, q_width),
            lambda b, i, c: (
                context[b, c // dim, i, c % dim] / te.max(total[b, c // dim, i], tirx.const(1e-30, "float32"))
            ),
            name="out",
        )
        return [*operands.values(), out]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        weights, value = self._reference_weights(inputs)
        context = np.einsum("bhij,bjhe->bihe", weights, value)
        return (context.reshape(self.batch, self.q_len, self.heads * self.head_dim),)

    def _reference_weights(self, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        operands = dict(zip((spec.name for spec in self.inputs()), inputs, strict=True))
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.packed:
            qkv = np.asarray(operands["qkv"], np.float64)
            query, key, value = np.split(qkv, [q_width, q_width + kv_width], axis=-1)
        else:
            query, key, value = (np.asarray(operands[name], np.float64) for name in ("query", "key", "value"))
        query = query.reshape(self.batch, self.q_len, self.heads, self.head_dim)
        group = self.heads // self.kv_heads
        key, value = (
            x.reshape(self.batch, self.kv_len, self.kv_heads, self.head_dim).repeat(group, axis=2) for x in (key, value)
        )
        scores = np.einsum("bihd,bjhd->bhij", query, key) * self.scaling
        if self.bias_heads:
            scores = scores + np.asarray(operands["bias"], np.float64)
        allowed = np.ones(scores.shape, bool)
        if self.mask:
            allowed &= (np.asarray(operands["mask"]) != 0)[:, None, None, :]
        if self.causal:
            reach = np.arange(self.q_len)[:, None] + self.causal_offset
            allowed &= np.arange(self.kv_len)[None, :] <= reach
        scores = np.where(allowed, scores, -np.inf)
        peak = np.maximum(scores.max(axis=-1, keepdims=True), FLOOR)
        weights = np.exp(scores - peak)
        return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30), value

    def flops(self) -> int:
        """Two matrix products over the (query, key) pairs that may attend; the softmax is not counted."""
        if self.causal:
            pairs = sum(min(max(i + self.causal_offset + 1, 0), self.kv_len) for i in range(self.q_len))
        else:
            pairs = self.q_len * self.kv_len
        return 4 * self.batch * self.heads * pairs * self.head_dim

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Normal operands; masks with a padded tail, a hole, and (from batch 3 on) one wholly masked row."""
        rng = np.random.default_rng(seed)
        values = []
        for spec in self.inputs():
            if spec.name != "mask":
                values.append(random_operand(rng, spec))
                continue
            mask = np.ones(spec.shape, np.int64)
            for row in range(self.batch):
                mask[row, self.kv_len - (row * self.kv_len) // (self.batch + 1) :] = 0
            if self.kv_len > 4:
                mask[0, self.kv_len // 2] = 0
            if self.batch > 2:
                mask[-1] = 0
            values.append(mask)
        return tuple(values)
