"""Writers side by side: a small Llama continued by attntune and by PyTorch, and what the page says of it."""

import json

import pytest
from checkpoints import LLAMA, llama_tensors, write

from attntune.compiler import compile
from attntune.engines.generation import compare_writers
from attntune.engines.writers import WRITERS, Writer, WriterSource
from attntune.errors import EngineError
from attntune.models import from_pretrained
from attntune.report.benchmarks import generation_section
from attntune.target import native


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writers")
    path = write(folder / "model", LLAMA, llama_tensors(LLAMA))
    model = from_pretrained(path)
    shape = {"batch": 1, "seq": 12, "context": 32}
    saved = {
        precision: str(
            compile(model, shapes=[shape], entries=["prefill", "decode"], precision=precision).save(folder / precision)
        )
        for precision in ("float32", "int4")
    }
    return compare_writers(
        WriterSource(str(path), saved, 32), {"12 tokens": list(range(3, 15))}, 9,
        {name: WRITERS[name] for name in ("attntune", "attntune-int8", "attntune-int4", "pytorch")},
        target=native().with_cores(1), rounds=2, say=lambda line: None,
    )  # fmt: skip


def test_writers_agree_and_every_round_is_kept(found):
    tokens = found["tokens"]["12 tokens"]
    assert tokens["attntune"] == tokens["pytorch"]
    assert len(tokens["attntune"]) == len(tokens["attntune-int4"]) == 9
    assert found["writers"]["attntune-int4"]["precision"] == "int4"
    samples = found["samples"]["12 tokens"]
    assert [len(samples[name]) for name in ("attntune", "attntune-int4", "pytorch")] == [2, 2, 2]
    assert all(turn["prefill_secs"] > 0 < turn["step_secs"] for rounds in samples.values() for turn in rounds)


def test_one_that_fails_is_left_out_with_its_reason(found):
    assert "int8" in found["left_out"]["attntune-int8"]
    assert "attntune-int8" not in found["samples"]["12 tokens"]


def test_the_page_has_rates_and_ratios(found):
    text = generation_section(json.loads(json.dumps({"model": "tiny", **found})), "raw.json")
    secs = sorted(turn["step_secs"] for turn in found["samples"]["12 tokens"]["pytorch"])
    assert f"| PyTorch | {2 / sum(secs):.1f} |" in text
    assert "PyTorch 9" in text
    assert "attntune-int8" in text


def test_nobody_left_is_an_error():
    class Pencil(Writer):
        package = "pencil"

    with pytest.raises(EngineError, match="package pencil is not installed"):
        compare_writers(
            WriterSource("", {}, 1), {"x": [1]}, 1, {"pencil": Pencil}, target=native(), rounds=1, say=print
        )


def test_a_precision_that_was_not_compiled_is_named():
    with pytest.raises(EngineError, match=r"no artifact in int8; expected one of \['float32'\]"):
        WriterSource("", {"float32": "a.attn"}, 1).artifact("int8")
