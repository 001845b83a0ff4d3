"""The package's surface: lazy names and light imports."""

import json
import subprocess
import sys

import pytest

import attntune

HEAVY = {"tvm", "tvm_ffi", "torch", "numpy", "onnx", "onnxruntime", "lightgbm", "scipy", "matplotlib", "typer"}


def loaded_modules(code):
    """Top-level names in sys.modules after `code` ran in a fresh interpreter."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(child.stdout.splitlines()[-1]))


def test_importing_attntune_imports_nothing_heavy():
    assert not HEAVY & loaded_modules("import attntune")


def test_importing_the_target_imports_nothing_heavy():
    assert not HEAVY & loaded_modules("import attntune; attntune.Target.parse('znver4')")


@pytest.mark.parametrize("name", attntune.__all__)
def test_every_public_name_resolves(name):
    assert getattr(attntune, name) is not None
    assert name in dir(attntune)


def test_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'tuner_'.*'tune'"):
        _ = attntune.tuner_


def test_names_are_the_stages_own():
    from attntune import errors, target

    assert attntune.Target is target.Target
    assert attntune.errors is errors
