"""How a definition reduces over its last axis; templates hand in a strategy that suits vector registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Element = Callable[[tuple[Any, ...], Any], Any]
"""``element(i, k)``: the k-th value of the reduction at outer index ``i``, a float32 expression."""


class Reduction:
    """The plain strategy, one ``te`` reduction; the meaning of every other.

    An operator's ``compute`` uses this one. A template passes a subclass to the operator's ``expression``, which
    reorders the same sum or maximum, so that no template restates what its operator means.
    """

    def sum(self, name: str, lead: Sequence[int], extent: int, element: Element) -> Any:
        """Stage ``name`` of shape ``lead``: Σ element(i, k) over 0 <= k < extent."""
        from tvm import te

        k = te.reduce_axis((0, extent), name="k")
        return te.compute(tuple(lead), lambda *i: te.sum(element(i, k), axis=k), name=name)

    def max(self, name: str, lead: Sequence[int], extent: int, element: Element) -> Any:
        """Stage ``name`` of shape ``lead``: the maximum of element(i, k) over 0 <= k < extent."""
        from tvm import te

        k = te.reduce_axis((0, extent), name="k")
        return te.compute(tuple(lead), lambda *i: te.max(element(i, k), axis=k), name=name)
