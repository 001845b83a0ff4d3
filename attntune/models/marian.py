"""Marian (Junczys-Dowmunt et al., 2018; OPUS-MT): translation models in Hugging Face directories.

Encoder-decoders of Vaswani et al. (2017) with sinusoidal positions, one table of embeddings for both languages or one
for each, and a bias of the vocabulary's logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attntune.models.bert import ACTIVATIONS
from attntune.models.config import choose, read_object, require_fixed
from attntune.models.encoder_decoder import EncoderDecoderConfig, build, sinusoids, usual_shapes
from attntune.models.huggingface import BART_NAMES, check_bart_sizes, generation, joined, renamed
from attntune.models.model import Model
from attntune.models.sentencepiece import marian_tokenizer
from attntune.models.tensors import Checkpoint

FAMILY = "marian"
_ACTIVATIONS = {**ACTIVATIONS, "swish": "silu"}
#: All but the first are what Marian can train and Hugging Face's model does not compute.
_FIXED = {
    "is_encoder_decoder": True, "static_position_embeddings": True, "normalize_before": False,
    "normalize_embedding": False, "add_final_layer_norm": False,
}  # fmt: skip
_SHARED, _SOURCE, _TARGET, _HEAD = (
    "model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight",
)  # fmt: skip


def load(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], directory: Path, name: str) -> Model:
    """Marian from ``config.json``, its tensors, and ``tokenizer.json`` or ``source.spm`` and ``vocab.json``.

    ``generation_config.json`` goes before ``config.json`` in what it says of generation. Without a tokenizer the model
    takes token ids.

    Args:
        fields: of ``config.json``.
        tensors: by the names of the file.
        directory: where the other files are looked for.
        name: of the model.

    Raises:
        ModelError: naming what is missing, unknown, mis-shaped or unsupported.
    """
    config = config_from_json(fields)
    settings = {**fields, **read_object(directory / "generation_config.json")}
    begins = generation(settings, FAMILY, config.positions)
    model = build(
        config, rename(config, fields, tensors), name, family=FAMILY, generation=begins,
        shapes=usual_shapes(config, sorted({1, 4, begins.beams})),
    )  # fmt: skip
    if not (directory / "tokenizer.json").is_file() and (directory / "source.spm").is_file():
        model.tokenizer = json.dumps(marian_tokenizer(directory), ensure_ascii=False)
    return model


def config_from_json(fields: Mapping[str, Any]) -> EncoderDecoderConfig:
    """Check and take what is needed of a Hugging Face ``config.json``.

    Raises:
        ModelError: naming the field that is missing or asks for something unsupported.
    """
    check_bart_sizes(fields, FAMILY, "max_position_embeddings")
    require_fixed(fields, _FIXED)
    hidden, heads = fields["d_model"], fields["encoder_attention_heads"]
    shared = _shared(fields)
    return EncoderDecoderConfig(
        vocab_size=fields["vocab_size"] if shared else fields.get("decoder_vocab_size") or fields["vocab_size"],
        source_vocab_size=fields["vocab_size"],
        hidden_size=hidden,
        heads=heads,
        encoder_layers=fields["encoder_layers"],
        decoder_layers=fields["decoder_layers"],
        inner=fields["encoder_ffn_dim"],
        source_positions=fields["max_position_embeddings"],
        positions=fields["max_position_embeddings"],
        activation=choose(fields, "activation_function", _ACTIVATIONS),
        embedding_scale=math.sqrt(hidden) if fields.get("scale_embedding") else 1.0,
        head_bias=True,
    )


def _shared(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("share_encoder_decoder_embeddings", True))


def rename(
    config: EncoderDecoderConfig, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Marian's tensors under attntune's names; what is tied is one array, wherever the file has it.

    Raises:
        ModelError: naming every tensor that is missing, unknown, or of the wrong shape.
    """
    checkpoint = Checkpoint(tensors)
    tied, shared = bool(fields.get("tie_word_embeddings", True)), _shared(fields)

    def table(rows: int, *names: str) -> np.ndarray:
        found = next((name for name in names if name in checkpoint), names[0])
        return checkpoint.take(found, rows, config.hidden_size)

    heads = (_HEAD,) if tied else ()
    target = table(config.vocab_size, *((_SHARED,) if shared else ()), _TARGET, *((_SOURCE,) if shared else ()), *heads)
    given = {
        "decoder.table": target,
        "encoder.table": target if shared else table(config.source_vocab_size, _SOURCE),
        "head.weight": target if tied else table(config.vocab_size, _HEAD),
        "head.bias": np.zeros(config.vocab_size, np.float32),
    }
    if "final_logits_bias" in checkpoint:
        given["head.bias"] = checkpoint.take("final_logits_bias", 1, config.vocab_size)[0]
    # Sine, then cosine, not in turns; files that were made with one have it, those that were saved again have none.
    positions = sinusoids(config.positions, config.hidden_size)
    positions = np.ascontiguousarray(np.concatenate([positions[:, 0::2], positions[:, 1::2]], axis=1))

    def take(theirs: str, *shape: int) -> np.ndarray:
        if theirs.endswith("embed_positions.weight") and f"model.{theirs}" not in checkpoint:
            return positions
        return checkpoint.take(f"model.{theirs}", *shape)

    weights = renamed(
        config, {**BART_NAMES, "head": "head.{end}"},
        lambda part, theirs, *shape: np.empty(0) if part in ("table", "head") else joined(take, theirs, *shape),
    )  # fmt: skip
    checkpoint.check(ignored=(_SHARED, _SOURCE, _TARGET, _HEAD) if tied else (_SHARED, _SOURCE, _TARGET))
    return {**weights, **given}
