"""GGUF files (llama.cpp): Llama, Qwen2 and Qwen3 decoders, dequantised, with their tokenizer and chat template."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import ModelError
from attntune.models import decoder, llama, rope_scaling
from attntune.models.config import require_fields, require_fixed, require_sizes, unsupported
from attntune.models.gguf_tokenizer import tokenizer_files
from attntune.models.model import Model

#: ``general.architecture`` → style of rotary embedding, and whether queries, keys and values have biases.
_ARCHITECTURES = {"llama": ("interleaved", False), "qwen2": ("half", True), "qwen3": ("half", False)}
#: Name of a part of a layer at Hugging Face → in a GGUF file.
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

#: Part of a layer in attntune → what of a file it is made of.
_JOINED = {
    "attention.qkv": ("attn_q", "attn_k", "attn_v"),
    "attention.output": ("attn_output",),
    "feed_forward.up": ("ffn_gate", "ffn_up"),
    "feed_forward.down": ("ffn_down",),
}

#: Bits of a type of which quantisation by groups finds the values again (Q4_K's but for the rounding of its scales); of
#: every other type that is quantised it takes 8.
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4}
#: Fields (after the architecture) whose only supported value is this, where they are there.
_FIXED = {
    "rope.scale_linear": 1.0, "expert_count": 0, "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0, "attention.causal": True, "logit_scale": 1.0,
    "use_parallel_residual": False, "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0,
}  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")

#: Keeps what was unpacked for models that are loaded until the process ends.
_unpacked: list[tempfile.TemporaryDirectory[str]] = []


def load(path: Path) -> Model:
    """The model of a GGUF file, in float32.

    Queries and keys stay as the file has them, Llama's in the order of interleaved rotary embedding. The tokenizer and
    the chat template are written to a temporary directory, the model's ``directory``, in Hugging Face's formats.

    Raises:
        ModelError: the file is absent or damaged, or its architecture, an option or a tensor is not supported.
    """
    fields, tensors, kinds = read(path)
    config = config_from_metadata(fields, path.name)
    if (factors := tensors.pop("rope_freqs.weight", None)) is not None:
        config = _with_factors(config, factors, path.name)
    weights = llama.rename(
        config, tensors, tied="output.weight" not in tensors, source=f"the metadata of {path.name}", spelled=_spelled
    )
    stop = [fields[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in fields]
    family = str(fields["general.architecture"])
    model = decoder.build(config, weights, path.stem, family=family, stop=tuple(dict.fromkeys(map(int, stop))))
    folder = tempfile.TemporaryDirectory(prefix="attntune-gguf-")
    _unpacked.append(folder)
    for name, content in tokenizer_files(fields, path.name).items():
        (Path(folder.name) / name).write_text(json.dumps(content, ensure_ascii=False))
    model.directory = Path(folder.name)
    model.bits = _bits(kinds, config.num_layers)
    return model


def _bits(kinds: Mapping[str, str], layers: int) -> dict[str, int]:
    """Bits by which int4 finds again what a file holds quantised, by name of a weight; of joined parts the most.

    Args:
        kinds: type of every tensor of the file.
        layers: how many the model has.
    """
    made_of = {
        "embedding.table": ["token_embd"],
        "head.weight": ["output" if "output.weight" in kinds else "token_embd"],
    }
    for index in range(layers):
        made_of |= {f"layers.{index}.{n}.weight": [f"blk.{index}.{p}" for p in parts] for n, parts in _JOINED.items()}
    found = {}
    for name, parts in made_of.items():
        of_parts = {kinds[f"{part}.weight"] for part in parts}
        if not of_parts & set(_FLOATS):
            found[name] = max(_BITS.get(kind, 8) for kind in of_parts)
    return found


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """Metadata by key, every tensor in float32 by name, and the types in which the file holds them, such as ``Q4_1``.

    Raises:
        ModelError: the file is absent or damaged, or the ``gguf`` package is missing.
    """
    try:
        import gguf
    except ImportError:
        raise ModelError("reading a GGUF file needs the gguf package: pip install 'attntune[models]'") from None
    if not path.is_file():
        raise ModelError(f"expected a GGUF file at {path}, which does not exist")
    try:
        reader = gguf.GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape)[::-1])
            for tensor in reader.tensors
        }
    except (ValueError, IndexError, KeyError, OSError, NotImplementedError) as error:
        raise ModelError(f"{path} is not a GGUF file that can be read: {error}") from None
    return fields, tensors, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def config_from_metadata(fields: Mapping[str, Any], source: str) -> decoder.DecoderConfig:
    """Check a file's metadata and take what is needed of it.

    Raises:
        ModelError: naming the field that is missing or asks for something unsupported.
    """
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise unsupported("general.architecture", architecture, sorted(_ARCHITECTURES), source)
    at = f"{architecture}."
    given = {name.removeprefix(at): value for name, value in fields.items() if name.startswith(at)}
    require_fields(
        given, str(architecture), "block_count", "context_length", "embedding_length", "feed_forward_length",
        "attention.head_count", "attention.layer_norm_rms_epsilon", source=source,
    )  # fmt: skip
    require_fields(fields, "GGUF", "tokenizer.ggml.tokens", source=source)
    require_fixed(fields, {at + name: value for name, value in _FIXED.items()}, source)
    require_sizes(
        fields, *(at + n for n in ("block_count", "context_length", "embedding_length", "feed_forward_length",
        "attention.head_count")), source=source,
    )  # fmt: skip
    hidden, heads = given["embedding_length"], given["attention.head_count"]
    head_dim = given.get("attention.key_length", hidden // heads)
    if given.get("attention.value_length", head_dim) != head_dim:
        raise unsupported(at + "attention.value_length", given["attention.value_length"], head_dim, source)
    if given.get("rope.dimension_count", head_dim) != head_dim:
        raise unsupported(at + "rope.dimension_count", given["rope.dimension_count"], head_dim, source)
    kv_heads = given.get("attention.head_count_kv", heads)
    if not isinstance(kv_heads, int) or heads % kv_heads:
        raise unsupported(at + "attention.head_count_kv", kv_heads, f"a divisor of head_count {heads}", source)
    theta = float(given.get("rope.freq_base", 10000.0))
    scaled = _rope_scaling(given, str(architecture), head_dim, theta, source)
    rope, bias = _ARCHITECTURES[architecture]
    preset = llama.PRESETS["smollm2-135m"]
    return dataclasses.replace(
        preset,
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        num_layers=given["block_count"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=given["feed_forward_length"],
        positions=given["context_length"],
        eps=float(given["attention.layer_norm_rms_epsilon"]),
        rope=rope,
        rope_theta=theta,
        rope_factors=scaled.factors,
        rope_magnitude=scaled.magnitude,
        head_norm=architecture == "qwen3",
        qkv_bias=bias,
    )


def _rope_scaling(
    given: Mapping[str, Any], architecture: str, head_dim: int, theta: float, source: str
) -> rope_scaling.RopeScaling:
    """What fields ``rope.scaling.*`` ask for."""
    kind = given.get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise unsupported(f"{architecture}.rope.scaling.type", kind, ["none", "linear", "yarn"], source)

    def number(name: str, default: float) -> float:
        found = given.get(f"rope.scaling.{name}", default)
        if not isinstance(found, int | float) or found <= 0:
            raise unsupported(f"{architecture}.rope.scaling.{name}", found, "a positive number", source)
        return float(found)

    factor = 1.0 if kind == "none" else number("factor", 1.0)
    if factor == 1.0:
        return rope_scaling.RopeScaling()
    if kind == "linear":
        return rope_scaling.RopeScaling((factor,) * (head_dim // 2))
    trained = number("original_context_length", given["context_length"])
    fast, slow = number("yarn_beta_fast", rope_scaling.FAST), number("yarn_beta_slow", rope_scaling.SLOW)
    magnitude = number("attn_factor", 1.0) * rope_scaling.yarn_magnitude(factor)
    return rope_scaling.yarn(head_dim, theta, factor, trained, fast=fast, slow=slow, magnitude=magnitude)


def _with_factors(config: decoder.DecoderConfig, factors: np.ndarray, source: str) -> decoder.DecoderConfig:
    """``config`` whose frequencies ``factors`` (head_dim/2,) divide, as Llama 3's files have them."""
    if factors.shape != (config.head_dim // 2,):
        raise ModelError(f"{source}: expected rope_freqs.weight of {config.head_dim // 2} values, got {factors.shape}")
    others = np.asarray(config.rope_factors or 1.0)
    return dataclasses.replace(config, rope_factors=tuple((factors.astype(np.float64) * others).tolist()))


def _spelled(name: str) -> str:
    """Hugging Face's name of a tensor as a GGUF file has it."""
    stem, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
        return f"blk.{found[1]}.{_PARTS[found[2]]}.{kind}"
    return f"{_WHOLE[stem]}.{kind}"
