"""CUDA kernels run on the CPU: TVM's CUDA C++ through the host's compiler, launched by a driver that emulates a GPU.

``install`` must come before TVM is imported, so it belongs into a process of its own (``IsolatedProcess``); ``check``
then builds a template's kernel and compares what it writes with the float64 reference. Everything but the device code's
assembly is the real path: TVM's host code, its CUDA runtime, memory, launches.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from ptx import without_assembly

from attntune.host import cuda_home

_HERE = Path(__file__).parent
_SIGNATURE = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)\) \{')
_folder = Path()
_driver: Any = None


def load_driver(folder: str) -> None:
    """Load the emulated driver and runtime under the names of CUDA's; what is compiled is kept in ``folder``."""
    global _driver, _folder
    _folder = Path(folder)
    for name in ("libcuda.so.1", "libcudart.so.13"):
        library, version = _folder / name, _folder / "version"
        if not library.exists():
            version.write_text(f"{name} {{ global: *; }};")
            script = [f"-Wl,--version-script={version}"] if name.startswith("libcudart") else []
            flags = ("-O1", "-shared", f"-Wl,-soname,{name}", str(_HERE / "hopper.cpp"), *script)
            _compile(_HERE / "driver.cpp", library, *flags)
        loaded = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        _driver = _driver or loaded
    header = _folder / "device.h"
    if not header.exists():
        shutil.copy(_HERE / "device.h", header)
        _compile(header, header.with_suffix(".h.gch"), "-x", "c++-header")


def install(folder: str) -> None:
    """Load the emulated driver, then TVM over it, and hand the host's compiler every kernel that is built."""
    load_driver(folder)
    from attntune.templates import cuda_lowering, nvcc

    def compile_source(source: str, target: Any, *, ptx: bool = False) -> nvcc.Compiled:
        return nvcc.Compiled(source, str(_kernel(source)).encode() + b"\0", (), 0.0)

    cuda_lowering.compile_source = compile_source
    assert cuda_lowering.load_cuda_runtime(), "TVM's CUDA runtime does not load over the emulated driver"


def _compile(source: Path, output: Path, *flags: str) -> None:
    command = ["g++", "-std=c++17", "-w", "-fPIC", f"-I{_HERE}", f"-I{cuda_home()}/include", *flags]
    ended = subprocess.run([*command, "-o", str(output), str(source)], capture_output=True, text=True)
    assert ended.returncode == 0, f"{source}: {ended.stderr[:3000]}"


def _kernel(code: str) -> Path:
    """The shared library of one CUDA source, with ``NAME_emulated(void**)`` for each kernel."""
    thunks = []
    for name, parameters in _SIGNATURE.findall(code):
        types = [re.sub(r"\b__(restrict|grid_constant)__\b", "", p).rsplit(" ", 1)[0] for p in parameters.split(", ")]
        values = ", ".join(f"*static_cast<{type_.strip()}*>(p[{i}])" for i, type_ in enumerate(types) if type_)
        thunks.append(f'extern "C" void {name}_emulated(void** p) {{ {name}({values}); }}')
    dynamic = r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];"
    code = re.sub(dynamic, r"\1* \2 = (\1*)emulated_shared();", code)
    code = re.sub(r"\b__shared__ (alignas\(\d+\))?", r"\1 static ", code)
    path = _folder / f"{hashlib.sha256(code.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        source = path.with_suffix(".cpp")
        source.write_text("\n".join([_without_assembly(code), *thunks]))
        _compile(source, path, "-shared", "-include", str(_folder / "device.h"))
    return path


def _without_assembly(code: str) -> str:
    """``code`` without assembly: device.h has the intrinsics of sm_80 by name, and ptx.py translates the rest."""
    from attntune.templates.cuda.intrinsics import SOURCES

    for source in SOURCES.values():
        code = code.replace(source, "")
    return without_assembly(code)


def then(folder: str, call: str, *arguments: Any) -> None:
    """``install``, then what a worker of a runner preloads."""
    from attntune.measure.worker_child import resolve

    install(folder)
    resolve(call)(*arguments)


@lru_cache(maxsize=1)
def _built(template_name: str, workload: Any, target: Any, config: Any) -> Any:
    from attntune.templates import load_template
    from attntune.templates.lowering import build

    template = load_template(template_name)
    assert template.space(workload, target).check(config) == config
    return build(template.schedule(workload, target, config), target)


def check(template_name: str, workload: Any, target: Any, config: Any, late: bool = True, seed: int = 0) -> str:
    """Build, run and compare; what is wrong, or nothing."""
    import tvm

    from attntune.measure.buffers import numpy_dtype
    from attntune.measure.evaluator import mismatch
    from attntune.templates import load_template

    template = load_template(template_name)
    executable = _built(template_name, workload, target, config)
    inputs = workload.example_inputs(seed=1)
    packings = template.pack(workload, target)
    device = tvm.cuda(0)

    def upload(values: np.ndarray, dtype: str) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(values).view(numpy_dtype(dtype)), device=device)

    operands = []
    for spec, values in zip(workload.inputs(), inputs, strict=True):
        if spec.name in packings:
            packing = packings[spec.name]
            operands.append(upload(packing.apply(values), packing.spec.dtype))
        else:
            operands.append(upload(values, spec.dtype))
    fresh = [tvm.runtime.empty(spec.shape, spec.dtype, device) for spec in workload.fresh()]
    _driver.emulation_mode(int(late), seed)
    executable["main"](*operands, *fresh)
    names = [spec.name for spec in workload.inputs()]
    results = [*fresh, *(operands[names.index(name)] for name in workload.updated)]
    rtol, atol = workload.tolerance()
    for spec, result, expected in zip(workload.outputs(), results, workload.reference(*inputs), strict=True):
        *_, problem = mismatch(spec.name, result.numpy(), np.asarray(expected, np.float64), rtol, atol)
        if problem:
            return f"{workload} {config}: {problem}"
    return ""


def fault(*arguments: Any, change: tuple[str, str] = ("", ""), patch: tuple[str, Any] | None = None) -> str:
    """What :func:`check` finds, or the device, where a kernel is broken on purpose; nothing if it is not noticed.

    Args:
        arguments: of :func:`check`.
        change: what to replace, once, in the kernel's CUDA C++, by what.
        patch: a constant of :mod:`attntune.templates.cuda.hopper`, and its value.
    """
    from attntune.templates import cuda_lowering
    from attntune.templates.cuda import hopper

    compile_source = cuda_lowering.compile_source

    def changed(source: str, *rest: Any, **options: Any) -> Any:
        assert change[0] in source, f"expected {change[0]!r} in the kernel"
        return compile_source(source.replace(*change), *rest, **options)

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # the device ends its process when a kernel breaks its rules
        os.dup2(writing, 2)
        cuda_lowering.compile_source = changed
        _built.cache_clear()
        if patch:
            setattr(hopper, *patch)
        try:
            os.write(writing, check(*arguments).encode())
        except Exception as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as found:
        text = found.read().decode()
    os.waitpid(child, 0)
    return text


def reverses(code: str, late: bool, seed: int) -> bool:
    """Whether ``main_kernel(x, y)`` of 64 threads, with as many floats of shared memory, writes x backwards to y."""
    kernel = ctypes.CDLL(str(_kernel(code))).main_kernel_emulated
    x, y = np.arange(64, dtype=np.float32), np.full(64, -1, np.float32)
    pointers = (ctypes.c_void_p * 2)(x.ctypes.data, y.ctypes.data)
    arguments = (ctypes.c_void_p * 2)(*(ctypes.addressof(pointers) + 8 * i for i in range(2)))
    _driver.emulation_mode(int(late), seed)
    config = _LaunchConfig(1, 1, 1, 64, 1, 1, 256)
    _driver.cuLaunchKernelEx(ctypes.byref(config), kernel, arguments, None)
    return bool((y == x[::-1]).all())


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared_bytes")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip
