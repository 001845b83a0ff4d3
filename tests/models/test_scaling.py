"""scripts/bottleneck: what it trains is what attntune runs; what threads bring, from models to tables."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from attntune.engines.interleaved import Contender, interleaved
from attntune.engines.scaling import dependent_steps, entry_flops
from attntune.errors import EngineError
from attntune.interop import evaluate
from attntune.report.benchmarks import table
from attntune.report.scaling import points, scaling_section

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("torch")
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("bottleneck", ROOT / "scripts" / "bottleneck.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "scripts"))


def seeded(script, kind, width=16):
    c = script.config(kind, width, 8)
    return script.model(kind, script.seeded_weights(c, 1), c), c


@pytest.mark.parametrize("kind", ["fixed", "additive", "transformer"])
def test_what_is_trained_is_what_runs(script, kind):
    import torch

    model, c = seeded(script, kind)
    source, target = script.batch(np.random.default_rng(0), 2, 5)
    given = {**script.source_inputs(source), "decoder_input_ids": target}
    expected = evaluate(model, given)["logits"]
    import bottleneck_models

    logits = bottleneck_models.transformer_logits if kind == "transformer" else bottleneck_models.rnn_logits
    weights = {name: torch.from_numpy(value) for name, value in model.weights.items()}
    found = logits(weights, c, torch.from_numpy(source), torch.from_numpy(target)).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_accuracy_counts_tokens_and_whole_sequences(script):
    class Copying:
        def generate(self, prompts, source, **options):
            tokens = [row[::-1].tolist() for row in source["input_ids"]]
            tokens[0] = tokens[0][:2]  # stops too early: 2 of 4 right
            return type("Found", (), {"tokens": tokens})

    assert script.accuracy(Copying(), 4, 8, 0) == (30 / 32, 7 / 8)


def test_steps_grow_with_the_length_of_a_recurrence_only(script):
    """One for each position; and the operators before and after it, which see all positions at once."""
    found = {
        kind: [dependent_steps(seeded(script, kind)[0], "encode", {"batch": 1, "source": n}) for n in (4, 8)]
        for kind in script.KINDS
    }
    assert found["fixed"] == [4 + 2, 8 + 2]
    assert found["additive"] == [4 + 4, 8 + 4]
    assert found["transformer"][0] == found["transformer"][1] == 1 + 7 * 2 + 2


def test_flops_of_an_encoder_count_every_call(script):
    """A GRU of 16 on embeddings of 8: lookup, projection (its bias is not counted), recurrent product, ten a gate."""
    model, _ = seeded(script, "fixed")
    lookup = 8
    projection = 48 * 2 * 8
    recurrent = 3 * 16 * (2 * 16 + 10)
    assert entry_flops(model, "encode", {"batch": 2, "source": 4}) == 2 * 4 * (lookup + projection + recurrent)


def test_a_wrong_model_is_not_timed(script):
    from attntune.compiler import compile

    right, c = seeded(script, "fixed")
    wrong = script.model("fixed", {**right.weights, "encoder.gru.recurrent_bias": np.ones(48, np.float32)}, c)
    shapes = [{"batch": 1, "source": 4}]
    artifact = compile(wrong, shapes=shapes, entries=["encode"])
    with pytest.raises(EngineError, match="it at 1×4: state is off by"):
        interleaved({"it": Contender(right, artifact, 1, "encode")}, shapes, rounds=1, turn_secs=0.01, say=print)


def test_scaling_alone_leaves_what_was_measured_before(script, tmp_path, monkeypatch):
    peaks = {"flops_per_sec": {"float32": 2e11}}
    measured = script.scaling
    monkeypatch.setattr(script, "scaling", lambda *a, **k: measured(*a, **k, peaks=lambda target: peaks))
    before = {"task": "reverse", "scaling": {"999": "kept"}}
    (tmp_path / "bottleneck.json").write_text(json.dumps(before))
    monkeypatch.setattr(script, "write_scaling", lambda found, folder: None)
    shapes = ["1x4", "2x8"]
    script.main(["--only", "scaling", "--widths", "16", "--scaling", *shapes, "--rounds", "2", "--seconds", "0",
                 "--out", str(tmp_path)])  # fmt: skip
    after = json.loads((tmp_path / "bottleneck.json").read_text())
    assert after["task"] == "reverse"
    assert after["scaling"]["999"] == "kept"
    document = after["scaling"]["16"]
    assert set(document["models"]) == set(script.KINDS)
    for rows in document["models"].values():
        assert [row["dims"] for row in rows] == [{"batch": 1, "source": 4}, {"batch": 2, "source": 8}]
        for row in rows:
            assert set(row["rounds"]) == {"1", "2"}
            assert all(len(turns) == 2 and min(map(min, turns)) > 0 for turns in row["rounds"].values())
    monkeypatch.undo()
    script.write_scaling({"16": document}, tmp_path)
    assert (tmp_path / "bottleneck-scaling.png").stat().st_size > 10_000
    page = (tmp_path / "README.md").read_text()
    assert "GRU, fixed context | 2×8 |" in page
    script.write_scaling({"16": document}, tmp_path)
    assert (tmp_path / "README.md").read_text() == page


def test_table_follows_from_the_samples():
    row = {
        "dims": {"batch": 1, "source": 4}, "flops": 8_000_000, "dependent_steps": 6,
        "rounds": {"1": [[2e-3, 2e-3], [4e-3, 4e-3]], "2": [[1e-3, 1e-3], [2e-3, 2e-3]]},
    }  # fmt: skip
    peaks = {"1": {"flops_per_sec": {"float32": 1e10}}, "2": {"flops_per_sec": {"float32": 2e10}}}
    document = {
        "threads": [1, 2], "models": {"gru": [row]}, "peaks": peaks, "settings": {"rounds": 2, "tuning_secs": 0},
        "machine": {"cpu_model": "A CPU"}, "time": "2025-01-01T00:00:00",
    }  # fmt: skip
    one, two = points(document)
    assert (one.median_secs, two.median_secs) == (3e-3, 1.5e-3)
    assert one.speed_up is None
    assert two.speed_up.value == 2.0
    assert two.flops_per_sec == pytest.approx(8e6 / 1.5e-3)
    assert (one.share, two.share) == pytest.approx((8 / 3 / 10, 8 / 1.5 / 20))
    text = scaling_section(document, {"gru": "GRU"}, "Encoders")
    assert "| GRU | 1×4 | 8 | 6 | 3 [2, 4] | 2.67 | 27 | 1.5 [1, 2] | 5.33 | 27 | 2.00× [2.00, 2.00] |" in text


def test_committed_page_shows_the_committed_samples(script):
    folder = ROOT / "results" / "bottleneck-znver4"
    page = (folder / "README.md").read_text()
    results = json.loads((folder / "bottleneck.json").read_text())
    for width, document in results.get("scaling", {}).items():
        assert scaling_section(document, script.KINDS, f"Encoders {width} wide").strip() in page
    lengths = (4, 16, 24, 32, 40, 48)
    for kind, cells in zip(script.KINDS, [line for line in page.splitlines() if line.count("|") == 8][2:], strict=True):
        rows = {row["length"]: f"{100 * row['tokens']:.1f}" for row in results["models"][kind]["accuracy"]}
        assert cells.split("|")[2:-1] == table([], [[""] + [rows[n] for n in lengths]])[-1].split("|")[2:-1]
