"""Every config in the space's order."""

from __future__ import annotations

from attntune.search.searcher import Searcher
from attntune.search.space import Config


class GridSearcher(Searcher):
    """Exhaustive, in the space's order: for spaces small enough to measure whole."""

    def propose(self, n: int) -> list[Config]:
        """The next ``n``."""
        return self.unseen()[:n]
