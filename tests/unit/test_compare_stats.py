import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attntune.engines.comparison import Case, Comparison, Outcome, Result, geometric_mean, paired_ratio
from attntune.errors import EngineError

CASE = Case({"batch": 1, "seq": 128})


def timed(engine, medians, case=CASE, error=1e-6):
    rounds = tuple((m * 0.9, m, m * 1.2) for m in medians)
    return Result(engine, case, Outcome.OK, rounds, error)


def comparison(*results, **fields):
    return Comparison("tiny", "forward", 2, results, **fields)


def test_ratio_is_paired_by_round():
    drift = np.array([1.0, 5.0, 1.0, 9.0, 2.0])  # the machine slows down in some rounds, for both alike
    ratio = paired_ratio(drift * 1.5, drift)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert ratio.verdict == "faster"


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [([2.0, 2.1, 1.9] * 4, "faster"), ([0.5, 0.6, 0.55] * 4, "slower"), ([0.9, 1.1, 1.0, 1.05] * 3, "tied")],
)
def test_verdict_needs_the_whole_interval_on_one_side(theirs, verdict):
    assert paired_ratio(theirs, np.ones(12)).verdict == verdict


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=20), st.floats(0.1, 10.0))
def test_interval_holds_the_ratio_and_scales_with_it(pairs, factor):
    theirs, ours = np.array(pairs).T
    ratio = paired_ratio(theirs, ours)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value == pytest.approx(float(np.median(theirs / ours)))
    scaled = paired_ratio(theirs * factor, ours)
    assert (scaled.value, scaled.low, scaled.high) == pytest.approx(
        (ratio.value * factor, ratio.low * factor, ratio.high * factor)
    )
    assert paired_ratio(theirs, ours) == ratio


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        ratio = paired_ratio(1.2 * np.exp(rng.normal(0, 0.1, 15)), np.exp(rng.normal(0, 0.1, 15)))
        hits += ratio.low <= 1.2 <= ratio.high
    assert 0.88 <= hits / 200 <= 1.0


def test_ratio_refuses_different_rounds():
    with pytest.raises(EngineError, match="got 2 and 3"):
        paired_ratio([1.0, 1.0], [1.0, 1.0, 1.0])
    with pytest.raises(EngineError, match="got 0 and 0"):
        paired_ratio([], [])


def test_medians_and_quartiles_are_of_all_samples():
    result = Result("attntune", CASE, Outcome.OK, ((1.0, 2.0, 3.0), (4.0, 5.0)))
    assert result.median_secs == 3.0
    assert result.quartiles_secs == (2.0, 4.0)
    assert list(result.round_medians) == [2.0, 4.5]
    assert result.samples == (1.0, 2.0, 3.0, 4.0, 5.0)
    failed = Result("pytorch", CASE, Outcome.FAILED, message="boom")
    assert math.isnan(failed.median_secs)
    assert all(math.isnan(q) for q in failed.quartiles_secs)


def test_only_a_right_result_carries_times():
    for outcome in (Outcome.WRONG_RESULT, Outcome.FAILED, Outcome.UNAVAILABLE):
        with pytest.raises(EngineError, match="expected samples"):
            Result("pytorch", CASE, outcome, ((1.0,),))
    with pytest.raises(EngineError, match="expected samples"):
        Result("pytorch", CASE, Outcome.OK)
    with pytest.raises(EngineError, match="expected samples"):
        Result("pytorch", CASE, Outcome.OK, ((1.0,), ()))


def test_ratio_only_where_both_were_timed():
    cold = Case({"batch": 1, "seq": 128}, cache="cold")
    found = comparison(
        timed("attntune", [1.0, 1.1, 1.0]),
        timed("onnxruntime", [1.5, 1.6, 1.4]),
        Result("pytorch", CASE, Outcome.WRONG_RESULT, max_abs_error=0.5, message="off"),
        timed("onnxruntime", [3.0, 3.0, 3.0], case=cold),
    )
    assert found.ratio("onnxruntime", CASE).value == pytest.approx(1.4545, abs=1e-3)
    assert found.ratio("pytorch", CASE) is None
    assert found.ratio("onnxruntime", cold) is None
    assert found.ratio("nobody", CASE) is None
    assert found.cases() == (CASE, cold)
    assert found.engine_names() == ("attntune", "onnxruntime", "pytorch")
    rows = found.summary()
    assert [row["verdict"] for row in rows] == [None, "faster", None, None]
    assert rows[2]["median_secs"] is None


def test_labels_name_what_is_unusual():
    assert CASE.label() == "1×128"
    assert Case({"batch": 5, "seq": 200}, "ragged", "cold").label() == "5×200 ragged cold"


def test_json_keeps_every_sample(tmp_path):
    found = comparison(
        timed("attntune", [1.0, 2.0]),
        Result("pytorch", CASE, Outcome.UNAVAILABLE, message="pip install torch"),
        engines={"pytorch": {"title": "PyTorch"}},
        settings={"rounds": 2},
        machine={"cpu_model": "Zen"},
        time="2026-01-01T00:00:00+00:00",
    )
    assert Comparison.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert Comparison.load(found.save(tmp_path / "deep" / "c.json")) == found
    assert found.title("pytorch") == "PyTorch"
    assert found.title("onnxruntime") == "onnxruntime"


@pytest.mark.parametrize("break_it", [
    lambda fields: fields.pop("results"),
    lambda fields: fields.update(schema=99),
    lambda fields: fields["results"][0].update(outcome="splendid"),
    lambda fields: fields["results"][0].update(rounds=[["fast"]]),
    lambda fields: fields["results"][0].update(case=3),
])  # fmt: skip
def test_malformed_comparisons_are_refused(tmp_path, break_it):
    fields = json.loads(json.dumps(comparison(timed("attntune", [1.0])).to_json()))
    break_it(fields)
    path = tmp_path / "c.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(EngineError, match=r"c\.json"):
        Comparison.load(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(EngineError, match=r"nothing\.json"):
        Comparison.load(tmp_path / "nothing.json")


def test_geometric_mean():
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert math.isnan(geometric_mean([]))
