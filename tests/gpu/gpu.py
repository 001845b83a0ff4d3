"""What the tests of CUDA templates share. None of them needs a GPU; most need nvcc, and say so where it is missing."""

import pytest

from attntune.errors import ToolchainError
from attntune.templates.nvcc import find_nvcc


def _has_nvcc():
    try:
        find_nvcc()
    except ToolchainError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not _has_nvcc(), reason="nvcc, the CUDA compiler, is not installed")
