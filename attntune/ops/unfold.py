"""Windows of a sequence, each a row: what a one-dimensional convolution multiplies by its weight.

A convolution as one matrix product: Chellapilla et al., "High Performance Convolutional Neural Networks for Document
Processing" (2006).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import FLOAT_DTYPES, TOLERANCES, TensorSpec, Workload, one_of, positive, require

LAYOUTS = ("blc", "bcl")


@dataclass(frozen=True)
class Unfold(Workload):
    """``y[b, t, (k, c)] = x[b, t·stride + k - padding, c]``, 0 outside the sequence.

    Shapes: x (batch, length, channels), or (batch, channels, length) with ``layout="bcl"`` → y (batch, steps,
    kernel·channels), where ``steps = (length + 2·padding - kernel) // stride + 1``. A linear layer on y with weight
    (features, kernel·channels) is the convolution with weight (features, channels, kernel), its last two axes swapped;
    bias and activation are that layer's.
    """

    op: ClassVar[str] = "unfold"

    batch: int
    length: int
    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    layout: str = "blc"
    dtype: str = "float32"
    out_dtype: str = ""
    """Of y; ``""`` means ``dtype``."""

    def __post_init__(self) -> None:
        positive(
            self.op, batch=self.batch, length=self.length, channels=self.channels, kernel=self.kernel,
            stride=self.stride,
        )  # fmt: skip
        one_of(self.op, "layout", self.layout, LAYOUTS)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        one_of(self.op, "out_dtype", self.out_dtype, ("", *FLOAT_DTYPES))
        require(self.padding >= 0, f"unfold: expected padding >= 0, got {self.padding}")
        require(
            self.length + 2 * self.padding >= self.kernel,
            f"unfold: expected length + 2·padding >= kernel ({self.kernel}), got {self.length} and {self.padding}",
        )

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> Unfold:
        """From a model's call: x, of rank 3."""
        (x,) = args
        require(len(x.shape) == 3, f"unfold: expected x of rank 3, got {x.shape}")
        layout = str(attrs.get("layout", "blc"))
        batch, length, channels = x.shape if layout == "blc" else (x.shape[0], x.shape[2], x.shape[1])
        return cls(
            batch, length, channels, kernel=int(attrs["kernel"]), stride=int(attrs["stride"]),
            padding=int(attrs["padding"]), layout=layout, dtype=x.dtype, out_dtype=str(attrs.get("out_dtype", "")),
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Windows of one sequence."""
        return (self.length + 2 * self.padding - self.kernel) // self.stride + 1

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X (batch, length, channels) or (batch, channels, length)."""
        inner = (self.length, self.channels) if self.layout == "blc" else (self.channels, self.length)
        return (TensorSpec("x", (self.batch, *inner), self.dtype),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (batch, steps, kernel·channels)."""
        return (
            TensorSpec("y", (self.batch, self.steps, self.kernel * self.channels), self.out_dtype or self.dtype),
        )  # fmt: skip

    def compute(self) -> list[Any]:
        """One elementwise stage ``y``."""
        from tvm import te, tirx

        x = te.placeholder(self.inputs()[0].shape, self.dtype, "x")
        zero = tirx.const(0.0, "float32")

        def element(b: Any, t: Any, j: Any) -> Any:
            at, c = t * self.stride + j // self.channels - self.padding, j % self.channels
            inside = tirx.And(at >= 0, at < self.length)
            at = te.max(te.min(at, self.length - 1), 0)
            value = x[b, at, c] if self.layout == "blc" else x[b, c, at]
            return tirx.Select(inside, value.astype("float32"), zero).astype(self.outputs()[0].dtype)

        return [x, te.compute(self.outputs()[0].shape, element, name="y")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        x = np.asarray(inputs[0], np.float64)
        if self.layout == "bcl":
            x = x.transpose(0, 2, 1)
        padded = np.pad(x, ((0, 0), (self.padding, self.padding), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.kernel, axis=1)[:, :: self.stride]
        return (np.ascontiguousarray(windows.transpose(0, 1, 3, 2)).reshape(self.outputs()[0].shape),)

    def tolerance(self) -> tuple[float, float]:
        """Of one rounding, to the dtype of y."""
        return TOLERANCES[self.outputs()[0].dtype]

    def flops(self) -> int:
        """One per element written, for the copy."""
        return self.batch * self.steps * self.kernel * self.channels
