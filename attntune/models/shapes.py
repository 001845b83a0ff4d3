"""Shapes as users give them: sizes by place or by name, and what a target's length means to each entry.

``source`` and ``target`` are the lengths of an encoder-decoder's two sides. Its entries do not share a dimension for
the target: ``forward`` reads all of one (``seq``), ``prefill`` and ``decode`` hold it in a cache (``context``) and
read so much of it at once (``seq``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attntune.errors import InputError

#: Dimensions of a shape given as numbers alone, by how many they are.
PLACES: Mapping[int, tuple[str, ...]] = {2: ("batch", "seq"), 3: ("batch", "source", "target")}

Shape = Mapping[str, int] | Sequence[int]


def by_name(shape: Shape) -> dict[str, int]:
    """``(1, 128)`` as batch and seq, ``(1, 64, 32)`` as batch, source and target; a mapping as it is.

    Raises:
        InputError: there are more or fewer numbers than that.
    """
    if isinstance(shape, Mapping):
        return dict(shape)
    if len(shape) not in PLACES:
        expected = " or ".join(f"({', '.join(names)})" for names in PLACES.values())
        raise InputError(f"expected a shape {expected}, or sizes by name, got {shape!r}")
    return dict(zip(PLACES[len(shape)], shape, strict=True))


def of_entry(shape: Mapping[str, int], dims: Sequence[str], prompts: Sequence[int]) -> list[dict[str, int]]:
    """``shape`` with what its ``target`` means to an entry of the dimensions ``dims``; what is given by name stays.

    Args:
        shape: sizes by name.
        dims: of the entry.
        prompts: tokens that an entry with a cache reads at once, each made a shape of its own.
    """
    if "target" not in shape:
        return [dict(shape)]
    rest = {name: size for name, size in shape.items() if name != "target"}
    target = shape["target"]
    if "context" not in dims:
        return [{"seq": target, **rest}]
    lengths = sorted({min(length, target) for length in prompts})
    return [{"context": target, "seq": length, **rest} for length in lengths]
