"""Attention over a long sequence: its memory grows with the length, not with the length's square."""

import subprocess
import sys

import pytest

from attntune.target import native
from attntune.templates.cpu import bf16

LENGTH, HEAD = 16_384, 64
_MIB = 2**20

#: Prints how many bytes the process grew by, over its operands, and the largest error of a few rows.
SCRIPT = """
import resource, sys
from pathlib import Path
import ml_dtypes, numpy as np
from attntune import functional
from attntune.kernel_cache import KernelCache

folder, dtype, causal, length, head = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", *map(int, sys.argv[4:])
functional._KERNELS = KernelCache(folder)
rng = np.random.default_rng(0)

def operands(rows):
    return [rng.standard_normal((1, 1, rows, head), np.float32).astype(dtype) for _ in range(3)]

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

functional.scaled_dot_product_attention(*operands(64), is_causal=causal)
query, key, value = operands(length)
found = functional.scaled_dot_product_attention(query[:, :, :16], key[:, :, :16], value[:, :, :16])
before = peak()
found = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
print(peak() - before)

worst = 0.0
for row in (0, 1, length // 2, length - 1):
    seen = row + 1 if causal else length
    q, k, v = (x[0, 0].astype(np.float64) for x in (query[:, :, row : row + 1], key[:, :, :seen], value[:, :, :seen]))
    scores = (q @ k.T)[0] / head**0.5
    weights = np.exp(scores - scores.max())
    error = found[0, 0, row].astype(np.float64) - weights @ v / weights.sum()
    worst = max(worst, float(np.abs(error).max()))
print(worst)
"""


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_scores_are_never_all_in_memory(tmp_path, dtype, bound, causal):
    if dtype == "bfloat16" and not bf16.available(native()):
        pytest.skip("this CPU lacks AVX512-BF16")
    arguments = [str(tmp_path), dtype, str(causal), str(LENGTH), str(HEAD)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    grown, worst = done.stdout.split()
    # The scores alone are a GiB; the result is 4 MiB in float32.
    assert float(grown) <= 64 * _MIB
    assert float(worst) <= bound
