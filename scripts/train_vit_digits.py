"""Train a Vision Transformer on scikit-learn's 8×8 digits in PyTorch, and run it tuned.

    scripts/train_vit_digits -o vit-digits
    attntune run vit-digits.attn --inputs vit-digits/held_out.npz

Writes a Hugging Face style directory (config.json, model.safetensors, preprocessor_config.json, and held_out.npz: the
360 images that training never saw, with their labels in labels.npz) and DIRECTORY.attn, compiled from it. Prints the
accuracy of PyTorch and of attntune on the held-out images; fails if they predict differently.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

SIDE, PATCH, HIDDEN, LAYERS, HEADS, INNER, EPS = 8, 2, 64, 4, 4, 128, 1e-6
CLASSES = 10


class Block(nn.Module):
    """Parameters are named as in Hugging Face's ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(HIDDEN, EPS), nn.LayerNorm(HIDDEN, EPS)
        projections = {name: nn.Linear(HIDDEN, HIDDEN) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {
                "attention": nn.ModuleDict(projections),
                "output": nn.ModuleDict({"dense": nn.Linear(HIDDEN, HIDDEN)}),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(HIDDEN, INNER)})
        self.output = nn.ModuleDict({"dense": nn.Linear(INNER, HIDDEN)})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """X (batch, seq, hidden) → the same, and the attention weights (batch, heads, seq, seq)."""
        normed = self.layernorm_before(x)
        projections = self.attention["attention"]
        query, key, value = (
            projections[name](normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("query", "key", "value")
        )
        weights = (query @ key.transpose(-1, -2) / (HIDDEN // HEADS) ** 0.5).softmax(-1)
        context = (weights @ value).transpose(1, 2).flatten(2)
        x = x + self.attention["output"]["dense"](context)
        inner = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](inner), weights


class Vit(nn.Module):
    """Pixels (batch, 1, 8, 8) → logits (batch, 10), and the attention weights of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = nn.Module()
        self.vit.embeddings = nn.Module()
        self.vit.embeddings.cls_token = nn.Parameter(torch.randn(1, 1, HIDDEN) * 0.02)
        self.vit.embeddings.position_embeddings = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2 + 1, HIDDEN) * 0.5)
        self.vit.embeddings.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(1, HIDDEN, PATCH, PATCH)})
        self.vit.encoder = nn.ModuleDict({"layer": nn.ModuleList([Block() for _ in range(LAYERS)])})
        self.vit.layernorm = nn.LayerNorm(HIDDEN, EPS)
        self.classifier = nn.Linear(HIDDEN, CLASSES)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits and weights."""
        embeddings = self.vit.embeddings
        patches = embeddings.patch_embeddings["projection"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([embeddings.cls_token.expand(len(pixels), -1, -1), patches], dim=1)
        x = x + embeddings.position_embeddings
        maps = []
        for block in self.vit.encoder["layer"]:
            x, weights = block(x)
            maps.append(weights)
        return self.classifier(self.vit.layernorm(x)[:, 0]), maps


@dataclass(frozen=True)
class Digits:
    """Pixels (images, 1, 8, 8) float32 in [-1, 1], labels (images,) int64."""

    pixels: np.ndarray
    labels: np.ndarray


def digits(seed: int = 0) -> tuple[Digits, Digits]:
    """Four fifths to train on and one fifth held out, each class in its share."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 1, SIDE, SIDE) / 8.0 - 1.0).astype(np.float32)
    split = train_test_split(pixels, labels.astype(np.int64), test_size=0.2, stratify=labels, random_state=seed)
    return Digits(split[0], split[2]), Digits(split[1], split[3])


def train(data: Digits, *, epochs: int, seed: int = 0) -> Vit:
    """AdamW with a warm-up and a cosine; half of the batches moved by at most one pixel in each direction."""
    torch.manual_seed(seed)
    model, batch = Vit(), 64
    pixels, labels = torch.from_numpy(data.pixels), torch.from_numpy(data.labels)
    steps = epochs * (len(pixels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.15)
    for _ in range(epochs):
        order = torch.randperm(len(pixels))
        for start in range(0, len(pixels) - batch + 1, batch):
            rows = order[start : start + batch]
            images = pixels[rows]
            if torch.rand(()) < 0.5:
                down, right = torch.randint(0, 3, (2,)).tolist()
                images = F.pad(images, (1, 1, 1, 1), value=-1.0)[:, :, down : down + SIDE, right : right + SIDE]
            loss = F.cross_entropy(model(images)[0], labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def save(model: Vit, held_out: Digits, directory: Path) -> None:
    """As Hugging Face's ``ViTForImageClassification`` is saved, and the held-out images."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER, "hidden_act": "gelu",
        "layer_norm_eps": EPS, "image_size": SIDE, "patch_size": PATCH, "num_channels": 1, "qkv_bias": True,
        "id2label": {str(digit): str(digit) for digit in range(CLASSES)},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # Digits have levels 0 to 16.
    preprocessing = {"rescale_factor": 1 / 16, "image_mean": [0.5], "image_std": [0.5],
                     "size": {"height": SIDE, "width": SIDE}}  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
              directory / "model.safetensors")  # fmt: skip
    np.savez(directory / "held_out.npz", pixel_values=held_out.pixels)
    np.savez(directory / "labels.npz", labels=held_out.labels)


def predict(model: Vit, pixels: np.ndarray) -> np.ndarray:
    """Logits (images, 10)."""
    with torch.inference_mode():
        return model(torch.from_numpy(pixels))[0].numpy()


def main() -> int:
    """Train, save, compile, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("vit-digits"), help="directory to write")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; the result depends on it in its last bits")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data, held_out = digits(options.seed)
    start = time.monotonic()
    model = train(data, epochs=options.epochs, seed=options.seed)
    save(model, held_out, options.output)
    logits = predict(model, held_out.pixels)
    print(f"PyTorch: {accuracy(logits, held_out):.2%} of {len(held_out.labels)} held-out digits, "
          f"trained in {time.monotonic() - start:.0f} s")  # fmt: skip

    import attntune

    loaded = attntune.models.from_pretrained(options.output)
    path = attntune.compile(loaded).save(options.output.with_name(options.output.name + ".attn"))
    tuned = attntune.load(path)(pixel_values=held_out.pixels)
    print(f"attntune: {accuracy(tuned, held_out):.2%}, logits within {np.abs(tuned - logits).max():.1e}; wrote {path}")
    return 0 if (tuned.argmax(1) == logits.argmax(1)).all() else 1


def accuracy(logits: np.ndarray, data: Digits) -> float:
    """Share of images whose largest logit is their label's."""
    return float((logits.argmax(1) == data.labels).mean())


if __name__ == "__main__":
    sys.exit(main())
