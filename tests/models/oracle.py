"""BERT written out in PyTorch from the Hugging Face tensors, independent of attntune's model code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def bert(directory: Path, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
    """Last hidden state (batch, seq, hidden) in float32."""
    return bert_attention(directory, ids, mask, types)[0]


def bert_attention(
    directory: Path, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same, and every layer's attention weights (batch, heads, seq, seq)."""
    config = json.loads((directory / "config.json").read_text())
    w = load_file(directory / "model.safetensors")
    hidden, heads, eps = config["hidden_size"], config["num_attention_heads"], config["layer_norm_eps"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (hidden,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    i, m = torch.from_numpy(ids), torch.from_numpy(mask)
    batch, seq = i.shape
    kinds = torch.zeros_like(i) if types is None else torch.from_numpy(types)
    x = w["embeddings.word_embeddings.weight"][i] + w["embeddings.position_embeddings.weight"][:seq]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][kinds], "embeddings.LayerNorm")
    allowed = (m != 0)[:, None, None, :]
    maps = []
    with torch.inference_mode():
        for index in range(config["num_hidden_layers"]):
            layer = f"encoder.layer.{index}."
            q, k, v = (
                dense(x, f"{layer}attention.self.{part}").view(batch, seq, heads, -1).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
            maps.append(scores.softmax(-1).numpy())
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).reshape(batch, seq, -1)
            x = norm(dense(context, f"{layer}attention.output.dense") + x, f"{layer}attention.output.LayerNorm")
            inner = F.gelu(dense(x, f"{layer}intermediate.dense"))
            x = norm(dense(inner, f"{layer}output.dense") + x, f"{layer}output.LayerNorm")
    return x.numpy(), maps


def tokens(batch: int, seq: int, vocab: int, *, ragged: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Seeded ids and mask (batch, seq); ragged rows lose an uneven tail."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (batch, seq))
    mask = np.ones((batch, seq), np.int64)
    if ragged:
        for row, length in enumerate(rng.integers(1, seq + 1, batch)):
            mask[row, length:] = 0
    return ids, mask
