"""SentencePiece models of the kind BPE (Sennrich et al., 2016) as Hugging Face's tokenizer.json: Llama 2's, Mistral's.

Such a model is a list of pieces with scores: of two neighbours whose text together is a piece, those of the best piece
are joined first. What no piece spells is written as its bytes, where there are pieces for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attntune.models.config import read_object
from attntune.models.sentencepiece import BPE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, SentencePiece, read_sentencepiece
from attntune.models.tokenizer_json import added_token, put_around

_BYTE = 6
_SPACE = "▁"


def llama_tokenizer(directory: Path) -> dict[str, Any]:
    """``tokenizer.json`` of ``tokenizer.model``, and of what ``tokenizer_config.json`` adds to its pieces.

    Raises:
        ModelError: the file is damaged or of another kind.
    """
    model = read_sentencepiece(directory / "tokenizer.model", BPE)
    settings = read_object(directory / "tokenizer_config.json")
    names = [piece for piece, _, _ in model.pieces]
    begin = [names.index("<s>")] if settings.get("add_bos_token", True) and "<s>" in names else []
    end = [names.index("</s>")] if settings.get("add_eos_token", False) and "</s>" in names else []
    return bpe_tokenizer(model, begin, end, settings.get("added_tokens_decoder") or {})


def bpe_tokenizer(
    model: SentencePiece, begin: Sequence[int] = (), end: Sequence[int] = (), more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``tokenizer.json`` that encodes as SentencePiece does.

    Args:
        model: of the kind BPE.
        begin: tokens put before a text.
        end: tokens put after it.
        more: tokens beside the pieces, as ``added_tokens_decoder`` has them: by number, with ``content``.
    """
    names = [piece for piece, _, _ in model.pieces]
    kinds = [kind for _, _, kind in model.pieces]
    added = {index: kinds[index] != USER_DEFINED for index in range(len(names))
             if kinds[index] in (UNKNOWN, CONTROL, USER_DEFINED)}  # fmt: skip
    texts = dict(enumerate(names))
    for number, token in (more or {}).items():
        texts[int(number)] = str(token["content"])
        added[int(number)] = bool(token.get("special", True))
    normalizers = model.normalizers()
    if model.prefix:
        normalizers.append({"type": "Prepend", "prepend": _SPACE})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}
    ]  # fmt: skip
    if model.prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added_token(index, texts[index], special) for index, special in sorted(added.items())],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": put_around(texts, begin, end),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "unk_token": names[kinds.index(UNKNOWN)] if UNKNOWN in kinds else None, "fuse_unk": True,
            "byte_fallback": _BYTE in kinds, "ignore_merges": False,
            "vocab": {name: index for index, name in enumerate(names)}, "merges": _merges(model.pieces),
        },
    }  # fmt: skip


def _merges(pieces: Sequence[tuple[str, float, int]]) -> list[str]:
    """Every pair of pieces that is a piece, best first."""
    scores = {piece: (-score, index) for index, (piece, score, kind) in enumerate(pieces) if kind == NORMAL}
    found = [
        (rank, cut, f"{piece[:cut]} {piece[cut:]}")
        for piece, rank in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [pair for *_, pair in sorted(found)]
