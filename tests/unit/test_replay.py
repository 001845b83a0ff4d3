"""A runner that answers from records, for tests of everything above it."""

from records import TEMPLATE, ZNVER4, Scale, record

from attntune.database.record import Status
from attntune.measure.replay import ReplayRunner
from attntune.measure.trial import Trial
from attntune.search.space import Config


def trial(tile, **fields):
    return Trial(Scale(64), ZNVER4, TEMPLATE.reference_name(), Config.of(tile=tile), **fields)


def test_answers_what_was_recorded_in_the_order_asked():
    recording = [record(1, (1.0,)), record(2, (2.0,)), record(4, status=Status.TIMEOUT)]
    with ReplayRunner(recording) as runner:
        assert list(runner.measure([trial(4), trial(2), trial(1)])) == recording[::-1]
        assert runner.replayed == 3


def test_the_trial_says_what_is_the_default():
    (answer,) = ReplayRunner([record(1)]).measure([trial(1, is_default=True)])
    assert answer.is_default


def test_what_was_not_recorded_is_a_run_error():
    (answer,) = ReplayRunner([record(1)]).measure([trial(2)])
    assert answer.status is Status.RUN_ERROR
    assert answer.message == "not in recording"
    assert answer.config == Config.of(tile=2)


def test_races_answer_from_final_records_first():
    recording = [
        record(1, (1.0, 1.1)),
        record(1, (0.5, 0.6), final=True, time="2026-02-01"),
        record(2, (2.0, 2.1, 2.2)),
    ]
    runner = ReplayRunner(recording)
    first, second = runner.race([trial(1), trial(2)], rounds=2)
    assert first.final
    assert second.final
    assert first.run_secs == (0.5, 0.6)
    assert second.run_secs == (2.0, 2.1)
    assert first.time == second.time
    assert runner.race([], rounds=2) == []
    assert next(runner.measure([trial(1)])).run_secs == (1.0, 1.1)
