"""A learned token put before each sequence, and position embeddings added: the class token of BERT and ViT.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020), equation 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, require


@dataclass(frozen=True)
class PrependToken(Workload):
    """``y[b, 0] = token + position[0]``, ``y[b, 1 + i] = x[b, i] + position[1 + i]``.

    Shapes: x (batch, seq, features), constants token (features,) and position (1 + seq, features) →
    y (batch, 1 + seq, features).
    """

    op: ClassVar[str] = "prepend_token"

    batch: int
    seq: int
    features: int
    dtype: str = "float32"
    out_dtype: str = ""
    """Of y; ``""`` means ``dtype``."""

    def __post_init__(self) -> None:
        positive(self.op, batch=self.batch, seq=self.seq, features=self.features)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        one_of(self.op, "out_dtype", self.out_dtype, ("", *FLOAT_DTYPES))

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> PrependToken:
        """From a model's call: x, token, position."""
        x, token, position = args
        batch, seq, features = x.shape
        require(
            token.shape == (features,) and position.shape == (seq + 1, features),
            f"prepend_token: expected token ({features},) and position ({seq + 1}, {features}) for x {x.shape}, "
            f"got {token.shape} and {position.shape}",
        )
        return cls(batch, seq, features, dtype=x.dtype, out_dtype=str(attrs.get("out_dtype", "")))

    def inputs(self) -> tuple[TensorSpec, ...]:
        """X, token, position."""
        return (
            TensorSpec("x", (self.batch, self.seq, self.features), self.dtype),
            TensorSpec("token", (self.features,), self.dtype, constant=True),
            TensorSpec("position", (self.seq + 1, self.features), self.dtype, constant=True),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y (batch, 1 + seq, features)."""
        return (TensorSpec("y", (self.batch, self.seq + 1, self.features), self.out_dtype or self.dtype),)

    def compute(self) -> list[Any]:
        """One elementwise stage ``y``."""
        from tvm import te, tirx

        x, token, position = (te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs())

        def element(b: Any, i: Any, j: Any) -> Any:
            # if_then_else, not Select: row -1 of x is not to be read.
            value = tirx.if_then_else(i == 0, token[j], x[b, i - 1, j])
            return (value.astype("float32") + position[i, j].astype("float32")).astype(self.outputs()[0].dtype)

        return [x, token, position, te.compute(self.outputs()[0].shape, element, name="y")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        x, token, position = (np.asarray(value, np.float64) for value in inputs)
        first = np.broadcast_to(token, (self.batch, 1, self.features))
        return (np.concatenate([first, x], axis=1) + position,)

    def flops(self) -> int:
        """One addition per element."""
        return self.batch * (self.seq + 1) * self.features
