"""The cache of compiled kernels: shared by processes, repaired when damaged, checked before it is kept."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from attntune.kernel_cache import KernelCache
from attntune.ops import Attention

SCRIPT = """
import json, sys
import numpy as np
from attntune import functional
rng = np.random.default_rng(0)
query, key, value = (rng.standard_normal((1, 2, 9, 16), dtype=np.float32) for _ in range(3))
out = functional.scaled_dot_product_attention(query, key, value)
print(json.dumps({"sum": float(out.sum()), "tvm": "tvm" in sys.modules, "torch": "torch" in sys.modules,
                  "builds": functional._KERNELS._last_build > 0}))
"""


def in_a_process(cache):
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    child = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def test_a_second_process_finds_the_kernel_and_a_damaged_one_is_built_again(tmp_path):
    first = in_a_process(tmp_path)
    assert first["builds"]
    assert not first["tvm"]
    assert not first["torch"]
    assert in_a_process(tmp_path) == {**first, "builds": False}
    (library,) = (tmp_path / "attntune" / "kernels").glob("*.so")
    library.write_bytes(library.read_bytes()[:1000])
    assert in_a_process(tmp_path) == first
    assert in_a_process(tmp_path) == {**first, "builds": False}


SMALL = Attention(1, 2, 5, 7, 16)


def test_what_is_on_disk_says_where_it_comes_from(tmp_path):
    kernels = KernelCache(tmp_path)
    kernels.function(SMALL)
    (manifest,) = [
        found
        for found in (json.loads(path.read_text()) for path in kernels.folder.glob("*.json"))
        if found.get("workload") == json.loads(SMALL.key())
    ]
    assert manifest["target"]["arch"] == kernels.target.arch
    assert manifest["versions"]["tvm"]
    assert 0 <= manifest["max_abs_error"] < 1e-5
    assert manifest["source"] in ("exact", "transferred", "default")


def test_damage_of_every_kind_is_repaired(tmp_path):
    cache = KernelCache(tmp_path)

    def builds():
        cache._functions.clear()
        cache._last_build = 0.0
        assert cache.function(SMALL) is not None
        return cache._last_build > 0

    assert builds()
    assert not builds()
    (library,) = tmp_path.glob("*.so")
    good = library.read_bytes()
    for damage in (b"", good[:-1] + b"x", None):
        library.unlink()  # what this process has loaded must stay
        if damage is not None:
            library.write_bytes(damage)
        assert builds()
        assert not builds()
    for text in ("{", "[]", "{}"):
        library.with_suffix(".json").write_text(text)
        assert builds()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_kernel_that_is_wrong_is_not_kept(tmp_path, monkeypatch):
    from attntune.database.record import Status
    from attntune.errors import CompileError
    from attntune.measure.evaluator import Evaluation

    cache = KernelCache(tmp_path)
    real = KernelCache._build_and_check

    def spoilt(self, trial, path):
        secs, _ = real(self, trial, path)
        return secs, Evaluation(Status.WRONG_RESULT, message="off by one")

    monkeypatch.setattr(KernelCache, "_build_and_check", spoilt)
    with pytest.raises(CompileError, match="off by one"):
        cache.function(SMALL)
    assert not list(tmp_path.glob("*.so"))


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path):
    place = tmp_path / "file"
    place.write_text("in the way")
    cache = KernelCache(place / "kernels")
    assert cache.folder.is_dir()
    assert cache.folder != place / "kernels"


def test_clearing_forgets(tmp_path):
    cache = KernelCache(tmp_path)
    cache.function(SMALL)
    assert cache.clear() == 1
    assert not list(tmp_path.glob("*.so"))
    cache.function(SMALL)
    assert cache.clear() == 1


def test_long_sequences_are_checked_by_a_sample():
    w = Attention(2, 4, 900, 800, 8, kv_heads=2, causal=True, causal_offset=3, mask=True, bias_batch=2, bias_heads=1,
                  layout="bhsd", weights=True)  # fmt: skip
    inputs = w.example_inputs()
    whole = w.reference(*inputs)
    parts = list(w.reference_sample(*inputs))
    assert len(parts) >= 2 * 8
    for places, expected in parts:
        for values, place, part in zip(whole, places, expected, strict=True):
            np.testing.assert_allclose(part, values[place], rtol=1e-12, atol=1e-14)
    turned = w.replace(layout="bshd", weights=False, bias_q=1)
    inputs = turned.example_inputs()
    (out,) = turned.reference(*inputs)
    for (place,), (part,) in turned.reference_sample(*inputs):
        np.testing.assert_allclose(part, out[place], rtol=1e-12, atol=1e-14)
    (place, values), *none = list(SMALL.reference_sample(*SMALL.example_inputs()))
    assert place == (...,)
    assert not none
    assert values[0].shape == SMALL.outputs()[0].shape
