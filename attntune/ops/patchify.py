"""Images cut into square patches, each a row: what a patch embedding multiplies by its weight.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020), equation 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import FLOAT_DTYPES, TOLERANCES, TensorSpec, Workload, one_of, positive, require


@dataclass(frozen=True)
class Patchify(Workload):
    """``y[b, (r, s), (c, i, j)] = x[b, c, r·patch + i, s·patch + j]``: patches row by row, of each its channels.

    Shapes: x (batch, channels, height, width) → y (batch, patches, channels·patch²), the order in which a convolution
    weight (features, channels, patch, patch) lies: a linear layer on y is that convolution with stride ``patch``.
    """

    op: ClassVar[str] = "patchify"

    batch: int
    channels: int
    height: int
    width: int
    patch: int
    dtype: str = "float32"
    out_dtype: str = ""
    """Of y; ``""`` means ``dtype``."""

    def __post_init__(self) -> None:
        positive(
            self.op, batch=self.batch, channels=self.channels, height=self.height, width=self.width, patch=self.patch
        )
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        one_of(self.op, "out_dtype", self.out_dtype, ("", *FLOAT_DTYPES))
        require(
            self.height % self.patch == 0 and self.width % self.patch == 0,
            f"patchify: expected height and width to be multiples of patch ({self.patch}), "
            f"got {self.height} and {self.width}",
        )

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> Patchify:
        """From a model's call: x (batch, channels, height, width)."""
        (x,) = args
        require(len(x.shape) == 4, f"patchify: expected x (batch, channels, height, width), got {x.shape}")
        batch, channels, height, width = x.shape
        return cls(
            batch, channels, height, width, int(attrs["patch"]), x.dtype, str(attrs.get("out_dtype", ""))
        )  # fmt: skip

    @property
    def across(self) -> int:
        """Patches in a row of the image."""
        return self.width // self.patch

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.height // self.patch * self.across

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X (batch, channels, height, width)."""
        return (TensorSpec("x", (self.batch, self.channels, self.height, self.width), self.dtype),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (batch, patches, channels·patch²)."""
        shape = (self.batch, self.patches, self.channels * self.patch**2)
        return (TensorSpec("y", shape, self.out_dtype or self.dtype),)

    def compute(self) -> list[Any]:
        """One elementwise stage ``y``."""
        from tvm import te

        x = te.placeholder(self.inputs()[0].shape, self.dtype, "x")
        area, patch = self.patch**2, self.patch

        def element(b: Any, p: Any, k: Any) -> Any:
            row = p // self.across * patch + k % area // patch
            column = p % self.across * patch + k % patch
            return x[b, k // area, row, column].astype("float32").astype(self.outputs()[0].dtype)

        return [x, te.compute(self.outputs()[0].shape, element, name="y")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        x = np.asarray(inputs[0], np.float64)
        down, across = self.height // self.patch, self.across
        cut = x.reshape(self.batch, self.channels, down, self.patch, across, self.patch)
        return (cut.transpose(0, 2, 4, 1, 3, 5).reshape(self.outputs()[0].shape),)

    def tolerance(self) -> tuple[float, float]:
        """Of one rounding, to the dtype of y."""
        return TOLERANCES[self.outputs()[0].dtype]

    def flops(self) -> int:
        """One per element, for the copy."""
        return self.batch * self.channels * self.height * self.width
