"""The command line: help, JSON, errors, and the verbs that need no compiler."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from attntune import cli
from attntune.cli import doctor as doctor_module
from attntune.cli.common import Reply, command, parse_shapes, seconds_text, table
from attntune.cli.tune import resume_command, subject_of
from attntune.errors import InputError

VERBS = ("target", "tune", "compile", "run", "perplexity", "compare", "report", "export", "records", "doctor")
HEAVY = {
    "tvm", "tvm_ffi", "torch", "numpy", "onnx", "onnxruntime", "lightgbm", "matplotlib", "tokenizers", "safetensors",
    "rich.progress", "rich.live", "rich.table",
}  # fmt: skip


def answer(capsys, *words):
    """Exit code, standard output and standard error of one command in this process."""
    code = cli.main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class TestHelp:
    def test_main_help_names_every_verb(self, capsys):
        code, out, _ = answer(capsys, "--help")
        assert code == 0
        assert all(f"\n  {verb} " in out for verb in VERBS)

    @pytest.mark.parametrize("verb", VERBS)
    def test_each_verb_has_help(self, capsys, verb):
        code, out, _ = answer(capsys, verb, "--help")
        assert code == 0
        assert f"attntune {verb}" in out
        assert verb == "records" or ("--json" in out and "--traceback" in out)

    @pytest.mark.parametrize("words", [["--help"], ["tune", "--help"], ["records", "--help"], ["--version"]])
    def test_help_imports_nothing_heavy(self, words):
        script = (
            "import sys; from attntune.cli import main; code = main(sys.argv[1:]);"
            "print(sorted(sys.modules), file=sys.stderr); sys.exit(code)"
        )
        child = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
        assert child.returncode == 0
        assert not HEAVY & set(eval(child.stderr))

    def test_version(self, capsys):
        import attntune

        assert answer(capsys, "--version")[1] == f"attntune {attntune.__version__}\n"

    def test_no_arguments_shows_help(self, capsys):
        _, out, err = answer(capsys)
        assert "Usage" in out + err


class TestErrors:
    def test_unknown_target(self, capsys):
        code, out, err = answer(capsys, "target", "znver9")
        assert (code, out) == (2, "")
        assert err.startswith("error: unknown target 'znver9'; expected")
        assert "Traceback" not in err

    def test_as_json(self, capsys):
        code, out, err = answer(capsys, "target", "znver9", "--json")
        assert code == 2
        error = json.loads(out)["error"]
        assert error["type"] == "TargetError"
        assert "unknown target 'znver9'" in error["message"]
        assert "unknown target" in err

    def test_traceback_on_request(self):
        with pytest.raises(ValueError, match="znver9"):
            cli.main(["target", "znver9", "--traceback"])

    def test_a_bug_keeps_its_traceback(self, monkeypatch):
        monkeypatch.setattr(doctor_module, "CHECKS", (lambda: 1 / 0,))
        with pytest.raises(ZeroDivisionError):
            cli.main(["doctor"])

    @pytest.mark.parametrize(
        "words",
        [
            ["compile", "./nowhere", "-o", "x.attn"],
            ["tune", "./nowhere", "--seconds", "1"],
            ["export", "./nowhere", "-o", "x.onnx"],
        ],
    )
    def test_missing_model(self, capsys, tmp_path, monkeypatch, words):
        monkeypatch.chdir(tmp_path)
        code, out, err = answer(capsys, *words)
        assert (code, out) == (2, "")
        assert "expected a model directory" in err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["run", "gone.attn", "--text", "a"], "expected an artifact or a model at gone.attn"),
            (["run", "gone.attn"], "expected either --text"),
            (["run", "gone.attn", "--text", "a", "--inputs", "b.npz"], "expected either --text"),
            (["compile", ".", "-o", "x.attn", "--database", "gone.jsonl"], "expected a tuning database at gone.jsonl"),
            (["compile", ".", "-o", "x.attn", "--shapes", "1x"], "expected shapes such as 1x128,8x128"),
            (["compare", ".", "gone.attn"], "expected an artifact at gone.attn"),
            (["report", "-o", "r", "--database", "gone.jsonl"], "expected a tuning database at gone.jsonl"),
            (["report", "-o", "r", "--comparison", "gone.json"], "expected a comparison at gone.json"),
            (["report", "-o", "r"], "expected --database"),
            (
                ["report", "-o", "r", "--comparison", ".", "--summary", "gone.json"],
                "expected a tuning summary at gone.json",
            ),
            (["records", "list", "gone.jsonl"], "expected a tuning database at gone.jsonl"),
            (["tune", '{"op": "linear"}', "./model"], "expected one model, or workload keys only"),
            (["tune", "./one", "./two"], "expected one model, or workload keys only"),
            (["tune", '{"op": "conv"}'], "unknown operator 'conv'"),
            (["tune", '{"op": "linear"'], "malformed workload key"),
        ],
    )
    def test_message(self, capsys, tmp_path, monkeypatch, words, message):
        monkeypatch.chdir(tmp_path)
        code, out, err = answer(capsys, *words)
        assert (code, out) == (2, "")
        assert message in err

    @pytest.mark.parametrize("words", [["tune"], ["target", "--frobnicate"], ["tune", "x", "--trials", "0"]])
    def test_usage_errors(self, capsys, words):
        code, out, err = answer(capsys, *words)
        assert (code, out) == (2, "")
        assert "Usage: attntune" in err
        code, out, _ = answer(capsys, *words, "--json")
        assert code == 2
        assert json.loads(out)["error"]["type"] == "UsageError"

    @pytest.mark.parametrize("text", ["", "1x", "x128", "0x128", "1x128,", "1x128;8x128", "1x1.5", "-1x4"])
    def test_bad_shapes(self, text):
        with pytest.raises(InputError, match=r"1x128,8x128 \(batch x sequence length\)"):
            parse_shapes(text)


class TestCommand:
    def test_json_replaces_text(self, capsys):
        def verb(count: int = 2) -> Reply:
            return Reply({"count": count}, f"{count} things", exit_code=1)

        import typer

        run = command(verb)
        with pytest.raises(typer.Exit) as stop:
            run(count=3, json_output=True, traceback=False)
        assert stop.value.exit_code == 1
        assert json.loads(capsys.readouterr().out) == {"count": 3}
        with pytest.raises(typer.Exit):
            run(count=3, json_output=False, traceback=False)
        assert capsys.readouterr().out == "3 things\n"

    def test_json_has_no_infinities(self, capsys):
        import typer

        found = Reply({"errors": [float("inf"), float("nan"), 1.5]}, "")
        with pytest.raises(typer.Exit):
            command(lambda: found)(json_output=True, traceback=False)
        assert json.loads(capsys.readouterr().out) == {"errors": [None, None, 1.5]}

    def test_interrupt_exits_with_130(self, capsys, monkeypatch):
        def interrupted():
            raise KeyboardInterrupt

        monkeypatch.setattr(doctor_module, "CHECKS", (interrupted,))
        assert cli.main(["doctor"]) == 130


class TestText:
    def test_shapes(self):
        assert parse_shapes("1x128, 8×64") == [{"batch": 1, "seq": 128}, {"batch": 8, "seq": 64}]

    @pytest.mark.parametrize(
        ("secs", "text"),
        [(None, "-"), (float("inf"), "-"), (1.234e-5, "12.3 us"), (4.5678e-3, "4.57 ms"), (1.2, "1.2 s")],
    )
    def test_seconds(self, secs, text):
        assert seconds_text(secs) == text

    def test_table_aligns_numbers_right_and_words_left(self):
        lines = table(("name", "count"), [("a", 5), ("long name", 12345)]).splitlines()
        assert lines == ["name       count", "---------  -----", "a              5", "long name  12345"]


class TestTarget:
    def test_preset(self, capsys):
        code, out, _ = answer(capsys, "target", "znver4")
        assert code == 0
        assert "cpu/znver4/8" in out
        assert "avx512bf16" in out

    def test_json_reads_back(self, capsys):
        from attntune.target import PRESETS, Target

        _, out, _ = answer(capsys, "target", "sm_90a", "--json")
        fields = json.loads(out)
        assert fields.pop("key") == "cuda/sm_90a/132"
        assert Target.from_json(fields) == PRESETS["sm_90a"]

    def test_list(self, capsys):
        from attntune.target import PRESETS

        _, out, _ = answer(capsys, "target", "--list", "--json")
        assert {preset["name"] for preset in json.loads(out)} == set(PRESETS)

    def test_measuring_a_foreign_target_is_an_error(self, capsys):
        code, _, err = answer(capsys, "target", "aarch64-neon", "--measure")
        assert code == 2
        assert "aarch64" in err


class TestTune:
    def test_resume_command_repeats_what_was_asked(self):
        again = resume_command(["my model"], "native", 60.0, None, Path("t.jsonl"), "random", 3, "1x8", True, None)
        assert again == (
            "attntune tune 'my model' --seconds 60 --database t.jsonl --searcher random --seed 3 --shapes 1x8 --cold"
        )

    def test_resume_command_leaves_out_defaults(self):
        again = resume_command(
            ["m"], "native", None, 5, Path("t.jsonl"), "evolutionary", 0, None, False, Path("t.json")
        )
        assert again == "attntune tune m --trials 5 --database t.jsonl --output t.json"

    def test_workload_keys(self):
        from attntune.ops import Softmax

        workload = Softmax(rows=4, features=8)
        assert subject_of([workload.key(), workload.key()], None) == [workload, workload]
        with pytest.raises(InputError, match="--shapes and --entries only with a model"):
            subject_of([workload.key()], "1x128")


class TestDoctor:
    def test_this_environment_is_fit(self, capsys):
        code, out, _ = answer(capsys, "doctor", "--json")
        document = json.loads(out)
        assert (code, document["ok"]) == (0, True), document
        names = {check["name"] for check in document["checks"]}
        assert {"python", "apache-tvm", "apache-tvm-ffi", "tvm", "threads", "isa", "compiler"} <= names

    def test_pins_are_those_of_the_package(self):
        import tomllib

        pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
        dependencies = pyproject["project"]["dependencies"]
        assert {f"{name}=={version}" for name, version in doctor_module.PINS.items()} <= set(dependencies)
        extras = pyproject["project"]["optional-dependencies"]
        for extra, (packages, _) in doctor_module.EXTRAS.items():
            assert {requirement.split(">=")[0] for requirement in extras[extra]} == set(packages)

    def test_wrong_pin_fails_with_a_remedy(self, capsys, monkeypatch):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.15")
        monkeypatch.setattr(doctor_module, "CHECKS", (doctor_module.pins,))
        code, out, _ = answer(capsys, "doctor")
        assert code == 1
        assert "fail  apache-tvm-ffi: 0.1.15, expected exactly 0.1.14.post1" in out
        assert "-> pip install apache-tvm-ffi==0.1.14.post1" in out

    def test_a_crashing_tvm_is_a_finding(self, monkeypatch):
        monkeypatch.setattr(doctor_module, "_PROBE", "import os; os.abort()")
        doctor_module.probe_tvm.cache_clear()
        try:
            (check,) = doctor_module.tvm_works()
        finally:
            doctor_module.probe_tvm.cache_clear()
        assert check.status == "fail"
        assert "exit code -6" in check.message
        assert "apache-tvm-ffi==0.1.14.post1" in check.remedy

    def test_no_compiler(self, monkeypatch):
        monkeypatch.setattr(doctor_module.shutil, "which", lambda name: None)
        (check,) = doctor_module.linker()
        assert check.status == "fail"
        assert "g++" in check.remedy

    def test_a_compiler_that_cannot_link(self, monkeypatch):
        monkeypatch.setattr(doctor_module.shutil, "which", lambda name: "/bin/false")
        (check,) = doctor_module.linker()
        assert (check.status, check.message.split(":")[0]) == ("fail", "/bin/false cannot link")

    @pytest.mark.parametrize(("text", "expected"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("?", None)])
    def test_cpu_quota(self, tmp_path, text, expected):
        (tmp_path / "cpu.max").write_text(text)
        assert doctor_module.cpu_quota(tmp_path / "cpu.max") == expected

    def test_missing_extra_is_a_warning(self, monkeypatch):
        monkeypatch.setattr(doctor_module, "EXTRAS", {"onnx": (("onnx_not_there",), "export")})
        (check,) = doctor_module.optional_packages()
        assert (check.status, check.remedy) == ("warn", "pip install 'attntune[onnx]'")

    def test_torch_extension(self, monkeypatch):
        found = {"torch": object()}
        monkeypatch.setattr(importlib.util, "find_spec", found.get)
        monkeypatch.setattr(cli, "torch_extension_chosen", False)
        (check,) = doctor_module.torch_extension()
        assert check.status == "warn"
        assert "TVM_FFI_DISABLE_TORCH_C_DLPACK=1" in check.remedy
        found["torch_c_dlpack_ext"] = object()
        assert [check.status for check in doctor_module.torch_extension()] == ["ok"]
        found.clear()
        assert list(doctor_module.torch_extension()) == []


def test_shapes_of_an_encoder_decoder_have_a_source_and_a_target():
    both = {"batch": 1, "source": 64, "target": 32}
    assert parse_shapes("1x64x32, 4x64x32xseq=8") == [both, {**both, "batch": 4, "seq": 8}]
    assert parse_shapes("1xsource=64xtarget=32,source=64 x target=32 x batch=1") == [both, both]


def test_shapes_take_dimensions_by_name():
    assert parse_shapes("1x128xcontext=2048, 8×16") == [
        {"batch": 1, "seq": 128, "context": 2048}, {"batch": 8, "seq": 16}
    ]  # fmt: skip
    assert parse_shapes("batch=8") == [{"batch": 8}]
    for wrong in ("8", "1xbatch=2", "x", "1x128xcontext=", "1x2x3x4", "context=9x1", "1xseq=2x3"):
        with pytest.raises(InputError, match="expected shapes such as"):
            parse_shapes(wrong)
