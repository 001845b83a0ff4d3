"""Our nvcc callback: its report, what it refuses, and a clear word where nvcc is missing. No GPU is needed."""

import dataclasses
import re
import shutil

import pytest
from gpu import needs_nvcc

from attntune.errors import CompileError, ToolchainError
from attntune.target import PRESETS
from attntune.templates.nvcc import KernelResources, compile_source, find_nvcc

ADD = 'extern "C" __global__ void __launch_bounds__(64) add(float* a) { a[threadIdx.x] += 1.0f; }'
#: 96 values that each thread keeps through a loop, in a block whose threads may have 64 registers.
SPILL = """
extern "C" __global__ void __launch_bounds__(1024) spill(float* a, int n) {
  float v[96];
  for (int i = 0; i < 96; ++i) v[i] = a[threadIdx.x + i * 1024];
  for (int k = 0; k < n; ++k) for (int i = 0; i < 96; ++i) v[i] = v[i] * v[(i + 1) % 96] + k;
  for (int i = 0; i < 96; ++i) a[threadIdx.x + i * 1024] = v[i];
}
"""
FINE = KernelResources("k", registers=128, spill_bytes=0, stack_bytes=0, shared_bytes=64 * 1024, threads=256)


@needs_nvcc
@pytest.mark.parametrize("name", [name for name, target in PRESETS.items() if target.kind == "cuda"])
def test_it_compiles_for_every_preset(name):
    compiled = compile_source(ADD, PRESETS[name])
    assert compiled.binary[:4] == b"\x7fELF"
    (kernel,) = compiled.kernels
    assert (kernel.name, kernel.spill_bytes, kernel.stack_bytes) == ("add", 0, 0)
    assert 0 < kernel.registers < 32


@needs_nvcc
def test_the_report_counts_spills():
    (kernel,) = compile_source(SPILL, PRESETS["sm_80"]).kernels
    assert kernel.registers == 64
    assert kernel.spill_bytes > 0
    assert "spills registers (64 in use)" in kernel.problem(PRESETS["sm_80"])


@needs_nvcc
def test_ptx_is_text():
    assert b".target sm_80" in compile_source(ADD, PRESETS["sm_80"], ptx=True).binary


@needs_nvcc
def test_errors_of_nvcc_are_passed_on():
    with pytest.raises(CompileError, match='identifier "nothing" is undefined'):
        compile_source("__global__ void f() { nothing(); }", PRESETS["sm_80"])


@needs_nvcc
def test_a_split_of_registers_that_the_assembler_ignores_is_an_error():
    more = (
        'extern "C" __global__ void more(float* a) { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); a[0] = 1; }'
    )
    with pytest.raises(CompileError, match="the assembler does not split registers as the kernel asks for"):
        compile_source(more, PRESETS["sm_90a"])


def test_a_missing_nvcc_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(ToolchainError, match=f"expected nvcc, the CUDA compiler, on the PATH or in {tmp_path}/bin"):
        find_nvcc()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spill_bytes": 8}, "spills registers .*: 8 bytes, expected at most 0 on sm_86"),
        ({"stack_bytes": 8}, "keeps arrays on a stack in memory"),
        ({"threads": 1056}, "has too large a block: 1056 threads, expected at most 1024"),
        ({"shared_bytes": 100 * 1024}, "takes too much shared memory: 102400 bytes, expected at most 101376"),
        ({"registers": 255, "threads": 512}, "takes too many registers"),
    ],
)
def test_limits_of_the_target(change, message):
    assert FINE.problem(PRESETS["sm_86"]) == ""
    assert re.search(message, dataclasses.replace(FINE, **change).problem(PRESETS["sm_86"]))


def test_blocks_that_an_sm_holds():
    assert FINE.blocks_per_sm(PRESETS["sm_86"]) == 1  # shared memory
    assert FINE.blocks_per_sm(PRESETS["sm_90a"]) == 2  # registers
    small = KernelResources("k", registers=16, spill_bytes=0, stack_bytes=0, shared_bytes=0, threads=32)
    assert small.blocks_per_sm(PRESETS["sm_86"]) == PRESETS["sm_86"].blocks_per_sm
