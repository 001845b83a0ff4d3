"""The others: engines that run the same model, each in a process of its own, to be compared with."""

from __future__ import annotations

from attntune.engines.attntune_ import AttntuneEngine
from attntune.engines.engine import Engine, ModelSource
from attntune.engines.onnxruntime_ import OnnxRuntimeEngine
from attntune.engines.pytorch import PyTorchCompileEngine, PyTorchEngine
from attntune.errors import EngineError

#: Engines by name. A new engine adds one line here.
ENGINES: dict[str, type[Engine]] = {
    cls.name: cls for cls in (AttntuneEngine, OnnxRuntimeEngine, PyTorchEngine, PyTorchCompileEngine)
}

__all__ = ["ENGINES", "Engine", "ModelSource", "engine"]


def engine(name: str) -> type[Engine]:
    """The engine called ``name``; raises :class:`EngineError` naming those there are."""
    try:
        return ENGINES[name]
    except KeyError:
        raise EngineError(f"unknown engine {name!r}; expected one of {sorted(ENGINES)}") from None
