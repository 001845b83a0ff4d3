"""PyTorch checkpoints and pickled vocabularies: tensors and plain data come out, nothing is run."""

import pickle

import numpy as np
import pytest
import torch

from attntune.errors import ModelError
from attntune.models.checkpoints import read_plain_pickle, read_torch


class Dangerous:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t}, lambda t: {"model": t, "epoch": 3}])
def test_tensors_come_out_as_float32_by_name(tmp_path, wrap):
    tensors = {"a.weight": torch.arange(6).reshape(2, 3).to(torch.bfloat16), "steps": torch.tensor([1, 2])}
    torch.save(wrap(tensors), tmp_path / "m.pt")
    found = read_torch(tmp_path / "m.pt")
    assert list(found) == ["a.weight", "steps"]
    assert (found["a.weight"].dtype, found["steps"].dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(found["a.weight"], np.arange(6).reshape(2, 3))


def test_what_is_pickled_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"a": torch.zeros(2), "b": Dangerous(tmp_path / "written")}, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"m\.pt is not a checkpoint of tensors alone"):
        read_torch(tmp_path / "m.pt")
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"itos": Dangerous(tmp_path / "written")}))
    with pytest.raises(ModelError, match=r"m\.pkl is not pickled plain data: it asks for .*open"):
        read_plain_pickle(tmp_path / "m.pkl")
    assert not (tmp_path / "written").exists()


def test_what_is_not_a_tensor_is_named(tmp_path):
    torch.save({"a": torch.zeros(2), "rate": 0.1}, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"expected tensors, got something else for \['rate'\]"):
        read_torch(tmp_path / "m.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="expected tensors by name, got a list"):
        read_torch(tmp_path / "list.pt")


def test_files_that_are_missing_or_damaged(tmp_path):
    for read in (read_torch, read_plain_pickle):
        with pytest.raises(ModelError, match="which does not exist"):
            read(tmp_path / "gone")
        (tmp_path / "m").write_bytes(b"\x80\x05 not one")
        with pytest.raises(ModelError, match="is not"):
            read(tmp_path / "m")


def test_plain_data_comes_out(tmp_path):
    data = {"itos": ["<pad>", "C"], "stoi": {"C": 1}, "size": 2}
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(data))
    assert read_plain_pickle(tmp_path / "v.pkl") == data
