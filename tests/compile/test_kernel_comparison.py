"""Kernels against PyTorch: right before timed, kept with raw samples, shown in generated tables."""

import dataclasses

import pytest

from attntune.engines.compare_kernels import KernelOptions, compare_kernels
from attntune.engines.comparison import Outcome
from attntune.engines.kernel_comparison import KernelCase, KernelComparison, KernelResult
from attntune.engines.kernel_suites import KERNEL_SUITES
from attntune.errors import EngineError, ReportError
from attntune.kernel_cache import KernelCache
from attntune.ops import Attention, LayerNorm, Linear
from attntune.report.benchmarks import kernel_section, update_page
from attntune.target import native

#: Memory is said to be slow, so that everything waits for it, and what is measured beside a round is more.
PEAKS = {"flops_per_sec": {"float32": 2e11}, "read_bytes_per_sec": 1e6, "copy_bytes_per_sec": 3e10}
QUICK = KernelOptions(rounds=2, turn_secs=0.001, max_samples=3, pause_secs=0.0)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    cases = [
        KernelCase("float32", "3×40→20", Linear(3, 40, 20)),
        KernelCase("int8 weights", "7×80→40", Linear(7, 80, 40, weight_dtype="int8")),
        KernelCase("int4", "5×80→40", Linear(5, 80, 40, weight_dtype="uint4")),
        KernelCase("float32 causal", "1×9", Attention(1, 4, 9, 9, 16, kv_heads=2, causal=True)),
        KernelCase("float32", "norm", LayerNorm(3, 40)),
        KernelCase("int8", "3×40→20", None, "no such dtype"),
    ]
    kernels = KernelCache(tmp_path_factory.mktemp("kernels"))
    return compare_kernels(
        "few", cases, ["pytorch"], kernels, target=native(), options=QUICK, peaks=lambda _: PEAKS
    )  # fmt: skip


def test_right_engines_are_timed_and_others_are_named(found):
    for label in ("3×40→20", "1×9"):
        results = [r for r in found.results if r.label == label and r.workload]
        assert {(r.engine, r.cache) for r in results} == {
            (engine, cache) for engine in ("attntune", "pytorch") for cache in ("hot", "cold")
        }
        for result in results:
            assert result.outcome is Outcome.OK
            assert len(result.rounds) == 2
            assert result.max_rel_error < 1e-5
            assert result.way
            # 3×40→20 waits for memory, which is measured where operands come from there.
            assert bool(result.limits) == (result.engine == "attntune" and result.cache == "cold")
    by_engine = {(r.engine, r.cache): r for r in found.results if r.label == "7×80→40"}
    assert set(by_engine) == {(engine, cache) for engine in ("attntune", "pytorch") for cache in ("hot", "cold")}
    for (engine, _), result in by_engine.items():
        if engine == "pytorch" or native().has("avx2"):
            assert result.outcome is Outcome.OK
            assert 0 < result.max_rel_error < (0.05 if engine == "pytorch" else 1e-5)
        else:
            assert result.outcome is Outcome.UNAVAILABLE
            assert "no template schedules linear" in result.message
    assert by_engine["pytorch", "hot"].way.startswith("linear_dynamic")
    four_bits = {r.engine: r for r in found.results if r.group == "int4"}
    assert four_bits["attntune"].outcome is Outcome.OK
    assert four_bits["attntune"].max_rel_error < 1e-5
    assert "no uint4 weights" in four_bits["pytorch"].message
    norm = {r.engine: r for r in found.results if r.label == "norm"}
    assert norm["attntune"].outcome is Outcome.OK
    assert norm["pytorch"].outcome is Outcome.FAILED
    assert "no function" in norm["pytorch"].message
    assert [r.outcome for r in found.results if r.group == "int8"] == [Outcome.UNAVAILABLE] * 2


def test_it_round_trips_and_becomes_a_table(found, tmp_path):
    again = KernelComparison.load(found.save(tmp_path / "samples.json"))
    assert again.cases() == found.cases()
    shares = [(r.share(), s.share()) for r, s in zip(again.results, found.results, strict=True)]
    assert all((a is None) == (b is None) for a, b in shares)
    assert any(a is not None and a.value == pytest.approx(b.value, rel=1e-3) for a, b in shares)
    assert again.peaks == found.peaks
    assert found.peaks["flops_per_sec"] == PEAKS["flops_per_sec"]
    assert found.peaks["read_bytes_per_sec"] > 100 * PEAKS["read_bytes_per_sec"]
    section = kernel_section(again, "few/samples.json")
    assert "| float32 causal | 1×9 | cold |" in section
    assert "% of the moment's" in section
    assert "% of the moment's" not in kernel_section(_without_limits(again), "few/samples.json")
    assert "no such dtype" in section
    page = tmp_path / "README.md"
    page.write_text("# Measurements\n\nBy hand.\n")
    update_page(page, "few", section)
    update_page(page, "few", "## few: newer\n")
    assert page.read_text().count("## few") == 1
    assert page.read_text().startswith("# Measurements\n\nBy hand.\n")
    page.write_text(page.read_text().replace("<!-- end few -->", ""))
    with pytest.raises(ReportError, match="both marks"):
        update_page(page, "few", section)


def _without_limits(found):
    """As it was kept before the machine was measured beside the rounds."""
    fields = found.to_json()
    return KernelComparison.from_json(
        {**fields, "results": [{k: v for k, v in row.items() if k != "limits"} for row in fields["results"]]}
    )


def test_the_share_is_of_the_rates_beside_each_round():
    key = Linear(64, 64, 64).key()
    result = KernelResult(
        "float32", "64", key, "hot", "attntune", Outcome.OK, ((2.0, 2.0), (4.0, 4.0), (5.0,)),
        limits=((1.0, 1.0), (3.0,), (4.0, 4.0)),
    )  # fmt: skip
    assert result.share().value == pytest.approx(0.75)
    assert dataclasses.replace(result, limits=()).share() is None


def test_every_suite_has_cases_that_say_what_they_are():
    for name, suite in KERNEL_SUITES.items():
        cases = list(suite(native(), ("float32", "int8", "int4")))
        assert len({(case.group, case.label) for case in cases}) == len(cases), name
        if name in ("linear", "gemv"):
            assert {c.workload.weight_dtype for c in cases if c.group == "int4"} == {"uint4"}
        else:
            assert all(c.group.startswith("float32") for c in cases), "attention has no weight to be int4"
        assert all((case.workload is None) == bool(case.problem) for case in cases)
        assert all(case.workload is not None for case in cases if case.group.startswith("float32"))


def test_mistakes_are_named(tmp_path):
    with pytest.raises(EngineError, match="rounds"):
        dataclasses.replace(QUICK, rounds=0)
    with pytest.raises(EngineError, match="warm"):
        dataclasses.replace(QUICK, caches=("warm",))
    with pytest.raises(EngineError, match="unknown kernel engines"):
        compare_kernels("x", [], ["no"], KernelCache(tmp_path), target=native())
    with pytest.raises(EngineError, match="at least one case"):
        compare_kernels("x", [], [], KernelCache(tmp_path), target=native())
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(EngineError, match=r"x\.json"):
        KernelComparison.load(tmp_path / "x.json")
