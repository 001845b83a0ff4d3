"""Which compiled shapes serve a request, and how its inputs are cut and padded to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from attntune.errors import InputError


@dataclass(frozen=True)
class Bucket:
    """One compiled shape: its dimensions, the function's name, and what a run costs in relative units."""

    dims: tuple[tuple[str, int], ...]
    function: str
    cost: float

    def __getitem__(self, dim: str) -> int:
        return dict(self.dims)[dim]


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of the batch, run in ``bucket``."""

    start: int
    stop: int
    bucket: Bucket


class Planner:
    """Chooses the cheapest buckets for a batch size and sequence length."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = tuple(buckets)
        self.longest = max(bucket["seq"] for bucket in self.buckets)
        self.plan = lru_cache(maxsize=1024)(self._plan)

    def _plan(self, batch: int, seq: int) -> tuple[Piece, ...]:
        fitting: dict[int, Bucket] = {}
        for bucket in self.buckets:
            if bucket["seq"] >= seq:
                best = fitting.get(bucket["batch"])
                if best is None or bucket.cost < best.cost:
                    fitting[bucket["batch"]] = bucket
        if not fitting:
            raise InputError(
                f"expected sequences of at most {self.longest} tokens, got {seq}; "
                "truncate them, or compile the artifact with a longer shape"
            )
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
            start = max(rows - chosen["batch"], 0)
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
