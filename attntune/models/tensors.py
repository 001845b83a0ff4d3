"""Tensors of a checkpoint, taken one by one under the names and shapes a model expects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from attntune.errors import ModelError


class Checkpoint:
    """Hands out tensors as float32 and keeps a list of everything that does not fit.

    Args:
        tensors: by the names of the file.
        source: of the expected shapes, for the error message, e.g. ``config.json``.
        spelled: from the name that is asked for to the name in the file, where they differ.
    """

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        source: str = "config.json",
        spelled: Callable[[str], str] = lambda name: name,
    ) -> None:
        self._tensors = tensors
        self._spelled = spelled
        self._source = source
        self._taken: set[str] = set()
        self._problems: list[str] = []

    def __contains__(self, name: str) -> bool:
        return self._spelled(name) in self._tensors

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The tensor called ``name``, contiguous float32; zeros, and a problem noted, where it does not fit."""
        name = self._spelled(name)
        self._taken.add(name)
        found = self._tensors.get(name)
        if found is None:
            self._problems.append(f"{name} is missing")
        elif found.shape != shape:
            self._problems.append(f"{name} has shape {found.shape}, expected {shape}")
        else:
            return np.ascontiguousarray(found, np.float32)
        return np.zeros(shape, np.float32)

    def check(self, ignored: Iterable[str] = ()) -> None:
        """Raise :class:`ModelError` naming what was missing or mis-shaped, and what was never taken.

        Args:
            ignored: endings of names that a checkpoint may hold without use, such as buffers of its framework.
        """
        endings = tuple(ignored)
        problems = list(self._problems)
        for name in self._tensors:
            if name not in self._taken and not (endings and name.endswith(endings)):
                problems.append(f"{name} is not known")
        if problems:
            shown = "; ".join(problems[:8]) + ("; …" if problems[8:] else "")
            raise ModelError(f"weights do not fit {self._source}: {shown}")
