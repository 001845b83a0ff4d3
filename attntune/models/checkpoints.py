"""PyTorch checkpoints and pickled plain data, read without ever running what is pickled in them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import ModelError


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint that ``torch.save`` wrote, by name; needs PyTorch.

    A checkpoint that wraps its tensors in ``state_dict`` or ``model`` is unwrapped.

    Raises:
        ModelError: the file is absent, holds anything but tensors and plain data, or PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise ModelError(f"reading {path} needs PyTorch; install it with: pip install torch") from None
    if not path.is_file():
        raise ModelError(f"expected weights in {path}, which does not exist")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path} is not a checkpoint of tensors alone: {first}") from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected tensors by name, got a {type(found).__name__}")
    if others := [name for name, value in found.items() if not isinstance(value, torch.Tensor)]:
        raise ModelError(f"{path}: expected tensors, got something else for {others[:8]}")
    return {
        str(name): (tensor.float() if tensor.is_floating_point() else tensor).numpy() for name, tensor in found.items()
    }


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, strings and numbers; whatever would import a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """Pickled lists, dicts, strings and numbers, such as a vocabulary.

    Raises:
        ModelError: the file is absent or damaged, or asks for any class or function.
    """
    if not path.is_file():
        raise ModelError(f"expected {path}, which does not exist")
    try:
        return _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is not pickled plain data: {error}") from None
