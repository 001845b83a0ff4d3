"""Layers that models are made of, as ``tvm.relax.frontend.nn`` modules over attntune's operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.relax.frontend import nn

from attntune.models import operators as op


@dataclass(frozen=True)
class Variant:
    """Where the layers of a model differ from those of Vaswani et al. (2017)."""

    norm: str = "layer"
    """``"layer"`` or ``"rms"``."""
    bias: bool = True
    """Whether linear layers have one."""
    gated: bool = False
    """Of the feed-forward layers: activation(gate) · up, see :class:`Linear`."""
    head_dim: int = 0
    """0 means hidden/heads."""
    scale: float | None = None
    """What scores are multiplied by; None means 1/√head_dim."""

    def width(self, hidden: int, heads: int) -> int:
        """Features of all heads together."""
        return heads * (self.head_dim or hidden // heads)


PLAIN = Variant()


class Linear(nn.Module):  # type: ignore[misc]
    """Weight (out_features, in_features) and bias (out_features,); activation and residual run in the same kernel.

    ``gated``: weight and bias have 2·out_features rows, the gate's first; see :class:`attntune.ops.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: str = "",
        bias: bool = True,
        gated: bool = False,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        rows = out_features * (2 if gated else 1)
        self.weight = nn.Parameter((rows, in_features), dtype)
        self.bias = nn.Parameter((rows,), dtype) if bias else None
        self.activation, self.gated = activation, gated

    def forward(self, x: Any, residual: Any | None = None, *, squeeze: bool = False, lengths: Any | None = None) -> Any:
        """X (…, in_features), residual (…, out_features) → (…, out_features); ``squeeze`` drops axis 1, of extent 1.

        ``lengths`` (batch,), with x (batch, seq, in_features): rows past them are not computed but zero.
        """
        return op.linear(
            x, self.weight, self.bias, activation=self.activation, residual=residual, gated=self.gated,
            squeeze=squeeze, lengths=lengths,
        )  # fmt: skip


class LayerNorm(nn.Module):  # type: ignore[misc]
    """Weight and bias (features,)."""

    def __init__(self, features: int, eps: float, dtype: str = "float32") -> None:
        super().__init__()
        self.weight = nn.Parameter((features,), dtype)
        self.bias = nn.Parameter((features,), dtype)
        self.eps = eps

    def forward(self, x: Any, lengths: Any | None = None) -> Any:
        """X (…, features) → the same shape, zero past ``lengths`` (batch,) of (batch, seq, features)."""
        return op.layer_norm(x, self.weight, self.bias, eps=self.eps, lengths=lengths)


class RMSNorm(nn.Module):  # type: ignore[misc]
    """Weight (features,)."""

    def __init__(self, features: int, eps: float, dtype: str = "float32") -> None:
        super().__init__()
        self.weight = nn.Parameter((features,), dtype)
        self.eps = eps

    def forward(self, x: Any, lengths: Any | None = None) -> Any:
        """X (…, features) → the same shape; rows of zeros, as those past ``lengths`` are, stay zeros."""
        return op.rms_norm(x, self.weight, eps=self.eps)


def norm(kind: str, features: int, eps: float, dtype: str = "float32") -> Any:
    """The normalisation called ``"layer"`` or ``"rms"``."""
    return (RMSNorm if kind == "rms" else LayerNorm)(features, eps, dtype)


def attention(*operands: Any, maps: list[Any] | None = None, **options: Any) -> Any:
    """:func:`operators.attention`; its weights (batch, heads, q_len, kv_len) join ``maps`` if it is a list."""
    if maps is None:
        return op.attention(*operands, **options)
    context, weights = op.attention(*operands, weights=True, **options)
    maps.append(weights)
    return context


class SelfAttention(nn.Module):  # type: ignore[misc]
    """Multi-head self-attention; queries, keys and values come from one product, the residual is added by the last."""

    def __init__(
        self, hidden: int, heads: int, *, causal: bool = False, dtype: str = "float32", variant: Variant = PLAIN
    ) -> None:  # fmt: skip
        super().__init__()
        width = variant.width(hidden, heads)
        self.heads, self.head_dim, self.causal, self.scale = heads, width // heads, causal, variant.scale
        self.qkv = Linear(hidden, 3 * width, bias=variant.bias, dtype=dtype)
        self.output = Linear(width, hidden, bias=variant.bias, dtype=dtype)

    def forward(
        self,
        x: Any,
        mask: Any | None,
        residual: Any,
        maps: list[Any] | None = None,
        row: int | None = None,
        lengths: Any | None = None,
        bias: Any | None = None,
    ) -> Any:
        """X and residual (batch, seq, hidden), mask (batch, seq) → (batch, seq, hidden), or a ``row`` (batch, hidden).

        ``maps`` collects the attention weights, see :func:`attention`. ``lengths`` (batch,): rows past them are zeros.
        ``bias`` (1|batch, 1|heads, seq, seq) is added to scores.
        """
        context = attention(
            self.qkv(x, lengths=lengths), heads=self.heads, head_dim=self.head_dim, mask=mask, causal=self.causal,
            maps=maps, lengths=lengths, length_kind="qkv", bias=bias, scale=self.scale,
        )  # fmt: skip
        if row is not None:
            context, residual = op.select_rows(context, row), op.select_rows(residual, row)
            return self.output(context, residual)
        return self.output(context, residual, lengths=lengths)

    def cached(
        self, x: Any, lengths: Any, keys: Any, values: Any, residual: Any, bias: Any | None = None
    ) -> Any:  # fmt: skip
        """The last rows of sequences ``lengths`` (batch,) long; caches (batch, heads, context, head_dim) gain them.

        ``bias`` (batch, heads, seq, context) is added to scores.
        """
        heads, head_dim = self.heads, self.head_dim
        query, keys, values = op.kv_append(
            self.qkv(x), lengths, keys, values, heads=heads, kv_heads=heads, head_dim=head_dim
        )
        context = op.attention(
            query, keys, values, heads=heads, head_dim=head_dim, causal=True, lengths=lengths, bias=bias,
            scale=self.scale,
        )  # fmt: skip
        return self.output(context, residual)


class FeedForward(nn.Module):  # type: ignore[misc]
    """Two linear layers with an activation, gated or not, between; the residual is added by the second."""

    def __init__(
        self, hidden: int, inner: int, activation: str, dtype: str = "float32", variant: Variant = PLAIN
    ) -> None:  # fmt: skip
        super().__init__()
        self.up = Linear(hidden, inner, activation=activation, bias=variant.bias, gated=variant.gated, dtype=dtype)
        self.down = Linear(inner, hidden, bias=variant.bias, dtype=dtype)

    def forward(self, x: Any, residual: Any, lengths: Any | None = None) -> Any:
        """X and residual (…, hidden) → (…, hidden); ``lengths``: see :class:`Linear`."""
        return self.down(self.up(x, lengths=lengths), residual, lengths=lengths)


class PostNormEncoderLayer(nn.Module):  # type: ignore[misc]
    """Encoder layer of Vaswani et al. (2017): normalisation after each residual."""

    def __init__(
        self, hidden: int, heads: int, inner: int, activation: str, eps: float, dtype: str, variant: Variant = PLAIN
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention = SelfAttention(hidden, heads, dtype=dtype, variant=variant)
        self.attention_norm = norm(variant.norm, hidden, eps, dtype)
        self.feed_forward = FeedForward(hidden, inner, activation, dtype, variant)
        self.output_norm = norm(variant.norm, hidden, eps, dtype)

    def forward(
        self,
        x: Any,
        mask: Any | None = None,
        maps: list[Any] | None = None,
        lengths: Any | None = None,
        bias: Any | None = None,
    ) -> Any:
        """X (batch, seq, hidden), mask (batch, seq) or lengths (batch,) → (batch, seq, hidden).

        ``maps``: see :func:`attention`; ``bias``: see :class:`SelfAttention`.
        """
        x = self.attention_norm(self.attention(x, mask, x, maps, lengths=lengths, bias=bias))
        return self.output_norm(self.feed_forward(x, x, lengths), lengths)


class PreNormEncoderLayer(nn.Module):  # type: ignore[misc]
    """Encoder layer of Baevski and Auli (2018): normalisation before each residual's branch."""

    def __init__(
        self, hidden: int, heads: int, inner: int, activation: str, eps: float, dtype: str, variant: Variant = PLAIN
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention_norm = norm(variant.norm, hidden, eps, dtype)
        self.attention = SelfAttention(hidden, heads, dtype=dtype, variant=variant)
        self.feed_forward_norm = norm(variant.norm, hidden, eps, dtype)
        self.feed_forward = FeedForward(hidden, inner, activation, dtype, variant)

    def forward(
        self,
        x: Any,
        mask: Any | None = None,
        maps: list[Any] | None = None,
        row: int | None = None,
        lengths: Any | None = None,
        bias: Any | None = None,
    ) -> Any:
        """X (batch, seq, hidden), mask (batch, seq) or lengths (batch,) → (batch, seq, hidden), a row (batch, hidden).

        ``maps``: see :func:`attention`; ``bias``: see :class:`SelfAttention`.
        """
        x = self.attention(self.attention_norm(x), mask, x, maps, row, lengths, bias)
        return self.feed_forward(self.feed_forward_norm(x), x, lengths if row is None else None)


class PatchEmbedding(nn.Module):  # type: ignore[misc]
    """Input layer of Dosovitskiy et al. (2020): patches embedded, a class token before them, positions added."""

    def __init__(self, channels: int, patch: int, patches: int, hidden: int, dtype: str = "float32") -> None:
        super().__init__()
        self.patch = patch
        self.projection = Linear(channels * patch * patch, hidden, dtype=dtype)
        self.token = nn.Parameter((hidden,), dtype)
        self.position = nn.Parameter((patches + 1, hidden), dtype)

    def forward(self, images: Any) -> Any:
        """Images (batch, channels, height, width) → (batch, 1 + patches, hidden)."""
        return op.prepend_token(self.projection(op.patchify(images, patch=self.patch)), self.token, self.position)


class GRU(nn.Module):  # type: ignore[misc]
    """Gated recurrent units (Cho et al., 2014): the inputs' products for all positions at once, then the recurrence."""

    def __init__(self, features: int, hidden: int, *, reverse: bool = False, dtype: str = "float32") -> None:
        super().__init__()
        self.input = Linear(features, 3 * hidden, dtype=dtype)
        self.recurrent_weight = nn.Parameter((3 * hidden, hidden), dtype)
        self.recurrent_bias = nn.Parameter((3 * hidden,), dtype)
        self.reverse = reverse

    def forward(self, x: Any, state: Any | None = None, lengths: Any | None = None) -> tuple[Any, Any]:
        """X (batch, seq, features), state (batch, hidden) → outputs (batch, seq, hidden), last state."""
        return op.gru_sequence(
            self.input(x), self.recurrent_weight, self.recurrent_bias, state=state, lengths=lengths,
            reverse=self.reverse,
        )  # fmt: skip

    def step(self, x: Any, state: Any) -> Any:
        """X (batch, 1, features), state (batch, hidden) → the next state."""
        return op.gru_cell(self.input(x, squeeze=True), self.recurrent_weight, self.recurrent_bias, state)
