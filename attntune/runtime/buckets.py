"""Which compiled shapes serve a request, and how its inputs are cut and padded to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from attntune.errors import InputError


@dataclass(frozen=True)
class Bucket:
    """One compiled shape: its dimensions, the function's name, and what a run costs in relative units."""

    dims: tuple[tuple[str, int], ...]
    function: str
    cost: float

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Dimension → size."""
        return dict(self.dims)

    def __getitem__(self, dim: str) -> int:
        return self.sizes[dim]


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of the batch, run in ``bucket``."""

    start: int
    stop: int
    bucket: Bucket


class Planner:
    """Chooses the cheapest buckets for the sizes of a request."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = tuple(buckets)
        self._plans = lru_cache(maxsize=1024)(self._plan)
        self._choices = lru_cache(maxsize=1024)(self._choose)

    def plan(self, dims: Mapping[str, int]) -> tuple[Piece, ...]:
        """Buckets that together take all rows of the batch (one row, without such a dimension)."""
        lengths = tuple(sorted((name, size) for name, size in dims.items() if name != "batch"))
        return self._plans(dims.get("batch", 1), lengths)

    def choose(self, dims: Mapping[str, int], fixed: Mapping[str, int] | None = None) -> Bucket:
        """The cheapest bucket of at least ``dims`` whose dimensions ``fixed`` are just so."""
        return self._choices(tuple(sorted(dims.items())), tuple(sorted((fixed or {}).items())))

    def _choose(self, dims: tuple[tuple[str, int], ...], fixed: tuple[tuple[str, int], ...]) -> Bucket:
        fitting = [b for b in self._longer(dims) if all(b[name] == size for name, size in fixed)]
        if not fitting:
            at = f" with {dict(fixed)}" if fixed else ""
            raise InputError(
                f"expected sizes within one of {[b.sizes for b in self.buckets]}, got {dict(dims)}{at}; "
                "compile the artifact with such a shape"
            )
        return min(fitting, key=lambda bucket: bucket.cost)

    def _longer(self, sizes: tuple[tuple[str, int], ...]) -> list[Bucket]:
        found = list(self.buckets)
        for name, size in sizes:
            longest = max((bucket[name] for bucket in found), default=0)
            found = [bucket for bucket in found if bucket[name] >= size]
            if not found and name == "seq":
                raise InputError(
                    f"expected sequences of at most {longest} tokens, got {size}; "
                    "truncate them, or compile the artifact with a longer shape"
                )
            if not found:
                raise InputError(
                    f"expected {name} of at most {longest}, got {size}; compile the artifact with a larger shape"
                )
        return found

    def _plan(self, batch: int, lengths: tuple[tuple[str, int], ...]) -> tuple[Piece, ...]:
        fitting: dict[int, Bucket] = {}
        for bucket in self._longer(lengths):
            size = bucket.sizes.get("batch", 1)
            best = fitting.get(size)
            if best is None or bucket.cost < best.cost:
                fitting[size] = bucket
        # Cheapest cover of n rows by buckets, where the last may be partly empty.
        costs: list[float] = [0.0] + [math.inf] * batch
        choices: list[Bucket | None] = [None] * (batch + 1)
        for rows in range(1, batch + 1):
            for size, bucket in fitting.items():
                cost = costs[max(rows - size, 0)] + bucket.cost
                if cost < costs[rows]:
                    costs[rows], choices[rows] = cost, bucket
        pieces, rows = [], batch
        while rows > 0:
            chosen = choices[rows]
            assert chosen is not None
            start = max(rows - chosen.sizes.get("batch", 1), 0)
            pieces.append(Piece(start, rows, chosen))
            rows = start
        return tuple(reversed(pieces))


def buckets_of(manifest_rows: Sequence[Mapping[str, object]], entry: str) -> list[Bucket]:
    """The buckets of one entry, from the manifest."""
    found = []
    for row in manifest_rows:
        if row["entry"] == entry:
            dims = row["dims"]
            assert isinstance(dims, Mapping)
            found.append(Bucket(tuple(sorted(dims.items())), str(row["function"]), float(str(row["cost"]))))
    return found
