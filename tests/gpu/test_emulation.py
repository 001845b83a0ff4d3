"""The emulated device finds what it is for: missing barriers and waits, and writes out of bounds."""

from pathlib import Path

import pytest
from gpu import needs_nvcc

from attntune.measure.worker import IsolatedProcess, WorkerDied

EMULATION = Path(__file__).parent / "emulation"

KERNEL = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void __launch_bounds__(64) main_kernel(float* __restrict__ x, float* __restrict__ y) {{
  extern __shared__ __align__(64) float s[];
  {body}
}}
"""
REVERSE = "s[threadIdx.x] = x[threadIdx.x]; {} y[threadIdx.x] = s[63 - threadIdx.x];"
COPY = """
  if (threadIdx.x % 4 == 0) attntune_cp_async_16(s, 2 * threadIdx.x, x + threadIdx.x, true);
  attntune_cp_async_commit(); {} __syncthreads(); y[threadIdx.x] = s[63 - threadIdx.x]; {}
"""
EARLY = """
  s[threadIdx.x] = x[threadIdx.x]; __syncthreads(); float kept = threadIdx.x % 2 ? s[63 - threadIdx.x] : 0;
  {} if (threadIdx.x % 4 == 0) attntune_cp_async_16(s, 2 * threadIdx.x, y + threadIdx.x, true);
  attntune_cp_async_commit(); y[threadIdx.x] = threadIdx.x % 2 ? kept : s[63 - threadIdx.x];
  attntune_cp_async_wait_0();
"""


@pytest.fixture(scope="module")
def device(emulation_folder):
    preload = [("emulation:load_driver", emulation_folder)]
    with IsolatedProcess(threads=1, plugin_paths=[str(EMULATION)], preload=preload) as process:
        yield process


def reversed_by(device, body, late=True):
    """Whether 64 threads reversed 64 numbers, whatever the order they ran in."""
    return all(device.call("emulation:reverses", KERNEL.format(body=body), late, seed) for seed in range(4))


@needs_nvcc
class TestEmulation:
    def test_a_missing_barrier_shows(self, device):
        assert reversed_by(device, REVERSE.format("__syncthreads();"))
        assert not reversed_by(device, REVERSE.format(""))

    def test_a_missing_wait_for_copies_shows(self, device):
        assert reversed_by(device, COPY.format("attntune_cp_async_wait_0();", ""))
        assert not reversed_by(device, COPY.format("", "attntune_cp_async_wait_0();"))

    def test_a_copy_over_what_is_still_read_shows(self, device):
        assert not reversed_by(device, EARLY.format(""), late=False)

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("s[threadIdx.x + 1] = 0;", "wrote past the end of shared memory"),
            ("attntune_cp_async_16(s, 8 * threadIdx.x, x, true); attntune_cp_async_wait_0();", "outside of shared"),
            ("attntune_cp_async_16(s, 4, x, true); attntune_cp_async_wait_0();", "misaligned"),
            ("if (threadIdx.x % 32) __syncthreads(); else __syncwarp();", "deadlock"),
        ],
    )
    def test_errors_end_the_process(self, device, body, message):
        with pytest.raises(WorkerDied, match=message):
            reversed_by(device, body)
