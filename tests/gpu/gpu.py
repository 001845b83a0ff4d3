"""What the tests of CUDA templates share. None of them needs a GPU; most need nvcc, and say so where it is missing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from attntune.errors import ToolchainError
from attntune.measure.cuda_runner import CudaRunner
from attntune.measure.worker import IsolatedProcess
from attntune.templates import cuda_lowering
from attntune.templates.lowering import build_with_resources
from attntune.templates.nvcc import find_nvcc

EMULATION = str(Path(__file__).parent / "emulation")
HELPERS = str(Path(__file__).parents[1] / "helpers")


class EmulatedRunner(CudaRunner):
    """Its workers' CUDA device is this CPU."""

    folder = ""

    def _process(self, threads, env, preload):
        preload = ("emulation:then", self.folder, *preload)
        return IsolatedProcess(threads=threads, env=env, preload=(preload,), plugin_paths=[EMULATION, HELPERS])


def _has_nvcc():
    try:
        find_nvcc()
    except ToolchainError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not _has_nvcc(), reason="nvcc, the CUDA compiler, is not installed")


def binaries_kept(monkeypatch):
    """A list to which every binary is added that is compiled from now on."""
    binaries = []
    compile_source = cuda_lowering.compile_source

    def kept(*arguments, **options):
        result = compile_source(*arguments, **options)
        binaries.append(result.binary)
        return result

    monkeypatch.setattr(cuda_lowering, "compile_source", kept)
    return binaries


def compiled(monkeypatch, template, workload, target, config):
    """Resources of the one kernel of a template, and its cubin; building fails where it spills or exceeds a limit."""
    binaries = binaries_kept(monkeypatch)
    assert template.space(workload, target).check(config) == config
    _, resources = build_with_resources(template.schedule(workload, target, config), target)
    (kernel,), (binary,) = resources.values(), binaries
    return kernel, binary


def instructions(cubin, tmp_path, pattern):
    """How many instructions of a cubin match; skips where there is no disassembler (pip's nvidia-cuda-nvdisasm)."""
    nvdisasm = disassembler()
    if nvdisasm is None:
        pytest.skip("nvdisasm is not installed (pip install nvidia-cuda-nvdisasm): instructions are not counted")
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    listing = subprocess.run([nvdisasm, str(path)], capture_output=True, text=True, check=True).stdout
    return len(re.findall(pattern, listing))


def disassembler():
    """Path of nvdisasm; None where it is not installed."""
    return shutil.which("nvdisasm") or _packaged("nvdisasm")


def _packaged(name):
    import site

    found = [p for folder in site.getsitepackages() for p in Path(folder).glob(f"nvidia/*/bin/{name}")]
    return str(found[0]) if found else None
