"""Parts of Hugging Face's tokenizer.json that tokenizers of every kind have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def added_token(index: int, content: str, special: bool) -> dict[str, Any]:
    """A token that text is searched for before anything else; a special one is no text."""
    return {
        "id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": special,
    }  # fmt: skip


def put_around(texts: Mapping[int, str], begin: Sequence[int], end: Sequence[int]) -> dict[str, Any] | None:
    """The post-processor that puts tokens before and after a text, and after the second of a pair; None for none."""
    if not (begin or end):
        return None

    def special(tokens: Sequence[int]) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": texts[index], "type_id": 0}} for index in tokens]

    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*special(begin), one, *special(end)],
        "pair": [*special(begin), one, two, *special(end)],
        "special_tokens": {
            texts[index]: {"id": texts[index], "ids": [index], "tokens": [texts[index]]} for index in (*begin, *end)
        },
    }
