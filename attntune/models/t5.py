"""T5 (Raffel et al., 2020) of version 1.0 and 1.1, Flan-T5 and mT5 too: text to text, in Hugging Face directories.

Normalisation before each branch and by the root mean square, no biases, scores not scaled, and positions only as a
bias of self-attention's scores, by buckets of distances.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import ModelError
from attntune.models.bert import ACTIVATIONS
from attntune.models.config import read_object, require_fields, require_fixed, require_sizes, unsupported
from attntune.models.encoder_decoder import EncoderDecoderConfig, build, usual_shapes
from attntune.models.huggingface import generation, joined, renamed
from attntune.models.model import Model
from attntune.models.sentencepiece import t5_tokenizer
from attntune.models.tensors import Checkpoint

_GATED = "gated-"
_DEFAULTS: dict[str, Any] = {
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu", "n_positions": 512,
}  # fmt: skip


def load(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], directory: Path, name: str) -> Model:
    """T5 from ``config.json``, its tensors, and ``tokenizer.json`` or ``spiece.model``.

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
    fields = {**_DEFAULTS, **fields}
    config, family = config_from_json(fields), fields["model_type"]
    settings = {**fields, **read_object(directory / "generation_config.json")}
    begins = generation(settings, family)
    model = build(
        config, rename(config, fields, tensors), name, family=family, generation=begins,
        shapes=usual_shapes(config, sorted({1, 4, begins.beams})),
    )  # fmt: skip
    if not (directory / "tokenizer.json").is_file() and (directory / "spiece.model").is_file():
        model.tokenizer = json.dumps(t5_tokenizer(directory, config.vocab_size), ensure_ascii=False)
    return model


def config_from_json(fields: Mapping[str, Any]) -> EncoderDecoderConfig:
    """Check and take what is needed of a Hugging Face ``config.json``.

    Raises:
        ModelError: naming the field that is missing or asks for something unsupported.
    """
    fields = {**_DEFAULTS, **fields}
    require_fields(fields, fields["model_type"], "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size")
    require_sizes(fields, "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "n_positions")
    require_fixed(fields, {"is_encoder_decoder": True})
    projection = str(fields["feed_forward_proj"])
    activation = projection.removeprefix(_GATED)
    # The one name that does not mean what it says.
    activation = "gelu_new" if projection == "gated-gelu" else activation
    if activation not in ACTIVATIONS:
        known = sorted([*ACTIVATIONS, *(_GATED + each for each in ACTIVATIONS)])
        raise ModelError(f"config.json: feed_forward_proj {projection!r} is not supported; expected one of {known}")
    buckets, longest = fields["relative_attention_num_buckets"], fields["relative_attention_max_distance"]
    if buckets < 4 or buckets % 4 or longest <= buckets // 2:
        raise unsupported(
            "relative_attention_num_buckets", buckets,
            f"a multiple of 4, less than twice relative_attention_max_distance {longest}",
        )  # fmt: skip
    positions = fields["n_positions"]
    return EncoderDecoderConfig(
        vocab_size=fields["vocab_size"],
        source_vocab_size=fields["vocab_size"],
        hidden_size=fields["d_model"],
        heads=fields["num_heads"],
        head_dim=fields["d_kv"],
        encoder_layers=fields["num_layers"],
        decoder_layers=fields.get("num_decoder_layers") or fields["num_layers"],
        inner=fields["d_ff"],
        source_positions=positions,
        positions=positions,
        activation=ACTIVATIONS[activation],
        gated=projection.startswith(_GATED),
        norm_first=True,
        norm="rms",
        eps=fields["layer_norm_epsilon"],
        relative=longest,
        bias=False,
        scale=1.0,
    )


_NAMES = {
    "relative": "{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "table": "shared.weight",
    "head": "lm_head.{end}",
    "norm": "{side}.final_layer_norm.{end}",
    "attention_norm": "{side}.block.{index}.layer.0.layer_norm.{end}",
    "attention.qkv": "{side}.block.{index}.layer.0.SelfAttention.[q|k|v].{end}",
    "attention.output": "{side}.block.{index}.layer.0.SelfAttention.o.{end}",
    "cross_attention_norm": "{side}.block.{index}.layer.1.layer_norm.{end}",
    "cross_attention.query": "{side}.block.{index}.layer.1.EncDecAttention.q.{end}",
    "cross_attention.key": "{side}.block.{index}.layer.1.EncDecAttention.k.{end}",
    "cross_attention.value": "{side}.block.{index}.layer.1.EncDecAttention.v.{end}",
    "cross_attention.output": "{side}.block.{index}.layer.1.EncDecAttention.o.{end}",
}


def rename(
    config: EncoderDecoderConfig, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """T5's tensors under attntune's names; buckets become distances.

    A head that is the table, as in version 1.0, takes the decoder's result divided by the root of d_model: the
    decoder's last normalisation does that here.

    Raises:
        ModelError: naming every tensor that is missing, unknown, or of the wrong shape.
    """
    checkpoint = Checkpoint(tensors)
    # Only version 1.1 has a head of its own. What was saved by later tools says so in a field of its own.
    scaled = fields.get("scale_decoder_outputs", fields.get("tie_word_embeddings", True)) is not False
    spelled = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    spelling = next((name for name in spelled if name in checkpoint), spelled[0])
    table = checkpoint.take(spelling, config.vocab_size, config.hidden_size)
    buckets = fields["relative_attention_num_buckets"]

    def take(theirs: str, *shape: int) -> np.ndarray:
        if theirs == "shared.weight" or (theirs == "lm_head.weight" and scaled and theirs not in checkpoint):
            return table
        if "relative_attention_bias" in theirs:
            found = checkpoint.take(theirs, buckets, config.heads)
            before, after = config.relative, config.relative if theirs.startswith("encoder") else 0
            return by_distance(found, before, after)
        return checkpoint.take(theirs, *shape)

    def named(part: str, theirs: str, *shape: int) -> np.ndarray:
        if part.startswith("feed_forward"):
            # The decoder's feed-forward layer is the third of a block, the encoder's the second.
            theirs = theirs.replace("LAST", "1" if theirs.startswith("encoder") else "2")
        return joined(take, theirs, *shape)

    up = "[wi_0|wi_1]" if config.gated else "wi"
    names = {
        **_NAMES,
        "feed_forward_norm": "{side}.block.{index}.layer.LAST.layer_norm.{end}",
        "feed_forward.up": "{side}.block.{index}.layer.LAST.DenseReluDense." + up + ".{end}",
        "feed_forward.down": "{side}.block.{index}.layer.LAST.DenseReluDense.wo.{end}",
    }
    weights = renamed(config, names, named)
    # Cross-attention has no positions; the first checkpoints hold a table for them all the same.
    checkpoint.check(ignored=(*spelled, "EncDecAttention.relative_attention_bias.weight"))
    if np.array_equal(weights["head.weight"], table):
        weights["head.weight"] = table
    if scaled:
        weights["decoder.norm.weight"] = weights["decoder.norm.weight"] * np.float32(config.hidden_size**-0.5)
    return weights


def by_distance(buckets: np.ndarray, before: int, after: int) -> np.ndarray:
    """A bias for each distance from key to query, of a bias for each bucket of distances.

    Args:
        buckets: (buckets, heads); keys after the query have the second half of them, where there are such.
        before: distances that are told apart, of keys before the query; further ones share the last bucket.
        after: as many of keys after it, or 0.

    Returns:
        (heads, before + 1 + after), keys furthest before the query first.
    """
    side = len(buckets) // 2 if after else len(buckets)
    bucket = [_bucket(distance, side, before) for distance in range(before + 1)]
    rows = [*reversed(bucket), *(side + each for each in bucket[1 : after + 1])]
    return np.ascontiguousarray(buckets[rows].T)


def _bucket(distance: int, buckets: int, longest: int) -> int:
    """Half of the buckets are one distance each; the others grow with the logarithm, up to ``longest``.

    In integers: what a distance that begins a bucket has for a logarithm depends on who rounds it.
    """
    exact = buckets // 2
    if distance < exact:
        return distance
    steps = buckets - exact
    # (distance / exact)^steps reaches (longest / exact)^step.
    reached = [step for step in range(1, steps) if distance**steps * exact**step >= longest**step * exact**steps]
    return exact + len(reached)
