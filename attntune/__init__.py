"""attntune: search-tuned kernels for attention and Transformer layers.

Everything named here is imported on first use, so ``import attntune`` costs no TVM, no torch and no NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attntune import errors, functional, models
    from attntune.compiler import compile
    from attntune.runtime import load
    from attntune.target import Target
    from attntune.tuner import tune

__version__ = "0.1.0"

__all__ = ["Target", "__version__", "compile", "errors", "functional", "load", "models", "tune"]

_HOMES = {
    "Target": "attntune.target",
    "compile": "attntune.compiler",
    "load": "attntune.runtime",
    "tune": "attntune.tuner",
}
_MODULES = ("errors", "functional", "models")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"attntune.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'attntune' has no attribute {name!r}; expected one of {__all__}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
