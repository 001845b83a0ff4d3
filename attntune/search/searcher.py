"""What every searcher is: it proposes configs (ask) and learns their costs (tell)."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from attntune.errors import ConfigError
from attntune.search.space import Config, ConfigSpace

Features = Callable[[Config], Sequence[float]]
"""A config as numbers a model can learn from: the same length and meaning for every workload of one template."""


class Searcher(ABC):
    """Proposes configs of one space, each at most once, the default first.

    Deterministic: the same seed and the same sequence of calls give the same proposals. A subclass writes
    :meth:`propose` and nothing else; a new searcher is one file and one line in ``SEARCHERS``.

    Args:
        space: the legal configs.
        features: numbers to learn from, for searchers that learn.
        default: a member of ``space``; always proposed first unless its cost is already known.
        seed: of every random choice.

    Raises:
        ConfigError: if ``default`` is not a member of ``space``.
    """

    def __init__(self, space: ConfigSpace, features: Features, default: Config, seed: int = 0) -> None:
        self.space = space
        self.features = features
        self.default = space.check(default)
        self.rng = random.Random(seed)
        self.seed = seed
        self.costs: dict[Config, float | None] = {}
        """What is known: seconds, or None for a config that failed."""
        self._suggested: list[Config] = []
        self._seen: set[Config] = set()

    def ask(self, n: int) -> list[Config]:
        """Up to ``n`` configs never asked or told before; fewer, or none, when the space is exhausted."""
        chosen: list[Config] = []
        if n > 0 and self.default not in self._seen:
            self._take(self.default, chosen)
        while self._suggested and len(chosen) < n:
            self._take(self._suggested.pop(0), chosen)
        if len(chosen) < n:
            for config in self.propose(n - len(chosen)):
                self._take(config, chosen)
        return chosen

    def tell(self, config: Config, cost: float | None) -> None:
        """Learn what ``config`` costs, in seconds; None says that it failed.

        The config need not have been asked for: what a database remembers is told the same way, and is then not
        asked for again.

        Raises:
            ConfigError: if ``config`` is not a member of the space.
        """
        if config not in self.space:
            raise ConfigError(f"expected a member of the space of {len(self.space)} configs, got {config}")
        self._seen.add(config)
        self.costs[config] = cost if cost is not None and math.isfinite(cost) else None

    def suggest(self, configs: Iterable[Config]) -> None:
        """Ask for these next, after the default: what was good for a similar workload.

        Those that are illegal here or were seen before are dropped.
        """
        waiting = self._suggested
        waiting += [c for c in dict.fromkeys(configs) if c in self.space and c not in self._seen and c not in waiting]

    def learn(self, group: str, features: Sequence[float], cost: float | None) -> None:  # noqa: B027
        """Learn from a trial of another workload, ``group``, of the same template; ignored where there is no model."""

    @abstractmethod
    def propose(self, n: int) -> list[Config]:
        """Up to ``n`` distinct configs out of :meth:`unseen`; fewer only if there are no more."""

    def unseen(self) -> list[Config]:
        """Configs neither asked nor told so far, in the space's order."""
        return [config for config in self.space if config not in self._seen]

    def seen(self, config: Config) -> bool:
        """Whether ``config`` was asked or told."""
        return config in self._seen

    @property
    def exhausted(self) -> bool:
        """Whether every config was asked or told."""
        return len(self._seen) >= len(self.space)

    def ranked(self) -> list[Config]:
        """Configs that worked, cheapest first; equal costs in the order of their keys."""
        known = [(cost, config.key(), config) for config, cost in self.costs.items() if cost is not None]
        return [config for _, _, config in sorted(known, key=lambda row: row[:2])]

    def _take(self, config: Config, chosen: list[Config]) -> None:
        if config not in self._seen:
            self._seen.add(config)
            chosen.append(config)
