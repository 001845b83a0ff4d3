"""Arrays that go from call to call: caches updated in place, hidden states, what an encoder hands to a decoder.

They are made by :meth:`TunedModel.state` or by an entry's call, have a compiled shape, padding included, and are never
copied. A language model has two a layer, and passes the same ones at every token: they are checked once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attntune.errors import InputError
from attntune.runtime.inputs import describe


@dataclass(frozen=True)
class Carried:
    """The carried inputs of one call, in the order of the entry's signature."""

    arrays: tuple[Any, ...]
    tensors: tuple[Any, ...]
    sizes: Mapping[str, int]
    """Dimension → the size that they prescribe for the bucket."""

    def holds(self, arrays: Sequence[Any]) -> bool:
        """Whether these are the very ``arrays``."""
        return len(arrays) == len(self.arrays) and all(map(_same, arrays, self.arrays))

    @classmethod
    def of(
        cls, specs: Sequence[Mapping[str, Any]], arrays: Sequence[Any], model: str,
        tensor_of: Callable[[Mapping[str, Any], Any, str], Any],
    ) -> Carried:  # fmt: skip
        """Check ``arrays``, one for each of ``specs``.

        ``tensor_of`` gives the tensor over the memory of one, from its spec, itself and what to call it.

        Raises:
            InputError: naming the one that is not as a state is made.
        """
        sizes: dict[str, int] = {}
        tensors = []
        for spec, array in zip(specs, arrays, strict=True):
            at = f"{model}: input {spec['name']!r}"
            tensors.append(tensor_of(spec, array, at))
            if len(array.shape) != len(spec["dims"]):
                raise InputError(f"{at} has shape {array.shape}; expected {describe(spec)}")
            for dim, size in zip(spec["dims"], array.shape, strict=True):
                expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
                if size != expected:
                    raise InputError(f"{at} has shape {array.shape}; expected {describe(spec)} with {dim} {expected}")
        return cls(tuple(arrays), tuple(tensors), sizes)


def _same(one: object, other: object) -> bool:
    return one is other
