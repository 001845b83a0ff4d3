"""Load models from Hugging Face style directories (config.json, model.safetensors, tokenizer.json) and GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import ModelError
from attntune.models import bert, decoder, g2p, gguf, gpt2, keras, llama, vit
from attntune.models.config import integers, unsupported
from attntune.models.model import Model
from attntune.models.presets import PREFIX, preset
from attntune.models.sentencepiece_bpe import llama_tokenizer


def _load_bert(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], directory: Path) -> Model:
    config = bert.BertConfig.from_json(fields, pooling=_mean_pooling(directory))
    return bert.build(config, bert.rename(config, tensors), _name(fields, directory))


def _load_llama(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], directory: Path) -> Model:
    config = llama.config_from_json(fields)
    fused = fields["model_type"] in llama.FUSED
    weights = llama.rename(config, tensors, tied=llama.is_tied(fields, tensors), fused=fused)
    name = _name(fields, directory)
    model = decoder.build(config, weights, name, family=fields["model_type"], stop=_stop(fields, directory))
    if not (directory / "tokenizer.json").is_file() and (directory / "tokenizer.model").is_file():
        model.tokenizer = json.dumps(llama_tokenizer(directory), ensure_ascii=False)
    return model


def _load_gpt2(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], directory: Path) -> Model:
    config = gpt2.config_from_json(fields)
    weights = gpt2.rename(config, tensors, tied=bool(fields.get("tie_word_embeddings", True)))
    return decoder.build(config, weights, _name(fields, directory), family="gpt2", stop=_stop(fields, directory))


def _load_whisper(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], directory: Path) -> Model:
    from attntune.models import whisper

    return whisper.load_huggingface(fields, tensors, directory, _name(fields, directory))


def _load_marian(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], directory: Path) -> Model:
    from attntune.models import marian

    return marian.load(fields, tensors, directory, _name(fields, directory))


def _load_t5(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], directory: Path) -> Model:
    from attntune.models import t5

    return t5.load(fields, tensors, directory, _name(fields, directory))


def _stop(fields: Mapping[str, Any], directory: Path) -> tuple[int, ...]:
    """Tokens that end a text, as the checkpoint's generation config or else its config says."""
    path = directory / "generation_config.json"
    asked = json.loads(path.read_text()) if path.is_file() else {}
    return integers(asked.get("eos_token_id", fields.get("eos_token_id")))


def _load_vit(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], directory: Path) -> Model:
    config = vit.VitConfig.from_json(fields)
    return vit.build(config, vit.rename(config, tensors), _name(fields, directory))


def _name(fields: Mapping[str, Any], directory: Path) -> str:
    """The name its authors gave the checkpoint, or else the directory's."""
    return str(fields.get("_name_or_path") or directory.resolve().name).rstrip("/").rsplit("/", 1)[-1]


#: Loaders by ``model_type`` of config.json. A new family adds one line.
LOADERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, np.ndarray], Path], Model]] = {
    "bert": _load_bert,
    "gpt2": _load_gpt2,
    "marian": _load_marian,
    **dict.fromkeys(("t5", "mt5"), _load_t5),
    "whisper": _load_whisper,
    **dict.fromkeys(llama.FAMILIES, _load_llama),
    "vit": _load_vit,
}


#: Loaders of checkpoints in one file, by how its name ends.
FILES: dict[str, Callable[[Path], Model]] = {
    ".gguf": gguf.load,
    ".npz": g2p.load,
    **dict.fromkeys((".keras", ".h5", ".hdf5"), keras.load),
}


def _checkpoint(path: Path) -> Path | None:
    """``path`` itself, or the one file of a kind in :data:`FILES` of a directory without ``config.json``."""
    if path.suffix in FILES and not path.is_dir():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(file for file in path.iterdir() if file.suffix in FILES)
    if len(found) > 1:
        raise ModelError(f"{path}: expected one checkpoint, got {[file.name for file in found]}; name one of them")
    return found[0] if found else None


def from_pretrained(path: str | Path) -> Model:
    """Load a model from a directory, or from a Hugging Face hub id where there is a network.

    Args:
        path: a directory with ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``, of which nothing but
            tensors is read); a file ending in one of
            :data:`FILES` (GGUF, Keras, g2p-en's ``.npz``), or a directory that holds just one; or an id such as
            ``"sentence-transformers/all-MiniLM-L6-v2"``, downloaded with ``huggingface_hub``; or ``"preset:"`` and the
            name of a preset, whose weights are seeded.

    Raises:
        ModelError: when a file or field is missing, or the model family or one of its options is not supported.
    """
    if str(path).startswith(PREFIX):
        return preset(str(path))
    directory = Path(path)
    if file := _checkpoint(directory):
        model = FILES[file.suffix](file)
        model.directory = model.directory or file.parent
        return model
    if not directory.is_dir():
        directory = _download(str(path))
    config_path = directory / "config.json"
    if (directory / "model.bin").is_file() and not (directory / "model.safetensors").is_file():
        from attntune.models import whisper

        return whisper.load_ctranslate2(directory)
    if not config_path.is_file():
        if any(directory.glob("*.pt")):
            from attntune.models import transformer

            return transformer.load_annalog(directory)
        raise ModelError(f"expected {config_path}, which does not exist")
    try:
        fields = json.loads(config_path.read_text())
    except json.JSONDecodeError as error:
        raise ModelError(f"{config_path} is not valid JSON: {error}") from None
    family = fields.get("model_type")
    if family not in LOADERS:
        raise ModelError(f"{config_path}: model_type {family!r} is not supported; expected one of {sorted(LOADERS)}")
    if quantized := fields.get("quantization_config"):
        raise unsupported("quantization_config", quantized, "weights that are floats", str(config_path))
    model = LOADERS[family](fields, read_tensors(directory), directory)
    model.directory = directory
    return model


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory's safetensors files, or else of its PyTorch checkpoint, ``pytorch_model.bin``.

    Raises:
        ModelError: there is neither, or a file is damaged or holds more than tensors.
    """
    index = directory / "pytorch_model.bin.index.json"
    whole = directory / "pytorch_model.bin"
    if any(directory.glob("*.safetensors")) or not (index.is_file() or whole.is_file()):
        return read_safetensors(directory)
    from attntune.models.checkpoints import read_torch

    files = [whole]
    if index.is_file():
        files = sorted({directory / name for name in json.loads(index.read_text())["weight_map"].values()})
    return {name: tensor for file in files for name, tensor in read_torch(file).items()}


def read_safetensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of ``model.safetensors``, or of the shards its index names.

    Raises:
        ModelError: when the file is absent or damaged.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError:
        raise ModelError("reading weights needs safetensors; install it with: pip install 'attntune[models]'") from None
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({directory / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [directory / "model.safetensors"]
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        if not file.is_file():
            raise ModelError(f"expected weights in {file}, which does not exist")
        try:
            tensors.update(load_file(file))
        except SafetensorError as error:
            raise ModelError(f"{file} is not a valid safetensors file: {error}") from None
    return tensors


def _mean_pooling(directory: Path) -> bool:
    """Whether a sentence-transformers directory asks for mean pooling."""
    pooling = directory / "1_Pooling" / "config.json"
    if not pooling.is_file():
        return False
    fields = json.loads(pooling.read_text())
    if not fields.get("pooling_mode_mean_tokens", False):
        asked = [name for name, on in fields.items() if name.startswith("pooling_mode") and on is True]
        raise ModelError(f"{pooling}: {asked} is not supported; expected pooling_mode_mean_tokens")
    return True


def _download(hub_id: str) -> Path:
    if hub_id.startswith((".", "/")) or hub_id.count("/") > 1 or not hub_id:
        raise ModelError(f"expected a model directory or a hub id such as 'owner/name', got {hub_id!r}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(f"{hub_id!r} is not a directory, and a hub id needs: pip install 'attntune[models]'") from None
    patterns = [
        "config.json",
        "*.safetensors",
        "*.safetensors.index.json",
        "tokenizer*.json",
        "tokenizer.model",
        "generation_config.json",
        "preprocessor_config.json",
        "*.spm",
        "spiece.model",
        "vocab.json",
        "modules.json",
        "1_Pooling/*",
    ]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds
        raise ModelError(f"{hub_id!r} is neither a directory nor a hub model that can be downloaded: {error}") from None
