"""Position embeddings added to rows that are no tokens, such as a spectrogram's after its convolutions.

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, require


@dataclass(frozen=True)
class AddPositions(Workload):
    """``y[b, i] = x[b, i] + position[i]``.

    Shapes: x (batch, seq, features), position (positions, features) constant, positions >= seq → y, shaped as x is.
    """

    op: ClassVar[str] = "add_positions"

    batch: int
    seq: int
    features: int
    positions: int = 0
    """0 means ``seq``."""
    dtype: str = "float32"
    out_dtype: str = ""
    """Of y; ``""`` means ``dtype``."""

    def __post_init__(self) -> None:
        if self.positions == 0:
            object.__setattr__(self, "positions", self.seq)
        positive(self.op, batch=self.batch, seq=self.seq, features=self.features, positions=self.positions)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        one_of(self.op, "out_dtype", self.out_dtype, ("", *FLOAT_DTYPES))
        require(
            self.positions >= self.seq,
            f"add_positions: expected at least seq ({self.seq}) positions, got {self.positions}",
        )

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> AddPositions:
        """From a model's call: x, position."""
        x, position = args
        require(
            len(x.shape) == 3 and position.shape[1:] == x.shape[2:],
            f"add_positions: expected position (positions, features) for x {x.shape}, got {position.shape}",
        )
        batch, seq, features = x.shape
        return cls(
            batch, seq, features, positions=position.shape[0], dtype=x.dtype,
            out_dtype=str(attrs.get("out_dtype", "")),
        )  # fmt: skip

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X, position."""
        return (
            TensorSpec("x", (self.batch, self.seq, self.features), self.dtype),
            TensorSpec("position", (self.positions, self.features), self.dtype, constant=True),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (batch, seq, features)."""
        return (TensorSpec("y", (self.batch, self.seq, self.features), self.out_dtype or self.dtype),)

    def compute(self) -> list[Any]:
        """One elementwise stage ``y``."""
        from tvm import te

        x, position = (te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs())

        def element(b: Any, i: Any, j: Any) -> Any:
            value = x[b, i, j].astype("float32") + position[i, j].astype("float32")
            return value.astype(self.outputs()[0].dtype)

        return [x, position, te.compute(self.outputs()[0].shape, element, name="y")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        x, position = (np.asarray(array, np.float64) for array in inputs)
        return (x + position[: self.seq],)

    def flops(self) -> int:
        """One per element."""
        return self.batch * self.seq * self.features
