"""Every registered searcher keeps the contract; the evolutionary one is worth having."""

import itertools
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from landscape import Landscape

from attntune.errors import ConfigError, TuningError
from attntune.search import SEARCHERS, Searcher, searcher_named
from attntune.search.cost_model import MIN_SAMPLES, CostModel, relative_log_costs
from attntune.search.evolutionary import EvolutionarySearcher
from attntune.search.space import Config, ConfigSpace, Knob


def small_space() -> ConfigSpace:
    return ConfigSpace(
        [Knob("rows", (1, 2, 4, 8)), Knob("columns", (16, 32, 64)), Knob("order", ("mn", "nm"))],
        [lambda config: config.integer("rows") * config.integer("columns") <= 256],
    )


def features(config: Config) -> list[float]:
    return [config.integer("rows"), config.integer("columns"), float(config["order"] == "mn")]


def cost(config: Config) -> float | None:
    """Best at rows=4 columns=32 order=nm; fails for one row."""
    rows, columns = config.integer("rows"), config.integer("columns")
    if rows == 1:
        return None
    return 1.0 + abs(math.log2(rows / 4)) + abs(math.log2(columns / 32)) + 0.1 * (config["order"] == "mn")


BEST = Config.of(rows=4, columns=32, order="nm")
DEFAULT = Config.of(rows=2, columns=16, order="mn")


def drive(searcher: Searcher, cost, trials: int, batch: int = 4) -> list[Config]:
    """Ask and tell until ``trials`` configs are known or there are no more; the configs in order."""
    asked: list[Config] = []
    while len(asked) < trials:
        configs = searcher.ask(min(batch, trials - len(asked)))
        if not configs:
            break
        for config in configs:
            searcher.tell(config, cost(config))
        asked += configs
    return asked


@pytest.mark.parametrize("name", sorted(SEARCHERS))
class TestEverySearcher:
    def make(self, name: str, seed: int = 0) -> Searcher:
        return SEARCHERS[name](small_space(), features, DEFAULT, seed)

    def test_the_default_comes_first(self, name):
        assert self.make(name).ask(3)[0] == DEFAULT
        assert self.make(name).ask(1) == [DEFAULT]

    @pytest.mark.parametrize("batch", [1, 3, 100])
    def test_exhausts_a_small_space_without_repeating_and_finds_the_best(self, name, batch):
        searcher = self.make(name)
        asked = drive(searcher, cost, 1000, batch)
        assert len(asked) == len(set(asked)) == len(small_space())
        assert set(asked) == set(small_space())
        assert searcher.exhausted
        assert searcher.ask(5) == []
        assert searcher.ranked()[0] == BEST

    def test_asks_for_no_more_than_wanted(self, name):
        searcher = self.make(name)
        assert searcher.ask(0) == []
        assert [len(searcher.ask(n)) for n in (1, 5, 2)] == [1, 5, 2]

    def test_same_seed_and_costs_give_the_same_proposals(self, name):
        runs = [drive(self.make(name, seed=7), cost, 16) for _ in range(2)]
        assert runs[0] == runs[1]

    def test_never_repeats_even_when_not_told(self, name):
        searcher = self.make(name)
        asked = [config for _ in range(6) for config in searcher.ask(2)]
        assert len(set(asked)) == len(asked) == 12

    def test_tolerates_that_everything_fails(self, name):
        searcher = self.make(name)
        asked = drive(searcher, lambda config: None, 1000)
        assert set(asked) == set(small_space())
        assert searcher.ranked() == []

    def test_what_was_told_is_not_asked(self, name):
        searcher = self.make(name)
        known = [DEFAULT, *itertools.islice((c for c in small_space() if c != DEFAULT), 0, None, 2)]
        for config in known:
            searcher.tell(config, cost(config))
        asked = drive(searcher, cost, 1000)
        assert not set(known) & set(asked)
        assert set(known) | set(asked) == set(small_space())

    def test_a_failed_config_may_be_told_with_infinite_cost(self, name):
        searcher = self.make(name)
        searcher.tell(DEFAULT, math.inf)
        assert searcher.costs == {DEFAULT: None}

    def test_suggestions_come_next_if_legal_and_new(self, name):
        searcher = self.make(name)
        illegal = Config.of(rows=8, columns=64, order="mn")
        searcher.suggest([BEST, illegal, DEFAULT, BEST])
        assert searcher.ask(2) == [DEFAULT, BEST]
        searcher.suggest([BEST])
        assert BEST not in drive(searcher, cost, 1000)

    def test_learning_from_other_workloads_is_accepted(self, name):
        searcher = self.make(name)
        for config in small_space():
            searcher.learn("other", features(config), cost(config))
        assert set(drive(searcher, cost, 1000)) == set(small_space())

    def test_a_config_of_another_space_is_refused(self, name):
        with pytest.raises(ConfigError, match="expected a member of the space of 22 configs"):
            self.make(name).tell(Config.of(rows=3, columns=16, order="mn"), 1.0)

    def test_a_default_outside_the_space_is_refused(self, name):
        with pytest.raises(ConfigError, match="knob 'rows': expected one of"):
            SEARCHERS[name](small_space(), features, DEFAULT.replace(rows=3), 0)

    @given(st.integers(0, 2**32), st.integers(1, 9), st.lists(st.booleans(), min_size=22, max_size=22))
    @settings(max_examples=10, deadline=None)
    def test_any_seed_batch_and_pattern_of_failures(self, name, seed, batch, fails):
        failing = {config for config, fail in zip(small_space(), fails, strict=True) if fail}
        asked = drive(self.make(name, seed), lambda c: None if c in failing else cost(c), 1000, batch)
        assert asked[0] == DEFAULT
        assert len(asked) == len(set(asked)) == len(small_space())


def test_an_unknown_searcher_names_those_there_are():
    with pytest.raises(TuningError, match=r"unknown searcher 'anneal'; expected one of \['evolutionary', 'grid', "):
        searcher_named("anneal")


def best_after(name: str, landscape: Landscape, trials: int, seed: int, learned=()) -> float:
    searcher = SEARCHERS[name](landscape.space, landscape.features, landscape.default, seed)
    for group, row, secs in learned:
        searcher.learn(group, row, secs)
    drive(searcher, landscape.cost, trials)
    return min(secs for secs in searcher.costs.values() if secs is not None) / landscape.optimum()


@pytest.mark.parametrize("landscape", [Landscape(384, 1536, 384), Landscape(77, 384, 384)], ids=str)
def test_evolutionary_beats_random_at_the_same_number_of_trials(landscape):
    seeds, trials = range(5), 40
    ours = statistics.median(best_after("evolutionary", landscape, trials, seed) for seed in seeds)
    random = statistics.median(best_after("random", landscape, trials, seed) for seed in seeds)
    assert ours < random
    assert ours < 1.10


def test_a_model_shared_between_workloads_saves_trials():
    other, landscape = Landscape(256, 1536, 384), Landscape(128, 384, 1536)
    searcher = EvolutionarySearcher(other.space, other.features, other.default, 1)
    drive(searcher, other.cost, 40)
    learned = [("other", other.features(config), secs) for config, secs in searcher.costs.items()]
    alone = statistics.median(best_after("evolutionary", landscape, 12, seed) for seed in range(3))
    shared = statistics.median(best_after("evolutionary", landscape, 12, seed, learned) for seed in range(3))
    assert shared < alone


def test_the_model_ranks_unseen_configs():
    landscape = Landscape()
    working = [config for config in landscape.space if landscape.cost(config) is not None]
    train, test = working[::40], working[17::200]
    model = CostModel.fit({"": [(landscape.features(c), landscape.cost(c)) for c in train]})
    assert model is not None
    predicted = model.predict([landscape.features(config) for config in test])
    actual = [landscape.cost(config) for config in test]
    pairs = list(itertools.combinations(range(len(test)), 2))
    agree = sum((predicted[i] < predicted[j]) == (actual[i] < actual[j]) for i, j in pairs)
    assert agree / len(pairs) > 0.75


def test_the_model_needs_enough_trials_that_differ():
    row = [1.0, 2.0]
    assert CostModel.fit({"": [(row, 1.0)] * (MIN_SAMPLES - 1)}) is None
    assert CostModel.fit({"": [(row, 1.0)] * MIN_SAMPLES}) is None
    assert CostModel.fit({"": [(row, None)] * MIN_SAMPLES}) is None
    assert CostModel.fit({"": [([float(i), 2.0], 1.0 + i) for i in range(MIN_SAMPLES)]}) is not None


def test_failures_cost_more_than_all_that_worked():
    assert relative_log_costs([1.0, 2.0, None]) == pytest.approx([0, math.log(2), math.log(4)])
    assert relative_log_costs([None, None]) == pytest.approx([math.log(2)] * 2)
    assert relative_log_costs([]) == []
