"""Which config wins an interleaved re-measurement: a tuned config must be seen to win, or the default stays."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from attntune.search.space import Config

#: To win a config must be faster in this share of the rounds …
WIN_SHARE = 0.75
#: … and by this much in the median round.
WIN_MARGIN = 0.01


def beats(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether one config is faster than another beyond noise.

    Args:
        ours: seconds per call, one sample per round.
        theirs: the other's samples of the same rounds. What disturbs a machine lasts longer than a round, so it is the
            ratio within a round that is compared.
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
    if not ratios:
        return False
    wins = sum(ratio < 1 for ratio in ratios)
    return wins >= WIN_SHARE * len(ratios) and statistics.median(ratios) <= 1 - WIN_MARGIN


def pick_winner(samples: Mapping[Config, Sequence[float]], default: Config | None) -> Config | None:
    """The config to use, from samples taken in turns; None if there are no samples at all.

    The config with the least median, and all that it does not beat, are tied. A tie goes to ``default`` if it is among
    them, else to the first by :meth:`Config.key`; so the same samples always give the same winner.
    """
    raced = {config: secs for config, secs in samples.items() if secs}
    if not raced:
        return None
    fastest = min(raced, key=lambda config: (statistics.median(raced[config]), config.key()))
    tied = [c for c, secs in raced.items() if c == fastest or not beats(raced[fastest], secs)]
    if default in tied:
        return default
    return min(tied, key=Config.key)
