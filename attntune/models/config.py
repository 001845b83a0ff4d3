"""What the readers of model configurations share: fields that must be there, and errors that name one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attntune.errors import ModelError


def require_fields(fields: Mapping[str, Any], family: str, *names: str, source: str = "config.json") -> None:
    """Raise :class:`ModelError` naming those of ``names`` that ``fields`` lacks."""
    if missing := [name for name in names if fields.get(name) is None]:
        raise ModelError(f"{source} of a {family} model lacks {missing}")


def unsupported(field: str, value: object, expected: object, source: str = "config.json") -> ModelError:
    """The error for a field that asks for something that is not supported."""
    return ModelError(f"{source}: {field} {value!r} is not supported; expected {expected!r}")


def require_fixed(fields: Mapping[str, Any], expected: Mapping[str, Any], source: str = "config.json") -> None:
    """Raise :class:`ModelError` naming a field that is there and differs from the only value that is supported."""
    for name, value in expected.items():
        if fields.get(name, value) != value:
            raise unsupported(name, fields[name], value, source)


def require_sizes(fields: Mapping[str, Any], *names: str, source: str = "config.json") -> None:
    """Raise :class:`ModelError` naming one of ``names`` that is there and no positive integer."""
    for name in names:
        value = fields.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{source}: {name} {value!r} is not supported; expected a positive integer")


def choose(fields: Mapping[str, Any], field: str, known: Mapping[str, str]) -> str:
    """What ``known`` says of the field's value; raises :class:`ModelError` naming the field and what is supported."""
    value = fields[field]
    if not isinstance(value, str) or value not in known:
        raise ModelError(f"config.json: {field} {value!r} is not supported; expected one of {sorted(known)}")
    return known[value]


def integers(value: Any) -> tuple[int, ...]:
    """None, one integer or several, as a tuple."""
    if value is None:
        return ()
    return tuple(int(each) for each in value) if isinstance(value, list) else (int(value),)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file.

    Raises:
        ModelError: it is not JSON, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected an object, got a {type(found).__name__}")
    return found
