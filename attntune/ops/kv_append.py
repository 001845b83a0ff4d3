"""New keys and values written into a cache in place, with the rotation of queries and keys on the way.

Sources: rotary embedding: Su et al., "RoFormer" (2021); caching of keys and values: Pope et al., "Efficiently Scaling
Transformer Inference" (2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.rope import STYLES, angle_specs, angles, rotated, rotated_reference
from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, random_operand, require


@dataclass(frozen=True)
class KVAppend(Workload):
    """``key_cache[b, :, p] = rotate(key[b, i])``, ``value_cache[b, :, p] = value[b, i]``, p = lengths[b] - q_len + i.

    Shapes: qkv (batch, q_len, (heads + 2·kv_heads)·head_dim), all query heads, then keys, then values; lengths (batch,)
    int32, the keys in the cache after this call; key_cache and value_cache (batch, kv_heads, context, head_dim),
    updated in place; with a ``style``, cos and sin (positions, head_dim/2) float32, constant → query (batch, q_len,
    heads·head_dim), and the caches. All keys of a head lie in one piece, for attention reads them head by head.

    With a ``style`` (see :class:`attntune.ops.rope.Rope`) queries and keys are rotated by the angles of p, which is
    clamped to the table. A row whose p is not in [0, context) is not written.
    """

    op: ClassVar[str] = "kv_append"

    batch: int
    q_len: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    style: str = ""
    positions: int = 0
    """Rows of cos and sin; 0 without a style."""
    dtype: str = "float32"

    def __post_init__(self) -> None:
        positive(
            self.op, batch=self.batch, q_len=self.q_len, context=self.context, heads=self.heads,
            kv_heads=self.kv_heads, head_dim=self.head_dim,
        )  # fmt: skip
        one_of(self.op, "style", self.style, ("", *STYLES))
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        require(
            bool(self.style) == (self.positions > 0),
            f"kv_append: expected positions with a style and none without, got {self.positions} and {self.style!r}",
        )
        require(
            not self.style or self.head_dim % 2 == 0, f"kv_append: expected an even head_dim, got {self.head_dim}"
        )  # fmt: skip

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> KVAppend:
        """From a model's call: qkv, lengths, key_cache, value_cache, then cos and sin where ``attrs`` name a style."""
        qkv, _, cache = args[:3]
        heads, kv_heads, head_dim, style = attrs["heads"], attrs["kv_heads"], attrs["head_dim"], attrs.get("style", "")
        width = (heads + 2 * kv_heads) * head_dim
        require(qkv.shape[-1] == width, f"kv_append: expected a last axis of {width}, got {qkv.shape}")
        require(len(cache.shape) == 4, f"kv_append: expected a cache (batch, kv_heads, context, head_dim), got {cache}")
        return cls(
            batch=qkv.shape[0], q_len=qkv.shape[1], context=cache.shape[2], heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, style=style, positions=args[4].shape[0] if style else 0, dtype=qkv.dtype,
        )  # fmt: skip

    @property
    def updated(self) -> tuple[str, ...]:
        """The caches."""
        return "key_cache", "value_cache"

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Qkv, lengths, key_cache, value_cache, then cos and sin where there is a style."""
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        return (
            TensorSpec("qkv", (self.batch, self.q_len, width), self.dtype),
            TensorSpec("lengths", (self.batch,), "int32"),
            *self._caches(),
            *(angle_specs(self.positions, self.head_dim) if self.style else ()),
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Query (batch, q_len, heads·head_dim), then the caches."""
        query = TensorSpec("query", (self.batch, self.q_len, self.heads * self.head_dim), self.dtype)
        return (query, *self._caches())

    def _caches(self) -> tuple[TensorSpec, TensorSpec]:
        shape = (self.batch, self.kv_heads, self.context, self.head_dim)
        return TensorSpec("key_cache", shape, self.dtype), TensorSpec("value_cache", shape, self.dtype)

    def compute(self) -> list[Any]:
        """Three elementwise stages; the caches come out as new tensors: what is in them, not where it is."""
        from tvm import te

        operand = {spec.name: te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs()}
        qkv, lengths = operand["qkv"], operand["lengths"]
        keys_at = self.heads * self.head_dim
        values_at = keys_at + self.kv_heads * self.head_dim

        def new(b: Any, i: Any, column: Any, rotates: bool) -> Any:
            if not (rotates and self.style):
                return qkv[b, i, column]
            at = te.max(te.min(lengths[b] - self.q_len + i, self.positions - 1), 0)
            value = rotated(
                lambda c: qkv[b, i, c].astype("float32"), operand["cos"], operand["sin"], at, column, self.head_dim,
                self.style,
            )  # fmt: skip
            return value.astype(self.dtype)

        def cached(old: Any, first: int, rotates: bool) -> Any:
            def element(b: Any, head: Any, c: Any, d: Any) -> Any:
                from tvm import tirx

                i = c - (lengths[b] - self.q_len)
                inside = tirx.And(i >= 0, i < self.q_len)
                row, column = te.max(te.min(i, self.q_len - 1), 0), first + head * self.head_dim + d
                return tirx.Select(inside, new(b, row, column, rotates), old[b, head, c, d])

            return te.compute(old.shape, element, name=old.op.name + "_updated")

        query = te.compute(
            self.outputs()[0].shape, lambda b, i, j: new(b, i, j, True), name="query"
        )  # fmt: skip
        return [
            *operand.values(),
            query,
            cached(operand["key_cache"], keys_at, True),
            cached(operand["value_cache"], values_at, False),
        ]

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy; the caches are new arrays."""
        operand = dict(zip((spec.name for spec in self.inputs()), inputs, strict=True))
        width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        qkv = np.asarray(operand["qkv"], np.float64)
        query, key, value = np.split(qkv, [width[0], width[0] + width[1]], axis=-1)
        at = operand["lengths"].astype(np.int64)[:, None] - self.q_len + np.arange(self.q_len)
        if self.style:
            angle = np.clip(at, 0, self.positions - 1)
            cos, sin = (np.asarray(operand[name], np.float64)[angle] for name in ("cos", "sin"))
            query = rotated_reference(query, cos, sin, self.head_dim, self.style)
            key = rotated_reference(key, cos, sin, self.head_dim, self.style)
        caches = []
        for name, new in (("key_cache", key), ("value_cache", value)):
            cache = np.array(operand[name], np.float64)
            b, i = np.nonzero((at >= 0) & (at < self.context))
            cache[b, :, at[b, i]] = new[b, i].reshape(-1, self.kv_heads, self.head_dim)
            caches.append(cache)
        return (np.ascontiguousarray(query), *caches)

    def flops(self) -> int:
        """Three per rotated element, at least one for each element moved."""
        rotated_columns = (self.heads + self.kv_heads) * self.head_dim
        columns = rotated_columns + self.kv_heads * self.head_dim
        return self.batch * self.q_len * (columns + (2 * rotated_columns if self.style else 0))

    def bytes_moved(self) -> int:
        """Qkv read once and written once; of the caches only the new rows move."""
        qkv, lengths = self.inputs()[:2]
        return 2 * qkv.bytes + lengths.bytes + (4 * self.batch * self.q_len * self.head_dim if self.style else 0)

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Lengths from full down; from batch 2 on the last sequence is new, and its first rows may not fit."""
        rng = np.random.default_rng(seed)
        values: list[np.ndarray] = []
        for spec in self.inputs():
            if spec.name == "lengths":
                lengths = np.array([max(self.context - 2 * b, 1) for b in range(self.batch)], np.int32)
                if self.batch > 1:
                    lengths[-1] = self.q_len
                if self.batch > 2:
                    lengths[1] = self.context + self.q_len // 2
                values.append(lengths)
            elif spec.name in ("cos", "sin"):
                values.append(angles(self.positions, self.head_dim)[spec.name == "sin"])
            else:
                values.append(random_operand(rng, spec))
        return tuple(values)
