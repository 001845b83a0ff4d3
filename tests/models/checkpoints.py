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
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocab, h), "model.norm.weight": (h,)}
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}."
        for name, rows, columns in (
            ("self_attn.q_proj", h, h), ("self_attn.k_proj", kv, h), ("self_attn.v_proj", kv, h),
            ("self_attn.o_proj", h, h), ("mlp.gate_proj", inner, h), ("mlp.up_proj", inner, h),
            ("mlp.down_proj", h, inner),
        ):  # fmt: skip
            shapes[f"{at}{name}.weight"] = (rows, columns)
            if config["model_type"] == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{at}{name}.bias"] = (rows,)
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (h,)
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
