"""Knobs, configs and the space of legal ones."""

import pickle
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attntune.errors import ConfigError
from attntune.search.space import Config, ConfigSpace, Knob

names = st.sampled_from(["rows", "columns", "unroll", "order", "flag"])
values = st.one_of(
    st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["mn", "nm", "none"]), min_size=1, max_size=3, unique=True),
    st.just([False, True]),
)
spaces = st.dictionaries(names, values, min_size=1, max_size=4).map(
    lambda knobs: ConfigSpace([Knob(name, tuple(choices)) for name, choices in knobs.items()])
)


def small_space() -> ConfigSpace:
    return ConfigSpace(
        [Knob("rows", (1, 2, 4, 8)), Knob("columns", (16, 32)), Knob("fused", (False, True))],
        [lambda config: config.integer("rows") * config.integer("columns") <= 128],
    )


@given(spaces)
def test_every_config_is_a_distinct_member(space):
    configs = list(space)
    assert len(configs) == len(set(configs)) == len(space)
    assert all(config in space and space.check(config) == config for config in configs)


@given(spaces, st.integers(0, 99))
def test_neighbours_are_members_that_differ_in_one_knob(space, seed):
    config = space.sample(random.Random(seed))
    neighbours = space.neighbours(config)
    assert len(set(neighbours)) == len(neighbours) == sum(len(knob.values) - 1 for knob in space.knobs)
    for other in neighbours:
        assert other in space
        assert sum(config[name] != other[name] for name in config) == 1


@given(spaces, st.integers(0, 99))
def test_configs_survive_json_and_pickle(space, seed):
    config = space.sample(random.Random(seed))
    for copy in (Config.from_json(config.to_json()), pickle.loads(pickle.dumps(config))):
        assert copy == config
        assert hash(copy) == hash(config)
        assert copy.key() == config.key()


def test_constraints_hold_for_configs_neighbours_and_samples():
    space = small_space()
    assert len(space) == 14  # 16 combinations less rows=8 columns=32, fused or not
    assert Config.of(rows=8, columns=32, fused=False) not in space
    assert all(other in space for config in space for other in space.neighbours(config))


def test_order_of_knobs_does_not_matter():
    assert Config.of(a=1, b=2) == Config.of(b=2, a=1)
    assert Config.of(a=1, b=2).replace(a=3) == Config.of(a=3, b=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rows": 3, "columns": 16, "fused": True}, r"knob 'rows': expected one of \[1, 2, 4, 8\], got 3"),
        ({"rows": "4", "columns": 16, "fused": True}, r"knob 'rows': expected one of \[1, 2, 4, 8\], got '4'"),
        ({"rows": 4, "columns": 16, "fused": 1}, r"knob 'fused': expected one of \[False, True\], got 1"),
        ({"rows": 4.0, "columns": 16, "fused": True}, r"knob 'rows': .* got 4.0"),
        ({"rows": 4, "columns": 16, "fused": True, "lanes": 8}, r"unknown knob 'lanes'; expected \['columns', "),
        ({"rows": 4, "fused": True}, r"missing knobs \['columns'\]"),
        ({"rows": 8, "columns": 32, "fused": True}, r"columns=32 fused=True rows=8 is outside the target's limits"),
    ],
)
def test_an_impossible_knob_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        small_space().check(config)


@pytest.mark.parametrize("choices", [(), (1, 1)])
def test_a_knob_needs_distinct_values(choices):
    with pytest.raises(ConfigError, match="knob 'rows': expected distinct values and at least one"):
        Knob("rows", choices)


def test_knob_names_must_be_distinct():
    with pytest.raises(ConfigError, match="expected distinct knob names"):
        ConfigSpace([Knob("rows", (1,)), Knob("rows", (2,))])


def test_a_space_without_a_legal_config_says_so():
    with pytest.raises(ConfigError, match=r"the constraints forbid every combination of knobs \['rows'\]"):
        len(ConfigSpace([Knob("rows", (1, 2))], [lambda config: False]))


def test_an_integer_is_asked_for():
    with pytest.raises(ConfigError, match="expected knob 'order' to be an integer, got 'mn'"):
        Config.of(order="mn").integer("order")
