"""Which config wins an interleaved re-measurement."""

import random

from attntune.search.final import beats, pick_winner
from attntune.search.space import Config

DEFAULT, A, B = (Config.of(tile=tile) for tile in (4, 2, 8))


def noisy(secs: float, rounds: int = 12, noise: float = 0.05, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [secs * (1 + noise * rng.uniform(-1, 1)) for _ in range(rounds)]


def test_a_clear_winner_replaces_the_default():
    assert pick_winner({DEFAULT: noisy(1.0, seed=1), A: noisy(0.7, seed=2)}, DEFAULT) == A


def test_within_noise_the_default_stays():
    assert pick_winner({DEFAULT: noisy(1.0, seed=1), A: noisy(0.99, seed=2), B: noisy(1.0, seed=3)}, DEFAULT) == DEFAULT


def test_other_ties_go_to_the_first_key_whatever_the_order():
    samples = {B: noisy(0.5, seed=1), A: noisy(0.501, seed=2), DEFAULT: noisy(1.0, seed=3)}
    assert pick_winner(samples, DEFAULT) == pick_winner(dict(reversed(samples.items())), DEFAULT) == A


def test_a_disturbance_common_to_a_round_does_not_hide_the_winner():
    disturbance = [1, 1, 4, 4, 1, 3, 1, 1, 2, 5, 1, 1]
    slow, fast = [1.0 * d for d in disturbance], [0.95 * d for d in disturbance]
    assert pick_winner({DEFAULT: slow, A: fast}, DEFAULT) == A


def test_the_slower_default_does_not_win_by_outliers():
    assert pick_winner({DEFAULT: [1.0] * 12, A: [0.8] * 10 + [9.0] * 2}, DEFAULT) == A
    assert pick_winner({DEFAULT: [1.0] * 12, A: [0.8] * 7 + [9.0] * 5}, DEFAULT) == DEFAULT


def test_failed_configs_cannot_win():
    assert pick_winner({DEFAULT: [], A: [1.0]}, DEFAULT) == A
    assert pick_winner({DEFAULT: [], A: []}, DEFAULT) is None
    assert pick_winner({}, None) is None


def test_less_than_a_percent_is_noise():
    assert not beats([0.995] * 12, [1.0] * 12)
    assert beats([0.98] * 12, [1.0] * 12)
    assert not beats([], [1.0])
