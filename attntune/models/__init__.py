"""Layers and models as Relax modules built from attntune's operators, and the loaders of their weights."""

from __future__ import annotations

from attntune.models.model import Entry, Generation, InputSpec, Model, OpCall
from attntune.models.presets import preset
from attntune.models.pretrained import from_pretrained

__all__ = ["Entry", "Generation", "InputSpec", "Model", "OpCall", "from_pretrained", "preset"]
