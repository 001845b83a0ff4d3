import re
import xml.etree.ElementTree as ElementTree

import pytest
from report_data import PEAKS, TARGET, WORKLOADS, comparison, record, tuning_records

from attntune.database.record import Status
from attntune.engines.comparison import Case, Comparison, Outcome, Result
from attntune.errors import ReportError
from attntune.ops import Attention, Linear, Softmax
from attntune.report import write_report
from attntune.report.kernels import peaks_for, short_label, summarize, tuning_curve
from attntune.report.markdown import headline, table
from attntune.report.plots import MAX_PANELS, panels

LINEAR = WORKLOADS[0][0]
CALLS = dict(zip((workload.key() for workload, _ in WORKLOADS), (6, 6, 6, 13), strict=True))
SUMMARY = {
    "searcher": "evolutionary", "seed": 0, "trials": 96, "elapsed_secs": 118.2, "resumed": 3, "speedup": 1.2,
    "results": [{"workload": key, "calls": calls} for key, calls in CALLS.items()],
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    path = write_report(folder, tuning_records(), [comparison()], SUMMARY, PEAKS, title="Tuning of a test")
    return path.read_text(), folder


def rows_of(text, heading):
    """Cells of the first table under a heading."""
    part = text.split(heading, 1)[1]
    lines = re.search(r"((?:^\|.*\|$\n?)+)", part, re.MULTILINE).group(1).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| :")]


def test_every_image_the_text_names_is_there_and_well_formed(written):
    text, folder = written
    images = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert images == ["speed-1.png", "kernels.png", "tuning-trials.png", "tuning-seconds.png"]
    for name in images:
        png = (folder / name).read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 10_000
        svg = ElementTree.parse(folder / name.replace(".png", ".svg"))
        assert svg.getroot().tag.endswith("svg")


def test_speed_table_holds_medians_and_intervals(written):
    text, _ = written
    header, *rows = rows_of(text, "## all-MiniLM-L6-v2")
    assert header[:4] == ["batch × seq", "attntune, ms", "ONNX Runtime, ms", "PyTorch, ms"]
    assert [row[0] for row in rows] == ["1×128", "8×128", "1×512"]
    found = comparison()
    case = found.cases()[0]
    ratio = found.ratio("onnxruntime", case)
    assert rows[0][1].startswith(f"{found.result('attntune', case).median_secs * 1e3:.3g}")
    assert f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]" in rows[0][4]


def test_what_is_slower_is_said_plainly(written):
    text, _ = written
    section = text.split("## Where attntune is not faster")[1].split("\n## ")[0]
    assert "at 1×512: PyTorch takes 0.8" in section
    assert "ONNX Runtime" not in section
    assert "(slower)" in text
    assert "slower in 1" in text
    assert "Not timed:\n\n- torch.compile: not installed: needs a C++ compiler" in text


def test_defaults_that_tuning_could_not_beat_are_named(tmp_path):
    records = [record(LINEAR, 0, 1e-3), record(LINEAR, 1, 2e-3), record(Softmax(4, 8), 0, None, Status.RUN_ERROR)]
    text = write_report(tmp_path, records).read_text()
    assert f"nothing better than the default schedule for 1 kernels: {short_label(LINEAR.key())}" in text
    assert "No schedule was right for: softmax 4×8." in text


def test_kernel_table_shows_share_of_peak(written):
    text, _ = written
    header, *rows = rows_of(text, "## Kernels")
    assert header == ["kernel", "calls", "default, µs", "tuned, µs", "speed-up", "% of peak", "rate", "trials"]
    by_name = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    row = by_name["linear 128×384→1152"]
    kernel = summarize(tuning_records(), SUMMARY)[0]
    expected = 100 * LINEAR.flops() / 215e9 / kernel.winner.median_secs
    assert row["% of peak"] == f"{expected:.0f} (compute)"
    assert row["calls"] == "6"
    assert row["trials"] == "24"
    assert row["rate"].endswith("GFLOP/s")
    assert by_name["layer norm 128×384 +residual"]["% of peak"].endswith("(memory)")
    assert "84 correct, 4 timeout, 4 wrong result, 4 build error" in text


def test_winner_and_default_come_from_the_same_final_round():
    kernel = summarize(tuning_records())[0]
    assert kernel.winner.final
    assert kernel.default.final
    assert kernel.default.is_default
    assert kernel.default.time == kernel.winner.time
    assert kernel.speedup == pytest.approx(kernel.default.median_secs / kernel.winner.median_secs)
    assert kernel.searched_default_secs == pytest.approx(1e-3)
    assert kernel.trials == 24


def test_curve_is_the_running_minimum_and_counts_failures():
    records = [
        record(LINEAR, 0, 3.0),
        record(LINEAR, 1, None, Status.TIMEOUT),
        record(LINEAR, 2, 4.0),
        record(LINEAR, 3, 1.0),
    ]
    curve = tuning_curve(records)
    assert [point.trial for point in curve] == [1, 2, 3, 4]
    assert [point.secs for point in curve] == [3.0, None, 4.0, 1.0]
    assert [point.best_secs for point in curve] == [3.0, 3.0, 3.0, 1.0]
    assert [point.elapsed_secs for point in curve] == [0.0, 1.5, 3.0, 4.5]
    assert tuning_curve([record(LINEAR, 0, 3.0, time="")])[0].elapsed_secs is None
    assert tuning_curve([]) == ()


def test_cold_and_hot_records_and_templates_are_kept_apart():
    records = [
        record(LINEAR, 0, 1e-3),
        record(LINEAR, 0, 2e-3, cache="cold"),
        record(LINEAR, 0, 3e-3, template="other.module:T"),
    ]
    kernels = summarize(records)
    assert [kernel.winner.median_secs for kernel in kernels] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert kernels[1].label.endswith(" cold")


def test_an_operator_of_somebody_elses_still_gets_a_row(tmp_path):
    strange = record(LINEAR, 0, 1e-3)
    strange = type(strange)(**{**strange.__dict__, "workload": '{"op":"rotary","rows":4}'})
    text = write_report(tmp_path, [strange], peaks=PEAKS).read_text()
    assert '{"op":"rotary","rows":4}' in text


def test_records_alone_and_comparisons_alone(tmp_path):
    only_records = write_report(tmp_path / "r", tuning_records(trials=3, final=False)).read_text()
    assert "speed-1" not in only_records
    assert "kernels.png" not in only_records  # no peak is known
    assert not (tmp_path / "r" / "kernels.png").exists()
    only_comparison = write_report(tmp_path / "c", comparisons=[comparison(), comparison()]).read_text()
    assert "speed-2.png" in only_comparison
    assert "## Kernels" not in only_comparison
    assert Comparison.load(tmp_path / "c" / "comparison-2.json") == comparison()


def test_comparison_in_which_nothing_could_be_timed(tmp_path):
    failed = Result("attntune", Case({"batch": 1, "seq": 8}), Outcome.FAILED, message="boom | really\nmore")
    text = write_report(tmp_path, comparisons=[Comparison("m", "forward", 2, (failed,))]).read_text()
    assert "speed-1.png" not in text
    assert "attntune: failed: boom | really" in text


def test_machine_table_gives_the_range_of_load(written):
    text, _ = written
    rows = dict(rows_of(text, "## Machine"))
    assert rows["CPU"] == "AMD EPYC 9R14"
    assert rows["load average (1 min) while measuring"] == "0.00 to 2.30"
    assert rows["measured float32 multiply-add peak"] == "215 GFLOP/s"


def test_the_same_data_give_the_same_files(tmp_path, written):
    _, folder = written
    write_report(tmp_path, tuning_records(), [comparison()], SUMMARY, PEAKS, title="Tuning of a test")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_nothing_to_report_and_unwritable_folders_are_errors(tmp_path):
    with pytest.raises(ReportError, match="got neither"):
        write_report(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ReportError, match="cannot write"):
        write_report(blocked / "report", tuning_records(trials=1))


def test_peaks_belong_to_one_target():
    assert peaks_for(PEAKS, TARGET, 1) is PEAKS
    assert peaks_for(PEAKS, TARGET, 2) is None
    assert peaks_for({TARGET: PEAKS}, TARGET, 2) is PEAKS
    assert peaks_for({TARGET: PEAKS}, "cpu/other/1", 2) is None
    assert peaks_for(None, TARGET, 1) is None


def test_labels():
    gqa = Attention(batch=2, heads=8, kv_heads=2, q_len=1, kv_len=77, head_dim=64, causal=True)
    assert short_label(gqa.key()) == "attention 2×1→77 8/2h d64 causal"
    assert short_label(Linear(4, 8, 16, residual=True, dtype="bfloat16").key()) == "linear 4×8→16 +residual bfloat16"
    assert short_label("not json") == "not json"


def test_curves_are_drawn_for_the_kernels_that_weigh_most():
    kernels = summarize(
        [record(Softmax(rows, 8), i, rows * 1e-6) for rows in range(1, MAX_PANELS + 5) for i in range(2)]
    )
    drawn = panels(kernels)
    assert len(drawn) == MAX_PANELS
    assert drawn[0].label == f"softmax {MAX_PANELS + 4}×8"


def test_headline_and_table():
    lines = headline(comparison())
    assert len(lines) == 3
    assert re.search(r"as fast as the best of all float32 engines in each case\*\* in the geometric mean", lines[0])
    assert re.search(r"\*\*1\.4\d× as fast as ONNX Runtime\*\* in the geometric mean of 3 cases", lines[1])
    assert table(["a", "b"], [["x|y", "1"]]) == ["| a | b |", "| :--- | ---: |", "| x\\|y | 1 |", ""]
