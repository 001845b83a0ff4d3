"""Built as a wheel and installed elsewhere, attntune works: names, command line, data files."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("attntune", "schedules"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    output = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", output, source],
        check=True,
    )
    (built,) = output.glob("attntune-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A virtual environment with the wheel; dependencies come from this interpreter's own site-packages."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    purelib = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()
    )  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", purelib, wheel],
        check=True,
    )
    # A .pth line is appended after purelib, so the wheel's attntune wins over an editable one outside.
    (purelib / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python, *arguments, cwd):
    """Standard output of `python` with a clean import path, away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    child = subprocess.run([python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_wheel_holds_what_it_should(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "attntune/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"attntune"}
    shipped = sorted(path.name for path in (ROOT / "schedules").glob("*.jsonl"))
    assert sorted(Path(name).name for name in names if name.endswith(".jsonl")) == shipped


def test_imports_come_from_the_wheel(installed, tmp_path):
    script = "import attntune, attntune.cli, json; print(json.dumps([attntune.__file__, attntune.__version__]))"
    file, version = json.loads(run(installed, "-c", script, cwd=tmp_path))
    assert str(installed.parents[1]) in file
    metadata = "import importlib.metadata as m; print(m.version('attntune'))"
    assert run(installed, "-c", metadata, cwd=tmp_path).strip() == version


def test_command_line_answers(installed, tmp_path):
    script = "import sys; from attntune.cli import main; sys.exit(main())"
    assert "tune" in run(installed, "-c", script, "--help", cwd=tmp_path)
    shown = json.loads(run(installed, "-c", script, "target", "znver4", "--json", cwd=tmp_path))
    assert shown["vector_bits"] == 512
