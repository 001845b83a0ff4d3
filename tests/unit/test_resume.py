"""A tuning run that was ended, interrupted or killed goes on where it stopped."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys import FakeRunner, SmallTemplate, Toy, ToyTemplate
from tuning import TARGET, TOY, trial_keys, tune

from attntune import templates, tuner
from attntune.database.journal import Journal
from attntune.database.record import TuningRecord
from attntune.errors import AttntuneError, DatabaseError
from attntune.measure.trial import Trial
from attntune.progress import TrialDone
from attntune.search import RandomSearcher
from attntune.search.space import Config

pytestmark = pytest.mark.usefixtures("toy_template")


class TestResume:
    def test_never_measures_twice(self, database):
        runners = [FakeRunner() for _ in range(3)]
        for runner in runners:
            summary = tune([TOY, Toy(m=128)], database, runner, trials=12, searcher="evolutionary")
        keys = [key for runner in runners for key in runner.keys()]  # noqa: SIM118
        assert len(keys) == len(set(keys)) == 36
        assert summary.resumed == 24
        assert sum(result.trials for result in summary.results) == 36

    def test_an_exhausted_space_costs_nothing_again(self, database, small):
        tune(TOY, database, FakeRunner(lambda trial: 1.0 / trial.config.integer("tile")), trials=100)
        before = database.read_bytes()
        runner = FakeRunner()
        summary = tune(TOY, database, runner, trials=100)
        assert (runner.trials, runner.races) == ([], [])
        assert database.read_bytes() == before
        assert summary.results[0].config.integer("tile") == 4
        assert summary.results[0].confirmed

    def test_what_the_journal_holds_is_learned_from(self, database):
        told = []

        class Listening(RandomSearcher):
            def tell(self, config, cost):
                told.append(config)
                super().tell(config, cost)

        tune(TOY, database, trials=10)
        tune(TOY, database, trials=1, searcher=Listening)
        assert [config.key() for config in told[:10]] == [key for _, key in trial_keys(database)[:10]]

    @pytest.mark.parametrize(
        "change",
        [
            {"target": "cpu/skylake-avx512/2"},
            {"template": "elsewhere:Template"},
            {"cache": "cold"},
            {"config": Config.of(tile=3, order="mn")},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_records_of_something_else_do_not_count(self, database, small, change):
        recorder = FakeRunner(lambda trial: 1.0)
        trial = Trial(TOY, TARGET, SmallTemplate().reference_name(), SmallTemplate().default(TOY, TARGET))
        fields = {**recorder.record(trial, 1.0, 3).to_json(), **change}
        fields["config"] = dict(change.get("config", trial.config))
        Journal(database).append(TuningRecord.from_json(fields))
        runner = FakeRunner(lambda trial: 1.0)
        summary = tune(TOY, database, runner, trials=100)
        assert len(runner.trials) == 6
        assert summary.resumed == 0

    def test_a_malformed_database_is_not_ignored(self, database):
        database.write_text('{"schema": 1}\nnonsense\n')
        with pytest.raises(DatabaseError, match="line 1"):
            tune(TOY, database, trials=1)


class TestInterrupt:
    def test_ctrl_c_keeps_everything_and_resumes(self, database):
        runner = FakeRunner(interrupt_after=9)
        summary = tune(TOY, database, runner, trials=30)
        assert summary.interrupted
        assert summary.stopped_by == "interrupt"
        assert summary.trials == len(trial_keys(database)) == 9
        assert runner.closed == 1
        assert str(database) in summary.resume
        assert summary.results[0].best_secs is not None
        again = FakeRunner()
        assert tune(TOY, database, again, trials=30).resumed == 9
        assert not set(runner.keys()) & set(again.keys())

    def test_ctrl_c_in_the_final(self, database):
        summary = tune(TOY, database, FakeRunner(interrupt_after=-1), trials=10)
        assert summary.interrupted
        assert summary.trials == 10
        assert not summary.results[0].confirmed
        again = FakeRunner()
        resumed = tune(TOY, database, again, trials=1)
        assert len(again.races) == 1
        assert resumed.results[0].confirmed

    def test_ctrl_c_pressed_twice(self, database):
        class Pressed(FakeRunner):
            def close(self):
                super().close()
                raise KeyboardInterrupt

        runner = Pressed(interrupt_after=5)
        summary = tune(TOY, database, runner, trials=10)
        assert (summary.interrupted, summary.trials, runner.closed) == (True, 5, 1)

    def test_ctrl_c_while_an_event_is_handled(self, database):
        def press(event):
            if isinstance(event, TrialDone) and event.trials_done == 3:
                raise KeyboardInterrupt

        assert tune(TOY, database, trials=10, on_event=press).interrupted
        assert len(trial_keys(database)) == 3

    @pytest.fixture
    def usual_handler(self):
        """A shell without job control starts what it runs in the background with the signal ignored."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.mark.usefixtures("usual_handler")
    def test_ctrl_c_where_the_exception_is_lost(self, database):
        def lost(event):
            with contextlib.suppress(KeyboardInterrupt):
                if isinstance(event, TrialDone) and event.trials_done == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(1)

        assert tune(TOY, database, trials=10, on_event=lost).interrupted
        assert len(trial_keys(database)) == 3
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_an_error_of_the_runner_is_raised_and_nothing_is_lost(self, database):
        class Broken(FakeRunner):
            def measure(self, trials):
                yield from itertools.islice(super().measure(trials), 1)
                raise AttntuneError("the machine is on fire")

        runner = Broken()
        with pytest.raises(AttntuneError, match="on fire"):
            tune(TOY, database, runner, trials=10)
        assert len(trial_keys(database)) == 1
        assert runner.closed == 0

    def test_a_runner_made_here_is_closed(self, database, monkeypatch):
        runner = FakeRunner()
        monkeypatch.setattr(tuner, "_local_runner", lambda cache: runner)
        tuner.tune(TOY, target=TARGET, database=database, trials=2, searcher="random", peaks={})
        assert runner.closed == 1


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from toys import FakeRunner, Toy, ToyTemplate, toy_secs
from attntune import templates, tuner
templates.template_for = lambda workload, target: ToyTemplate()
def secs(trial):
    time.sleep(0.002)
    return toy_secs(trial)
def said(event):
    if hasattr(event, "record"):
        print(event.record.final, event.record.workload, event.record.config.key(), sep="\\t", flush=True)
tuner.tune([Toy(), Toy(m=128)], target="znver4", database=sys.argv[2], runner=FakeRunner(secs), searcher="random",
           trials=int(sys.argv[3]), peaks={}, on_event=said)
"""


def test_killed_at_any_moment_nothing_is_lost_or_repeated(database):
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    said: list[tuple[str, str]] = []
    for after in (1, 8, 25, 0, 60):
        command = [sys.executable, "-W", "ignore", "-c", CHILD, here, str(database), "1000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            lines = [child.stdout.readline() for _ in range(after)]
            time.sleep(0.001 * (after % 7))
            child.send_signal(signal.SIGKILL)
            lines += child.stdout.read().splitlines(keepends=True)
        whole = [line.rstrip("\n").split("\t") for line in lines if line.endswith("\n")]
        said += [(workload, config) for final, workload, config in whole if final == "False"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "template_for", lambda workload, target: ToyTemplate())
        tune([TOY, Toy(m=128)], database, trials=10)
    kept = trial_keys(database)
    assert len(said) >= 94
    assert set(said) <= set(kept)
    assert len(kept) == len(set(kept))
