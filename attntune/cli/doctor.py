"""``attntune doctor``: is this environment fit to tune, compile and run?"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from attntune import cli
from attntune.cli.common import Reply
from attntune.host import available_cpus, host_features, physical_cores, user_cache_dir
from attntune.target import vector_shape

#: The versions that work together; later ones satisfy TVM's metadata and crash.
PINS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}

#: What each extra brings, by import name, and what it is for.
EXTRAS = {
    "models": (
        ("safetensors", "tokenizers", "huggingface_hub", "gguf", "h5py", "jinja2"),
        "loading models and tokenizing text",
    ),
    "onnx": (("onnx", "onnxruntime"), "export and comparison with ONNX Runtime"),
    "torch": (("torch",), "comparison with PyTorch and tensors of it"),
    "report": (("jinja2", "matplotlib"), "reports"),
}

#: Run in a child process: a wrong pair of TVM and ffi does not raise, it crashes.
_PROBE = """
import json, tvm
def ask(name):
    function = tvm.get_global_func(name, allow_missing=True)
    return function() if function else None
print(json.dumps({
    "tvm": tvm.__version__, "llvm": ask("target.llvm_version_major"),
    "threads": ask("runtime.NumThreads"), "cpu": str(ask("target.llvm_get_system_cpu") or ""),
}))
"""


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis. ``status`` is ok, warn or fail; ``remedy`` is what to do about the latter two."""

    name: str
    status: str
    message: str
    remedy: str = ""


def doctor() -> Reply:
    """Diagnose the environment: pins, threads, ISA, compiler, torch extension, optional packages."""
    checks = [check for group in CHECKS for check in group()]
    failed = [check for check in checks if check.status == "fail"]
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name}: {check.message}")
        if check.remedy:
            lines.append(f"      -> {check.remedy}")
    warned = sum(check.status == "warn" for check in checks)
    lines.append(f"{len(checks) - warned - len(failed)} ok, {warned} to look at, {len(failed)} failed")
    document = {"ok": not failed, "checks": [asdict(check) for check in checks]}
    return Reply(document, "\n".join(lines), exit_code=1 if failed else 0)


def python_version() -> Iterator[Check]:
    """Which Python this is; the package does not install on one that is too old."""
    yield Check("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}")


def pins() -> Iterator[Check]:
    """TVM and its ffi are exactly the pair that works."""
    import importlib.metadata

    for package, expected in PINS.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, "fail", f"not installed, expected {expected}", f"pip install {package}=={expected}")
            continue
        if found == expected:
            yield Check(package, "ok", found)
        else:
            yield Check(package, "fail", f"{found}, expected exactly {expected}", f"pip install {package}=={expected}")


@lru_cache(maxsize=1)
def probe_tvm() -> dict[str, Any] | str:
    """What TVM says of itself from a child process, or why it did not answer."""
    try:
        child = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "no answer within 120 s"
    if child.returncode != 0:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        return f"exit code {child.returncode}: {last[0]}"
    answer: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    return answer


def tvm_works() -> Iterator[Check]:
    """TVM imports and carries LLVM."""
    answer = probe_tvm()
    if isinstance(answer, str):
        wanted = " ".join(f"{package}=={version}" for package, version in PINS.items())
        yield Check("tvm", "fail", f"import failed ({answer})", f"pip install --force-reinstall --no-deps {wanted}")
    elif answer["llvm"] is None:
        yield Check(
            "tvm", "fail", "built without LLVM: it runs artifacts but cannot compile", "install apache-tvm from PyPI"
        )
    else:
        yield Check("tvm", "ok", f"imports, with LLVM {answer['llvm']}; LLVM names this CPU {answer['cpu']!r}")


def threads() -> Iterator[Check]:
    """Cores, and whether a container quota or a setting of TVM's takes some away."""
    cores, logical = physical_cores(), len(available_cpus())
    answer = probe_tvm()
    default = f"; TVM alone would use {answer['threads']}" if isinstance(answer, dict) else ""
    yield Check("threads", "ok", f"{cores} physical of {logical} logical cores, attntune uses {cores}{default}")
    quota = cpu_quota()
    if quota is not None and quota < cores:
        yield Check(
            "cpu quota", "warn", f"this container may use {quota:g} CPUs but sees {cores} cores",
            f"pass --target native,cores={max(1, int(quota))} to tune and compile",
        )  # fmt: skip
    load = os.getloadavg()[0]
    if load > 0.5 * cores:
        yield Check(
            "load", "warn", f"load average {load:.1f} on {cores} cores: measurements will be noisy",
            "tune when nothing else runs",
        )  # fmt: skip


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """CPUs that the control group allows, or None without a limit."""
    try:
        quota, period = path.read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def isa() -> Iterator[Check]:
    """The CPU has vectors that the templates know."""
    features = host_features()
    bits, _ = vector_shape(features)
    if {"avx512f", "avx2", "neon"} & set(features):
        yield Check("isa", "ok", f"{bits}-bit vectors: {' '.join(features)}")
    else:
        yield Check(
            "isa", "warn", f"neither AVX2, AVX-512 nor NEON found ({' '.join(features) or 'no features read'})",
            "kernels will use 128-bit vectors; run on a CPU with AVX2 or NEON for speed",
        )  # fmt: skip


def linker() -> Iterator[Check]:
    """A C compiler links a shared object in the temporary folder, and it loads from there."""
    named = os.environ.get("CXX") or os.environ.get("CC")
    candidates = [named] if named else ["g++", "gcc", "clang++", "clang", "c++", "cc"]
    compiler = next((found for name in candidates if (found := shutil.which(name))), None)
    remedy = "install a C compiler: apt install g++, dnf install gcc-c++, or conda install cxx-compiler"
    if compiler is None:
        yield Check("compiler", "fail", f"none of {', '.join(candidates)} on PATH; kernels cannot be linked", remedy)
        return
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.c"), Path(folder, "probe.so")
        source.write_text("int attntune_probe(void) { return 7; }\n")
        child = subprocess.run(
            [compiler, "-x", "c", "-shared", "-fPIC", "-o", str(library), str(source)], capture_output=True, text=True
        )
        if child.returncode != 0:
            yield Check("compiler", "fail", f"{compiler} cannot link: {child.stderr.strip()[-300:]}", remedy)
            return
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            yield Check(
                "compiler", "fail", f"a library linked in {tempfile.gettempdir()} does not load: {error}",
                "set TMPDIR to a folder on a file system mounted without noexec",
            )  # fmt: skip
            return
    yield Check("compiler", "ok", f"{compiler} links, and {tempfile.gettempdir()} may hold libraries")


def torch_extension() -> Iterator[Check]:
    """With torch installed, ``import tvm`` does not stop to compile an extension."""
    variable = cli.TORCH_EXTENSION_VARIABLE
    if importlib.util.find_spec("torch") is None:
        return
    if cli.torch_extension_chosen:
        yield Check("torch extension", "ok", f"{variable}={os.environ.get(variable, '')}, as you set it")
    elif importlib.util.find_spec("torch_c_dlpack_ext") is not None:
        yield Check("torch extension", "ok", "torch-c-dlpack-ext is installed")
    else:
        yield Check(
            "torch extension", "warn",
            "the first import of tvm beside torch compiles an extension for 25 to 30 s (not under this command)",
            f"export {variable}=1, or pip install torch-c-dlpack-ext",
        )  # fmt: skip


def optional_packages() -> Iterator[Check]:
    """Each extra's packages are there, or what is missing without them."""
    for extra, (packages, purpose) in EXTRAS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            yield Check(
                f"extra {extra}", "warn", f"{', '.join(missing)} missing, needed for {purpose}",
                f"pip install 'attntune[{extra}]'",
            )  # fmt: skip
        else:
            yield Check(f"extra {extra}", "ok", " ".join(packages))


def writable() -> Iterator[Check]:
    """The current folder (where databases go by default), the cache and the temporary folder take files."""
    folders = {"folder": Path.cwd(), "cache": user_cache_dir(), "temporary folder": Path(tempfile.gettempdir())}
    for name, folder in folders.items():
        present = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(present).free
        if not os.access(present, os.W_OK):
            status, remedy = _UNWRITABLE[name]
            yield Check(name, status, f"{folder} is not writable", remedy)
        elif free < 1 << 28:
            yield Check(name, "warn", f"{folder} has {free >> 20} MiB left", "free some space")
        else:
            yield Check(name, "ok", f"{folder} is writable, {free >> 30} GiB free")


_UNWRITABLE = {
    "folder": ("warn", "change to a folder of yours, or name outputs elsewhere (--database, -o)"),
    "cache": ("warn", "set XDG_CACHE_HOME to a folder of yours; until then measured peaks are not remembered"),
    "temporary folder": ("fail", "set TMPDIR to a folder of yours"),
}

CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    python_version, pins, tvm_works, threads, isa, linker, torch_extension, optional_packages, writable,
)  # fmt: skip
