"""Decoder-only models in plain PyTorch, from the tensors and configs of their checkpoints, by other formulas than ours.

Rotation is multiplication of complex numbers, heads are einsum axes, the cache does not exist.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def rotate(x, theta, interleaved, scaled=lambda frequency: frequency, magnitude=1.0):
    """x (batch, seq, heads, head_dim) turned by its position's angles, which grow by ``scaled`` frequencies."""
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2)) if interleaved else x.unflatten(-1, (2, half)).transpose(-1, -2)
    growth = torch.tensor([scaled(theta ** (-pair / half)) for pair in range(half)], dtype=torch.float64)
    angle = torch.arange(x.shape[1])[:, None].double() * growth
    turned = (
        torch.view_as_complex(pairs.double().contiguous())
        * torch.polar(torch.full_like(angle, magnitude), angle)[:, None, :]
    )
    pairs = torch.view_as_real(turned).to(x.dtype)
    return pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)


def llama3_scaling(factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, **_):
    """How a frequency is scaled, by cases of its wavelength (Llama 3.1's own code)."""

    def scaled(frequency):
        wavelength = 2 * math.pi / frequency
        if wavelength < original_max_position_embeddings / high_freq_factor:
            return frequency
        if wavelength > original_max_position_embeddings / low_freq_factor:
            return frequency / factor
        smooth = original_max_position_embeddings / wavelength - low_freq_factor
        smooth /= high_freq_factor - low_freq_factor
        return (1 - smooth) * frequency / factor + smooth * frequency

    return scaled


def yarn_scaling(theta, half, factor, trained, fast, slow):
    """How a frequency is scaled by YaRN: by where its pair lies between those that turn ``fast`` and ``slow`` times."""

    def place(frequency):
        return -half * math.log(frequency) / math.log(theta)

    first, last = (place(times * 2 * math.pi / trained) for times in (fast, slow))
    first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * half - 1)

    def scaled(frequency):
        share = min(max((place(frequency) - first) / (last - first), 0.0), 1.0)
        return share * frequency / factor + (1 - share) * frequency

    return scaled


def attend(q, k, v, window=0):
    """Causal attention of q (batch, seq, heads, head_dim) over fewer key heads → (batch, seq, heads·head_dim)."""
    groups = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bqkgd,bskd->bkgqs", groups, k) / q.shape[-1] ** 0.5
    unseen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    if window:
        unseen |= torch.ones_like(unseen).tril(-window)
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    return torch.einsum("bkgqs,bskd->bqkgd", weights, v).flatten(2), weights.flatten(1, 2)


@torch.inference_mode()
def llama_logits(
    t, ids, *, layers, heads, kv_heads, eps, theta, interleaved=False, scaled=lambda frequency: frequency,
    magnitude=1.0, window=0,
):  # fmt: skip
    """Logits (batch, seq, vocab) from tensors by Hugging Face's names; optional biases where they are there."""

    def linear(x, name):
        return F.linear(x, t[name + ".weight"], t.get(name + ".bias"))

    def norm(x, name):
        return t[name + ".weight"] * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()

    x = t["model.embed_tokens.weight"][ids]
    for index in range(layers):
        at = f"model.layers.{index}."
        y = norm(x, at + "input_layernorm")
        counts = heads, kv_heads, kv_heads
        if f"{at}self_attn.qkv_proj.weight" in t:
            q, k, v = linear(y, f"{at}self_attn.qkv_proj").unflatten(-1, (sum(counts), -1)).split(counts, -2)
        else:
            q, k, v = (
                linear(y, f"{at}self_attn.{name}_proj").unflatten(-1, (count, -1))
                for name, count in zip("qkv", counts, strict=True)
            )
        if f"{at}self_attn.q_norm.weight" in t:
            q, k = norm(q, f"{at}self_attn.q_norm"), norm(k, f"{at}self_attn.k_norm")
        mixed, _ = attend(*(rotate(part, theta, interleaved, scaled, magnitude) for part in (q, k)), v, window)
        x = x + linear(mixed, at + "self_attn.o_proj")
        y = norm(x, at + "post_attention_layernorm")
        if f"{at}mlp.gate_up_proj.weight" in t:
            gate, up = linear(y, at + "mlp.gate_up_proj").chunk(2, -1)
        else:
            gate, up = linear(y, at + "mlp.gate_proj"), linear(y, at + "mlp.up_proj")
        x = x + linear(F.silu(gate) * up, at + "mlp.down_proj")
    head = t.get("lm_head.weight", t["model.embed_tokens.weight"])
    return F.linear(norm(x, "model.norm"), head)


@torch.inference_mode()
def gpt2_logits(t, ids, *, layers, heads, eps):
    """Logits (batch, seq, vocab) and the weights (batch, heads, seq, seq) of every layer."""

    def conv1d(x, name):
        return x @ t[name + ".weight"] + t[name + ".bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], t[name + ".weight"], t[name + ".bias"], eps)

    x = t["transformer.wte.weight"][ids] + t["transformer.wpe.weight"][: ids.shape[1]]
    maps = []
    for index in range(layers):
        at = f"transformer.h.{index}."
        q, k, v = (p.unflatten(-1, (heads, -1)) for p in conv1d(norm(x, at + "ln_1"), at + "attn.c_attn").chunk(3, -1))
        mixed, weights = attend(q, k, v)
        maps.append(weights)
        x = x + conv1d(mixed, at + "attn.c_proj")
        x = x + conv1d(F.gelu(conv1d(norm(x, at + "ln_2"), at + "mlp.c_fc"), approximate="tanh"), at + "mlp.c_proj")
    return F.linear(norm(x, "transformer.ln_f"), t["transformer.wte.weight"]), maps
