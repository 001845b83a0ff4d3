"""What the machine that this process runs on says of itself: features, CPUs, caches, folders.

The environment is read here and in the command line, nowhere else. Nothing of it needs TVM or a compiler.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

#: ISA features that templates ask about, by the flag Linux prints in /proc/cpuinfo.
CPUINFO_FEATURES = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_bf16": "avx512bf16",
    "avx512_vnni": "avx512vnni",
    "avx_vnni": "avxvnni",
    "amx_tile": "amx-tile",
    "amx_bf16": "amx-bf16",
    "amx_int8": "amx-int8",
    "asimd": "neon",
    "asimddp": "dotprod",
    "bf16": "bf16",
    "sve": "sve",
}


#: The system call that asks Linux for AMX's tile registers (``arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)``),
#: by its number on x86-64. It holds for the process, its threads and what it forks.
ASK_FOR_TILES = (158, 0x1023, 18)


def host_features() -> tuple[str, ...]:
    """ISA features of this machine, from /proc/cpuinfo; AMX only where Linux grants its registers to this process."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    for line in text.splitlines():
        if line.split(":")[0].strip() in ("flags", "Features"):
            flags = set(line.partition(":")[2].split())
            if "amx_tile" in flags and not _tiles_granted():
                flags = {flag for flag in flags if not flag.startswith("amx_")}
            return tuple(sorted(ours for theirs, ours in CPUINFO_FEATURES.items() if theirs in flags))
    return ()


def _tiles_granted() -> bool:
    try:
        return bool(ctypes.CDLL(None).syscall(*ASK_FOR_TILES) == 0)
    except (OSError, AttributeError):  # no C library to call it by
        return False


def host_triple() -> str:
    """LLVM triple of the machine this process runs on."""
    machine = platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return f"{machine}-unknown-linux-gnu" if platform.system() == "Linux" else f"{machine}-apple-darwin"


def available_cpus() -> tuple[int, ...]:
    """CPUs this process may run on, one logical CPU for each physical core first."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    firsts: list[int] = []
    rest: list[int] = []
    seen: set[str] = set()
    for cpu in allowed:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(cpu)
        (rest if siblings in seen else firsts).append(cpu)
        seen.add(siblings)
    return (*firsts, *rest)


def physical_cores() -> int:
    """Physical cores this process may run on."""
    cpus = available_cpus()
    groups = set()
    for cpu in cpus:
        try:
            groups.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            groups.add(str(cpu))
    return max(1, len(groups))


def user_cache_dir() -> Path:
    """Where attntune remembers what it can find out again: ``$XDG_CACHE_HOME/attntune``, ``~/.cache`` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attntune"


def cuda_home() -> Path:
    """Where the CUDA toolkit is: ``$CUDA_HOME``, /usr/local/cuda by default."""
    return Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")


def cache_bytes(level: int, kind: str, fallback: int) -> int:
    """Bytes of the first CPU's cache of ``level`` and ``kind`` ("Data", "Unified"); ``fallback`` where nothing says."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if int((index / "level").read_text()) == level and (index / "type").read_text().strip() in (
                kind,
                "Unified",
            ):
                size = (index / "size").read_text().strip()
                return int(size[:-1]) * {"K": 1024, "M": 1024**2}[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return fallback
