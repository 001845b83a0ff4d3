import numpy as np
import pytest

from attntune.cli.compare import _ENGINES
from attntune.engines import ENGINES
from attntune.engines.compare import engines_at
from attntune.engines.comparison import Case, Comparison, Outcome, Result
from attntune.engines.parity import agreement, parity_of
from attntune.errors import EngineError
from attntune.models.precision import PRECISIONS

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((2, 3, 64))
BF16 = parity_of("bfloat16", 1e-4)


def test_rounding_to_bfloat16_passes_its_parity_and_not_float32s():
    rough = {"y": ROWS * (1 + RNG.uniform(-0.004, 0.004, ROWS.shape))}
    found = agreement(rough, {"y": ROWS}, BF16)
    assert found.problem == ""
    assert 0.999 < found.min_cosine < 1.0
    assert "max abs error" in agreement(rough, {"y": ROWS}, parity_of("float32", 1e-4)).problem


@pytest.mark.parametrize(("wrong", "problem"), [
    (ROWS * 2.0, "norm"),
    (-ROWS, "cosine"),
    (np.concatenate([ROWS[:1], RNG.standard_normal((1, 3, 64))]), "cosine"),
    (np.where(ROWS[0, 0, 0] == ROWS, np.nan, ROWS), "cosine"),
    (ROWS[:1], "shape"),
])  # fmt: skip
def test_one_wrong_row_or_a_wrong_scale_is_seen(wrong, problem):
    assert problem in agreement({"y": wrong}, {"y": ROWS}, BF16).problem


def test_rows_of_zeros_must_be_zero():
    zeroed = ROWS.copy()
    zeroed[0, 0] = 0.0
    assert agreement({"y": zeroed}, {"y": zeroed}, BF16).problem == ""
    assert "norm" in agreement({"y": ROWS}, {"y": zeroed}, BF16).problem


def test_every_precision_has_its_parity_and_lower_ones_ask_for_less():
    demanded = {precision: parity_of(precision, 1e-4).min_cosine for precision in PRECISIONS if precision != "float32"}
    assert demanded["bfloat16"] > demanded["int8"] > demanded["int4"] >= demanded["w4a8"] > 0.9


def test_precisions_name_their_engines():
    with pytest.raises(EngineError, match="float4"):
        engines_at("float4")
    with pytest.raises(EngineError, match="float4"):
        parity_of("float4", 1e-4)
    assert set(engines_at("bfloat16")) == {"openvino-bf16", "pytorch-bf16", "zentorch-bf16"}
    assert "metaschedule" not in engines_at("float32", "bfloat16")
    assert {*_ENGINES.split(", "), "attntune"} == set(ENGINES)


def test_the_best_is_of_attntunes_own_precision():
    case = Case({"batch": 1, "seq": 128})
    secs = {"attntune": 1.0, "onnxruntime": 1.5, "openvino": 1.2, "openvino-bf16": 0.6}
    results = tuple(Result(name, case, Outcome.OK, ((s, s),) * 3) for name, s in secs.items())
    found = Comparison("m", "forward", 2, results, {"openvino-bf16": {"precision": "bfloat16"}})
    name, ratio = found.best_peer(case)
    assert (name, ratio.value) == ("openvino", pytest.approx(1.2))
    assert found.best()[0]["engine"] == "openvino"
    own = Comparison("m", "forward", 2, results, {n: {"precision": "bfloat16"} for n in ("attntune", "openvino-bf16")})
    assert own.best_peer(case)[0] == "openvino-bf16"
