"""A made-up but realistic search problem: a blocked matrix product whose time is computed instead of measured.

The shape of real ones: a cliff where the register tile spills, another where a block outgrows L2, waste in the tail of
tiles that do not divide, idle cores when there are too few blocks, some configs that fail, and noise that belongs to
the config (alignment and the like), which no feature explains.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from attntune.search.space import Config, ConfigSpace, Knob

_LANES, _REGISTERS, _L1, _L2, _CORES = 16, 32, 32 * 1024, 512 * 1024, 4


@dataclass(frozen=True)
class Landscape:
    """A matrix product (m, k) x (k, n) in float32."""

    m: int = 384
    n: int = 1536
    k: int = 384
    noise: float = 0.06

    @property
    def space(self) -> ConfigSpace:
        return ConfigSpace(
            [
                Knob("rows", (1, 2, 4, 6, 8, 12, 16)),
                Knob("columns", (16, 32, 48, 64)),
                Knob("block_m", (16, 32, 64, 128, 256)),
                Knob("block_n", (64, 128, 256, 512)),
                Knob("unroll", (1, 2, 4, 8)),
                Knob("order", ("mn", "nm")),
            ],
            [
                lambda c: c.integer("rows") <= c.integer("block_m"),
                lambda c: c.integer("columns") <= c.integer("block_n"),
            ],
        )

    @property
    def default(self) -> Config:
        return Config.of(rows=4, columns=32, block_m=64, block_n=128, unroll=1, order="mn")

    def features(self, config: Config) -> list[float]:
        rows, columns, bm, bn, unroll, order = self._knobs(config)
        return [
            rows, columns, bm, bn, unroll, float(order == "mn"),
            rows * columns / _LANES, 4 * self.k * (bm + bn) / _L2, 4 * self.k * columns / _L1,
            math.log2(math.ceil(self.m / bm) * math.ceil(self.n / bn)), math.log2(2 * self.m * self.n * self.k),
        ]  # fmt: skip

    def cost(self, config: Config) -> float | None:
        """Seconds, or None where building fails."""
        rows, columns, bm, bn, unroll, order = self._knobs(config)
        draw = int(hashlib.sha256(f"{self}{config.key()}".encode()).hexdigest(), 16)
        if draw % 29 == 0:
            return None
        registers = rows * columns / _LANES + columns / _LANES + 1
        per_cycle = 1 / (1 + 6 / (rows * columns / _LANES))  # latency hidden by independent accumulators
        if registers > _REGISTERS:
            per_cycle /= 1 + 0.25 * (registers - _REGISTERS)
        if 4 * self.k * columns > _L1:
            per_cycle *= 0.9
        if 4 * self.k * (bm + bn) > _L2:
            per_cycle *= 0.6
        per_cycle *= 1 + 0.05 * math.log2(unroll) - (0.02 * unroll if rows > 8 else 0)
        per_cycle *= 1.06 if order == "nm" and self.n > self.m else 1.0
        blocks_m, blocks_n = math.ceil(self.m / bm), math.ceil(self.n / bn)
        tiles = math.ceil(bm / rows) * rows * math.ceil(bn / columns) * columns
        waves = math.ceil(blocks_m * blocks_n / _CORES)
        jitter = 1 + self.noise * ((draw >> 16) % 1000 / 1000 - 0.5) * 2
        return waves * (2 * tiles * self.k / (per_cycle * 64e9) + 2e-7) * jitter

    def optimum(self) -> float:
        """Seconds of the best config there is."""
        return min(cost for cost in map(self.cost, self.space) if cost is not None)

    @staticmethod
    def _knobs(config: Config) -> tuple[int, int, int, int, int, str]:
        names = ("rows", "columns", "block_m", "block_n", "unroll")
        rows, columns, bm, bn, unroll = (config.integer(name) for name in names)
        return rows, columns, bm, bn, unroll, str(config["order"])
