"""``attntune records`` on small databases, and what tuning shows while it runs."""

import csv
import json

import pytest

from attntune import cli
from attntune.cli.live import Progress, describe
from attntune.database.journal import Journal
from attntune.database.record import Status, TuningRecord
from attntune.ops import Softmax
from attntune.progress import TaskState, TrialDone
from attntune.search.space import Config

TASK = Softmax(rows=4, features=64)
OTHER = Softmax(rows=8, features=64)


def record(rows, secs=None, workload=TASK, **fields):
    """A trial of knob `rows`: correct in `secs`, or a build error."""
    status = Status.CORRECT if secs else Status.BUILD_ERROR
    samples = tuple(secs * (1 + 0.001 * i) for i in range(5)) if secs else ()
    return TuningRecord(
        workload.key(), "cpu/znver4/2", "attntune.templates.cpu.softmax:SoftmaxCpu", Config.of(rows=rows), status,
        samples, time="2026-01-02" if fields.get("final") else f"2026-01-01T00:00:{rows:02d}+00:00", **fields,
    )  # fmt: skip


@pytest.fixture
def database(tmp_path):
    """Two workloads: one with a default and a config that beat it, another and a failure, one with a single config."""
    path = tmp_path / "tuning.jsonl"
    Journal(path).extend(
        [
            record(1, 4e-3, is_default=True, final=True),
            record(2, 1e-3, final=True),
            record(3, 2e-3),
            record(4),
            record(1, 5e-6, OTHER),
        ]
    )
    return path


def ask(capsys, *words):
    """The JSON document of a command that succeeds."""
    code = cli.main(["records", *map(str, words), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


class TestList:
    def test_everything_fastest_first(self, capsys, database):
        rows = [r["config"]["rows"] for r in ask(capsys, "list", database) if r["workload"] == TASK.key()]
        assert rows == [2, 3, 1, 4]

    def test_best(self, capsys, database):
        assert sorted(r["config"]["rows"] for r in ask(capsys, "list", database, "--best")) == [1, 2]

    def test_filters(self, capsys, database):
        assert [r["config"]["rows"] for r in ask(capsys, "list", database, "--status", "build_error")] == [4]
        assert len(ask(capsys, "list", database, "--op", "softmax")) == 5
        assert ask(capsys, "list", database, "--op", "linear") == []

    def test_text(self, capsys, database):
        assert cli.main(["records", "list", str(database), "--limit", "2"]) == 0
        out = capsys.readouterr().out
        assert "softmax(rows=4, features=64)" in out
        assert "1 ms" in out
        assert "5 records (1 build_error, 4 correct), 3 not shown" in out

    def test_unknown_status(self, capsys, database):
        assert cli.main(["records", "list", str(database), "--status", "great"]) == 2
        assert "expected one of ['correct', 'wrong_result'" in capsys.readouterr().err

    def test_malformed_line_is_named(self, capsys, database):
        lines = database.read_text().splitlines()
        database.write_text("\n".join([lines[0], "{nonsense", *lines[1:]]) + "\n")
        assert cli.main(["records", "list", str(database)]) == 2
        assert "line 2: expected a tuning record" in capsys.readouterr().err


def test_merge_adds_what_is_missing(capsys, database, tmp_path):
    more, whole = tmp_path / "more.jsonl", tmp_path / "whole.jsonl"
    Journal(more).extend([record(2, 1e-3, final=True), record(7, 3e-3)])
    assert ask(capsys, "merge", database, more, "-o", whole)["added"] == 6
    assert ask(capsys, "merge", database, more, "-o", whole)["added"] == 0
    assert len(Journal(whole).load()) == 6


def test_prune_keeps_the_fastest_and_the_default(capsys, database, tmp_path):
    small = tmp_path / "small.jsonl"
    document = ask(capsys, "prune", database, "-o", small, "--keep", "1")
    assert (document["kept"], document["removed"]) == (3, 2)
    assert [(r.workload == TASK.key(), r.config["rows"]) for r in Journal(small).load()] == [
        (True, 1), (True, 2), (False, 1),
    ]  # fmt: skip
    assert len(Journal(database).load()) == 5


@pytest.mark.parametrize("words", [["prune"], ["export"], ["export", "--csv"]])
def test_no_file_is_overwritten(capsys, database, words):
    before = database.read_bytes()
    assert cli.main(["records", *words, str(database), "-o", str(database)]) == 2
    assert "not to exist yet" in capsys.readouterr().err
    assert database.read_bytes() == before


def test_diff(capsys, database, tmp_path):
    later = tmp_path / "later.jsonl"
    Journal(later).append(record(3, 5e-4))
    mine, other = sorted(ask(capsys, "diff", database, later), key=lambda d: d["workload"] != TASK.key())
    assert mine["ratio"] == pytest.approx(0.5)
    assert mine["same_config"] is False
    assert (other["after_secs"], other["ratio"]) == (None, None)
    assert cli.main(["records", "diff", str(database), str(later)]) == 0
    assert "0.500" in capsys.readouterr().out


class TestExport:
    def test_winners(self, capsys, database, tmp_path):
        best = tmp_path / "best.jsonl"
        assert ask(capsys, "export", database, "-o", best)["written"] == 2
        assert {(r.workload, r.config["rows"]) for r in Journal(best).load()} == {(TASK.key(), 2), (OTHER.key(), 1)}

    def test_csv(self, capsys, database, tmp_path):
        sheet = tmp_path / "all.csv"
        assert ask(capsys, "export", database, "-o", sheet, "--csv")["written"] == 5
        rows = list(csv.DictReader(sheet.read_text().splitlines()))
        assert [row["status"] for row in rows].count("build_error") == 1
        assert float(rows[1]["median_secs"]) == pytest.approx(1.002e-3)
        assert rows[3]["median_secs"] == ""


def state(trials=3, best_secs=1e-3, **fields):
    """A workload's state in the middle of a run."""
    known = {"calls": 6, "failures": 1, "default_secs": 2e-3, "peak_fraction": 0.5, "finished": False}
    return TaskState(TASK, trials=trials, best_secs=best_secs, **{**known, **fields})


class TestProgress:
    def test_description(self):
        assert describe(state()) == ["3 trials", "best 1 ms", "2.00x the default", "50 % of peak"]
        assert describe(state(best_secs=None, peak_fraction=None)) == ["3 trials", "best -"]

    def test_plain_lines_go_to_standard_error(self, capsys, monkeypatch):
        monkeypatch.setattr("attntune.cli.live._PLAIN_INTERVAL_SECS", 0.0)
        with Progress(live=False) as progress:
            progress(state(trials=0, best_secs=None))
            progress(TrialDone(record(2, 1e-3), state(), trials_done=3, trials_left=7, seconds_left=None))
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.splitlines() == [
            "3 trials, 7 trials left  |  softmax(rows=4, features=64): "
            "3 trials, best 1 ms, 2.00x the default, 50 % of peak"
        ]

    def test_live_table_names_every_workload(self):
        from rich.console import Console

        progress = Progress(live=True)
        progress(state())
        progress(TaskState(OTHER, 1, 0, 0, None, None, None, False))
        progress(TrialDone(record(2, 1e-3), state(), trials_done=3, trials_left=None, seconds_left=60.0))
        console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(progress.table())
        shown = console.export_text()
        assert "softmax(rows=4, features=64)" in shown
        assert "softmax(rows=8, features=64)" in shown
        assert "2.00x" in shown
        assert "50 %" in shown
        assert "3 trials, " in shown
        assert "s left" in shown
