"""Whisper (Radford et al., 2022): speech to text, from CTranslate2 and Hugging Face directories.

The encoder always hears 30 seconds, shorter recordings padded with silence, as the model was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import ModelError
from attntune.models.audio import HOP, SAMPLE_RATE, SECONDS, WINDOW
from attntune.models.bert import ACTIVATIONS
from attntune.models.config import choose, integers, read_object, require_fixed, unsupported
from attntune.models.ctranslate2 import read_ctranslate2
from attntune.models.encoder_decoder import EncoderDecoderConfig, build
from attntune.models.huggingface import BART_NAMES, check_bart_sizes, joined, renamed
from attntune.models.model import Generation, Model
from attntune.models.tensors import Checkpoint

FAMILY = "whisper"
#: Beams of Whisper's own beam search, and the tokens a prompt may have before text: start, language, task, no times.
_BATCHES, _PROMPT = (1, 5), 4
#: CTranslate2's activations by number (``ActivationType`` of its ``common_spec.py``).
_CTRANSLATE2_ACTIVATIONS = {0: "relu", 1: "gelu_tanh", 2: "silu", 3: "gelu"}
#: Numbers of a side whose only supported value is this, where they are there.
_CTRANSLATE2_FIXED = {
    "pre_norm": 1, "scale_embeddings": 0, "alibi": 0, "start_from_zero_embedding": 0, "multi_query_attention": 0,
    "sliding_window": 0,
}  # fmt: skip
#: Frames of the spectrogram for each row of the encoder: its second convolution has stride 2.
_FRAMES = 2


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
    fields = read_object(directory / "config.json")
    settings = {
        "suppress_tokens": fields.get("suppress_ids"),
        "begin_suppress_tokens": fields.get("suppress_ids_begin"),
    }
    name = directory.resolve().name
    return _model(
        config, _rename_ctranslate2(config, tensors), directory, "whisper" if name == "model" else name, settings
    )


def load_huggingface(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], directory: Path, name: str) -> Model:
    """Whisper from a Hugging Face directory: ``config.json``, its tensors, ``tokenizer.json``.

    ``generation_config.json`` goes before ``config.json`` in what it says of generation; what
    ``preprocessor_config.json`` says of the spectrogram must be what is computed here.

    Args:
        fields: of ``config.json``.
        tensors: by the names of the file.
        directory: where the other files are looked for.
        name: of the model.

    Raises:
        ModelError: naming what is missing, unknown, mis-shaped or unsupported.
    """
    config = config_from_json(fields)
    expected = {
        "feature_size": config.mels, "sampling_rate": SAMPLE_RATE, "n_fft": WINDOW, "hop_length": HOP,
        "chunk_length": SECONDS,
    }  # fmt: skip
    heard = read_object(directory / "preprocessor_config.json")
    for field, value in expected.items():
        if heard.get(field, value) != value:
            raise unsupported(field, heard[field], value, "preprocessor_config.json")
    settings = {**fields, **read_object(directory / "generation_config.json")}
    return _model(config, _rename_huggingface(config, tensors), directory, name, settings)


def config_from_json(fields: Mapping[str, Any]) -> EncoderDecoderConfig:
    """Check and take what is needed of a Hugging Face ``config.json``.

    Raises:
        ModelError: naming the field that is missing or asks for something unsupported.
    """
    check_bart_sizes(fields, FAMILY, "num_mel_bins", "max_source_positions", "max_target_positions")
    require_fixed(fields, {"scale_embedding": False, "tie_word_embeddings": True})
    hidden, heads = fields["d_model"], fields["encoder_attention_heads"]
    if fields["max_source_positions"] * _FRAMES * HOP != SECONDS * SAMPLE_RATE:
        raise unsupported(
            "max_source_positions", fields["max_source_positions"], SECONDS * SAMPLE_RATE // HOP // _FRAMES
        )  # fmt: skip
    return EncoderDecoderConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=hidden,
        heads=heads,
        encoder_layers=fields["encoder_layers"],
        decoder_layers=fields["decoder_layers"],
        inner=fields["encoder_ffn_dim"],
        source_positions=fields["max_source_positions"],
        positions=fields["max_target_positions"],
        mels=fields["num_mel_bins"],
        activation=choose(fields, "activation_function", ACTIVATIONS),
        norm_first=True,
    )


def _model(
    config: EncoderDecoderConfig,
    weights: dict[str, np.ndarray],
    directory: Path,
    name: str,
    settings: Mapping[str, Any],
) -> Model:
    model = build(
        config, weights, name, family=FAMILY, generation=_generation(config, directory, settings),
        shapes=[{"batch": batch, "seq": _PROMPT, "context": config.positions} for batch in _BATCHES],
    )  # fmt: skip
    model.directory = directory
    return model


def _generation(config: EncoderDecoderConfig, directory: Path, settings: Mapping[str, Any]) -> Generation:
    """What the decoder starts with, stops at and never writes.

    Args:
        config: of the model.
        directory: with ``tokenizer.json``, whose special tokens hold where ``settings`` say nothing.
        settings: as in Hugging Face's ``generation_config.json``.
    """
    tokenizer = directory / "tokenizer.json"
    added = {token["content"]: int(token["id"]) for token in read_object(tokenizer).get("added_tokens", ())}

    def token(content: str, field: str = "") -> int:
        found = settings.get(field)
        found = added.get(content) if found is None else found
        if found is None:
            what = f", or {field} in generation_config.json" if field else ""
            raise ModelError(f"expected {content} among the added_tokens of {tokenizer}{what}")
        return int(found)

    def allowed(field: str) -> tuple[int, ...]:
        # -1 stands for OpenAI's own list in some configs; those that hold it give no list.
        return tuple(each for each in integers(settings.get(field)) if 0 <= each < config.vocab_size)

    stop = integers(settings.get("eos_token_id")) or (token("<|endoftext|>"),)
    # A model of many languages is told language and task; English ones know neither. Only the former put the end of
    # text behind 50256, the last of GPT-2's byte pairs.
    forced: list[int] = []
    if stop[0] > 50256:
        language = str(settings.get("language") or "en").strip("<|>")
        forced = [token(f"<|{language}|>"), token(f"<|{settings.get('task') or 'transcribe'}|>")]
    for position, value in settings.get("forced_decoder_ids") or ():
        # No value: to be detected from the sound, which is not done here.
        if value is not None:
            forced[position - 1 : position] = [int(value)]
    times = token("<|notimestamps|>", "no_timestamps_token_id")
    if times not in forced:
        forced.append(times)
    start = (token("<|startoftranscript|>", "decoder_start_token_id"), *forced)
    return Generation(
        "encoder-decoder", start=start, stop=stop, max_length=config.positions,
        suppress=allowed("suppress_tokens"), suppress_first=allowed("begin_suppress_tokens"),
    )  # fmt: skip


# -- names -------------------------------------------------------------------------------------------------------------

#: As :data:`attntune.models.huggingface.BART_NAMES`, in CTranslate2's format.
_CTRANSLATE2_NAMES = {
    "position": "{side}/position_encodings/encodings",
    "table": "{side}/embeddings/weight",
    "head": "decoder/projection/{end}",
    "projection": "{side}/conv{number}/{end}",
    "norm": "{side}/layer_norm/{scale}",
    "attention_norm": "{side}/layer_{index}/self_attention/layer_norm/{scale}",
    "attention.qkv": "{side}/layer_{index}/self_attention/linear_0/{end}",
    "attention.output": "{side}/layer_{index}/self_attention/linear_1/{end}",
    "cross_attention_norm": "{side}/layer_{index}/attention/layer_norm/{scale}",
    "cross_attention.query": "{side}/layer_{index}/attention/linear_0/{end}",
    "cross_attention.key": "{side}/layer_{index}/attention/linear_1/{end}",
    "cross_attention.value": "{side}/layer_{index}/attention/linear_1/{end}",
    "cross_attention.output": "{side}/layer_{index}/attention/linear_2/{end}",
    "feed_forward_norm": "{side}/layer_{index}/ffn/layer_norm/{scale}",
    "feed_forward.up": "{side}/layer_{index}/ffn/linear_0/{end}",
    "feed_forward.down": "{side}/layer_{index}/ffn/linear_1/{end}",
}
_HUGGINGFACE_NAMES = {
    **BART_NAMES,
    "head": "decoder.embed_tokens.{end}",
    "projection": "{side}.conv{number}.{end}",
}


def _rename_ctranslate2(c: EncoderDecoderConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint(tensors, "model.bin")

    def take(part: str, theirs: str, rows: int, *columns: int) -> np.ndarray:
        if part not in ("cross_attention.key", "cross_attention.value"):
            return checkpoint.take(theirs, rows, *columns)
        both = checkpoint.take(theirs, 2 * rows, *columns)
        return np.ascontiguousarray(both[:rows] if part.endswith("key") else both[rows:])

    weights = renamed(c, _CTRANSLATE2_NAMES, take)
    checkpoint.check(ignored=("alignment_heads",))
    return weights


def _rename_huggingface(c: EncoderDecoderConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    prefix = "model." if any(name.startswith("model.") for name in tensors) else ""
    checkpoint = Checkpoint(tensors)

    def take(theirs: str, *shape: int) -> np.ndarray:
        # Keys have no bias: softmax does not see what is added to all scores of a query.
        if theirs.endswith("k_proj.bias"):
            return np.zeros(shape, np.float32)
        return checkpoint.take(prefix + theirs, *shape)

    weights = renamed(c, _HUGGINGFACE_NAMES, lambda _, *wanted: joined(take, *wanted))
    weights["head.weight"] = weights["decoder.table"]
    checkpoint.check(ignored=("proj_out.weight",))
    return weights


def _from_ctranslate2(tensors: Mapping[str, np.ndarray], numbers: Mapping[str, int]) -> EncoderDecoderConfig:
    def layers(side: str) -> int:
        return len({name.split("/")[1] for name in tensors if name.startswith(f"{side}/layer_")} - {"layer_norm"})

    for side in ("encoder", "decoder"):
        require_fixed(numbers, {f"{side}/{name}": value for name, value in _CTRANSLATE2_FIXED.items()}, "model.bin")
        if rotary := [name for name in numbers if name.startswith(f"{side}/rotary_")]:
            raise unsupported(rotary[0], numbers[rotary[0]], "learned positions", "model.bin")
    for name in ("num_heads", "activation"):
        if numbers.get(f"encoder/{name}", numbers.get(f"decoder/{name}")) != numbers.get(f"decoder/{name}"):
            raise unsupported(f"decoder/{name}", numbers.get(f"decoder/{name}"), f"that of encoder/{name}", "model.bin")
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
