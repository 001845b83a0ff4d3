"""Small seeded checkpoints in Hugging Face's layout, written to a directory."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

LLAMA = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 500.0, "tie_word_embeddings": False, "eos_token_id": [3, 5],
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 89, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 40,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "eos_token_id": 88,
}  # fmt: skip
MARIAN = {
    "model_type": "marian", "architectures": ["MarianMTModel"], "vocab_size": 67, "decoder_vocab_size": 67,
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "max_position_embeddings": 72,
    "activation_function": "swish", "scale_embedding": True, "static_position_embeddings": True,
    "normalize_before": False, "share_encoder_decoder_embeddings": True, "is_encoder_decoder": True,
    "pad_token_id": 66, "decoder_start_token_id": 66, "eos_token_id": 0, "bad_words_ids": [[66]],
    "renormalize_logits": True,
}  # fmt: skip
T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 67, "d_model": 48, "d_kv": 10,
    "d_ff": 80, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 6, "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6, "layer_norm_epsilon": 1e-6,
    "n_positions": 72, "tie_word_embeddings": True, "is_encoder_decoder": True, "pad_token_id": 0,
    "decoder_start_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
T5_11 = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def write(folder, config, tensors):
    """config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def _random(shapes, seed):
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            values /= np.sqrt(max(shape) if "wte" in name or "embed" in name else shape[0]) / 1.5
        else:
            values = values * 0.2 + (1.0 if "ln_" in name or "norm" in name else 0.0)
        tensors[name] = values.astype(np.float32)
    return tensors


def llama_tensors(config, seed=0):
    """Every tensor of a Llama-like checkpoint, float32."""
    h, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim", h // config["num_attention_heads"])
    width, kv = (head_dim * config[name] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"model.embed_tokens.weight": (vocab, h), "model.norm.weight": (h,)}
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}."
        for name, rows, columns in (
            ("self_attn.q_proj", width, h), ("self_attn.k_proj", kv, h), ("self_attn.v_proj", kv, h),
            ("self_attn.o_proj", h, width), ("mlp.gate_proj", inner, h), ("mlp.up_proj", inner, h),
            ("mlp.down_proj", h, inner),
        ):  # fmt: skip
            shapes[f"{at}{name}.weight"] = (rows, columns)
            if config["model_type"] == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{at}{name}.bias"] = (rows,)
        if config["model_type"] == "qwen3":
            shapes[f"{at}self_attn.q_norm.weight"] = shapes[f"{at}self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (h,)
    if config["model_type"] == "phi3":
        for index in range(config["num_hidden_layers"]):
            at = f"model.layers.{index}."
            for target, parts in (("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                                  ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"))):  # fmt: skip
                shapes[f"{at}{target}.weight"] = (sum(shapes.pop(f"{at}{part}.weight")[0] for part in parts), h)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, h)
    return _random(shapes, seed)


def gpt2_tensors(config, seed=0):
    """Every tensor of a GPT-2 checkpoint, float32."""
    h = config["n_embd"]
    shapes = {"transformer.wte.weight": (config["vocab_size"], h), "transformer.wpe.weight": (config["n_positions"], h)}
    pairs = {"transformer.ln_f": None}
    for index in range(config["n_layer"]):
        at = f"transformer.h.{index}."
        pairs |= {f"{at}ln_1": None, f"{at}ln_2": None}
        pairs |= {
            f"{at}attn.c_attn": (h, 3 * h), f"{at}attn.c_proj": (h, h), f"{at}mlp.c_fc": (h, 4 * h),
            f"{at}mlp.c_proj": (4 * h, h),
        }  # fmt: skip
    for name, shape in pairs.items():
        shapes[f"{name}.weight"] = shape or (h,)
        shapes[f"{name}.bias"] = ((shape or (h,))[-1],)
    return _random(shapes, seed)


def marian_tensors(config, seed=0):
    """Every tensor of a Marian checkpoint as it is saved, float32: what is tied is there once, positions are not."""
    h, inner = config["d_model"], config["encoder_ffn_dim"]
    shapes = {}
    if config["share_encoder_decoder_embeddings"]:
        shapes["model.shared.weight"] = (config["vocab_size"], h)
    else:
        shapes["model.encoder.embed_tokens.weight"] = (config["vocab_size"], h)
        shapes["model.decoder.embed_tokens.weight"] = (config["decoder_vocab_size"], h)
    for side, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        for index in range(config[f"{side}_layers"]):
            at = f"model.{side}.layers.{index}."
            linears = {f"{a}.{part}_proj": (h, h) for a in attentions for part in ("q", "k", "v", "out")}
            linears |= {"fc1": (inner, h), "fc2": (h, inner)}
            norms = (*(f"{a}_layer_norm" for a in attentions), "final_layer_norm")
            for name, shape in (*linears.items(), *((name, (h,)) for name in norms)):
                shapes[f"{at}{name}.weight"], shapes[f"{at}{name}.bias"] = shape, shape[:1]
    tensors = _random(shapes, seed)
    # A text is not to end soon.
    bias = np.random.default_rng(seed).standard_normal((1, config["decoder_vocab_size"])).astype(np.float32)
    bias[0, config["eos_token_id"]] = -2.0
    return {**tensors, "final_logits_bias": bias}


def t5_tensors(config, seed=0):
    """Every tensor of a T5 checkpoint as it is saved, float32: what is tied is there once."""
    h, inner, width = config["d_model"], config["d_ff"], config["num_heads"] * config["d_kv"]
    gated = config["feed_forward_proj"].startswith("gated")
    shapes = {"shared.weight": (config["vocab_size"], h)}
    for side, count in (("encoder", config["num_layers"]), ("decoder", config["num_decoder_layers"])):
        attentions = ("SelfAttention", "EncDecAttention")[: 1 + (side == "decoder")]
        for index in range(count):
            at = f"{side}.block.{index}.layer."
            for layer, attention in enumerate(attentions):
                for part in "qkv":
                    shapes[f"{at}{layer}.{attention}.{part}.weight"] = (width, h)
                shapes[f"{at}{layer}.{attention}.o.weight"] = (h, width)
            for part in ("wi_0", "wi_1") if gated else ("wi",):
                shapes[f"{at}{len(attentions)}.DenseReluDense.{part}.weight"] = (inner, h)
            shapes[f"{at}{len(attentions)}.DenseReluDense.wo.weight"] = (h, inner)
            for layer in range(len(attentions) + 1):
                shapes[f"{at}{layer}.layer_norm.weight"] = (h,)
        shapes[f"{side}.final_layer_norm.weight"] = (h,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], h)
    tensors = _random(shapes, seed)
    for name in tensors:
        # Scores are not divided by a root, and grow to some tens.
        if name.endswith("Attention.q.weight"):
            tensors[name] *= np.float32(np.sqrt(config["d_kv"]))
    rng = np.random.default_rng(seed + 1)
    for side in ("encoder", "decoder"):
        name = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shape = (config["relative_attention_num_buckets"], config["num_heads"])
        tensors[name] = rng.standard_normal(shape).astype(np.float32)
    return tensors
