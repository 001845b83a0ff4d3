"""Layers of encoder-decoder models: cross-attention over keys and values computed once, decoder layers, conv stem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.relax.frontend import nn

from attntune.models import operators as op
from attntune.models.layers import PLAIN, FeedForward, Linear, SelfAttention, Variant, attention, norm


class CrossAttention(nn.Module):  # type: ignore[misc]
    """Multi-head attention of a decoder's rows over an encoder's; the residual is added by the last product."""

    def __init__(self, hidden: int, heads: int, variant: Variant = PLAIN) -> None:
        super().__init__()
        width = variant.width(hidden, heads)
        self.heads, self.head_dim, self.scale = heads, width // heads, variant.scale
        self.query = Linear(hidden, width, bias=variant.bias)
        self.key = Linear(hidden, width, bias=variant.bias)
        self.value = Linear(hidden, width, bias=variant.bias)
        self.output = Linear(width, hidden, bias=variant.bias)

    def keys_values(self, encoded: Any) -> tuple[Any, Any]:
        """Encoded (batch, source, hidden) → keys and values (batch, source, width), for every later call."""
        return self.key(encoded), self.value(encoded)

    def forward(
        self, x: Any, keys: Any, values: Any, lengths: Any | None, residual: Any, maps: list[Any] | None = None
    ) -> Any:
        """X and residual (batch, seq, hidden), keys and values (batch, source, width) → (batch, seq, hidden).

        ``lengths`` (batch,): source rows that exist; None: all. ``maps``: see :func:`attntune.models.layers.attention`.
        """
        context = attention(
            self.query(x), keys, values, heads=self.heads, head_dim=self.head_dim, lengths=lengths, maps=maps,
            scale=self.scale,
        )  # fmt: skip
        return self.output(context, residual)


class DecoderLayer(nn.Module):  # type: ignore[misc]
    """Decoder layer of Vaswani et al. (2017): masked self-attention, cross-attention, feed-forward, with residuals.

    ``norm_first``: normalisation before each residual's branch, else after each residual, as in the paper.
    """

    def __init__(
        self, hidden: int, heads: int, inner: int, activation: str, eps: float, *, norm_first: bool,
        variant: Variant = PLAIN,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm_first = norm_first
        self.attention = SelfAttention(hidden, heads, causal=True, variant=variant)
        self.attention_norm = norm(variant.norm, hidden, eps)
        self.cross_attention = CrossAttention(hidden, heads, variant)
        self.cross_attention_norm = norm(variant.norm, hidden, eps)
        self.feed_forward = FeedForward(hidden, inner, activation, variant=variant)
        self.feed_forward_norm = norm(variant.norm, hidden, eps)

    def forward(
        self,
        x: Any,
        cross: tuple[Any, Any],
        source_lengths: Any | None,
        cache: tuple[Any, Any, Any] | None = None,
        maps: tuple[list[Any], list[Any]] | None = None,
        bias: Any | None = None,
    ) -> Any:
        """X (batch, seq, hidden) → the same shape.

        Args:
            x: the decoder's rows.
            cross: keys and values (batch, source, width) from :meth:`CrossAttention.keys_values`.
            source_lengths: (batch,) rows of the source that exist; None: all.
            cache: lengths (batch,), keys and values (batch, heads, context, head_dim): x are then the last rows of
                sequences that are ``lengths`` long, and join the cache.
            maps: lists that self-attention's and cross-attention's weights join.
            bias: (1|batch, heads, seq, seq), with a cache (batch, heads, seq, context), of self-attention's scores.
        """
        own, over = maps or (None, None)

        def self_attention(y: Any, residual: Any) -> Any:
            if cache is None:
                return self.attention(y, None, residual, own, bias=bias)
            return self.attention.cached(y, *cache, residual, bias)

        def cross_attention(y: Any, residual: Any) -> Any:
            return self.cross_attention(y, *cross, source_lengths, residual, over)

        x = self._sublayer(x, self.attention_norm, self_attention)
        x = self._sublayer(x, self.cross_attention_norm, cross_attention)
        return self._sublayer(x, self.feed_forward_norm, self.feed_forward)

    def _sublayer(self, x: Any, normalise: Any, branch: Callable[[Any, Any], Any]) -> Any:
        return branch(normalise(x), x) if self.norm_first else normalise(branch(x, x))


class Convolution(nn.Module):  # type: ignore[misc]
    """One-dimensional convolution with its activation: windows of the sequence, then one product.

    Weight (features, kernel·channels), a window's steps before their channels; see :class:`attntune.ops.Unfold`.
    """

    def __init__(
        self, channels: int, features: int, kernel: int, activation: str, *, stride: int = 1, layout: str = "blc"
    ) -> None:  # fmt: skip
        super().__init__()
        self.window = {"kernel": kernel, "stride": stride, "padding": kernel // 2}
        self.layout = layout
        self.projection = Linear(kernel * channels, features, activation=activation)

    def forward(self, x: Any) -> Any:
        """X (batch, length, channels), with ``"bcl"`` (batch, channels, length) → (batch, steps, features)."""
        return self.projection(op.unfold(x, **self.window, layout=self.layout))
