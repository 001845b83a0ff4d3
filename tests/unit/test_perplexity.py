"""Perplexity over windows of a text, on a decoder of NumPy."""

import numpy as np
import pytest
from scipy.special import log_softmax

from attntune.errors import InputError
from attntune.runtime.perplexity import perplexity

VOCAB = 7


class Toy:
    """Logits of a position follow from its token and from how far it is from the beginning."""

    def __init__(self, outputs=("logits",), longest=8):
        self.manifest = {"name": "toy", "buckets": [{"entry": "forward", "dims": {"batch": 1, "seq": longest}}]}
        self._outputs = outputs
        self._rows = np.random.default_rng(0).normal(size=(VOCAB, longest, VOCAB)) * 3

    def require(self, entry):
        assert entry == "forward"
        return {"inputs": [{"name": "input_ids"}], "outputs": [{"name": name} for name in self._outputs]}

    def run(self, entry, input_ids):
        assert entry == "forward"
        return self._rows[input_ids, np.arange(input_ids.shape[1])].astype(np.float32)

    def likelihood(self, ids, window):
        """Mean negative log-likelihood, one position after another."""
        found = []
        for at, token in enumerate(ids[:-1]):
            if (at + 1) % window:
                found.append(-log_softmax(self._rows[token, at % window])[ids[at + 1]])
        return np.mean(found), len(found)


@pytest.mark.parametrize(("length", "window"), [(8, None), (5, None), (21, None), (21, 5), (17, 4), (2, 2)])
def test_each_window_is_on_its_own(length, window):
    toy = Toy()
    ids = np.random.default_rng(1).integers(0, VOCAB, length)
    expected, tokens = toy.likelihood(ids, window or 8)
    found = perplexity(toy, ids, window)
    assert found.value == pytest.approx(np.exp(expected), rel=1e-6)
    assert (found.tokens, found.window) == (tokens, window or 8)


def test_many_rows_are_taken_a_part_at_a_time():
    toy = Toy(longest=200)
    ids = np.random.default_rng(1).integers(0, VOCAB, 200)
    assert perplexity(toy, ids).value == pytest.approx(np.exp(toy.likelihood(ids, 200)[0]), rel=1e-6)


def test_likelihoods_too_small_for_a_float_count():
    toy = Toy()
    toy._rows[:] = 0
    toy._rows[:, :, 3] = 2000
    assert perplexity(toy, [3, 3, 3, 3]).value == pytest.approx(1.0)
    assert perplexity(toy, [3, 2]).value == np.inf


def test_what_cannot_be_measured_is_said():
    with pytest.raises(InputError, match="expected a text of at least 2 tokens, got 1"):
        perplexity(Toy(), [1])
    for window in (1, 9):
        with pytest.raises(InputError, match=f"expected a window of 2 to 8 tokens, .* got {window}"):
            perplexity(Toy(), [1, 2, 3], window)
    with pytest.raises(InputError, match=r"expected forward to give logits .* got \['hidden'\]"):
        perplexity(Toy(outputs=("hidden",)), [1, 2])
