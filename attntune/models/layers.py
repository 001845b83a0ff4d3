"""Layers that models are made of, as ``tvm.relax.frontend.nn`` modules over attntune's operators."""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn

from attntune.models import operators as op


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

    def forward(self, x: Any, residual: Any | None = None, *, squeeze: bool = False) -> Any:
        """X (…, in_features), residual (…, out_features) → (…, out_features); ``squeeze`` drops axis 1, of extent 1."""
        return op.linear(
            x, self.weight, self.bias, activation=self.activation, residual=residual, gated=self.gated, squeeze=squeeze
        )


class LayerNorm(nn.Module):  # type: ignore[misc]
    """Weight and bias (features,)."""

    def __init__(self, features: int, eps: float, dtype: str = "float32") -> None:
        super().__init__()
        self.weight = nn.Parameter((features,), dtype)
        self.bias = nn.Parameter((features,), dtype)
        self.eps = eps

    def forward(self, x: Any) -> Any:
        """X (…, features) → the same shape."""
        return op.layer_norm(x, self.weight, self.bias, eps=self.eps)


class RMSNorm(nn.Module):  # type: ignore[misc]
    """Weight (features,)."""

    def __init__(self, features: int, eps: float, dtype: str = "float32") -> None:
        super().__init__()
        self.weight = nn.Parameter((features,), dtype)
        self.eps = eps

    def forward(self, x: Any) -> Any:
        """X (…, features) → the same shape."""
        return op.rms_norm(x, self.weight, eps=self.eps)


class SelfAttention(nn.Module):  # type: ignore[misc]
    """Multi-head self-attention; queries, keys and values come from one product, the residual is added by the last."""

    def __init__(self, hidden: int, heads: int, *, causal: bool = False, dtype: str = "float32") -> None:
        super().__init__()
        self.heads, self.head_dim, self.causal = heads, hidden // heads, causal
        self.qkv = Linear(hidden, 3 * hidden, dtype=dtype)
        self.output = Linear(hidden, hidden, dtype=dtype)

    def forward(self, x: Any, mask: Any, residual: Any) -> Any:
        """X and residual (batch, seq, hidden), mask (batch, seq) → (batch, seq, hidden)."""
        context = op.attention(
            self.qkv(x), heads=self.heads, head_dim=self.head_dim, mask=mask, causal=self.causal
        )  # fmt: skip
        return self.output(context, residual)


class FeedForward(nn.Module):  # type: ignore[misc]
    """Two linear layers with an activation between; the residual is added by the second."""

    def __init__(self, hidden: int, inner: int, activation: str, dtype: str = "float32") -> None:
        super().__init__()
        self.up = Linear(hidden, inner, activation=activation, dtype=dtype)
        self.down = Linear(inner, hidden, dtype=dtype)

    def forward(self, x: Any, residual: Any) -> Any:
        """X and residual (…, hidden) → (…, hidden)."""
        return self.down(self.up(x), residual)


class PostNormEncoderLayer(nn.Module):  # type: ignore[misc]
    """Encoder layer of Vaswani et al. (2017): normalisation after each residual."""

    def __init__(self, hidden: int, heads: int, inner: int, activation: str, eps: float, dtype: str) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden, heads, dtype=dtype)
        self.attention_norm = LayerNorm(hidden, eps, dtype)
        self.feed_forward = FeedForward(hidden, inner, activation, dtype)
        self.output_norm = LayerNorm(hidden, eps, dtype)

    def forward(self, x: Any, mask: Any) -> Any:
        """X (batch, seq, hidden), mask (batch, seq) → (batch, seq, hidden)."""
        x = self.attention_norm(self.attention(x, mask, x))
        return self.output_norm(self.feed_forward(x, x))
