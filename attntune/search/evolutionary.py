"""Evolutionary search guided by a learned cost model.

Each batch: fit the model to all that is known, breed candidates from the best configs by mutation and crossover, rank
them by the model, take the best, and keep a few places for chance (epsilon-greedy), so that the model also sees what it
believes to be bad. Small spaces are ranked whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from attntune.search.cost_model import CostModel
from attntune.search.searcher import Features, Searcher
from attntune.search.space import Config, ConfigSpace

#: Spaces up to this size are ranked whole; larger ones are bred.
RANK_WHOLE = 512
_EPSILON = 0.1
_PARENTS = 12
_POPULATION = 128
_GENERATIONS = 4
_OWN = ""


class EvolutionarySearcher(Searcher):
    """Proposes what a cost model, learned from the trials so far, believes to be fast."""

    def __init__(self, space: ConfigSpace, features: Features, default: Config, seed: int = 0) -> None:
        super().__init__(space, features, default, seed)
        self._others: dict[str, list[tuple[Sequence[float], float | None]]] = {}
        self._rows: dict[Config, Sequence[float]] = {}

    def learn(self, group: str, features: Sequence[float], cost: float | None) -> None:
        """Add another workload's trial to what the model is fitted to."""
        self._others.setdefault(group, []).append((features, cost))

    def propose(self, n: int) -> list[Config]:
        """The best-ranked candidates, with some random ones among them."""
        unseen = self.unseen()
        own = [(self._row(config), cost) for config, cost in self.costs.items()]
        model = CostModel.fit({**self._others, _OWN: own}, self.seed, focus=_OWN)
        ranked = self._first_guesses() if model is None else self._by_model(model, unseen)
        self.rng.shuffle(unseen)
        chosen: dict[Config, None] = {}
        while len(chosen) < n and unseen:
            explore = not ranked or self.rng.random() < _EPSILON
            config = unseen.pop() if explore else ranked.pop(0)
            chosen.setdefault(config)
        return list(chosen)

    def _first_guesses(self) -> list[Config]:
        """Before there is a model: half neighbours of the best so far (at first the default), half random."""
        start = next(iter(self.ranked()), self.default)
        near = [config for config in self.space.neighbours(start) if not self.seen(config)]
        self.rng.shuffle(near)
        far = self.rng.sample(self.unseen(), min(len(near), len(self.unseen())))
        return [config for pair in zip(near, far, strict=False) for config in pair]

    def _by_model(self, model: CostModel, unseen: list[Config]) -> list[Config]:
        if len(self.space) <= RANK_WHOLE:
            return self._sorted(model, unseen)
        parents = self.ranked()[:_PARENTS] or [self.default]
        population = [*parents, *self.rng.sample(unseen, min(_POPULATION // 2, len(unseen)))]
        candidates: dict[Config, None] = dict.fromkeys(population)
        for _ in range(_GENERATIONS):
            children = [self._child(population) for _ in range(_POPULATION)]
            candidates.update(dict.fromkeys(children))
            population = self._sorted(model, [*dict.fromkeys([*population, *children])])[: _POPULATION // 2]
        return self._sorted(model, [config for config in candidates if not self.seen(config)])

    def _child(self, population: list[Config]) -> Config:
        mother = self.rng.choice(population)
        if self.rng.random() < 0.3:
            father = self.rng.choice(population)
            knobs = {name: (mother if self.rng.random() < 0.5 else father)[name] for name in mother}
            child = Config.of(**knobs)
            return child if child in self.space else mother
        near = self.space.neighbours(mother)
        return self.rng.choice(near) if near else mother

    def _sorted(self, model: CostModel, configs: list[Config]) -> list[Config]:
        costs = model.predict([self._row(config) for config in configs])
        order = sorted(range(len(configs)), key=lambda i: (costs[i], configs[i].key()))
        return [configs[i] for i in order]

    def _row(self, config: Config) -> Sequence[float]:
        if config not in self._rows:
            self._rows[config] = self.features(config)
        return self._rows[config]
