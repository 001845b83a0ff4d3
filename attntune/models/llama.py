"""Llama decoders (Touvron et al., 2023; Llama 3) and those built like them: Mistral, Phi-3, Qwen2, Qwen3, SmolLM2.

Rotary positions, grouped-query attention, RMS normalisation, gated feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attntune.models import rope_scaling
from attntune.models.config import choose, require_fields, require_fixed, require_sizes, unsupported
from attntune.models.decoder import DecoderConfig
from attntune.models.tensors import Checkpoint

#: ``model_type`` → whether the projections of queries, keys and values have biases when the config does not say.
FAMILIES = {"llama": False, "mistral": False, "phi3": False, "qwen2": True, "qwen3": False}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
#: Families of which every layer has the config's ``sliding_window``.
_WINDOWED = ("mistral", "phi3")
#: Families whose files have one weight for queries, keys and values, and one for gate and up.
FUSED = ("phi3",)
#: Fields whose only supported value is the default.
_FIXED = {"use_sliding_window": False, "pretraining_tp": 1, "partial_rotary_factor": 1.0}
#: Buffers that old checkpoints carry.
_IGNORED = ("rotary_emb.inv_freq",)

PRESETS: dict[str, DecoderConfig] = {
    "smollm2-135m": DecoderConfig(
        49152, 576, 30, 9, 3, 64, 1536, 8192, "rms", 1e-5, "silu", True, rope="half", rope_theta=100000.0
    )
}


def config_from_json(fields: Mapping[str, Any]) -> DecoderConfig:
    """Check a Hugging Face ``config.json`` and take what is needed of it.

    Raises:
        ModelError: naming the field that is missing or asks for something unsupported.
    """
    family = str(fields["model_type"])
    require_fields(
        fields, family,
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings", "hidden_act", "rms_norm_eps",
    )  # fmt: skip
    require_sizes(
        fields, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings",
    )  # fmt: skip
    scaling = fields.get("rope_scaling") or {}
    rope = {**(fields.get("rope_parameters") or {}), **scaling}
    window = fields.get("sliding_window") if family in _WINDOWED else None
    if window is not None and (not isinstance(window, int) or window < 1):
        raise unsupported("sliding_window", window, "a positive number of tokens, or null")
    require_fixed(fields, _FIXED)
    require_fixed(rope, {"partial_rotary_factor": 1.0})
    if others := set(fields.get("layer_types") or ()) - {"full_attention"}:
        raise unsupported("layer_types", sorted(others), "full_attention")
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or hidden // heads
    if not fields.get("head_dim") and hidden % heads:
        raise unsupported("num_attention_heads", heads, f"a divisor of hidden_size {hidden}")
    kv_heads = fields.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise unsupported("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    bias = bool(fields.get("attention_bias", FAMILIES[family]))
    theta = float(rope.get("rope_theta", fields.get("rope_theta", 10000.0)))
    scaled = rope_scaling.from_config(rope, head_dim, theta, fields["max_position_embeddings"])
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=hidden,
        num_layers=fields["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=fields["intermediate_size"],
        positions=fields["max_position_embeddings"],
        norm="rms",
        eps=float(fields["rms_norm_eps"]),
        activation=choose(fields, "hidden_act", _ACTIVATIONS),
        gated=True,
        rope="half",
        rope_theta=theta,
        rope_factors=scaled.factors,
        rope_magnitude=scaled.magnitude,
        window=window if window and window < fields["max_position_embeddings"] else 0,
        head_norm=family == "qwen3",
        qkv_bias=bias,
        output_bias=bias and family != "qwen2",
        feed_forward_bias=bool(fields.get("mlp_bias", False)),
    )


def rename(
    config: DecoderConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    tied: bool,
    fused: bool = False,
    source: str = "config.json",
    spelled: Callable[[str], str] = lambda name: name,
) -> dict[str, np.ndarray]:
    """Hugging Face tensors under attntune's names; queries, keys and values become one weight, gate and up another.

    Args:
        config: what their shapes follow from.
        tensors: by the names of the file.
        tied: whether the vocabulary projection is the embedding's table.
        fused: whether the file is of one of :data:`FUSED`.
        source: of ``config``, for error messages.
        spelled: from Hugging Face's name of a tensor to the file's, where the file is another's.

    Raises:
        ModelError: naming every tensor that is missing, unknown or of the wrong shape.
    """
    found = Checkpoint(tensors, source, spelled)
    c, h = config, config.hidden_size
    widths = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
    weights = {"embedding.table": found.take("model.embed_tokens.weight", c.vocab_size, h)}
    for index in range(c.num_layers):
        theirs, ours = f"model.layers.{index}.", f"layers.{index}."

        def joined(target: str, names: list[str], rows: list[int], columns: int, bias: bool, at: str) -> None:
            parts = [found.take(f"{at}{n}.weight", r, columns) for n, r in zip(names, rows, strict=True)]
            weights[f"{target}.weight"] = np.concatenate(parts) if len(parts) > 1 else parts[0]
            if bias:
                vectors = [found.take(f"{at}{n}.bias", r) for n, r in zip(names, rows, strict=True)]
                weights[f"{target}.bias"] = np.concatenate(vectors)

        attention, attention_rows = [f"self_attn.{part}_proj" for part in "qkv"], list(widths)
        gated, gated_rows = ["mlp.gate_proj", "mlp.up_proj"], [c.inner] * 2
        if fused:
            attention, attention_rows = ["self_attn.qkv_proj"], [sum(widths)]
            gated, gated_rows = ["mlp.gate_up_proj"], [2 * c.inner]
        joined(f"{ours}attention.qkv", attention, attention_rows, h, c.qkv_bias, theirs)
        if c.head_norm:
            normed = [
                np.broadcast_to(found.take(f"{theirs}self_attn.{part}_norm.weight", c.head_dim), (count, c.head_dim))
                for part, count in (("q", c.heads), ("k", c.kv_heads))
            ]
            weights[f"{ours}attention.norm.weight"] = np.concatenate(normed)
        joined(f"{ours}attention.output", ["self_attn.o_proj"], [h], widths[0], c.output_bias, theirs)
        joined(f"{ours}feed_forward.up", gated, gated_rows, h, c.feed_forward_bias, theirs)
        joined(f"{ours}feed_forward.down", ["mlp.down_proj"], [h], c.inner, c.feed_forward_bias, theirs)
        weights[f"{ours}attention_norm.weight"] = found.take(f"{theirs}input_layernorm.weight", h)
        weights[f"{ours}feed_forward_norm.weight"] = found.take(f"{theirs}post_attention_layernorm.weight", h)
    weights["norm.weight"] = found.take("model.norm.weight", h)
    if tied:
        weights["head.weight"] = weights["embedding.table"]
    else:
        weights["head.weight"] = found.take("lm_head.weight", c.vocab_size, h)
    found.check(ignored=(*_IGNORED, *(("lm_head.weight",) if tied else ())))
    return weights


def is_tied(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether the vocabulary projection is the embedding's table."""
    return bool(fields.get("tie_word_embeddings", False)) or (
        "tie_word_embeddings" not in fields and "lm_head.weight" not in tensors
    )
