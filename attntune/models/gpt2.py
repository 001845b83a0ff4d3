"""GPT-2 (Radford et al., 2019): learned positions, layer normalisation before each half of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attntune.models.config import choose, require_fields, require_fixed, require_sizes, unsupported
from attntune.models.decoder import DecoderConfig
from attntune.models.tensors import Checkpoint

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
#: Buffers of the causal mask, in old checkpoints.
_IGNORED = (".attn.bias", ".attn.masked_bias")
#: Fields whose only supported value is the default.
_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}

PRESETS: dict[str, DecoderConfig] = {
    "gpt2": DecoderConfig(
        50257, 768, 12, 12, 12, 64, 3072, 1024, "layer", 1e-5, "gelu_tanh", False,
        qkv_bias=True, output_bias=True, feed_forward_bias=True,
    )
}  # fmt: skip


def config_from_json(fields: Mapping[str, Any]) -> DecoderConfig:
    """Check a Hugging Face ``config.json`` and take what is needed of it.

    Raises:
        ModelError: naming the field that is missing or asks for something unsupported.
    """
    require_fields(
        fields, "gpt2", "vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "activation_function",
        "layer_norm_epsilon",
    )  # fmt: skip
    require_fixed(fields, _FIXED)
    require_sizes(fields, "vocab_size", "n_embd", "n_layer", "n_head", "n_positions")
    if fields.get("n_inner") is not None:
        require_sizes(fields, "n_inner")
    hidden, heads = fields["n_embd"], fields["n_head"]
    if hidden % heads:
        raise unsupported("n_head", heads, f"a divisor of n_embd {hidden}")
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=hidden,
        num_layers=fields["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        inner=fields.get("n_inner") or 4 * hidden,
        positions=fields["n_positions"],
        norm="layer",
        eps=float(fields["layer_norm_epsilon"]),
        activation=choose(fields, "activation_function", _ACTIVATIONS),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        feed_forward_bias=True,
    )


def rename(config: DecoderConfig, tensors: Mapping[str, np.ndarray], *, tied: bool) -> dict[str, np.ndarray]:
    """Hugging Face tensors under attntune's names; theirs are laid out (in_features, out_features).

    Raises:
        ModelError: naming every tensor that is missing, unknown or of the wrong shape.
    """
    found = Checkpoint(tensors)
    at = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""
    c, h = config, config.hidden_size
    weights = {
        "embedding.table": found.take(f"{at}wte.weight", c.vocab_size, h),
        "embedding.position": found.take(f"{at}wpe.weight", c.positions, h),
    }

    def norm(theirs: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            weights[f"{ours}.{kind}"] = found.take(f"{theirs}.{kind}", h)

    for index in range(c.num_layers):
        theirs, ours = f"{at}h.{index}.", f"layers.{index}."
        norm(f"{theirs}ln_1", f"{ours}attention_norm")
        norm(f"{theirs}ln_2", f"{ours}feed_forward_norm")
        for source, target, rows, columns in (
            ("attn.c_attn", "attention.qkv", h, 3 * h),
            ("attn.c_proj", "attention.output", h, h),
            ("mlp.c_fc", "feed_forward.up", h, c.inner),
            ("mlp.c_proj", "feed_forward.down", c.inner, h),
        ):
            matrix = found.take(f"{theirs}{source}.weight", rows, columns)
            weights[f"{ours}{target}.weight"] = np.ascontiguousarray(matrix.T)
            weights[f"{ours}{target}.bias"] = found.take(f"{theirs}{source}.bias", columns)
    norm(f"{at}ln_f", "norm")
    if tied:
        weights["head.weight"] = weights["embedding.table"]
    else:
        weights["head.weight"] = found.take("lm_head.weight", c.vocab_size, h)
    found.check(ignored=(*_IGNORED, *(("lm_head.weight",) if tied else ())))
    return weights
