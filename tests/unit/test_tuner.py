"""The tuning loop, with runners that compute or replay times: budgets, searching, finals, what may be tuned."""

import json

import pytest
from toys import FakeRunner, Toy, ToyModel, ToyTemplate, toy_secs
from tuning import TARGET, TOY, trial_keys, tune

from attntune.database.journal import Journal
from attntune.database.query import Database
from attntune.database.record import Status
from attntune.errors import TuningError
from attntune.measure.replay import ReplayRunner
from attntune.measure.trial import Trial
from attntune.progress import TaskState, TrialDone
from attntune.search import SEARCHERS, RandomSearcher
from attntune.search.space import Config

pytestmark = pytest.mark.usefixtures("toy_template")


class TestBudgets:
    @pytest.mark.parametrize(
        ("budget", "message"),
        [
            ({}, "expected a budget: seconds=… or trials=… or both"),
            ({"trials": 0}, "expected trials to be positive, got 0"),
            ({"seconds": -1.0}, "expected seconds to be positive, got -1.0"),
            ({"seconds": float("nan")}, "expected seconds to be positive, got nan"),
        ],
    )
    def test_a_budget_is_required(self, database, budget, message):
        with pytest.raises(TuningError, match=message):
            tune(TOY, database, **budget)
        assert not database.exists()

    @pytest.mark.parametrize("trials", [1, 7, 20])
    def test_trials_are_counted_exactly(self, database, trials):
        runner = FakeRunner()
        summary = tune([TOY, Toy(m=128)], database, runner, trials=trials)
        assert summary.trials == len(runner.trials) == len(trial_keys(database)) == trials
        assert summary.stopped_by == "trials"
        assert not summary.interrupted

    def test_seconds_include_the_finals(self, database, clock):
        runner = FakeRunner(clock=clock)
        summary = tune([TOY, Toy(m=128)], database, runner, seconds=60)
        assert summary.stopped_by == "seconds"
        assert len(runner.races) == 2
        assert 40 <= summary.elapsed_secs <= 62
        assert all(result.confirmed for result in summary.results)

    def test_a_short_time_still_measures_the_default(self, database, clock):
        runner = FakeRunner(clock=clock)
        summary = tune(TOY, database, runner, seconds=1.5)
        assert runner.trials[0].is_default
        assert summary.results[0].default_secs is not None

    def test_whichever_budget_ends_first(self, database, clock):
        assert tune(TOY, database, FakeRunner(clock=clock), seconds=1000, trials=5).stopped_by == "trials"

    def test_ends_by_itself_when_the_space_is_exhausted(self, database, small):
        runner = FakeRunner(lambda trial: 1.0 / trial.config.integer("tile"))
        summary = tune(TOY, database, runner, trials=1000)
        assert summary.stopped_by == "finished"
        assert summary.trials == 6

    def test_ends_by_itself_when_nothing_improves(self, database):
        summary = tune(TOY, database, FakeRunner(lambda trial: 1.0), trials=3000)
        assert summary.stopped_by == "finished"
        assert summary.trials < 100
        assert summary.results[0].source == "default"


class TestSearching:
    def test_the_default_of_every_workload_comes_first(self, database):
        runner = FakeRunner()
        tune([Toy(m=m) for m in (64, 128, 256)], database, runner, trials=20)
        assert [trial.is_default for trial in runner.trials[:4]] == [True, True, True, False]
        assert [trial.workload.m for trial in runner.trials[:3]] == [64, 128, 256]

    @pytest.mark.parametrize("searcher", sorted(SEARCHERS))
    def test_same_seed_same_trials(self, tmp_path, searcher):
        runners = [FakeRunner(), FakeRunner()]
        for i, runner in enumerate(runners):
            tune([TOY, Toy(m=128)], tmp_path / f"{i}.jsonl", runner, trials=30, searcher=searcher, seed=3)
        assert runners[0].keys() == runners[1].keys()
        assert runners[0].races == runners[1].races

    def test_the_evolutionary_searcher_finds_something_good(self, database):
        summary = tune(TOY, database, trials=50, searcher="evolutionary")
        (result,) = summary.results
        assert result.source == "tuned"
        assert result.best_secs < 1.15 * TOY.landscape.optimum()
        assert result.speedup > 1.5

    def test_workloads_of_one_template_learn_from_each_other(self, database):
        learned = []

        class Listening(RandomSearcher):
            def learn(self, group, features, cost):
                learned.append((group, len(features), cost))

        tune([TOY, Toy(m=128)], database, trials=10, searcher=Listening)
        assert {group for group, *_ in learned} == {TOY.key(), Toy(m=128).key()}
        assert len(learned) == 10
        assert len({length for _, length, _ in learned}) == 1

    def test_a_young_workload_tries_what_won_for_its_sibling(self, database):
        first = FakeRunner()
        tune(TOY, database, first, trials=40)
        best = Database([*Journal(database).load()], shipped=False).lookup(TOY, TARGET, ToyTemplate()).config
        second = FakeRunner()
        tune(Toy(m=256), database, second, trials=5)
        assert second.trials[0].is_default
        assert second.trials[1].config == best

    def test_operators_that_are_not_asked_for_are_not_tuned(self, database):
        assert [result.workload for result in tune(TOY, database, trials=2, operators=["toy"]).results] == [TOY]
        with pytest.raises(TuningError, match=r"unknown operators \['linear'\]; expected some of \['toy'\]"):
            tune(TOY, database, trials=2, operators=["linear"])

    def test_the_heavier_workload_gets_more_trials(self, database):
        light, heavy = Toy(n=384), Toy(n=1536)
        summary = tune({light: 1, heavy: 3}, database, trials=60, searcher="evolutionary")
        trials = {result.workload: result.trials for result in summary.results}
        assert trials[heavy] > trials[light] > 1

    def test_an_unknown_searcher_is_named(self, database):
        with pytest.raises(TuningError, match="unknown searcher 'bogo'; expected one of"):
            tune(TOY, database, trials=1, searcher="bogo")

    def test_failing_trials_are_recorded_and_passed_by(self, database):
        def secs(trial: Trial) -> float | None:
            return None if trial.config.integer("rows") % 4 == 0 else toy_secs(trial)

        summary = tune(TOY, database, FakeRunner(secs), trials=30, searcher="evolutionary")
        (result,) = summary.results
        assert result.statuses["build_error"] > 0
        assert sum(result.statuses.values()) == result.trials == 30
        assert result.default_secs is None
        assert result.source == "tuned"
        assert result.config.integer("rows") % 4 != 0

    def test_nothing_correct_at_all(self, database):
        summary = tune([TOY, Toy(m=128)], database, FakeRunner(lambda trial: None), trials=12)
        assert [(r.source, r.config, r.best_secs) for r in summary.results] == [("none", None, None)] * 2
        assert summary.statuses == {"build_error": 12}
        assert summary.speedup is None

    def test_a_broken_installation_does_not_fill_the_journal_with_failures(self, database):
        message = "16 trials and none worked; the last was a build_error: does not build"
        with pytest.raises(TuningError, match=message):
            tune([TOY, Toy(m=128)], database, FakeRunner(lambda trial: None), trials=500)
        assert len(trial_keys(database)) == 16


class TestFinals:
    def test_tuned_never_loses(self, database):
        """Single trials flatter all but the default; the race tells the truth."""

        def race_secs(trial: Trial) -> float:
            return 1.0 if trial.is_default else 1.2

        runner = FakeRunner(lambda trial: 1.0 if trial.is_default else 0.8, race_secs=race_secs)
        summary = tune(TOY, database, runner, trials=20)
        (result,) = summary.results
        assert result.source == "default"
        assert result.best_secs == result.default_secs == pytest.approx(1.0, rel=0.01)
        assert result.confirmed
        choice = Database(database, shipped=False).lookup(TOY, TARGET, ToyTemplate())
        assert choice.config == result.config == TOY.landscape.default

    def test_a_tie_goes_to_the_default(self, database):
        runner = FakeRunner(lambda trial: 1.0 if trial.is_default else 0.98, race_secs=lambda trial: 1.0)
        assert tune(TOY, database, runner, trials=10).results[0].source == "default"

    def test_the_winner_is_what_a_lookup_finds(self, database):
        runner = FakeRunner()
        workloads = [Toy(m=m) for m in (64, 128, 384)]
        summary = tune(workloads, database, runner, trials=60)
        found = Database(database, shipped=False)
        for workload, result in zip(workloads, summary.results, strict=True):
            choice = found.lookup(workload, TARGET, ToyTemplate())
            assert choice.source == "exact"
            assert (choice.config, choice.record.median_secs) == (result.config, result.best_secs)
            assert result.best_secs <= result.default_secs

    def test_finalists_are_the_default_and_the_best(self, database):
        runner = FakeRunner()
        tune(TOY, database, runner, trials=30)
        (race,) = runner.races
        assert race[0].is_default
        assert 2 <= len(race) <= 4
        limit = min(secs for secs in map(toy_secs, runner.trials) if secs is not None) * 1.11
        assert all(toy_secs(trial) < limit for trial in race[1:])

    def test_no_race_without_a_rival(self, database):
        runner = FakeRunner(lambda trial: 1.0 if trial.is_default else None)
        (result,) = tune(TOY, database, runner, trials=10).results
        assert runner.races == []
        assert (result.source, result.confirmed) == ("default", True)

    def test_a_config_that_fails_in_the_final_is_out(self, database):
        runner = FakeRunner(race_secs=lambda trial: toy_secs(trial) if trial.is_default else None)
        (result,) = tune(TOY, database, runner, trials=20).results
        assert result.source == "default"
        assert result.statuses["build_error"] >= 1
        assert Database(database, shipped=False).lookup(TOY, TARGET, ToyTemplate()).config == result.config

    def test_the_last_winner_defends_itself(self, database, small):
        secs = {1: 3.0, 2: 2.0, 4: 1.0}
        runner = FakeRunner(lambda trial: secs[trial.config.integer("tile")] if trial.config["order"] == "nm" else 2.5)
        tune(TOY, database, runner, trials=3)
        tune(TOY, database, runner, trials=100)
        assert len(runner.trials) == 6
        result = tune(TOY, database, runner, trials=1).results[0]
        assert result.config == Config.of(tile=4, order="nm")


class TestReplay:
    def test_searches_a_recorded_space(self, tmp_path, small):
        recording = tmp_path / "recording.jsonl"
        secs = {1: 3.0, 2: 2.0, 4: 1.0}
        tune(TOY, recording, FakeRunner(lambda trial: secs[trial.config.integer("tile")]), trials=100)
        runner = ReplayRunner(Journal(recording).load())
        for name in SEARCHERS:
            summary = tune(TOY, tmp_path / f"{name}.jsonl", runner, trials=100, searcher=name)
            assert summary.results[0].config.integer("tile") == 4
        assert runner.replayed == 6 * len(SEARCHERS)

    def test_what_is_not_in_the_recording_fails(self, database):
        summary = tune(TOY, database, ReplayRunner([]), trials=4)
        assert summary.statuses == {str(Status.RUN_ERROR): 4}


class TestWhatIsTuned:
    def test_a_model_with_shapes(self, database):
        summary = tune(ToyModel(), database, shapes=[{"batch": 1, "seq": 64}, {"batch": 2, "seq": 64}], trials=12)
        assert {(r.workload.m, r.workload.n): r.calls for r in summary.results} == {
            (64, 384): 4,
            (64, 1536): 2,
            (128, 384): 4,
            (128, 1536): 2,
        }

    def test_a_model_without_shapes(self, database):
        assert {r.workload.m for r in tune(ToyModel(), database, trials=2).results} == {128}

    def test_a_model_that_names_its_shapes(self, database):
        model = ToyModel()
        model.shapes = ({"batch": 3, "seq": 8}, {"batch": 1, "seq": 5})
        assert {r.workload.m for r in tune(model, database, trials=2).results} == {24, 5}
        shapes = [{"batch": 2, "seq": 2}]
        assert {r.workload.m for r in tune(model, database, trials=2, shapes=shapes).results} == {4}

    def test_chosen_entries(self, database):
        summary = tune(ToyModel(), database, entries=["forward"], trials=2)
        assert {r.workload.n: r.calls for r in summary.results} == {384: 4, 1536: 1}

    def test_a_list_counts_repeated_workloads(self, database):
        summary = tune([TOY, Toy(m=128), TOY], database, trials=4)
        assert [(r.workload, r.calls) for r in summary.results] == [(TOY, 2), (Toy(m=128), 1)]

    @pytest.mark.parametrize(
        ("what", "options", "message"),
        [
            ([], {}, "nothing to tune"),
            ("linear", {}, "expected a model, a Workload, or a list or dict of them; got str"),
            ([3], {}, "got int"),
            ({TOY: 0}, {}, "expected a positive number of calls"),
            (TOY, {"shapes": [{"batch": 1}]}, "expected shapes and entries only with a model"),
            (TOY, {"entries": ["forward"]}, "expected shapes and entries only with a model"),
            (ToyModel(), {"entries": ["embed", "attend"]}, r"unknown entries \['attend'\]; expected some of"),
            (ToyModel(), {"shapes": []}, "at least one shape"),
        ],
    )
    def test_anything_else_is_refused(self, database, what, options, message):
        with pytest.raises(TuningError, match=message):
            tune(what, database, trials=1, **options)


class TestReporting:
    def test_events(self, database):
        events = []
        flops = TOY.flops() / TOY.landscape.optimum()
        peaks = {"flops_per_sec": {"float32": flops}, "read_bytes_per_sec": 50e9}
        tune([TOY, Toy(m=128)], database, trials=12, seconds=1000, peaks=peaks, on_event=events.append)
        assert [event.workload for event in events[:2]] == [TOY, Toy(m=128)]
        assert [(event.trials, event.best_secs, event.default_secs) for event in events[:2]] == [(0, None, None)] * 2
        trials = [event for event in events if isinstance(event, TrialDone) and not event.record.final]
        assert [event.trials_done for event in trials] == list(range(1, 13))
        assert [event.trials_left for event in trials] == list(range(11, -1, -1))
        assert all(0 <= event.seconds_left <= 1000 for event in trials)
        assert any(isinstance(event, TrialDone) and event.record.final for event in events)
        last = [event for event in events if isinstance(event, TaskState) and event.workload == TOY][-1]
        assert 0 < last.peak_fraction <= 1.01
        assert last.speedup >= 1
        assert last.trials >= 2

    def test_the_state_of_a_resumed_run_is_known_at_once(self, database):
        tune(TOY, database, trials=10)
        events = []
        tune(TOY, database, trials=1, on_event=events.append)
        assert events[0].trials == 10
        assert events[0].best_secs is not None

    def test_the_summary_as_json(self, database):
        summary = tune(ToyModel(), database, trials=20)
        document = json.loads(json.dumps(summary.to_json()))
        assert document["target"] == TARGET.key()
        assert document["trials"] == 20
        assert document["database"] == str(database)
        assert document["interrupted"] is False
        assert document["statuses"] == {str(k): v for k, v in summary.statuses.items()}
        assert [r["calls"] for r in document["results"]] == [4, 2]
        assert all(r["source"] in ("tuned", "default") and r["config"] for r in document["results"])
        assert document["speedup"] == pytest.approx(summary.speedup)
