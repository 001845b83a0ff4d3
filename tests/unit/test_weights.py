"""Weights of an artifact: read back as they were written, from the file or from huge pages."""

import numpy as np
import pytest

from attntune.measure.buffers import as_array, as_tensor, numpy_dtype
from attntune.runtime import artifact

WEIGHTS = {
    "a": np.arange(3 << 18, dtype=np.float32).reshape(3, -1),
    "b": np.arange(7, dtype=np.int8),
    "c": np.ones((2, 5), numpy_dtype("bfloat16")),
}


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("names", ["abc", "bc"], ids=["large", "small"])
def test_weights_come_back(tmp_path, huge, names):
    given = {name: WEIGHTS[name] for name in names}
    index = artifact.write_weights(tmp_path / "weights.bin", given)
    found = artifact.map_weights(tmp_path / "weights.bin", index, huge=huge)
    assert list(found) == list(given)
    for name, value in given.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
        assert found[name].ctypes.data % artifact.ALIGNMENT == 0


def test_without_huge_pages_the_file_is_mapped(tmp_path, monkeypatch):
    index = artifact.write_weights(tmp_path / "weights.bin", WEIGHTS)
    monkeypatch.delattr(artifact.mmap, "MADV_HUGEPAGE", raising=False)
    found = artifact.map_weights(tmp_path / "weights.bin", index, huge=True)
    np.testing.assert_array_equal(found["a"], WEIGHTS["a"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernels_result_can_be_written_to(dtype):
    memory = np.zeros(64, numpy_dtype(dtype))
    seen = as_array(as_tensor(memory))
    seen[3] = 2
    assert memory[3] == 2
