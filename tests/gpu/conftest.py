"""Lets these tests import the rows of the contract tests; where the emulated device keeps what it compiles."""

import sys
from pathlib import Path

import pytest

for folder in (Path(__file__).parents[1] / "contract", Path(__file__).parent / "emulation"):
    sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def emulation_folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="module")
def emulator(emulation_folder):
    """A process whose CUDA device is this CPU."""
    from attntune.measure.worker import IsolatedProcess

    here = Path(__file__).parent
    with IsolatedProcess(
        threads=1,
        plugin_paths=[str(here / "emulation"), str(here.parent / "contract")],
        preload=[("emulation:install", emulation_folder)],
    ) as process:
        yield process
