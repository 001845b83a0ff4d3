"""The tokenizer in a GGUF file's metadata as Hugging Face's tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attntune.models.config import require_fields, unsupported
from attntune.models.sentencepiece import CONTROL, NORMAL, USER_DEFINED, SentencePiece
from attntune.models.sentencepiece_bpe import bpe_tokenizer
from attntune.models.tokenizer_json import added_token, put_around

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_WORDS = {**_BYTES, "use_regex": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")

#: How text is cut before merging, by ``tokenizer.ggml.pre``: the steps of each model's own tokenizer.json.
_CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_WORDS],
    "smollm": [{"type": "Digits", "individual_digits": True}, _WORDS],
    **{name: [_split(_CL100K.replace("DIGITS", r"\p{N}{1,3}")), _BYTES] for name in _LLAMA3},
    **{name: [_split(_CL100K.replace("DIGITS", r"\p{N}")), _BYTES] for name in ("qwen2", "deepseek-r1-qwen")},
}


def tokenizer_files(fields: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """File name → content, from the metadata of the file called ``source``.

    Raises:
        ModelError: naming the field that is missing, or the kind of tokenizer that is not supported.
    """
    at = "tokenizer.ggml."
    given = {name.removeprefix(at): value for name, value in fields.items() if name.startswith(at)}
    require_fields(given, "GGUF", "model", "tokens", source=source)
    if given["model"] not in _KINDS:
        raise unsupported("tokenizer.ggml.model", given["model"], sorted(_KINDS), source)
    tokens: list[str] = given["tokens"]
    config: dict[str, Any] = {
        f"{name}_token": tokens[int(given[f"{name}_token_id"])]
        for name in ("bos", "eos")
        if f"{name}_token_id" in given
    }
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return {"tokenizer.json": _KINDS[given["model"]](given, source), "tokenizer_config.json": config}


def _put_around(given: Mapping[str, Any], begins: bool) -> tuple[list[int], list[int]]:
    """Tokens put before and after a text, as the file asks; ``begins``: whether there is a first one by default."""
    around = []
    for name, asked in (("bos", given.get("add_bos_token", begins)), ("eos", given.get("add_eos_token", False))):
        around.append([int(given[f"{name}_token_id"])] if asked and f"{name}_token_id" in given else [])
    return around[0], around[1]


def _sentencepiece(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """``tokenizer.json`` of SentencePiece's BPE: pieces and their scores."""
    require_fields(given, "GGUF", "scores", "token_type", source=source)
    pieces = tuple(zip(given["tokens"], given["scores"], given["token_type"], strict=True))
    model = SentencePiece(
        pieces, bytes(given.get("precompiled_charsmap", b"")), prefix=bool(given.get("add_space_prefix", True)),
        squeeze=bool(given.get("remove_extra_whitespaces", False)),
    )  # fmt: skip
    return bpe_tokenizer(model, *_put_around(given, begins=True))


def _byte_level(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """``tokenizer.json`` of byte-level BPE: tokens and merges, best first."""
    require_fields(given, "GGUF", "merges", source=source)
    cut = given.get("pre", "gpt-2")
    if cut not in _CUTS:
        raise unsupported("tokenizer.ggml.pre", cut, sorted(_CUTS), source)
    tokens: list[str] = given["tokens"]
    types = given.get("token_type", [NORMAL] * len(tokens))
    added = [
        added_token(index, token, kind == CONTROL)
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _CUTS[cut]},
        "post_processor": put_around(dict(enumerate(tokens)), *_put_around(given, begins=cut in _LLAMA3)) or _WORDS,
        "decoder": _WORDS,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": cut in _LLAMA3,
            "vocab": {token: index for index, token in enumerate(tokens)}, "merges": given["merges"],
        },
    }  # fmt: skip


#: Makers of ``tokenizer.json`` by ``tokenizer.ggml.model``.
_KINDS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {"gpt2": _byte_level, "llama": _sentencepiece}
