"""Layers of decoder-only models: grouped-query self-attention with and without a cache, feed-forward, both together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm.relax.frontend import nn

from attntune.models import layers
from attntune.models import operators as op
from attntune.models.layers import Linear

if TYPE_CHECKING:
    from attntune.models.decoder import DecoderConfig


def norm(c: DecoderConfig) -> Any:
    """The normalisation that ``c`` names."""
    return layers.norm(c.norm, c.hidden_size, c.eps)


class Angles(nn.Module):  # type: ignore[misc]
    """Cosines and sines (positions, head_dim/2) of a rotary embedding, shared by all layers."""

    def __init__(self, positions: int, head_dim: int) -> None:
        super().__init__()
        self.cos = nn.Parameter((positions, head_dim // 2), "float32")
        self.sin = nn.Parameter((positions, head_dim // 2), "float32")


class HeadNorm(nn.Module):  # type: ignore[misc]
    """Normalisation of each head of queries and keys; weight (heads + kv_heads, head_dim)."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.sizes: dict[str, Any] = {"heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim}
        self.weight = nn.Parameter((c.heads + c.kv_heads, c.head_dim), "float32")
        self.eps = c.eps

    def forward(self, qkv: Any) -> Any:
        """Qkv (batch, seq, (heads + 2·kv_heads)·head_dim) → the same shape."""
        return op.head_norm(qkv, self.weight, **self.sizes, eps=self.eps)


class CausalSelfAttention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention, causal; queries, keys and values come from one product, the residual joins the last."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.sizes: dict[str, Any] = {"heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim}
        self.style = c.rope
        self.seen: dict[str, Any] = {"causal": True, "window": c.window}
        width = c.heads * c.head_dim
        self.qkv = Linear(c.hidden_size, width + 2 * c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.norm = HeadNorm(c) if c.head_norm else None
        self.output = Linear(width, c.hidden_size, bias=c.output_bias)

    def _projected(self, x: Any) -> Any:
        qkv = self.qkv(x)
        return qkv if self.norm is None else self.norm(qkv)

    def _rotated(self, x: Any, rope: Angles | None) -> Any:
        qkv = self._projected(x)
        return qkv if rope is None else op.rope(qkv, rope.cos, rope.sin, **self.sizes, style=self.style)

    def forward(self, x: Any, rope: Angles | None, residual: Any) -> Any:
        """X and residual (batch, seq, hidden) → (batch, seq, hidden)."""
        return self.output(op.attention(self._rotated(x, rope), **self.sizes, **self.seen), residual)

    def attend(self, x: Any, rope: Angles | None, residual: Any) -> tuple[Any, Any]:
        """As :meth:`forward`, with the weights (batch, heads, seq, seq)."""
        context, weights = op.attention(self._rotated(x, rope), **self.sizes, **self.seen, weights=True)
        return self.output(context, residual), weights

    def cached(self, x: Any, rope: Angles | None, lengths: Any, keys: Any, values: Any, residual: Any) -> Any:
        """The last seq tokens of sequences that are ``lengths`` (batch,) long, over caches that gain them.

        X and residual (batch, seq, hidden), keys and values (batch, kv_heads, context, head_dim) → as x.
        """
        angles = () if rope is None else (rope.cos, rope.sin)
        query, keys, values = op.kv_append(
            self._projected(x), lengths, keys, values, *angles, **self.sizes, style=self.style
        )  # fmt: skip
        context = op.attention(query, keys, values, **self.sizes, **self.seen, lengths=lengths)
        return self.output(context, residual)


class PreNormFeedForward(nn.Module):  # type: ignore[misc]
    """Up, activation (gated or not, one kernel), down; the residual joins the last."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.up = Linear(
            c.hidden_size, c.inner, activation=c.activation, bias=c.feed_forward_bias, gated=c.gated
        )  # fmt: skip
        self.down = Linear(c.inner, c.hidden_size, bias=c.feed_forward_bias)

    def forward(self, x: Any, residual: Any) -> Any:
        """X and residual (…, hidden) → (…, hidden)."""
        return self.down(self.up(x), residual)


class PreNormLayer(nn.Module):  # type: ignore[misc]
    """Decoder layer with its normalisations before attention and feed-forward (Radford et al., "GPT-2", 2019)."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = norm(c)
        self.attention = CausalSelfAttention(c)
        self.feed_forward_norm = norm(c)
        self.feed_forward = PreNormFeedForward(c)

    def forward(self, x: Any, rope: Angles | None) -> Any:
        """X (batch, seq, hidden) → the same shape."""
        return self._second_half(self.attention(self.attention_norm(x), rope, x))

    def attend(self, x: Any, rope: Angles | None) -> tuple[Any, Any]:
        """As :meth:`forward`, with the attention weights."""
        x, weights = self.attention.attend(self.attention_norm(x), rope, x)
        return self._second_half(x), weights

    def cached(self, x: Any, rope: Angles | None, lengths: Any, keys: Any, values: Any) -> Any:
        """As :meth:`forward`, over a cache; see :meth:`CausalSelfAttention.cached`."""
        return self._second_half(self.attention.cached(self.attention_norm(x), rope, lengths, keys, values, x))

    def _second_half(self, x: Any) -> Any:
        return self.feed_forward(self.feed_forward_norm(x), x)
