"""Vision Transformers (Dosovitskiy et al., 2020) that classify images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attntune.errors import ModelError
from attntune.models.bert import ACTIVATIONS
from attntune.models.model import Entry, InputSpec, Model


@dataclass(frozen=True)
class VitConfig:
    """Sizes of a vision Transformer; field names as in Hugging Face's ``config.json``."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    image_size: int
    patch_size: int
    num_channels: int
    num_labels: int
    qkv_bias: bool = True
    labels: tuple[str, ...] = ()
    """Names of the classes, where the checkpoint has them."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> VitConfig:
        """Check and take what is needed of a ``config.json``.

        Raises:
            ModelError: naming the field that is missing or asks for something unsupported.
        """
        fields = {"num_labels": len(fields.get("id2label") or (0, 1)), **fields}
        names = [name for name in cls.__dataclass_fields__ if name not in ("qkv_bias", "labels")]
        if missing := [name for name in names if name not in fields]:
            raise ModelError(f"config.json of a vit model lacks {missing}")
        for name in names:
            wanted = str if name == "hidden_act" else (int, float) if name == "layer_norm_eps" else int
            if not isinstance(fields[name], wanted):
                kind = "one integer" if wanted is int else "a number" if wanted is not str else "a name"
                raise ModelError(f"config.json: {name} {fields[name]!r} is not supported; expected {kind}")
        if fields["hidden_act"] not in ACTIVATIONS:
            raise ModelError(
                f"config.json: hidden_act {fields['hidden_act']!r} is not supported; "
                f"expected one of {sorted(ACTIVATIONS)}"
            )
        for whole, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if fields[whole] % fields[part]:
                raise ModelError(f"config.json: {whole} {fields[whole]} is not a multiple of {part} {fields[part]}")
        labels = fields.get("id2label") or {}
        return cls(
            **{name: fields[name] for name in names},
            qkv_bias=bool(fields.get("qkv_bias", True)),
            labels=tuple(str(labels.get(str(index), index)) for index in range(fields["num_labels"])) if labels else (),
        )

    @property
    def patches(self) -> int:
        """Patches of an image; the encoder sees one position more, the class token's."""
        return (self.image_size // self.patch_size) ** 2


def build(config: VitConfig, weights: Mapping[str, np.ndarray], name: str) -> Model:
    """A :class:`Model` of ``config`` with attntune's own weight names, as :func:`rename` gives them."""
    c = config
    pixels = InputSpec("pixel_values", ("batch", c.num_channels, c.image_size, c.image_size), "float32")
    logits = InputSpec("logits", ("batch", c.num_labels), "float32")
    positions = c.patches + 1
    maps = tuple(
        InputSpec(f"attention.{index}", ("batch", c.num_attention_heads, positions, positions), "float32")
        for index in range(c.num_hidden_layers)
    )
    return Model(
        name=name,
        family="vit",
        config={**c.__dict__},
        weights=dict(weights),
        entries={
            "forward": Entry((pixels,), (logits,)),
            "attend": Entry((pixels,), (logits, *maps), on_request=True),
        },
        make_module=lambda: _module(c),
        shapes=tuple({"batch": batch} for batch in (1, 2, 4, 8)),
    )


def _module(c: VitConfig) -> Any:
    from tvm.relax.frontend import nn

    from attntune.models import layers

    class Vit(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = layers.PatchEmbedding(c.num_channels, c.patch_size, c.patches, c.hidden_size)
            self.layers = nn.ModuleList(
                [
                    layers.PreNormEncoderLayer(
                        c.hidden_size,
                        c.num_attention_heads,
                        c.intermediate_size,
                        ACTIVATIONS[c.hidden_act],
                        c.layer_norm_eps,
                        "float32",
                    )
                    for _ in range(c.num_hidden_layers)
                ]
            )
            self.norm = layers.LayerNorm(c.hidden_size, c.layer_norm_eps)
            self.classifier = layers.Linear(c.hidden_size, c.num_labels)

        def forward(self, pixel_values: Any, maps: list[Any] | None = None) -> Any:
            x = self.embeddings(pixel_values)
            *encoder, last = self.layers
            for layer in encoder:
                x = layer(x, maps=maps)
            # The classifier reads the class token alone: past the last attention the other rows are not computed.
            return self.classifier(self.norm(last(x, maps=maps, row=0)))

        def attend(self, pixel_values: Any) -> Any:
            maps: list[Any] = []
            return (self.forward(pixel_values, maps), *maps)

    return Vit()


_LAYER_NAMES = {
    "attention.output.dense": "attention.output",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "layernorm_before": "attention_norm",
    "layernorm_after": "feed_forward_norm",
}


def rename(config: VitConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face tensors under attntune's names; query, key and value of a layer become one weight.

    Raises:
        ModelError: naming every tensor that is missing, unknown, or of the wrong shape.
    """
    c, h = config, config.hidden_size
    problems: list[str] = []
    taken: set[str] = set()

    def take(name: str, *shape: int) -> np.ndarray:
        taken.add(name)
        found = tensors.get(name)
        if found is None:
            problems.append(f"{name} is missing")
            return np.zeros(shape, np.float32)
        if found.shape != shape:
            problems.append(f"{name} has shape {found.shape}, expected {shape}")
        return np.ascontiguousarray(found, np.float32)

    patch = (c.num_channels, c.patch_size, c.patch_size)
    embeddings = "vit.embeddings."
    projection = f"{embeddings}patch_embeddings.projection."
    weights = {
        "embeddings.token": take(f"{embeddings}cls_token", 1, 1, h).reshape(-1),
        "embeddings.position": take(f"{embeddings}position_embeddings", 1, c.patches + 1, h).reshape(-1, h),
        "embeddings.projection.weight": take(f"{projection}weight", h, *patch).reshape(h, -1),
        "embeddings.projection.bias": take(f"{projection}bias", h),
        "norm.weight": take("vit.layernorm.weight", h),
        "norm.bias": take("vit.layernorm.bias", h),
        "classifier.weight": take("classifier.weight", c.num_labels, h),
        "classifier.bias": take("classifier.bias", c.num_labels),
    }
    matrices = {
        "attention.output": (h, h),
        "feed_forward.up": (c.intermediate_size, h),
        "feed_forward.down": (h, c.intermediate_size),
    }
    for index in range(c.num_hidden_layers):
        source, target = f"vit.encoder.layer.{index}.", f"layers.{index}."
        parts = [f"{source}attention.attention.{part}" for part in ("query", "key", "value")]
        weights[f"{target}attention.qkv.weight"] = np.concatenate([take(f"{part}.weight", h, h) for part in parts])
        weights[f"{target}attention.qkv.bias"] = (
            np.concatenate([take(f"{part}.bias", h) for part in parts]) if c.qkv_bias else np.zeros(3 * h, np.float32)
        )
        for theirs, ours in _LAYER_NAMES.items():
            shape = matrices.get(ours, (h,))
            weights[f"{target}{ours}.weight"] = take(f"{source}{theirs}.weight", *shape)
            weights[f"{target}{ours}.bias"] = take(f"{source}{theirs}.bias", shape[0])
    # A pooler is part of some checkpoints; classification does not use it.
    problems += [f"{name} is unknown" for name in sorted(set(tensors) - taken) if not name.startswith("vit.pooler.")]
    if problems:
        raise ModelError("weights do not fit config.json: " + "; ".join(problems[:8]) + ("; …" if problems[8:] else ""))
    return weights
