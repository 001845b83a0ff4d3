"""Lets these tests import the rows of the contract tests; where the emulated device keeps what it compiles."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))


@pytest.fixture(scope="session")
def emulation_folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("emulation"))
