"""Device functions."""

from __future__ import annotations

SOURCES: dict[str, str] = {}
