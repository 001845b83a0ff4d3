"""Which config a database dispatches: exact, then transferred, then default; never one that was not correct."""

import dataclasses

import pytest
from records import TEMPLATE, ZNVER4, Scale, record

from attntune.database import maintenance, query
from attntune.database.journal import Journal
from attntune.database.query import Database, shape_distance
from attntune.database.record import Status
from attntune.search.space import Config
from attntune.target import PRESETS

W = Scale(64)


def lookup(*records, workload=W, target=ZNVER4):
    return Database(records, shipped=False).lookup(workload, target, TEMPLATE)


def test_default_when_nothing_is_known():
    choice = lookup()
    assert (choice.config, choice.source, choice.record) == (Config.of(tile=8), "default", None)


def test_exact_best_wins():
    slow, fast = record(1, (2.0, 2.1)), record(4, (1.0, 1.1))
    choice = lookup(slow, fast)
    assert (choice.config, choice.source, choice.record) == (Config.of(tile=4), "exact", fast)


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.CORRECT])
def test_what_was_not_correct_is_never_dispatched(status):
    broken = record(4, status=status)
    assert lookup(broken).source == "default"
    assert lookup(broken, workload=Scale(65)).source == "default"
    assert lookup(broken, record(2, (5.0,))).config == Config.of(tile=2)


def test_a_config_that_failed_later_is_not_dispatched():
    assert lookup(record(4, (1.0,)), record(2, (2.0,)), record(4, status=Status.WRONG_RESULT)).config["tile"] == 2
    finals = [record(t, (s,) * 4, final=True, time="2026-02-01") for t, s in ((4, 1.0), (2, 2.0))]
    assert lookup(*finals, record(4, status=Status.WRONG_RESULT)).config["tile"] == 2


def test_a_config_outside_the_space_is_not_dispatched():
    assert lookup(record(64, (0.1,)), record(2, (1.0,))).config["tile"] == 2
    assert lookup(record(64, (0.1,))).source == "default"


def test_records_of_another_template_do_not_count():
    assert lookup(record(4, template="elsewhere:Other")).source == "default"


def test_ties_break_in_a_fixed_order():
    noisy = [record(t, (1.0 + d, 1.1 + d, 1.2 + d, 1.3 + d, 1.4 + d)) for t, d in ((16, 0.0), (2, 0.05), (4, 0.02))]
    for order in (noisy, noisy[::-1]):
        assert lookup(*order).config["tile"] == 16  # '{"tile":16}' sorts before '{"tile":2}'
    clear = record(32, (0.5, 0.5, 0.5, 0.5))
    assert lookup(*noisy, clear).config["tile"] == 32


def test_without_a_final_round_the_default_stays():
    default, faster = record(8, (1.0,) * 4, is_default=True), record(32, (0.5,) * 4)
    choice = lookup(default, faster)
    assert (choice.config["tile"], choice.source) == (8, "exact")
    raced = [dataclasses.replace(r, final=True, time="2026-02-01") for r in (default, faster)]
    assert lookup(default, faster, *raced).config["tile"] == 32
    broken = record(8, status=Status.RUN_ERROR, is_default=True)
    assert lookup(broken, faster).config["tile"] == 32


def test_the_newest_final_round_decides():
    single = record(1, (0.1,) * 8)
    old = [record(t, (s,) * 8, final=True, time="2026-02-01") for t, s in ((2, 0.2), (4, 0.5))]
    new = [
        record(t, (s,) * 8, final=True, time="2026-02-02", is_default=d)
        for t, s, d in ((4, 0.3, False), (8, 0.6, True))
    ]
    assert lookup(single, *old).config["tile"] == 2
    assert lookup(single, *old, *new).config["tile"] == 4
    assert lookup(*new, *old, single).config["tile"] == 4


def test_a_final_round_without_a_clear_winner_keeps_the_default():
    tuned = record(4, (1.0, 1.2, 1.0, 1.2), final=True, time="2026-02-01")
    default = record(8, (1.1, 1.1, 1.1, 1.1), final=True, time="2026-02-01", is_default=True)
    assert lookup(tuned, default).config["tile"] == 8


def test_transfer_from_the_nearest_shape():
    near, far = record(4, workload=Scale(96)), record(2, workload=Scale(256))
    choice = lookup(far, near)
    assert (choice.config["tile"], choice.source, choice.record) == (4, "transferred", near)
    assert '"rows":96' in choice.from_
    assert ZNVER4.key() in choice.from_


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"factor": "three"}])
def test_no_transfer_where_more_than_sizes_differ(other):
    assert lookup(record(4, workload=Scale(64, **other))).source == "default"


def test_a_size_that_keys_leave_out_is_a_size():
    assert lookup(record(4, workload=Scale(64, columns=128))).source == "transferred"
    assert lookup(record(4, workload=Scale(64)), workload=Scale(64, columns=128)).source == "transferred"


def test_transfer_prefers_the_same_target():
    elsewhere = dataclasses.replace(ZNVER4, arch="znver5", name="znver5")
    there, here = record(4, workload=W, target=elsewhere), record(2, workload=Scale(128))
    assert lookup(there, here).config["tile"] == 2
    assert lookup(there).config["tile"] == 4
    assert lookup(there).source == "transferred"


@pytest.mark.parametrize("other", ["x86-64-v3", "x86-64-v4", "sapphirerapids", "sm_80"])
def test_no_transfer_between_targets_of_other_limits(other):
    assert lookup(record(4, target=PRESETS[other])).source == "default"


def test_limits_that_a_record_does_not_tell_are_those_of_the_preset():
    unknown = record(4, target=dataclasses.replace(ZNVER4, arch="nobody-knows"), machine={})
    assert lookup(unknown).source == "default"
    preset = record(4, target=PRESETS["znver4"], machine={})
    assert lookup(preset).source == "transferred"
    old = {"target": {n: v for n, v in PRESETS["x86-64-v4"].to_json().items() if n != "fmas_per_cycle"}}
    assert lookup(record(4, target=PRESETS["x86-64-v4"], machine=old)).source == "default"


def test_transfer_prefers_as_many_cores():
    elsewhere = dataclasses.replace(ZNVER4, arch="znver5", name="znver5")
    more, as_many = record(4, target=elsewhere.with_cores(8)), record(2, target=elsewhere)
    assert lookup(more, as_many).config["tile"] == 2
    assert lookup(more).config["tile"] == 4


def test_no_transfer_over_too_great_a_distance():
    assert lookup(record(4, workload=Scale(64 * 16))).source == "transferred"
    assert lookup(record(4, workload=Scale(64 * 17))).source == "default"


def test_a_config_that_does_not_fit_gives_way_to_the_next_nearest():
    large, small = record(32, workload=Scale(32)), record(4, workload=Scale(80))
    assert lookup(large, small, workload=Scale(16)).config["tile"] == 4


def test_where_the_default_won_nearby_the_own_default_is_used():
    choice = lookup(record(2, workload=Scale(96), is_default=True))
    assert (choice.config["tile"], choice.source, choice.record) == (8, "default", None)


def test_shape_distance():
    a = {"op": "x", "rows": 4, "causal": True, "dtype": "float32"}
    assert shape_distance(a, a) == (0, 0.0)
    assert shape_distance(a, {**a, "rows": 16}) == (0, 2.0)
    assert shape_distance(a, {**a, "rows": 1, "causal": False, "dtype": "bfloat16"}) == (2, 2.0)
    assert shape_distance(a, {**a, "rows": 0}) == (1, 0.0)


def test_the_users_records_come_before_shipped_ones(tmp_path, monkeypatch):
    shipped = tmp_path / "znver4.jsonl"
    Journal(shipped).extend([record(4, (0.1,)), record(16, (0.2,), workload=Scale(256))])
    monkeypatch.setattr(query, "shipped_journals", lambda: [shipped])
    assert Database().lookup(W, ZNVER4, TEMPLATE).config["tile"] == 4
    database = Database([record(2, (5.0,))])
    assert database.lookup(W, ZNVER4, TEMPLATE).config["tile"] == 2
    assert database.best(W, ZNVER4).config["tile"] == 2
    assert list(database.measured(W, ZNVER4)) == [Config.of(tile=2).key()]
    assert database.records() == [record(2, (5.0,))]
    assert database.lookup(Scale(256), ZNVER4, TEMPLATE).from_ == "shipped znver4.jsonl"
    assert Database(shipped=False).lookup(W, ZNVER4, TEMPLATE).source == "default"


def test_shipped_journals_are_readable():
    for path in query.shipped_journals():
        assert Journal(path).load()


def test_measured_holds_the_latest_of_each_config_failed_ones_too(tmp_path):
    path = tmp_path / "t.jsonl"
    journal = Journal(path)
    journal.extend([record(1, (1.0,)), record(2, status=Status.TIMEOUT), record(1, (3.0,))])
    journal.append(record(4, workload=Scale(8)))
    database = Database(path, shipped=False)
    assert database.measured(W, ZNVER4) == {
        Config.of(tile=1).key(): record(1, (3.0,)),
        Config.of(tile=2).key(): record(2, status=Status.TIMEOUT),
    }
    assert database.measured(W, ZNVER4, template="other:One") == {}
    assert database.measured(W, PRESETS["x86-64-v3"]) == {}
    assert len(Database([path, str(tmp_path / "none.jsonl")], shipped=False)) == 4


def test_pruning_changes_no_lookup():
    records = [record(t, (s,)) for t, s in ((1, 5.0), (2, 3.0), (4, 1.0), (16, 2.0))]
    records += [record(8, (4.0,), is_default=True), record(32, status=Status.RUN_ERROR)]
    finals = [record(t, (s,) * 4, final=True, time="2026-02-01") for t, s in ((16, 0.5), (8, 0.7))]
    kept = maintenance.pruned(records, keep=1)
    assert [r.config["tile"] for r in kept] == [4, 8]
    assert lookup(*kept) == lookup(*records)
    kept = maintenance.pruned([*records, *finals], keep=1)
    assert all(final in kept for final in finals)
    assert lookup(*kept) == lookup(*records, *finals)


def test_merging_keeps_one_of_each():
    a, b, c = record(1), record(2), record(4)
    assert maintenance.merged([[a, b], [b, c], [a]]) == [a, b, c]


def test_winners_and_their_differences():
    before = [record(1, (2.0,)), record(2, (3.0,)), record(4, workload=Scale(8))]
    after = [record(2, (1.0,)), record(1, workload=Scale(4)), record(16, status=Status.WRONG_RESULT)]
    assert maintenance.winners(before) == [record(1, (2.0,)), record(4, workload=Scale(8))]
    found = {d.workload: d for d in maintenance.diff(before, after)}
    assert found[W.key()].ratio == 0.5
    assert not found[W.key()].same_config
    assert found[Scale(8).key()].after is None
    assert found[Scale(8).key()].ratio is None
    assert found[Scale(4).key()].before is None
