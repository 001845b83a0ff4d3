"""Beam search: the likeliest sequences, not the likeliest next tokens.

A finished sequence scores log P / length**length_penalty, length without the prompt; the search ends when no open one
can still beat the worst kept. Source: Wu et al., "Google's Neural Machine Translation System" (2016), section 7, with
Hugging Face's penalty.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from attntune.runtime.sampling import Suppressed, log_softmax
from attntune.runtime.sequences import Sequences


@dataclass
class _Search:
    """The beams of one prompt."""

    beams: int
    length_penalty: float
    finished: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    done: bool = False

    def finish(self, total: float, tokens: tuple[int, ...]) -> None:
        self.finished.append((self.score(total, len(tokens)), tokens))
        self.finished.sort(key=lambda item: -item[0])
        del self.finished[self.beams :]

    def score(self, total: float, length: int) -> float:
        return float(total / max(length, 1) ** self.length_penalty)

    def settled(self, best_total: float, length: int, longest: int) -> bool:
        """Whether no open beam can still enter: totals only fall, a longer length helps most at its greatest."""
        if len(self.finished) < self.beams:
            return False
        reach = longest if self.length_penalty > 0 else length
        return self.score(best_total, reach) <= self.finished[-1][0]


def beam_search(
    sequences: Sequences, beams: int, longest: int, stop: Collection[int], suppressed: Suppressed,
    length_penalty: float, renormalize: bool = False,
) -> list[list[tuple[float, tuple[int, ...]]]]:  # fmt: skip
    """Finished sequences of each prompt, best first: score, and tokens with the stop token where one was written.

    ``sequences`` has ``beams`` rows for every prompt, all the same. ``renormalize``: the probability of tokens that are
    ``suppressed`` goes to the others.
    """
    prompts = sequences.rows // beams
    searches = [_Search(beams, length_penalty) for _ in range(prompts)]
    totals = np.full((prompts, beams), -np.inf)
    totals[:, 0] = 0.0
    tokens: list[list[tuple[int, ...]]] = [[()] * beams for _ in range(prompts)]
    logits = sequences.begin()
    for length in range(1, longest + 1):
        never = suppressed.at(length - 1)
        if never and renormalize:
            logits = np.array(logits)
            logits[:, never] = -np.inf
        chances = log_softmax(logits).reshape(prompts, beams, -1)
        if never:
            chances[:, :, never] = -np.inf
        vocab = chances.shape[-1]
        parents, following = np.arange(sequences.rows), np.zeros(sequences.rows, np.int64)
        for p, search in enumerate(searches):
            if search.done:
                continue
            scores = (totals[p][:, None] + chances[p]).reshape(-1)
            # Each beam may end at most once a step for each stop token; what is left fills the beams.
            wanted = min(beams * (1 + len(stop)), len(scores))
            best = np.argpartition(-scores, wanted - 1)[:wanted]
            open_: list[tuple[float, int, int]] = []
            for at in best[np.argsort(-scores[best], kind="stable")]:
                parent, token = divmod(int(at), vocab)
                if scores[at] == -np.inf:
                    continue
                if token in stop:
                    search.finish(float(scores[at]), (*tokens[p][parent], token))
                elif len(open_) < beams:
                    open_.append((float(scores[at]), parent, token))
            old = tokens[p]
            totals[p] = -np.inf
            tokens[p] = [()] * beams
            for beam, (total, parent, token) in enumerate(open_):
                totals[p, beam], tokens[p][beam] = total, (*old[parent], token)
                parents[p * beams + beam], following[p * beams + beam] = p * beams + parent, token
            search.done = not open_ or search.settled(totals[p].max(), length, longest)
        if all(search.done for search in searches) or length == longest:
            break
        sequences.reorder(parents)
        logits = sequences.step(following)
    for p, search in enumerate(searches):
        if not search.done:
            for total, sequence in zip(totals[p], tokens[p], strict=True):
                if total > -np.inf:
                    search.finish(float(total), sequence)
    return [search.finished for search in searches]
