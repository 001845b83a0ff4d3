"""Scaled dot-product attention: layouts, masks, position biases, per-sequence lengths; no separate transposes.

Sources: Vaswani et al., "Attention Is All You Need" (2017), section 3.2; grouped heads: Ainslie et al., "GQA" (2023);
linear biases: Press et al., "ALiBi" (2022); sliding window: Jiang et al., "Mistral 7B" (2023); capped scores: Gemma 2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import FLOAT_DTYPES, TensorSpec, Workload, one_of, positive, random_operand, require

#: Score of a key that may not be attended to; far below any real score, and far above the lowest float32.
MASKED = -1.0e30
#: Where the running maximum of a row starts: above MASKED, so that a wholly masked row sums to zero, not to its length.
FLOOR = -1.0e29

#: Fields that are left out of a key while they hold their default: records outlive the variants added after them.
_LEFT_OUT = frozenset(
    {"layout", "kv_layout", "window", "softcap", "alibi", "bias_q", "lengths", "ragged", "score_mod", "weights"}
)  # fmt: skip


@dataclass(frozen=True)
class Attention(Workload):
    """``softmax(scores, masked) · V``, where ``scores = cap(scale · Q Kᵀ) + bias + alibi``, then ``score_mod``.

    Operands, in order, with shapes by ``layout``:

    ==========  =============================================  ==========================================
    operand     ``"bshd"``                                     ``"bhsd"``
    ==========  =============================================  ==========================================
    qkv         (batch, q_len, (heads + 2·kv_heads)·head_dim)  not available
    query       (batch, q_len, heads·head_dim)                 (batch, heads, q_len, head_dim)
    key, value  (batch, kv_len, kv_heads·head_dim)             (batch, kv_heads, kv_len, head_dim)
    out         (batch, q_len, heads·head_dim)                 (batch, heads, q_len, head_dim)
    ==========  =============================================  ==========================================

    With ``kv_layout="bhsd"`` key and value have this layout whatever that of query and out: a cache, in which all keys
    of a head lie in one piece (:class:`attntune.ops.KVAppend`).

    qkv (``packed``: all query heads, then keys, then values) takes the place of query, key and value. Then, each only
    if the variant has it: mask (batch, kv_len) int64, nonzero where a key may be attended to; bias (bias_batch,
    bias_heads, bias_q, kv_len), -inf where a key may not be; slopes (heads,) float32 (``alibi``); lengths (batch,)
    int32; offsets (batch + 1,) int32 (``ragged``).

    Query i stands at position i + offset among the keys, where offset is ``causal_offset``, plus lengths[b] - q_len
    with ``lengths="kv"``: the queries are then the last ones of their sequence. Positions matter to ``causal`` (query i
    sees keys j <= i + offset), ``window`` (and only j > i + offset - window) and ``alibi`` (scores get
    slopes[h] · (j - i - offset)).

    ``lengths="kv"``: only the first lengths[b] keys exist, as in a cache that is being filled. ``lengths="qkv"``: also
    only the first lengths[b] queries, as in a batch padded at the right; what follows them in the result is zero.
    Neither is computed with. ``ragged``: no padding at all; ``batch`` sequences lie one after another in q_len rows, of
    which sequence b has rows offsets[b] up to offsets[b + 1]; operands have no batch axis: query (q_len,
    heads·head_dim), and so on. Rows past offsets[batch] give zeros.

    A query that may see no key gives zeros. ``weights`` adds a second result, the softmax (batch, heads, q_len, kv_len)
    in float32.
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
    layout: str = "bshd"
    """``"bshd"``, or ``"bhsd"``: what PyTorch's scaled_dot_product_attention takes."""
    kv_layout: str = ""
    """Of key and value; ``""`` means ``layout``."""
    window: int = 0
    """How many keys a query sees, itself included; 0 means all up to it. With ``causal``."""
    softcap: float = 0.0
    """Scaled scores become cap · tanh(score / cap); 0 means no cap."""
    alibi: bool = False
    bias_q: int = 0
    """0 means ``q_len``; 1: the same bias for every query."""
    lengths: str = ""
    """``""``, ``"kv"`` or ``"qkv"``."""
    ragged: bool = False
    score_mod: str = ""
    """``module:function`` called with (score, b, h, i, j), natural-log units, giving the score to use before masking;
    i and j count from the start of the sequence.

    The function is called with scalar TE expressions; and with NumPy arrays, for the reference, unless it has an
    attribute ``reference``, which is then called instead."""
    weights: bool = False

    def __post_init__(self) -> None:
        if self.kv_heads == 0:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.bias_heads and self.bias_q == self.q_len:
            object.__setattr__(self, "bias_q", 0)
        if self.kv_layout == self.layout:
            object.__setattr__(self, "kv_layout", "")
        positive(
            self.op, batch=self.batch, heads=self.heads, kv_heads=self.kv_heads,
            q_len=self.q_len, kv_len=self.kv_len, head_dim=self.head_dim,
        )  # fmt: skip
        one_of(self.op, "dtype", self.dtype, FLOAT_DTYPES)
        one_of(self.op, "layout", self.layout, ("bshd", "bhsd"))
        one_of(self.op, "kv_layout", self.kv_layout, ("", "bhsd"))
        one_of(self.op, "lengths", self.lengths, ("", "kv", "qkv"))
        one_of(self.op, "bias_batch", self.bias_batch, (0, 1, self.batch))
        one_of(self.op, "bias_heads", self.bias_heads, (0, 1, self.heads))
        one_of(self.op, "bias_q", self.bias_q, (0, 1) if self.bias_heads else (0,))
        require(
            self.heads % self.kv_heads == 0,
            f"attention: expected heads ({self.heads}) to be a multiple of kv_heads ({self.kv_heads})",
        )
        require(
            (self.bias_batch == 0) == (self.bias_heads == 0),
            "attention: expected bias_batch and bias_heads to be both zero or both set",
        )
        for name, fused in (("packed", self.packed), ("ragged", self.ragged), ('lengths="qkv"', self.lengths == "qkv")):
            require(
                not fused or self.q_len == self.kv_len,
                f"attention: expected {name} to have q_len == kv_len, got {self.q_len} and {self.kv_len}",
            )
        for name, fused in (("packed", self.packed), ("ragged", self.ragged)):
            heads_apart = self.heads_apart("query") or self.heads_apart("key")
            require(not fused or not heads_apart, f"attention: expected {name} to have layout 'bshd' for all operands")
        clashes = {
            "mask": self.mask, "bias": bool(self.bias_heads), "lengths": bool(self.lengths), "weights": self.weights,
            "causal_offset": bool(self.causal_offset),
        }  # fmt: skip
        require(
            not (self.ragged and any(clashes.values())),
            f"attention: expected ragged without {', '.join(n for n, on in clashes.items() if on)}",
        )
        require(
            self.window >= 0 and (self.window == 0 or self.causal),
            f"attention: expected window to be 0, or positive and with causal; got {self.window}",
        )
        require(
            math.isfinite(self.softcap) and self.softcap >= 0.0,
            f"attention: expected softcap to be 0 or a positive number, got {self.softcap}",
        )
        require(
            not self.score_mod or len(self.score_mod.split(":")) == 2,
            f"attention: expected score_mod as 'module:function', got {self.score_mod!r}",
        )

    def key(self) -> str:
        """As every workload's; variants added later are named only where they are used."""
        kept = json.loads(super().key())
        defaults = {field.name: field.default for field in fields(self)}
        kept = {n: v for n, v in kept.items() if n not in _LEFT_OUT or v != defaults[n]}
        return json.dumps(kept, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_call(cls, attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> Attention:
        """From a model's call: the operands of the class, in its order, as ``attrs`` say which there are."""
        packed, ragged = bool(attrs["packed"]), bool(attrs.get("ragged", False))
        heads, kv_heads, head_dim = attrs["heads"], attrs["kv_heads"], attrs["head_dim"]
        layout = attrs.get("layout", "bshd")
        first = args[0]
        kv_layout = attrs.get("kv_layout", "") or layout
        seq_axis, kv_axis = (2 if kind == "bhsd" else 0 if ragged else 1 for kind in (layout, kv_layout))
        width = head_dim if layout == "bhsd" else (heads + 2 * kv_heads if packed else heads) * head_dim
        require(first.shape[-1] == width, f"attention: expected a last axis of {width}, got {first.shape}")
        at = 1 if packed else 3
        at += bool(attrs.get("mask"))
        bias = args[at].shape if attrs.get("bias") else (0, 0, 0)
        return cls(
            batch=args[-1].shape[0] - 1 if ragged else first.shape[0], heads=heads, kv_heads=kv_heads,
            q_len=first.shape[seq_axis], kv_len=args[0 if packed else 1].shape[kv_axis], head_dim=head_dim,
            packed=packed, causal=bool(attrs.get("causal", False)), causal_offset=attrs.get("causal_offset", 0),
            mask=bool(attrs.get("mask", False)), bias_batch=bias[0], bias_heads=bias[1], bias_q=bias[2],
            scale=attrs.get("scale"), dtype=first.dtype, layout=layout, kv_layout=kv_layout,
            window=attrs.get("window", 0), softcap=attrs.get("softcap", 0.0), alibi=bool(attrs.get("alibi", False)),
            lengths=attrs.get("lengths", ""), ragged=ragged, score_mod=attrs.get("score_mod", ""),
            weights=bool(attrs.get("weights", False)),
        )  # fmt: skip

    @property
    def resident(self) -> tuple[str, ...]:
        """Keys and values of a cache, or of what few queries attend to again and again."""
        few = not self.packed and 4 * self.q_len < self.kv_len
        return ("key", "value") if few or self.lengths == "kv" else ()

    def heads_apart(self, name: str) -> bool:
        """Whether the operand ``query``, ``key``, ``value`` or ``out`` has an axis of heads, before that of rows."""
        return (self.kv_layout if name in ("key", "value") and self.kv_layout else self.layout) == "bhsd"

    @property
    def scaling(self) -> float:
        """What scores are multiplied by."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    def modification(self) -> Callable[..., Any]:
        """The function that ``score_mod`` names."""
        from importlib import import_module

        module, name = self.score_mod.split(":")
        try:
            function = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            require(False, f"attention: expected score_mod to name a function, got {self.score_mod!r} ({error})")
        require(callable(function), f"attention: expected score_mod to name a function, got {function!r}")
        return function  # type: ignore[no-any-return]

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Qkv, or query, key and value; then mask, bias, slopes, lengths and offsets where the variant has them."""
        if self.packed:
            width = (self.heads + 2 * self.kv_heads) * self.head_dim
            specs = [TensorSpec("qkv", self._rows(self.q_len, width), self.dtype)]
        else:
            specs = [
                TensorSpec(name, self._shape(name, heads, length), self.dtype)
                for name, heads, length in (
                    ("query", self.heads, self.q_len),
                    ("key", self.kv_heads, self.kv_len),
                    ("value", self.kv_heads, self.kv_len),
                )
            ]
        if self.mask:
            specs.append(TensorSpec("mask", (self.batch, self.kv_len), "int64"))
        if self.bias_heads:
            shape = (self.bias_batch, self.bias_heads, self.bias_q or self.q_len, self.kv_len)
            specs.append(TensorSpec("bias", shape, self.dtype))
        if self.alibi:
            specs.append(TensorSpec("slopes", (self.heads,), "float32"))
        if self.lengths:
            specs.append(TensorSpec("lengths", (self.batch,), "int32"))
        if self.ragged:
            specs.append(TensorSpec("offsets", (self.batch + 1,), "int32"))
        return tuple(specs)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Out, shaped as query is; then the attention weights if they are asked for."""
        out = TensorSpec("out", self._shape("out", self.heads, self.q_len), self.dtype)
        if not self.weights:
            return (out,)
        return out, TensorSpec("weights", (self.batch, self.heads, self.q_len, self.kv_len), "float32")

    def _shape(self, name: str, heads: int, length: int) -> tuple[int, ...]:
        if self.heads_apart(name):
            return (self.batch, heads, length, self.head_dim)
        return self._rows(length, heads * self.head_dim)

    def _rows(self, length: int, width: int) -> tuple[int, ...]:
        return (length, width) if self.ragged else (self.batch, length, width)

    def compute(self) -> list[Any]:
        """Three stages and the reductions between them: scores, softmax, weighted sum."""
        from attntune.ops.attention_expression import expression

        return expression(self)

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy."""
        from attntune.ops.attention_reference import reference

        return reference(self, *inputs)

    def reference_sample(self, *inputs: np.ndarray) -> Iterator[tuple[tuple[Any, ...], tuple[np.ndarray, ...]]]:
        """Of long sequences, some queries of every head."""
        from attntune.ops.attention_reference import sample

        return sample(self, *inputs)

    def tolerance(self) -> tuple[float, float]:
        """In bfloat16 and float16, weights are rounded before they meet the values.

        In bfloat16 each is off by at most a relative 2^-9 and, divided by their own sum, moves the result by at most
        1.1 · 2^-8 · Σ_j w_j |v_j - out|; values of normal operands lie within 4 of the result. Float16 has three bits
        more.
        """
        rtol, atol = super().tolerance()
        return rtol, {"bfloat16": 4.0 * 1.1 * 2.0**-8, "float16": 4.0 * 1.1 * 2.0**-11}.get(self.dtype, atol)

    def flops(self) -> int:
        """Two matrix products over the (query, key) pairs that may attend; the softmax is not counted.

        Where lengths are operands, those of :meth:`example_inputs` count.
        """
        return 4 * self.heads * self.head_dim * sum(self._pairs(q, kv) for q, kv in self._sequences())

    def _sequences(self) -> list[tuple[int, int]]:
        """Queries and keys of each sequence in the examples."""
        if self.ragged:
            offsets = self._example_offsets()
            return [(int(b - a), int(b - a)) for a, b in pairwise(offsets)]
        lengths = self._example_lengths() if self.lengths else [self.kv_len] * self.batch
        return [(int(n) if self.lengths == "qkv" else self.q_len, int(n)) for n in lengths]

    def _pairs(self, queries: int, keys: int) -> int:
        if not self.causal:
            return queries * keys
        offset = self.causal_offset + (keys - self.q_len if self.lengths == "kv" else 0)
        at = np.arange(queries) + offset
        first = np.maximum(at + 1 - self.window, 0) if self.window else np.zeros_like(at)
        return int(np.maximum(np.minimum(at + 1, keys) - first, 0).sum())

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Normal operands; masks with a padded tail, a hole, and (from batch 3 on) one wholly masked row.

        A bias has keys at -inf. Lengths go from full (a batch of one: seven eighths) down to half, and to none in the
        last sequence of three or more.
        """
        rng = np.random.default_rng(seed)
        made = {
            "mask": self._example_mask, "lengths": self._example_lengths, "offsets": self._example_offsets,
            "slopes": self._example_slopes,
        }  # fmt: skip
        values = []
        for spec in self.inputs():
            value = made[spec.name]() if spec.name in made else random_operand(rng, spec)
            if spec.name == "bias" and self.kv_len > 3:
                value[..., 3] = -np.inf
            values.append(value)
        return tuple(values)

    def _example_mask(self) -> np.ndarray:
        mask = np.ones((self.batch, self.kv_len), np.int64)
        for row in range(self.batch):
            mask[row, self.kv_len - (row * self.kv_len) // (self.batch + 1) :] = 0
        if self.kv_len > 4:
            mask[0, self.kv_len // 2] = 0
        if self.batch > 2:
            mask[-1] = 0
        return mask

    def _example_lengths(self) -> np.ndarray:
        lengths = [self.kv_len - row * self.kv_len // (2 * self.batch) for row in range(self.batch)]
        if self.batch == 1:
            lengths[0] -= self.kv_len // 8
        if self.batch > 2:
            lengths[-1] = 0
        return np.array(lengths, np.int32)

    def _example_offsets(self) -> np.ndarray:
        """Sequences of growing length, the last rows but one in thirty-two in use, one sequence of three empty."""
        used = self.q_len - self.q_len // 32
        shares = np.arange(1, self.batch + 1, dtype=np.float64)
        if self.batch > 2:
            shares[1] = 0.0
        ends = np.round(np.cumsum(shares) / shares.sum() * used)
        return np.concatenate([[0], ends]).astype(np.int32)

    def _example_slopes(self) -> np.ndarray:
        """Geometric, from the paper: 2^(-8/heads), its square, and so on."""
        return np.exp2(-8.0 * np.arange(1, self.heads + 1) / self.heads).astype(np.float32)
