"""CUDA C++ to a cubin by one run of nvcc, with what the assembler says of registers, spills and shared memory.

Needs nvcc, and neither a GPU nor its driver.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attntune.errors import CompileError, ToolchainError
from attntune.host import cuda_home
from attntune.target import Target

_TIMEOUT_SECS = 300
#: Kernels may compute with halves through operators, and call constexpr host functions.
_FLAGS = (
    "-O3", "-std=c++17", "--use_fast_math", "--expt-relaxed-constexpr", "-diag-suppress=177,550",
    "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_BFLOAT162_OPERATORS__",
)  # fmt: skip


@dataclass(frozen=True)
class KernelResources:
    """What one kernel takes of an SM."""

    name: str
    registers: int
    """32-bit registers of each thread."""
    spill_bytes: int
    """Bytes of registers that each thread stores to memory and loads back, for want of registers; both counted."""
    stack_bytes: int
    """Stack frame of each thread, spills included: arrays that are indexed by what is not known to the compiler."""
    shared_bytes: int
    """Shared memory of a block, static and dynamic."""
    threads: int
    """Threads of a block."""

    def problem(self, target: Target) -> str:
        """Why it should not or cannot run on ``target``; empty where it may."""
        limits = (
            (self.spill_bytes, 0, f"spills registers ({self.registers} in use)", "bytes"),
            (self.stack_bytes, 0, "keeps arrays on a stack in memory", "bytes"),
            (self.threads, target.threads_per_block, "has too large a block", "threads"),
            (self.shared_bytes, target.shared_memory_bytes, "takes too much shared memory", "bytes"),
            (self.registers * self.threads, target.registers_per_block, "takes too many registers", "registers"),
        )
        for used, limit, what, unit in limits:
            if used > limit:
                return f"kernel {self.name!r} {what}: {used} {unit}, expected at most {limit} on {target.name}"
        return ""

    def report(self) -> str:
        """What the assembler said of it, in words."""
        return (
            f"{self.registers} registers, {self.spill_bytes} bytes spilled, {self.stack_bytes} bytes of stack, "
            f"{self.shared_bytes} bytes of shared memory, {self.threads} threads"
        )

    def blocks_per_sm(self, target: Target) -> int:
        """How many of its blocks an SM of ``target`` holds at once."""
        warps = -(-self.threads // 32)
        # Registers are given to warps in units of 256; the system takes 1 KiB of shared memory for each block.
        registers = -(-self.registers * 32 // 256) * 256 * warps
        return min(
            target.blocks_per_sm, target.warps_per_sm // warps, target.registers_per_sm // max(registers, 1),
            target.shared_memory_per_sm_bytes // (self.shared_bytes + 1024),
        )  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """One CUDA source, compiled."""

    source: str
    binary: bytes
    """A cubin, or PTX."""
    kernels: tuple[KernelResources, ...]
    """Threads and dynamic shared memory are 0 in these: the source does not hold them."""
    secs: float


def find_nvcc() -> str:
    """Path of nvcc: on the PATH, or in ``$CUDA_HOME/bin`` or /usr/local/cuda/bin.

    Raises:
        ToolchainError: when there is none.
    """
    folder = cuda_home() / "bin"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=str(folder))
    if found is None:
        raise ToolchainError(
            f"expected nvcc, the CUDA compiler, on the PATH or in {folder}, and found none; install the CUDA "
            "toolkit (12.8 or later knows every preset) or set CUDA_HOME to where it is"
        )
    return found


def compile_source(source: str, target: Target, *, ptx: bool = False, flags: Iterable[str] = ()) -> Compiled:
    """Compile CUDA C++ for ``target.arch``.

    Args:
        source: one translation unit.
        target: of kind ``cuda``.
        ptx: whether ``binary`` is to be PTX, which the driver assembles when it is loaded, also for newer GPUs.
        flags: added to nvcc's command line.

    Raises:
        ToolchainError: when there is no nvcc.
        CompileError: with nvcc's first errors; or where the assembler ignores how a kernel splits registers.
    """
    start = time.perf_counter()
    nvcc = find_nvcc()
    number = target.arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory(prefix="attntune-nvcc-") as folder:
        unit, cubin, assembly = (Path(folder) / name for name in ("kernel.cu", "kernel.cubin", "kernel.ptx"))
        unit.write_text(source)
        common = [nvcc, f"-gencode=arch=compute_{number},code=sm_{number}", *_FLAGS, *flags]
        log = _run([*common, "-cubin", "-Xptxas=-v", "-o", str(cubin), str(unit)])
        if unheeded := [line.strip() for line in log.splitlines() if "setmaxnreg" in line]:
            # Consumers might wait for registers that nobody gives up.
            raise CompileError(f"the assembler does not split registers as the kernel asks for: {unheeded[0]}")
        if ptx:
            _run([*common, "-ptx", "-o", str(assembly), str(unit)])
        binary = (assembly if ptx else cubin).read_bytes()
    return Compiled(source, binary, tuple(_resources(log)), time.perf_counter() - start)


def _run(command: list[str]) -> str:
    """What the command wrote to standard error."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECS)
    except subprocess.TimeoutExpired:
        raise CompileError(f"nvcc took more than {_TIMEOUT_SECS} s: {' '.join(command)}") from None
    if ended.returncode:
        lines = ended.stderr.splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise CompileError(f"nvcc failed ({' '.join(command[:2])}): {' | '.join(errors[:4])[:1000]}")
    return ended.stderr


def _resources(log: str) -> Iterable[KernelResources]:
    """Of each kernel in the log of ``ptxas -v``."""
    pattern = r"Compiling entry function '(\S+)' for '\S+'(.*?)(?=Compiling entry function|\Z)"
    for name, text in re.findall(pattern, log, re.S):

        def number(pattern: str, text: str = text) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        yield KernelResources(
            name, number(r"Used (\d+) registers"),
            number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes smem"), 0,
        )  # fmt: skip


def as_json(kernels: Iterable[KernelResources], target: Target) -> dict[str, Any]:
    """Resources by kernel, JSON-ready, with how many blocks an SM holds."""
    return {k.name: {**_without(asdict(k), "name"), "blocks_per_sm": k.blocks_per_sm(target)} for k in kernels}


def _without(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}
