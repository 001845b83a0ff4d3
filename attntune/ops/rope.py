"""Rotary position embedding of the queries and keys of a packed projection.

Source: Su et al., "RoFormer" (2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, random_operand, require

STYLES = ("half", "interleaved")


@dataclass(frozen=True)
class Rope(Workload):
    """Queries and keys of position s rotated by its angles; values stay.

    Shapes: qkv (batch, seq, (heads + 2·kv_heads)·head_dim), all query heads, then keys, then values; cos and sin
    (positions, head_dim/2) float32, constant → y, shaped as qkv.

    A pair (a, b) becomes (a·cos - b·sin, b·cos + a·sin). ``style`` says which elements of a head make pair d:
    ``"half"``: d and d + head_dim/2 (Hugging Face); ``"interleaved"``: 2d and 2d + 1 (the paper, GGUF's llama).
    """

    op: ClassVar[str] = "rope"

    batch: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    style: str = "half"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        positive(
            self.op, batch=self.batch, seq=self.seq, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            positions=self.positions,
        )  # fmt: skip
        one_of(self.op, "style", self.style, STYLES)
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        require(self.head_dim % 2 == 0, f"rope: expected an even head_dim, got {self.head_dim}")
        require(self.seq <= self.positions, f"rope: expected seq <= positions ({self.positions}), got {self.seq}")

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> Rope:
        """From a model's call: qkv, cos, sin."""
        qkv, cos, _ = args
        width = (attrs["heads"] + 2 * attrs["kv_heads"]) * attrs["head_dim"]
        require(qkv.shape[-1] == width, f"rope: expected a last axis of {width}, got {qkv.shape}")
        return cls(
            batch=qkv.shape[0], seq=qkv.shape[1], heads=attrs["heads"], kv_heads=attrs["kv_heads"],
            head_dim=attrs["head_dim"], positions=cos.shape[0], style=attrs["style"], dtype=qkv.dtype,
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Of a row of qkv."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Qkv, cos, sin."""
        return (
            TensorSpec("qkv", (self.batch, self.seq, self.width), self.dtype),
            *angle_specs(self.positions, self.head_dim),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Y, shaped as qkv."""
        return (TensorSpec("y", (self.batch, self.seq, self.width), self.dtype),)

    def compute(self) -> list[Any]:
        """One elementwise stage ``y``."""
        from tvm import te, tirx

        qkv, cos, sin = (te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs())
        rotates = (self.heads + self.kv_heads) * self.head_dim

        def element(b: Any, s: Any, column: Any) -> Any:
            turned = rotated(lambda c: qkv[b, s, c].astype("float32"), cos, sin, s, column, self.head_dim, self.style)
            value = tirx.Select(column < rotates, turned, qkv[b, s, column].astype("float32"))
            return value.astype(self.dtype)

        return [qkv, cos, sin, te.compute(self.outputs()[0].shape, element, name="y")]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        qkv, cos, sin = (np.asarray(value, np.float64) for value in inputs)
        at = np.broadcast_to(np.arange(self.seq), (self.batch, self.seq))
        rotates = (self.heads + self.kv_heads) * self.head_dim
        turned = rotated_reference(qkv[..., :rotates], cos[at], sin[at], self.head_dim, self.style)
        return (np.concatenate([turned, qkv[..., rotates:]], axis=-1),)

    def flops(self) -> int:
        """Three per rotated element."""
        return 3 * self.batch * self.seq * (self.heads + self.kv_heads) * self.head_dim

    def bytes_moved(self) -> int:
        """Qkv read and written, and the angles of the positions in use."""
        qkv, cos, sin = self.inputs()
        return 2 * qkv.bytes + (cos.bytes + sin.bytes) * self.seq // self.positions

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Normal rows, and the angles of the paper."""
        return random_operand(np.random.default_rng(seed), self.inputs()[0]), *angles(self.positions, self.head_dim)


def angle_specs(positions: int, head_dim: int) -> tuple[TensorSpec, TensorSpec]:
    """Cos and sin (positions, head_dim/2), float32 at any precision."""
    shape = (positions, head_dim // 2)
    return TensorSpec("cos", shape, "float32", constant=True), TensorSpec("sin", shape, "float32", constant=True)


def frequencies(head_dim: int, theta: float = 10000.0) -> np.ndarray:
    """By what the angle of pair d grows from position to position, theta^(-2d/head_dim); (head_dim/2,) float64."""
    found: np.ndarray = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return found


def angles(
    positions: int, head_dim: int, theta: float = 10000.0, factors: Sequence[float] = (), magnitude: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """``magnitude`` times cos and sin (positions, head_dim/2) float32 of position · frequency.

    ``factors`` (head_dim/2,) divide frequencies.
    """
    growth = frequencies(head_dim, theta) / (np.asarray(factors, np.float64) if len(factors) else 1.0)
    angle = np.arange(positions, dtype=np.float64)[:, None] * growth
    return (magnitude * np.cos(angle)).astype(np.float32), (magnitude * np.sin(angle)).astype(np.float32)


def rotated(load: Any, cos: Any, sin: Any, position: Any, column: Any, head_dim: int, style: str) -> Any:
    """One rotated float32 element, as an expression; ``load(column)`` reads a row of heads."""
    from tvm import tirx

    half = head_dim // 2
    d = column % head_dim
    if style == "half":
        first, partner, pair = d < half, column + tirx.Select(d < half, half, -half), d % half
    else:
        first, partner, pair = d % 2 == 0, column + 1 - 2 * (d % 2), d // 2
    sine = sin[position, pair] * tirx.Select(first, tirx.const(-1.0, "float32"), tirx.const(1.0, "float32"))
    return load(column) * cos[position, pair] + load(partner) * sine


def rotated_reference(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, head_dim: int, style: str) -> np.ndarray:
    """X (batch, seq, n·head_dim) rotated by cos, sin (batch, seq, head_dim/2), all float64."""
    batch, seq, width = x.shape
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    if style == "half":
        pairs = x.reshape(batch, seq, width // head_dim, 2, head_dim // 2)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        axis = -2
    else:
        pairs = x.reshape(batch, seq, width // head_dim, head_dim // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        axis = -1
    return np.stack([a * cos - b * sin, b * cos + a * sin], axis=axis).reshape(x.shape)
