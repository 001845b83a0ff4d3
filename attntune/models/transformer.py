"""The Transformer of Vaswani et al. (2017): the paper's sizes with seeded weights, and ANNalog's checkpoint.

ANNalog (Dai, 2025; package ``annalog``) writes analogues of a molecule: SMILES to SMILES, three layers on each side,
learned positions.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import ModelError
from attntune.models.checkpoints import read_plain_pickle, read_torch
from attntune.models.encoder_decoder import EncoderDecoderConfig, build, random_weights, usual_shapes
from attntune.models.model import Generation, Model
from attntune.models.tensors import Checkpoint


def _paper(hidden: int, heads: int, inner: int) -> EncoderDecoderConfig:
    return EncoderDecoderConfig(
        vocab_size=37000, source_vocab_size=37000, hidden_size=hidden, heads=heads, encoder_layers=6, decoder_layers=6,
        inner=inner, source_positions=1024, positions=1024, embedding_scale=math.sqrt(hidden),
    )  # fmt: skip


#: Table 3 of the paper, rows "base" and "big"; one table of 37,000 byte pairs for both sides and the head.
PRESETS: dict[str, EncoderDecoderConfig] = {
    "transformer-base": _paper(512, 8, 2048),
    "transformer-big": _paper(1024, 16, 4096),
}

FAMILY = "transformer"


def random_model(config: EncoderDecoderConfig, name: str, seed: int = 0) -> Model:
    """A model of ``config`` with seeded weights and sinusoidal positions, for measuring speed."""
    return build(
        config,
        random_weights(config, seed),
        name,
        family=FAMILY,
        generation=Generation("encoder-decoder", start=(1,), stop=(2,), max_length=config.positions),
        shapes=usual_shapes(config),
    )


#: Heads of ANNalog's attention; no tensor tells them, its ``model_handler.py`` does.
_ANNALOG_HEADS = 8
#: How ANNalog cuts a SMILES into tokens (``vocabulary.py``): bracketed atoms, ring bonds above 9, two-letter halogens.
_SMILES_TOKENS = r"(\[[^\]]*\]|%[0-9]{2}|Br|Cl|.)"


def load_annalog(directory: Path) -> Model:
    """ANNalog from its package's ``ckpt_and_vocab``: ``Lev_extended.pt`` and the vocabulary beside it.

    Raises:
        ModelError: a file is missing, holds more than tensors or plain data, or does not fit.
    """
    checkpoints, vocabularies = sorted(directory.glob("*.pt")), sorted(directory.glob("*vocab*.pkl"))
    if len(checkpoints) != 1 or len(vocabularies) != 1:
        raise ModelError(
            f"expected one *.pt and one *vocab*.pkl in {directory}, "
            f"got {[p.name for p in (*checkpoints, *vocabularies)]}"
        )
    tensors = read_torch(checkpoints[0])
    vocabulary = read_plain_pickle(vocabularies[0])
    if not isinstance(vocabulary, dict) or not isinstance(vocabulary.get("itos"), list):
        raise ModelError(f"{vocabularies[0]}: expected a dict with the list 'itos'")
    tokens = [str(token) for token in vocabulary["itos"]]
    if lacking := [token for token in ("<sos>", "<eos>", "<unk>", "<pad>") if token not in tokens]:
        raise ModelError(f"{vocabularies[0]}: expected the tokens {lacking} in 'itos'")
    config = _annalog_config(tensors, checkpoints[0])
    if len(tokens) != config.vocab_size:
        raise ModelError(f"{vocabularies[0]} has {len(tokens)} tokens; expected {config.vocab_size}")
    start, stop = tokens.index("<sos>"), tokens.index("<eos>")
    model = build(
        config,
        rename_annalog(config, tensors, checkpoints[0].name),
        "annalog",
        family=FAMILY,
        generation=Generation(
            "encoder-decoder",
            start=(start,),
            stop=(stop,),
            max_length=config.positions,
            suppress=tuple(tokens.index(token) for token in ("<unk>", "<pad>", "<sos>")),
        ),
        shapes=usual_shapes(config, (1, 2, 4, 8), (32, 64, 102)),
    )
    model.directory = directory
    model.tokenizer = json.dumps(smiles_tokenizer(tokens))
    return model


def _annalog_config(tensors: dict[str, np.ndarray], path: Path) -> EncoderDecoderConfig:
    def layers(side: str) -> int:
        return len({name.split(".")[2] for name in tensors if name.startswith(f"{side}.layers.")})

    try:
        vocab, hidden = tensors["decoder.tok_embedding.weight"].shape
        return EncoderDecoderConfig(
            vocab_size=vocab,
            source_vocab_size=tensors["encoder.tok_embedding.weight"].shape[0],
            hidden_size=hidden,
            heads=_ANNALOG_HEADS,
            encoder_layers=layers("encoder"),
            decoder_layers=layers("decoder"),
            inner=tensors["decoder.layers.0.positionwise_feedforward.fc_1.weight"].shape[0],
            source_positions=tensors["encoder.pos_embedding.weight"].shape[0],
            positions=tensors["decoder.pos_embedding.weight"].shape[0],
            embedding_scale=math.sqrt(hidden),
            head_bias=True,
        )
    except KeyError as error:
        raise ModelError(f"{path}: expected an ANNalog checkpoint; {error} is missing") from None


def rename_annalog(config: EncoderDecoderConfig, tensors: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """ANNalog's tensors under attntune's names; query, key and value of self-attention become one weight.

    Raises:
        ModelError: naming every tensor that is missing, unknown, or of the wrong shape.
    """
    c, h = config, config.hidden_size
    checkpoint = Checkpoint(tensors, source)
    weights = {
        "encoder.table": checkpoint.take("encoder.tok_embedding.weight", c.source_vocab_size, h),
        "encoder.position": checkpoint.take("encoder.pos_embedding.weight", c.source_positions, h),
        "decoder.table": checkpoint.take("decoder.tok_embedding.weight", c.vocab_size, h),
        "decoder.position": checkpoint.take("decoder.pos_embedding.weight", c.positions, h),
        "head.weight": checkpoint.take("decoder.fc_out.weight", c.vocab_size, h),
        "head.bias": checkpoint.take("decoder.fc_out.bias", c.vocab_size),
    }
    shapes = config.shapes()
    parts = {
        "attention_norm": "self_attn_layer_norm",
        "attention.qkv": "self_attention.fc_",
        "attention.output": "self_attention.fc_o",
        "cross_attention_norm": "enc_attn_layer_norm",
        "cross_attention.query": "encoder_attention.fc_q",
        "cross_attention.key": "encoder_attention.fc_k",
        "cross_attention.value": "encoder_attention.fc_v",
        "cross_attention.output": "encoder_attention.fc_o",
        "feed_forward.up": "positionwise_feedforward.fc_1",
        "feed_forward.down": "positionwise_feedforward.fc_2",
        "feed_forward_norm": "ff_layer_norm",
        "output_norm": "ff_layer_norm",
    }
    for name, shape in shapes.items():
        side, kind, *rest = name.split(".")
        if kind != "layers":
            continue
        part, end = ".".join(rest[1:-1]), rest[-1]
        at = f"{side}.layers.{rest[0]}.{parts[part]}"
        if part == "attention.qkv":
            each = (shape[0] // 3, *shape[1:])
            weights[name] = np.concatenate([checkpoint.take(f"{at}{letter}.{end}", *each) for letter in "qkv"])
        else:
            weights[name] = checkpoint.take(f"{at}.{end}", *shape)
    checkpoint.check()
    return weights


def smiles_tokenizer(tokens: list[str]) -> dict[str, Any]:
    """A ``tokenizer.json`` of the ``tokenizers`` package: one token an atom or bond, between <sos> and <eos>."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    special = ("<unk>", "<pad>", "<sos>", "<eos>")
    ends = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("<sos>", "<eos>")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocabulary[name], "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            for name in special
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": _SMILES_TOKENS}, "behavior": "Isolated", "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [ends[0], {"Sequence": {"id": "A", "type_id": 0}}, ends[1]],
            "pair": [ends[0], *({"Sequence": {"id": name, "type_id": 0}} for name in "AB"), ends[1]],
            "special_tokens": {
                name: {"id": name, "ids": [vocabulary[name]], "tokens": [name]} for name in ("<sos>", "<eos>")
            },
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip
