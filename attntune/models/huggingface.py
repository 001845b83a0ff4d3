"""Encoder-decoders of other formats, Hugging Face's first of all: names of weights, settings of generation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attntune.models.config import integers, require_fields, require_sizes, unsupported
from attntune.models.encoder_decoder import EncoderDecoderConfig
from attntune.models.model import Generation

#: What Hugging Face calls our tensors in models made after BART (Marian, Whisper), by what is left of our name without
#: side and number. A weight that joins several of theirs has them in brackets.
BART_NAMES = {
    "position": "{side}.embed_positions.weight",
    "table": "{side}.embed_tokens.weight",
    "norm": "{side}.layer_norm.{end}",
    "attention_norm": "{side}.layers.{index}.self_attn_layer_norm.{end}",
    "attention.qkv": "{side}.layers.{index}.self_attn.[q|k|v]_proj.{end}",
    "attention.output": "{side}.layers.{index}.self_attn.out_proj.{end}",
    "cross_attention_norm": "{side}.layers.{index}.encoder_attn_layer_norm.{end}",
    "cross_attention.query": "{side}.layers.{index}.encoder_attn.q_proj.{end}",
    "cross_attention.key": "{side}.layers.{index}.encoder_attn.k_proj.{end}",
    "cross_attention.value": "{side}.layers.{index}.encoder_attn.v_proj.{end}",
    "cross_attention.output": "{side}.layers.{index}.encoder_attn.out_proj.{end}",
    "feed_forward_norm": "{side}.layers.{index}.final_layer_norm.{end}",
    "output_norm": "{side}.layers.{index}.final_layer_norm.{end}",
    "feed_forward.up": "{side}.layers.{index}.fc1.{end}",
    "feed_forward.down": "{side}.layers.{index}.fc2.{end}",
}
_BART_SIZES = (
    "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads",
    "encoder_ffn_dim", "decoder_ffn_dim", "vocab_size",
)  # fmt: skip
_OURS = re.compile(
    r"(?:(?P<side>encoder|decoder)\.)?(?:(?:layers|stem)\.(?P<index>\d+)\.)?(?P<part>[a-z_.]+?)(?:\.(?P<end>weight|bias))?"
)
_SEVERAL = re.compile(r"\[(.+?)\]")


def check_bart_sizes(fields: Mapping[str, Any], family: str, *more: str) -> None:
    """Check what models made after BART have in common, and ``activation_function``.

    Args:
        fields: of ``config.json``.
        family: for the error message.
        more: fields of positive integers that this family has as well.

    Raises:
        ModelError: naming the field that is missing or asks for something unsupported.
    """
    require_fields(fields, family, *_BART_SIZES, *more, "activation_function")
    require_sizes(fields, *_BART_SIZES, *more)
    for part in ("attention_heads", "ffn_dim"):
        encoder, decoder = f"encoder_{part}", f"decoder_{part}"
        if fields[encoder] != fields[decoder]:
            raise unsupported(decoder, fields[decoder], f"{encoder} {fields[encoder]}")
    if fields["d_model"] % fields["encoder_attention_heads"]:
        heads = fields["encoder_attention_heads"]
        raise unsupported("encoder_attention_heads", heads, f"a divisor of d_model {fields['d_model']}")


def renamed(
    config: EncoderDecoderConfig, names: Mapping[str, str], take: Callable[..., np.ndarray]
) -> dict[str, np.ndarray]:
    """Every weight under our name.

    Args:
        config: of the model.
        names: like :data:`BART_NAMES`; ``{number}`` is the layer's, counted from 1, and ``{scale}`` a norm's ``{end}``
            (weight or bias) as gamma or beta.
        take: ``take(part, theirs, *shape)`` gives one weight; ``part`` is the key of ``names``.
    """
    weights = {}
    for name, shape in config.shapes().items():
        found = _OURS.fullmatch(name)
        assert found is not None, name
        part, end = found["part"], found["end"]
        theirs = names[part].format(
            side=found["side"], index=found["index"], number=int(found["index"] or 0) + 1, end=end,
            scale={"weight": "gamma", "bias": "beta"}.get(end),
        )  # fmt: skip
        if part == "projection" and end == "weight":
            # A convolution's weight (features, channels, kernel) as a product's (features, kernel·channels).
            kernel = take(part, theirs, shape[0], shape[1] // 3, 3).transpose(0, 2, 1)
            weights[name] = np.ascontiguousarray(kernel).reshape(shape)
        else:
            weights[name] = take(part, theirs, *shape)
    return weights


def joined(take: Callable[..., np.ndarray], theirs: str, rows: int, *columns: int) -> np.ndarray:
    """What ``take(name, *shape)`` gives; of a name such as ``[q|k|v]_proj`` all of them, below one another."""
    if (found := _SEVERAL.search(theirs)) is None:
        return take(theirs, rows, *columns)
    parts = found[1].split("|")
    each = [take(theirs.replace(found[0], part), rows // len(parts), *columns) for part in parts]
    return np.concatenate(each)


def generation(settings: Mapping[str, Any], family: str, max_length: int = 0) -> Generation:
    """How a model of text to text begins and ends.

    Args:
        settings: of ``config.json``, and over them those of ``generation_config.json``.
        family: for the error message.
        max_length: tokens that the decoder has positions for; 0: any number.

    Raises:
        ModelError: naming the field that is missing, or asks for something unsupported.
    """
    start = settings.get("decoder_start_token_id")
    start = settings.get("pad_token_id") if start is None else start
    require_fields({**settings, "decoder_start_token_id": start}, family, "decoder_start_token_id", "eos_token_id")
    never = settings.get("bad_words_ids") or []
    if any(len(word) != 1 for word in never):
        raise unsupported("bad_words_ids", never, "words of one token")
    beams, penalty = settings.get("num_beams") or 1, settings.get("length_penalty")
    if not isinstance(beams, int) or beams < 1:
        raise unsupported("num_beams", beams, "a whole number of at least 1")
    return Generation(
        "encoder-decoder", start=integers(start), stop=integers(settings["eos_token_id"]), max_length=max_length,
        suppress=tuple(int(word[0]) for word in never), renormalize=bool(settings.get("renormalize_logits")),
        beams=beams, length_penalty=1.0 if penalty is None else float(penalty),
    )  # fmt: skip
