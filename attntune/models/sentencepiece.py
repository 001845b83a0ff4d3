"""SentencePiece models (Kudo and Richardson, 2018) as Hugging Face's tokenizer.json, read without their library.

A model is a protocol buffer of pieces with their log probabilities, and a normaliser as a table; both are what the
``tokenizers`` package takes for its Unigram model and its Precompiled normaliser.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attntune.errors import ModelError
from attntune.models.config import read_object, unsupported
from attntune.models.tokenizer_json import added_token

#: Types of a piece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
#: Kinds of a model.
UNIGRAM, BPE = 1, 2
_KINDS = {UNIGRAM: "unigram", BPE: "BPE"}
#: A target language of models that write several, as a text begins with it.
_LANGUAGE = re.compile(r">>[^<>]+<<")
#: Below a source's pieces: those that only the target has are for what nothing else spells.
_RARE = 1000.0


@dataclass(frozen=True)
class SentencePiece:
    """A model as its file has it."""

    pieces: tuple[tuple[str, float, int], ...]
    """Text, log probability (BPE: score) and type; a piece's id is its place."""
    charsmap: bytes
    """What the text is normalised by; empty: it is taken as it is."""
    prefix: bool
    """Whether a text begins with a space that it does not have."""
    squeeze: bool
    """Whether spaces at the ends go, and several become one."""

    def normalizers(self) -> list[dict[str, Any]]:
        """What ``tokenizer.json`` has for ``charsmap`` and ``squeeze``."""
        found: list[dict[str, Any]] = []
        if self.charsmap:
            charsmap = base64.b64encode(self.charsmap).decode()
            found.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
        if self.squeeze:
            found.append({"type": "Strip", "strip_left": True, "strip_right": True})
            found.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        return found


def read_sentencepiece(path: Path, kind: int = UNIGRAM) -> SentencePiece:
    """The model in a ``.spm`` or ``.model`` file.

    Raises:
        ModelError: it is damaged, or not of this kind.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), _float(piece.get(2, bytes(4))), piece.get(3, NORMAL)))
            elif field in (2, 3):
                (trainer if field == 2 else normalizer).update(_fields(value))
    except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error) as error:
        raise ModelError(f"{path} is not a SentencePiece model: {error}") from None
    if not pieces:
        raise ModelError(f"{path} is not a SentencePiece model: it has no pieces")
    if (found := trainer.get(3, UNIGRAM)) != kind:
        raise unsupported("model_type", found, f"{kind} ({_KINDS[kind]})", path.name)
    if kind == UNIGRAM and trainer.get(35):
        raise unsupported("byte_fallback", True, False, path.name)
    return SentencePiece(
        tuple(pieces), normalizer.get(2, b""), bool(normalizer.get(3, True)), bool(normalizer.get(4, True))
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protocol buffer's fields; a value is an integer or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a field of wire type {kind} at byte {at}")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise ValueError(f"it ends within a field at byte {at}")
        yield tag >> 3, data[at : at + size]
        at += size


def _float(data: bytes) -> float:
    return float(struct.unpack("<f", data)[0])


def t5_tokenizer(directory: Path, vocab_size: int) -> dict[str, Any]:
    """``tokenizer.json`` of ``spiece.model`` and the sentinels ``<extra_id_…>`` that T5 puts behind its pieces.

    Args:
        directory: with ``spiece.model``; ``extra_ids`` of its ``tokenizer_config.json`` tells how many there are.
        vocab_size: of the model.

    Raises:
        ModelError: the file is damaged or not a unigram model, or has no </s>.
    """
    path = directory / "spiece.model"
    model = read_sentencepiece(path)
    count = int(read_object(directory / "tokenizer_config.json").get("extra_ids", 100))
    pieces = list(model.pieces)
    pieces += [(f"<extra_id_{index}>", 0.0, CONTROL) for index in reversed(range(count))]
    return _tokenizer(model, pieces[:vocab_size], path)


def marian_tokenizer(directory: Path) -> dict[str, Any]:
    """``tokenizer.json`` of ``source.spm``, with the ids of ``vocab.json`` for both languages.

    A text may begin with ``>>language<<``, where the vocabulary has it. A piece of ``source.spm`` that the vocabulary
    lacks is spelled with others; one that only the target has, where nothing else spells it.

    Raises:
        ModelError: a file is missing, damaged or not a unigram model, or ids leave gaps.
    """
    path = directory / "vocab.json"
    vocabulary = {str(piece): int(index) for piece, index in read_object(path).items()}
    if sorted(vocabulary.values()) != list(range(len(vocabulary))) or not vocabulary:
        raise ModelError(f"{path}: expected pieces with ids from 0 on without gaps, got {len(vocabulary)} pieces")
    model = read_sentencepiece(directory / "source.spm")
    scores = {piece: score for piece, score, kind in model.pieces if kind == NORMAL}
    rare = min(scores.values(), default=0.0) - _RARE
    special = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<pad>": CONTROL}

    def kind(piece: str) -> int:
        return CONTROL if _LANGUAGE.fullmatch(piece) else special.get(piece, NORMAL)

    ordered = sorted(vocabulary, key=lambda piece: vocabulary[piece])
    return _tokenizer(model, [(piece, scores.get(piece, rare), kind(piece)) for piece in ordered], path)


def _tokenizer(model: SentencePiece, pieces: Sequence[tuple[str, float, int]], path: Path) -> dict[str, Any]:
    """``tokenizer.json`` that encodes as SentencePiece does and puts </s> after a text."""
    names = [piece for piece, _, _ in pieces]
    unknown = next((index for index, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    if unknown is None or "</s>" not in names:
        raise ModelError(f"{path}: expected a piece for what is unknown, and </s>")
    end = names.index("</s>")
    normalizers = model.normalizers()
    spaces = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always" if model.prefix else "never",
        "split": True,
    }  # fmt: skip
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    stop = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(index, piece, kind != USER_DEFINED)
            for index, (piece, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": spaces,
        "post_processor": {
            "type": "TemplateProcessing", "single": [one, stop], "pair": [one, stop, two, stop],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [end], "tokens": ["</s>"]}},
        },
        "decoder": spaces,
        "model": {
            "type": "Unigram", "unk_id": unknown, "byte_fallback": False,
            "vocab": [[piece, score] for piece, score, _ in pieces],
        },
    }  # fmt: skip
