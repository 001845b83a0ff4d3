"""The others: engines that run the same model, each in a process of its own, to be compared with."""

from __future__ import annotations

import importlib

from attntune.engines.attntune_ import AttntuneEngine
from attntune.engines.engine import Engine, ModelSource
from attntune.engines.metaschedule import MetaScheduleEngine
from attntune.engines.onnxruntime_ import OnnxRuntimeEngine
from attntune.engines.openvino_ import OpenVinoBFloat16Engine, OpenVinoEngine
from attntune.engines.pytorch import PyTorchBFloat16Engine, PyTorchEngine
from attntune.engines.torch_compile import (
    PyTorchCompileEngine,
    PyTorchMaxAutotuneEngine,
    ZentorchBFloat16Engine,
    ZentorchEngine,
)
from attntune.errors import EngineError

#: Engines by name. A new engine adds one line here.
ENGINES: dict[str, type[Engine]] = {
    cls.name: cls
    for cls in (
        AttntuneEngine,
        OnnxRuntimeEngine,
        OpenVinoEngine,
        OpenVinoBFloat16Engine,
        PyTorchEngine,
        PyTorchBFloat16Engine,
        PyTorchCompileEngine,
        PyTorchMaxAutotuneEngine,
        ZentorchEngine,
        ZentorchBFloat16Engine,
        MetaScheduleEngine,
    )
}

__all__ = ["ENGINES", "Engine", "ModelSource", "engine"]


def engine(name: str) -> type[Engine]:
    """The engine called ``name``, or the class that ``"module:Class"`` names.

    Raises:
        EngineError: naming the engines there are, or what is wrong with the class.
    """
    if name in ENGINES:
        return ENGINES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise EngineError(f"unknown engine {name!r}; expected one of {sorted(ENGINES)} or 'module:Class'")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise EngineError(f"cannot import the engine {name!r}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise EngineError(f"expected {name!r} to be a subclass of attntune.engines.Engine, got {found!r}")
    return found
