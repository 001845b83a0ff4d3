"""Whisper (Radford et al., 2022): speech to text, from CTranslate2 and Hugging Face directories.

The encoder always hears 30 seconds, shorter recordings padded with silence, as the model was trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import ModelError
from attntune.models.bert import ACTIVATIONS
from attntune.models.ctranslate2 import read_ctranslate2
from attntune.models.encoder_decoder import EncoderDecoderConfig, build
from attntune.models.model import Generation, Model
from attntune.models.tensors import Checkpoint

FAMILY = "whisper"
#: Beams of Whisper's own beam search, and the tokens a prompt may have before text: start, language, task, no times.
_BATCHES, _PROMPT = (1, 5), 4
#: CTranslate2's activations by number (``ActivationType`` of its ``common_spec.py``).
_CTRANSLATE2_ACTIVATIONS = {0: "relu", 1: "gelu_tanh", 2: "silu", 3: "gelu"}


def load_ctranslate2(directory: Path) -> Model:
    """Whisper from a CTranslate2 directory: ``model.bin``, ``config.json``, ``tokenizer.json``.

    Raises:
        ModelError: naming what is missing, unknown, mis-shaped or unsupported.
    """
    found = read_ctranslate2(directory)
    if found.specification != "WhisperSpec":
        raise ModelError(
            f"{directory}: specification {found.specification!r} is not supported; expected 'WhisperSpec'"
        )  # fmt: skip
    tensors = {name: array for name, array in found.tensors.items() if array.ndim}
    numbers = {name: int(array) for name, array in found.tensors.items() if not array.ndim}
    config = _from_ctranslate2(tensors, numbers)
    fields = _json(directory / "config.json")
    suppress = tuple(int(token) for token in fields.get("suppress_ids", ()))
    return _model(config, _rename_ctranslate2(config, tensors), directory, _name(directory), suppress)


def load_huggingface(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], directory: Path) -> Model:
    """Whisper from a Hugging Face directory's ``config.json`` and tensors.

    Raises:
        ModelError: naming what is missing, unknown, mis-shaped or unsupported.
    """
    config = config_from_json(fields)
    generation = {**fields, **_json(directory / "generation_config.json")}
    suppress = tuple(int(token) for token in generation.get("suppress_tokens") or () if token >= 0)
    name = str(fields.get("_name_or_path") or directory.resolve().name).rstrip("/").rsplit("/", 1)[-1]
    return _model(config, _rename_huggingface(config, tensors), directory, name, suppress)


def config_from_json(fields: Mapping[str, Any]) -> EncoderDecoderConfig:
    """Check and take what is needed of a Hugging Face ``config.json``.

    Raises:
        ModelError: naming the field that is missing or asks for something unsupported.
    """
    needed = (
        "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads",
        "encoder_ffn_dim", "decoder_ffn_dim", "vocab_size", "num_mel_bins", "max_source_positions",
        "max_target_positions", "activation_function",
    )  # fmt: skip
    if missing := [name for name in needed if name not in fields]:
        raise ModelError(f"config.json of a whisper model lacks {missing}")
    for encoder, decoder in (
        ("encoder_attention_heads", "decoder_attention_heads"),
        ("encoder_ffn_dim", "decoder_ffn_dim"),
    ):
        if fields[encoder] != fields[decoder]:
            raise ModelError(
                f"config.json: {decoder} {fields[decoder]} is not supported; expected {encoder}, {fields[encoder]}"
            )
    for name, expected in (("scale_embedding", False), ("tie_word_embeddings", True)):
        if fields.get(name, expected) is not expected:
            raise ModelError(f"config.json: {name} {fields[name]!r} is not supported; expected {expected}")
    if fields["activation_function"] not in ACTIVATIONS:
        raise ModelError(
            f"config.json: activation_function {fields['activation_function']!r} is not supported; "
            f"expected one of {sorted(ACTIVATIONS)}"
        )
    return EncoderDecoderConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["d_model"],
        heads=fields["encoder_attention_heads"],
        encoder_layers=fields["encoder_layers"],
        decoder_layers=fields["decoder_layers"],
        inner=fields["encoder_ffn_dim"],
        source_positions=fields["max_source_positions"],
        positions=fields["max_target_positions"],
        mels=fields["num_mel_bins"],
        activation=ACTIVATIONS[fields["activation_function"]],
        norm_first=True,
    )


def _model(
    config: EncoderDecoderConfig, weights: dict[str, np.ndarray], directory: Path, name: str, suppress: tuple[int, ...]
) -> Model:
    start, stop = _special_tokens(directory)
    model = build(
        config, weights, name, family=FAMILY,
        generation=Generation(
            "encoder-decoder", start=start, stop=stop, max_length=config.positions,
            suppress=tuple(token for token in suppress if token < config.vocab_size),
        ),
        shapes=[{"batch": batch, "seq": _PROMPT, "context": config.positions} for batch in _BATCHES],
    )  # fmt: skip
    model.directory = directory
    return model


def _special_tokens(directory: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the decoder starts with (English, transcription, no times) and stops at, from ``tokenizer.json``."""
    added = {
        token["content"]: int(token["id"]) for token in _json(directory / "tokenizer.json").get("added_tokens", ())
    }
    names = ["<|startoftranscript|>", "<|notimestamps|>"]
    if missing := [name for name in (*names, "<|endoftext|>") if name not in added]:
        raise ModelError(f"{directory / 'tokenizer.json'} lacks the tokens {missing}")
    # A model of many languages is told which; English ones have no such prompt. Only the former put the end of text
    # before 50257, the number of GPT-2's byte pairs.
    if added["<|endoftext|>"] >= 50257:
        names[1:1] = ["<|en|>", "<|transcribe|>"]
    return tuple(added[name] for name in names), (added["<|endoftext|>"],)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected an object, got a {type(found).__name__}")
    return found


def _name(directory: Path) -> str:
    found = directory.resolve().name
    return "whisper" if found == "model" else found


# -- names -------------------------------------------------------------------------------------------------------------


def _stem(weight: np.ndarray) -> np.ndarray:
    """A convolution's weight (features, channels, kernel) as a product's (features, kernel·channels)."""
    return np.ascontiguousarray(weight.transpose(0, 2, 1)).reshape(len(weight), -1)


def _from_ctranslate2(tensors: Mapping[str, np.ndarray], numbers: Mapping[str, int]) -> EncoderDecoderConfig:
    def layers(side: str) -> int:
        return len({name.split("/")[1] for name in tensors if name.startswith(f"{side}/layer_")} - {"layer_norm"})

    def must_be(name: str, expected: int) -> None:
        if numbers.get(f"decoder/{name}", expected) != expected:
            raise ModelError(
                f"model.bin: decoder/{name} {numbers[f'decoder/{name}']} is not supported; expected {expected}"
            )

    must_be("pre_norm", 1)
    must_be("scale_embeddings", 0)
    must_be("alibi", 0)
    activation = numbers.get("decoder/activation", 3)
    if activation not in _CTRANSLATE2_ACTIVATIONS:
        raise ModelError(
            f"model.bin: decoder/activation {activation} is not supported; "
            f"expected one of {sorted(_CTRANSLATE2_ACTIVATIONS)}"
        )
    try:
        vocab, hidden = tensors["decoder/embeddings/weight"].shape
        return EncoderDecoderConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            heads=numbers["encoder/num_heads"],
            encoder_layers=layers("encoder"),
            decoder_layers=layers("decoder"),
            inner=tensors["encoder/layer_0/ffn/linear_0/weight"].shape[0],
            source_positions=tensors["encoder/position_encodings/encodings"].shape[0],
            positions=tensors["decoder/position_encodings/encodings"].shape[0],
            mels=tensors["encoder/conv1/weight"].shape[1],
            activation=_CTRANSLATE2_ACTIVATIONS[activation],
            norm_first=True,
        )
    except KeyError as error:
        raise ModelError(f"model.bin: {error} is missing") from None


_CTRANSLATE2_NAMES = {
    "attention_norm": "self_attention/layer_norm",
    "attention.qkv": "self_attention/linear_0",
    "attention.output": "self_attention/linear_1",
    "cross_attention_norm": "attention/layer_norm",
    "cross_attention.query": "attention/linear_0",
    "cross_attention.output": "attention/linear_2",
    "feed_forward_norm": "ffn/layer_norm",
    "feed_forward.up": "ffn/linear_0",
    "feed_forward.down": "ffn/linear_1",
}


def _rename_ctranslate2(c: EncoderDecoderConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    h = c.hidden_size
    checkpoint = Checkpoint(tensors, "model.bin")
    take = checkpoint.take
    weights = {
        "encoder.position": take("encoder/position_encodings/encodings", c.source_positions, h),
        "decoder.table": take("decoder/embeddings/weight", c.vocab_size, h),
        "decoder.position": take("decoder/position_encodings/encodings", c.positions, h),
        "head.weight": take("decoder/projection/weight", c.vocab_size, h),
    }
    for index, channels in enumerate((c.mels, h)):
        at, theirs = f"encoder.stem.{index}.projection.", f"encoder/conv{index + 1}/"
        weights[f"{at}weight"] = _stem(take(f"{theirs}weight", h, channels, 3))
        weights[f"{at}bias"] = take(f"{theirs}bias", h)
    for name, shape in c.shapes().items():
        if name in weights:
            continue
        *path, end = name.split(".")
        if path[1] == "norm":
            weights[name] = take(f"{path[0]}/layer_norm/{'gamma' if end == 'weight' else 'beta'}", h)
            continue
        part, at = ".".join(path[3:]), f"{path[0]}/layer_{path[2]}/"
        if part in ("cross_attention.key", "cross_attention.value"):
            both = take(f"{at}attention/linear_1/{end}", 2 * h, *shape[1:])
            weights[name] = np.ascontiguousarray(both[:h] if part.endswith("key") else both[h:])
            continue
        if part.endswith("norm"):
            end = "gamma" if end == "weight" else "beta"
        weights[name] = take(f"{at}{_CTRANSLATE2_NAMES[part]}/{end}", *shape)
    checkpoint.check(ignored=("alignment_heads",))
    return weights


_HUGGINGFACE_NAMES = {
    "attention_norm": "self_attn_layer_norm",
    "attention.output": "self_attn.out_proj",
    "cross_attention_norm": "encoder_attn_layer_norm",
    "cross_attention.query": "encoder_attn.q_proj",
    "cross_attention.key": "encoder_attn.k_proj",
    "cross_attention.value": "encoder_attn.v_proj",
    "cross_attention.output": "encoder_attn.out_proj",
    "feed_forward_norm": "final_layer_norm",
    "feed_forward.up": "fc1",
    "feed_forward.down": "fc2",
}


def _rename_huggingface(c: EncoderDecoderConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    h = c.hidden_size
    prefix = "model." if any(name.startswith("model.") for name in tensors) else ""
    checkpoint = Checkpoint(tensors)

    def take(name: str, *shape: int) -> np.ndarray:
        # Keys have no bias: softmax does not see what is added to all scores of a query.
        if name.endswith("k_proj.bias"):
            return np.zeros(shape, np.float32)
        return checkpoint.take(prefix + name, *shape)

    table = take("decoder.embed_tokens.weight", c.vocab_size, h)
    weights = {
        "encoder.position": take("encoder.embed_positions.weight", c.source_positions, h),
        "decoder.table": table,
        "decoder.position": take("decoder.embed_positions.weight", c.positions, h),
        "head.weight": table,
    }
    for index, channels in enumerate((c.mels, h)):
        at, theirs = f"encoder.stem.{index}.projection.", f"encoder.conv{index + 1}."
        weights[f"{at}weight"] = _stem(take(f"{theirs}weight", h, channels, 3))
        weights[f"{at}bias"] = take(f"{theirs}bias", h)
    for name, shape in c.shapes().items():
        if name in weights:
            continue
        *path, end = name.split(".")
        if path[1] == "norm":
            weights[name] = take(f"{path[0]}.layer_norm.{end}", h)
            continue
        part, at = ".".join(path[3:]), f"{path[0]}.layers.{path[2]}."
        if part == "attention.qkv":
            each = (h, *shape[1:])
            weights[name] = np.concatenate([take(f"{at}self_attn.{letter}_proj.{end}", *each) for letter in "qkv"])
        else:
            weights[name] = take(f"{at}{_HUGGINGFACE_NAMES[part]}.{end}", *shape)
    checkpoint.check(ignored=("proj_out.weight",))
    return weights
