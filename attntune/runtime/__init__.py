"""Artifact → TunedModel: load a compiled model and run it. Imports neither TVM's compiler nor torch."""

from __future__ import annotations

from attntune.runtime.artifact import Artifact, open_artifact
from attntune.runtime.tuned_model import TunedModel, load

__all__ = ["Artifact", "TunedModel", "load", "open_artifact"]
