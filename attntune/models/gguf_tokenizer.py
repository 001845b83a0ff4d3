"""The tokenizer in a GGUF file's metadata as Hugging Face's tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attntune.models.config import require_fields, unsupported

_CONTROL, _USER_DEFINED = 3, 4

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_WORDS = {**_BYTES, "use_regex": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: How text is cut before merging, by ``tokenizer.ggml.pre``: the steps of each model's own tokenizer.json.
_CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_WORDS],
    "smollm": [{"type": "Digits", "individual_digits": True}, _WORDS],
    "llama-bpe": [_split(_CL100K.replace("DIGITS", r"\p{N}{1,3}")), _BYTES],
    "qwen2": [_split(_CL100K.replace("DIGITS", r"\p{N}")), _BYTES],
}


def tokenizer_files(fields: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """File name → content, from the metadata of the file called ``source``.

    Raises:
        ModelError: naming the field that is missing, or the kind of tokenizer that is not supported.
    """
    at = "tokenizer.ggml."
    given = {name.removeprefix(at): value for name, value in fields.items() if name.startswith(at)}
    require_fields(given, "GGUF", "model", "tokens", "merges", source=source)
    if given["model"] != "gpt2":
        raise unsupported("tokenizer.ggml.model", given["model"], "gpt2", source)
    cut = given.get("pre", "gpt-2")
    if cut not in _CUTS:
        raise unsupported("tokenizer.ggml.pre", cut, sorted(_CUTS), source)
    tokens: list[str] = given["tokens"]
    types = given.get("token_type", [1] * len(tokens))
    added = [
        {
            "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind == _CONTROL,
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _CUTS[cut]},
        "post_processor": _post_processor(given, tokens),
        "decoder": _WORDS,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": cut == "llama-bpe",
            "vocab": {token: index for index, token in enumerate(tokens)}, "merges": given["merges"],
        },
    }  # fmt: skip
    config: dict[str, Any] = {
        f"{name}_token": tokens[int(given[f"{name}_token_id"])]
        for name in ("bos", "eos")
        if f"{name}_token_id" in given
    }
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _post_processor(given: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Puts the first token before a text, where the file asks for it."""
    if not given.get("add_bos_token") or "bos_token_id" not in given:
        return _WORDS
    index = int(given["bos_token_id"])
    bos = {"SpecialToken": {"id": tokens[index], "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, one],
        "pair": [bos, one, two],
        "special_tokens": {tokens[index]: {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]}},
    }
