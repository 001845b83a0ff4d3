"""Arrays that go from call to call: caches updated in place, hidden states, what an encoder hands to a decoder.

They are made by :meth:`TunedModel.state` or by an entry's call, have a compiled shape, padding included, and are never
copied. A language model has two a layer, and passes the same ones at every token: they are checked once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attntune.errors import InputError
from attntune.measure.buffers import numpy_dtype
from attntune.runtime.artifact import ALIGNMENT
from attntune.runtime.inputs import describe
from attntune.runtime.kernel_thread import device_tensors


@dataclass(frozen=True)
class Carried:
    """The carried inputs of one call, in the order of the entry's signature."""

    arrays: tuple[np.ndarray, ...]
    tensors: tuple[Any, ...]
    sizes: Mapping[str, int]
    """Dimension → the size that they prescribe for the bucket."""

    def holds(self, arrays: Sequence[Any]) -> bool:
        """Whether these are the very ``arrays``."""
        return len(arrays) == len(self.arrays) and all(map(_same, arrays, self.arrays))

    @classmethod
    def of(cls, specs: Sequence[Mapping[str, Any]], arrays: Sequence[Any], model: str) -> Carried:
        """Check ``arrays``, one for each of ``specs``.

        Raises:
            InputError: naming the one that is not as a state is made.
        """
        sizes: dict[str, int] = {}
        for spec, array in zip(specs, arrays, strict=True):
            at = f"{model}: input {spec['name']!r}"
            if not isinstance(array, np.ndarray) or array.dtype != numpy_dtype(spec["dtype"]):
                kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
                raise InputError(f"{at} is {kind}; expected {describe(spec)} as state() or an entry gave it")
            if array.ndim != len(spec["dims"]):
                raise InputError(f"{at} has shape {array.shape}; expected {describe(spec)}")
            for dim, size in zip(spec["dims"], array.shape, strict=True):
                expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
                if size != expected:
                    raise InputError(f"{at} has shape {array.shape}; expected {describe(spec)} with {dim} {expected}")
            if array.ctypes.data % ALIGNMENT or not array.flags.c_contiguous or not array.flags.writeable:
                raise InputError(
                    f"{at} is not contiguous, writable and at a multiple of {ALIGNMENT} bytes; "
                    "expected what state() or an entry gave"
                )
        return cls(tuple(arrays), tuple(device_tensors(arrays)), sizes)


def _same(one: object, other: object) -> bool:
    return one is other
