"""Mean over the unmasked positions of a sequence, and L2 normalisation: a sentence embedding.

Source: Reimers, Gurevych, "Sentence-BERT" (2019), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.reduction import Reduction
from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, random_operand, require

#: Least norm that is divided by, as in ``torch.nn.functional.normalize``.
NORM_FLOOR = 1e-12


@dataclass(frozen=True)
class MeanPool(Workload):
    """``p / max(‖p‖₂, 1e-12)`` with ``p = Σ x[s] / max(count, eps)`` over positions whose mask is not 0.

    Shapes: x (batch, seq, features), mask (batch, seq) int64 → y (batch, features). A wholly masked sequence gives
    zeros; masked positions are not read into the result, whatever they hold. Without ``normalize``, y is p.
    """

    op: ClassVar[str] = "mean_pool"

    batch: int
    seq: int
    features: int
    normalize: bool = True
    eps: float = 1e-9
    dtype: str = "float32"
    out_dtype: str = ""
    """Of y; ``""`` means ``dtype``."""

    def __post_init__(self) -> None:
        positive(self.op, batch=self.batch, seq=self.seq, features=self.features)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        one_of(self.op, "out_dtype", self.out_dtype, ("", *FLOAT_DTYPES))
        require(self.eps > 0, f"mean_pool: expected eps > 0, got {self.eps!r}")

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> MeanPool:
        """From a model's call: x (batch, seq, features), mask (batch, seq)."""
        x, mask = args
        require(x.shape[:2] == mask.shape, f"mean_pool: expected mask {x.shape[:2]} for x {x.shape}, got {mask.shape}")
        batch, seq, features = x.shape
        return cls(
            batch, seq, features, bool(attrs.get("normalize", True)), float(attrs.get("eps", cls.eps)), dtype=x.dtype,
            out_dtype=str(attrs.get("out_dtype", "")),
        )  # fmt: skip

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X and mask."""
        return (
            TensorSpec("x", (self.batch, self.seq, self.features), self.dtype),
            TensorSpec("mask", (self.batch, self.seq), "int64"),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (batch, features)."""
        return (TensorSpec("y", (self.batch, self.features), self.out_dtype or self.dtype),)

    def compute(self) -> list[Any]:
        """The definition with plain reductions."""
        return self.expression(Reduction())

    def expression(self, reduction: Reduction) -> list[Any]:
        """The definition over any strategy for reducing along a contiguous axis.

        Stages: ``count``, ``total``, ``share``, ``mean``; with ``normalize`` also ``squares`` and ``scale``; ``y``.
        """
        from tvm import te, tirx

        def f32(value: float) -> Any:
            return tirx.const(value, "float32")

        x, mask = (te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs())
        zero = tirx.const(0, "int64")
        count = reduction.sum(
            "count", (self.batch,), self.seq, lambda i, k: tirx.Select(mask[(*i, k)] != zero, f32(1.0), f32(0.0))
        )
        s = te.reduce_axis((0, self.seq), name="s")
        shape = (self.batch, self.features)
        total = te.compute(
            shape,
            # Select, not a product: 0 · inf in a padded position would be NaN.
            lambda b, f: te.sum(tirx.Select(mask[b, s] != zero, x[b, s, f].astype("float32"), f32(0.0)), axis=s),
            name="total",
        )
        share = te.compute((self.batch,), lambda b: f32(1.0) / te.max(count[b], f32(self.eps)), name="share")
        mean = te.compute(shape, lambda b, f: total[b, f] * share[b], name="mean")
        if not self.normalize:
            return [x, mask, te.compute(shape, lambda b, f: mean[b, f].astype(self.outputs()[0].dtype), name="y")]
        squares = reduction.sum("squares", (self.batch,), self.features, lambda i, k: mean[(*i, k)] * mean[(*i, k)])
        scale = te.compute(
            (self.batch,), lambda b: f32(1.0) / te.max(tirx.sqrt(squares[b]), f32(NORM_FLOOR)), name="scale"
        )
        return [
            x,
            mask,
            te.compute(shape, lambda b, f: (mean[b, f] * scale[b]).astype(self.outputs()[0].dtype), name="y"),
        ]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        x, mask = np.asarray(inputs[0], np.float64), np.asarray(inputs[1]) != 0
        total = np.where(mask[:, :, None], x, 0.0).sum(axis=1)
        mean = total / np.maximum(mask.sum(axis=1, keepdims=True), self.eps)
        if self.normalize:
            mean = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), NORM_FLOOR)
        return (mean,)

    def flops(self) -> int:
        """One addition per element of x; the rest is counted per feature: mean, square, sum, scale."""
        return self.batch * self.features * (self.seq + (4 if self.normalize else 1))

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Ragged lengths, the first sequence full; with three or more, the last is wholly masked."""
        rng = np.random.default_rng(seed)
        x = random_operand(rng, self.inputs()[0])
        lengths = rng.integers(1, self.seq + 1, self.batch)
        lengths[0] = self.seq
        if self.batch >= 3:
            lengths[-1] = 0
        mask = (np.arange(self.seq) < lengths[:, None]).astype(np.int64)
        x[mask == 0] = np.nan
        return (x, mask)
