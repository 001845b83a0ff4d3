"""WHICH: configuration spaces, and searchers that propose configs from them. Knows nothing of TVM or records."""

from __future__ import annotations

from attntune.errors import TuningError
from attntune.search.evolutionary import EvolutionarySearcher
from attntune.search.grid import GridSearcher
from attntune.search.random_ import RandomSearcher
from attntune.search.searcher import Searcher

#: Searchers by name. A new one adds one line here.
SEARCHERS: dict[str, type[Searcher]] = {
    "evolutionary": EvolutionarySearcher,
    "grid": GridSearcher,
    "random": RandomSearcher,
}

__all__ = ["SEARCHERS", "EvolutionarySearcher", "GridSearcher", "RandomSearcher", "Searcher", "searcher_named"]


def searcher_named(name: str) -> type[Searcher]:
    """The searcher called ``name``; raises :class:`TuningError` naming those there are."""
    try:
        return SEARCHERS[name]
    except KeyError:
        raise TuningError(f"unknown searcher {name!r}; expected one of {sorted(SEARCHERS)}") from None
