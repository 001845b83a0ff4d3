"""Uniform sampling without replacement: the baseline every other searcher has to beat."""

from __future__ import annotations

from attntune.search.searcher import Searcher
from attntune.search.space import Config


class RandomSearcher(Searcher):
    """Uniform over the configs not seen yet."""

    def propose(self, n: int) -> list[Config]:
        """A sample of ``n``."""
        unseen = self.unseen()
        return self.rng.sample(unseen, min(n, len(unseen)))
