"""Decoder-only models in plain PyTorch, from the tensors and configs of their checkpoints, by other formulas than ours.

Rotation is multiplication of complex numbers, heads are einsum axes, the cache does not exist.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def rotate(x, theta, interleaved):
    """x (batch, seq, heads, head_dim) turned by its position's angles."""
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2)) if interleaved else x.unflatten(-1, (2, half)).transpose(-1, -2)
    angle = torch.arange(x.shape[1])[:, None].double() / theta ** (torch.arange(half).double() / half)
    turned = torch.view_as_complex(pairs.double().contiguous()) * torch.polar(torch.ones_like(angle), angle)[:, None, :]
    pairs = torch.view_as_real(turned).to(x.dtype)
    return pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)


def attend(q, k, v):
    """Causal attention of q (batch, seq, heads, head_dim) over fewer key heads → (batch, seq, heads·head_dim)."""
    groups = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bqkgd,bskd->bkgqs", groups, k) / q.shape[-1] ** 0.5
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("bkgqs,bskd->bqkgd", weights, v).flatten(2), weights.flatten(1, 2)


@torch.inference_mode()
def llama_logits(t, ids, *, layers, heads, kv_heads, eps, theta, interleaved=False):
    """Logits (batch, seq, vocab) from tensors by Hugging Face's names; optional biases where they are there."""

    def linear(x, name):
        return F.linear(x, t[name + ".weight"], t.get(name + ".bias"))

    def norm(x, name):
        return t[name + ".weight"] * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()

    x = t["model.embed_tokens.weight"][ids]
    for index in range(layers):
        at = f"model.layers.{index}."
        y = norm(x, at + "input_layernorm")
        q, k, v = (
            linear(y, f"{at}self_attn.{name}_proj").unflatten(-1, (count, -1))
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        mixed, _ = attend(rotate(q, theta, interleaved), rotate(k, theta, interleaved), v)
        x = x + linear(mixed, at + "self_attn.o_proj")
        y = norm(x, at + "post_attention_layernorm")
        x = x + linear(F.silu(linear(y, at + "mlp.gate_proj")) * linear(y, at + "mlp.up_proj"), at + "mlp.down_proj")
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
