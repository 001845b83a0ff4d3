"""How kernels for CUDA become a module: TVM writes CUDA C++, our callback compiles it and keeps the assembler's report.

Works on a machine without a GPU. TVM's CUDA runtime needs the driver's library to load; where there is none, a stand-in
whose every function returns an error takes its place: enough to build modules, and to embed their cubins in a library.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from attntune.errors import CompileError, ToolchainError
from attntune.target import Target
from attntune.templates.nvcc import Compiled, KernelResources, compile_source

#: The driver's functions that TVM's runtime refers to.
_DRIVER_FUNCTIONS = (
    "cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuLaunchKernelEx",
    "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled",
)  # fmt: skip
_NO_DEVICE = 100
#: TVM's switch for modules that hold what is compiled where they are loaded.
_AS_SOURCE = "TVM_COMPILE_FORCE_FALLBACK"
_LAUNCH = re.compile(r'T\.call_ffi_kernel\("(\w+)", (.*?), launch_params=\[(.*?)\]')


@dataclasses.dataclass
class CudaBuild:
    """What the building of one module showed."""

    target: Target
    code: str = "cubin"
    sources: list[Compiled] = dataclasses.field(default_factory=list)
    launches: dict[str, Launch] = dataclasses.field(default_factory=dict)

    def kernels(self) -> list[KernelResources]:
        """Resources of every kernel, its launch included."""
        found = []
        for kernel in (kernel for compiled in self.sources for kernel in compiled.kernels):
            launch = self.launches.get(kernel.name, Launch(0, 0))
            shared = kernel.shared_bytes + launch.dynamic_shared_bytes
            found.append(dataclasses.replace(kernel, shared_bytes=shared, threads=launch.threads))
        return found

    def require_runnable(self) -> None:
        """Raise :class:`CompileError`, with the assembler's report, where a kernel spills or exceeds the target."""
        found = [(kernel, kernel.problem(self.target)) for kernel in self.kernels()]
        problems = [f"{problem} ({kernel.report()})" for kernel, problem in found if problem]
        if problems:
            raise CompileError("; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the host launches a kernel."""

    threads: int
    dynamic_shared_bytes: int


_building: ContextVar[CudaBuild | None] = ContextVar("building", default=None)


@contextmanager
def building(target: Target, *, code: str = "cubin") -> Iterator[CudaBuild]:
    """While a module is compiled for ``target``: every CUDA source that TVM writes passes through nvcc.

    The modules carry cubins or PTX, as ``code`` says; CUDA source where that is asked for, or where TVM's CUDA runtime
    cannot be loaded.
    """
    load_cuda_runtime()
    _register_callback()
    build = CudaBuild(target, code)
    token = _building.set(build)
    os.environ.pop(_AS_SOURCE, None)  # TVM offers no other way to say so, and no one else's choice counts here
    if code == "source":
        os.environ[_AS_SOURCE] = "1"
    try:
        yield build
    finally:
        os.environ.pop(_AS_SOURCE, None)
        _building.reset(token)


def finish(build: CudaBuild, module: Any) -> None:
    """After TVM compiled: nvcc for sources that the callback did not see, since no CUDA runtime asked for them."""
    if not build.sources:
        for source in _cuda_sources(module):
            build.sources.append(compile_source(source, build.target))


def _cuda_sources(module: Any) -> Iterator[str]:
    if module.kind == "cuda":
        yield module.inspect_source("cuda")
    for imported in module.imports:
        yield from _cuda_sources(imported)


def launch_watcher(build: CudaBuild) -> Any:
    """A pass instrument that notes threads and dynamic shared memory of each kernel as host and device are split."""
    import tvm

    @tvm.instrument.pass_instrument
    class Watcher:
        def run_after_pass(self, module: Any, info: Any) -> None:
            if str(info.name) == "tirx.SplitHostDevice":
                for function in module.functions.values():
                    build.launches.update(_launches(function))

    return Watcher()


def _launches(function: Any) -> dict[str, Launch]:
    """Launches in a host function, read off its text: TVM offers Python no way to walk statements."""
    found: dict[str, Launch] = {}
    for name, arguments, tags in _LAUNCH.findall(function.script() if hasattr(function, "script") else ""):
        names = re.findall(r'"([\w.]+)"', tags)
        values = [int(re.sub(r"\D", "", word.replace("int64", ""))) for word in arguments.split(", ")[-len(names) :]]
        launch = dict(zip(names, values, strict=True))
        threads = math.prod(value for tag, value in launch.items() if tag.startswith("threadIdx"))
        found[name] = Launch(threads, launch.get("tirx.use_dyn_shared_memory", 0))
    return found


@cache
def _register_callback() -> None:
    import tvm_ffi

    def tvm_callback_cuda_compile(code: str) -> bytes:
        build = _building.get()
        if build is None:
            raise CompileError("expected CUDA modules to be built through attntune.templates.lowering.build")
        compiled = compile_source(code, build.target, ptx=build.code == "ptx")
        build.sources.append(compiled)
        return compiled.binary

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", tvm_callback_cuda_compile, override=True)


@cache
def load_cuda_runtime() -> bool:
    """Load TVM's CUDA runtime, over a stand-in where there is no driver; whether CUDA modules can be made."""
    import tvm

    def present() -> bool:
        return tvm.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None

    if present():
        return True
    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError:
        try:
            _load_stand_in()
        except (OSError, ToolchainError):
            return False
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError:  # without libcudart
        return False
    return present()


def _load_stand_in() -> None:
    """A ``libcuda.so.1`` for this process alone, in which everything answers that there is no device."""
    with tempfile.TemporaryDirectory(prefix="attntune-cuda-") as folder:
        source, library = Path(folder) / "driver.c", Path(folder) / "libcuda.so.1"
        source.write_text("".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in _DRIVER_FUNCTIONS))
        command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ToolchainError(f"expected a C compiler 'cc' that links shared libraries: {error}") from None
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
