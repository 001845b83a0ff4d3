import subprocess
import sys
from pathlib import Path

import pytest
from graphs import tiny_bert

from attntune.engines import ModelSource, session
from attntune.engines.compare import CompareOptions, compare
from attntune.engines.comparison import Comparison, Outcome
from attntune.errors import EngineError
from attntune.measure.worker import IsolatedProcess

HERE = str(Path(__file__).parent)
QUICK = CompareOptions(rounds=3, turn_secs=0.002, max_calls=4, pause_secs=0.0, plugin_paths=(HERE,))
SHAPES = [{"batch": 1, "seq": 5}, {"batch": 3, "seq": 8}]


def test_engines_are_checked_then_timed_in_turns():
    options = CompareOptions(rounds=3, turn_secs=0.002, max_calls=4, pause_secs=0.0, masks=("full", "ragged"),
                             caches=("hot", "cold"))  # fmt: skip
    said = []
    found = compare(tiny_bert(), None, SHAPES[:1], ("onnxruntime", "pytorch"), threads=1, options=options,
                    on_event=said.append)  # fmt: skip
    assert [case.label() for case in found.cases()] == ["1×5", "1×5 cold", "1×5 ragged", "1×5 ragged cold"]
    assert found.engine_names() == ("onnxruntime", "pytorch")
    for result in found.results:
        assert result.outcome is Outcome.OK
        assert [3 <= len(samples) <= 4 for samples in result.rounds] == [True] * 3
        assert min(result.samples) > 0
        assert result.max_abs_error < 1e-5
    assert found.threads == 1
    assert found.engines["pytorch"]["title"] == "PyTorch"
    assert found.engines["pytorch"]["version"]
    assert found.machine["cpu_model"]
    assert found.settings["rounds"] == 3
    assert found.result("onnxruntime", found.cases()[0]).variant
    ratio = found.ratio("pytorch", found.cases()[0], baseline="onnxruntime")
    assert 0 < ratio.low <= ratio.value <= ratio.high
    assert any("loading" in line for line in said)
    assert Comparison.from_json(found.to_json()) == found


def test_engines_that_fail_are_reported_and_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    names = ["Wrong", "Crashing", "CrashingLater", "Missing", "Unloadable"]
    engines = ["onnxruntime", *(f"strange_engines:{name}" for name in names)]
    found = compare(tiny_bert(), None, SHAPES, engines, threads=1, options=QUICK)
    outcomes = {name: [r for r in found.results if r.engine.endswith(f":{name}")] for name in names}
    expected = {
        "Wrong": (Outcome.WRONG_RESULT, "max abs error"),
        "Crashing": (Outcome.FAILED, "SIGABRT"),
        "CrashingLater": (Outcome.FAILED, "SIGABRT"),
        "Missing": (Outcome.UNAVAILABLE, "pip install no-such-package"),
        "Unloadable": (Outcome.FAILED, "the model does not fit"),
    }
    for name, (outcome, message) in expected.items():
        assert len(outcomes[name]) == len(SHAPES)
        for result in outcomes[name]:
            assert result.outcome is outcome
            assert message in result.message
            assert not result.rounds
    assert outcomes["Wrong"][0].max_abs_error == pytest.approx(0.01, abs=1e-4)
    good = [r for r in found.results if r.engine == "onnxruntime"]
    assert [r.outcome for r in good] == [Outcome.OK] * 2


def test_mistakes_of_the_caller_are_named():
    model = tiny_bert()
    with pytest.raises(EngineError, match=r"'tvm'.*attntune.*onnxruntime"):
        compare(model, None, SHAPES, ["tvm"])
    with pytest.raises(EngineError, match=r"'generate'.*embed.*forward"):
        compare(model, None, SHAPES, ["pytorch"], entry="generate")
    with pytest.raises(EngineError, match="at least one engine and one shape"):
        compare(model, None, [], ["pytorch"])
    with pytest.raises(EngineError, match="warm"):
        CompareOptions(caches=("warm",))
    with pytest.raises(EngineError, match="rounds"):
        CompareOptions(rounds=0)
    with pytest.raises(EngineError, match="cannot import"):
        compare(model, None, SHAPES, ["no_such_module:Engine"])
    with pytest.raises(EngineError, match="subclass"):
        compare(model, None, SHAPES, ["pathlib:Path"])


def test_the_process_of_attntunes_own_engine_imports_no_torch():
    with IsolatedProcess(threads=1) as process, pytest.raises(EngineError, match="artifact"):
        process.call("attntune.engines.session:open_engine", "attntune", ModelSource("forward", ("y",)), 1)
    heavy = "{'torch', 'tvm', 'onnx', 'onnxruntime'}"
    code = f"import sys, attntune.engines.session; print(sorted({heavy} & set(sys.modules)))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(HERE).parents[1]
    )
    assert shown.stdout.strip() == "[]"


def test_a_session_must_be_opened_first(monkeypatch):
    monkeypatch.setattr(session, "_engine", None)
    with pytest.raises(EngineError, match="open_engine"):
        session.outputs("key", {})
