"""Targets: what a schedule may assume of the machine it is made for.

A :class:`Target` joins a TVM target with the limits that schedules need (ISA features, vector width, registers, cores,
cache sizes; for CUDA: architecture, shared memory, registers, SMs). Templates read limits from it and never from the
host, so a schedule for one machine can be made, and its object code checked, on another.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from attntune.errors import TargetError
from attntune.host import CPUINFO_FEATURES, available_cpus, cache_bytes, host_features, host_triple, physical_cores

_KIB = 1024
_MIB = 1024 * 1024

_V3 = ("avx2", "f16c", "fma")
_V4 = ("avx2", "avx512bw", "avx512dq", "avx512f", "avx512vl", "f16c", "fma")


#: By LLVM's name of the CPU: ``fmas_per_cycle`` and ``bf16_dots_per_cycle``, where they are not the usual ones. Zen 4's
#: vector units have half a register's width. (Both by :mod:`attntune.measure.peaks`, on Zen 4 and Emerald Rapids.)
_ISSUE = {
    "znver4": (1.0, 1.0),
    "sapphirerapids": (2.0, 0.5),
    "emeraldrapids": (2.0, 0.5),
    "graniterapids": (2.0, 0.5),
}


@dataclass(frozen=True)
class Target:
    """A machine that schedules are made for.

    Sizes are in bytes, ``vector_bits`` is the widest SIMD register that pays, ``cores`` is how many threads a kernel
    uses. Two targets with the same :meth:`key` share tuning records.
    """

    kind: str
    """``"cpu"`` or ``"cuda"``."""
    name: str
    """The preset or CPU name a person would say: ``znver4``, ``x86-64-v3``, ``sm_90a``."""
    arch: str
    """LLVM ``mcpu`` for CPUs, ``sm_…`` for CUDA."""
    triple: str
    """LLVM target triple of the host code."""
    features: tuple[str, ...] = ()
    """ISA features the compiled code may use, sorted."""
    vector_bits: int = 128
    vector_registers: int = 16
    cores: int = 1
    logical_cores: int = 1
    l1d_bytes: int = 32 * _KIB
    l2_bytes: int = 512 * _KIB
    l3_bytes: int = 8 * _MIB
    fmas_per_cycle: float = 2.0
    """CPUs: multiply-adds of full vectors that a core starts in a cycle."""
    bf16_dots_per_cycle: float = 1.0
    """CPUs with AVX512-BF16: ``vdpbf16ps`` of full vectors that a core starts in a cycle."""
    shared_memory_bytes: int = 0
    """CUDA only: shared memory one thread block may use."""
    registers_per_block: int = 0
    """CUDA only: 32-bit registers one thread block may use."""
    sm_count: int = 0
    """CUDA only: streaming multiprocessors."""
    shared_memory_per_sm_bytes: int = 0
    """CUDA only: shared memory of one SM, of which each resident block takes its own and 1 KiB more."""
    registers_per_sm: int = 0
    """CUDA only: 32-bit registers of one SM."""
    registers_per_thread: int = 0
    """CUDA only: 32-bit registers one thread may use before the compiler spills."""
    warps_per_sm: int = 0
    """CUDA only: warps resident on one SM at most."""
    blocks_per_sm: int = 0
    """CUDA only: thread blocks resident on one SM at most."""
    threads_per_block: int = 0
    """CUDA only: threads of one thread block at most."""

    def key(self) -> str:
        """Identity in a database: kind, architecture and thread count, e.g. ``cpu/znver4/2``."""
        return f"{self.kind}/{self.arch}/{self.cores if self.kind == 'cpu' else self.sm_count}"

    def has(self, *features: str) -> bool:
        """Whether every named ISA feature is available."""
        return all(feature in self.features for feature in features)

    def lanes(self, dtype: str = "float32") -> int:
        """Elements of ``dtype`` in one vector register."""
        return self.vector_bits // dtype_bits(dtype)

    def with_cores(self, cores: int) -> Target:
        """The same machine limited to ``cores`` threads."""
        if cores < 1:
            raise TargetError(f"expected at least 1 core, got {cores}")
        return dataclasses.replace(self, cores=cores, logical_cores=max(cores, self.logical_cores))

    def to_tvm(self) -> Any:
        """The ``tvm.target.Target`` that code is generated for."""
        import tvm

        if self.kind == "cuda":
            return tvm.target.Target(
                {
                    "kind": "cuda",
                    "arch": self.arch,
                    "max_shared_memory_per_block": self.shared_memory_bytes,
                    "max_threads_per_block": self.threads_per_block,
                    "thread_warp_size": 32,
                },
                host={"kind": "llvm", "mtriple": self.triple},
            )
        return tvm.target.Target({"kind": "llvm", "mcpu": self.arch, "mtriple": self.triple, "num-cores": self.cores})

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return {**dataclasses.asdict(self), "features": list(self.features)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Target:
        """Inverse of :meth:`to_json`; raises :class:`TargetError` naming a missing or unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(fields) - known:
            raise TargetError(f"unknown target fields {sorted(unknown)}; expected a subset of {sorted(known)}")
        try:
            return cls(**{**fields, "features": tuple(fields.get("features", ()))})
        except TypeError as error:
            raise TargetError(f"incomplete target {dict(fields)}: {error}") from None

    @classmethod
    def parse(cls, text: str | Target | Mapping[str, Any]) -> Target:
        """Read a target from ``native``, a preset, a preset with options, or a TVM target string or dict.

        Args:
            text: ``"native"``; a preset such as ``"znver4"``, or with its kind, ``"cuda:sm_90a"``; options after
                commas, ``"znver4,cores=8"`` or ``"cuda:sm_86,sms=72"``; a TVM target as JSON or dict,
                ``'{"kind": "llvm", "mcpu": "skylake-avx512", "num-cores": 4}'``; or the older dashed form,
                ``"llvm -mcpu=skylake-avx512 -num-cores=4"``.

        Raises:
            TargetError: naming the presets, when nothing matches.
        """
        if isinstance(text, Target):
            return text
        if isinstance(text, Mapping):
            return _from_tvm_fields(text)
        stripped = text.strip()
        if stripped.startswith("{"):
            try:
                return _from_tvm_fields(json.loads(stripped))
            except json.JSONDecodeError as error:
                raise TargetError(f"malformed target JSON {text!r}: {error}") from None
        if stripped.split(" ")[0] in ("llvm", "cuda"):
            return _from_tvm_fields(_dashed(stripped))
        name, *options = stripped.split(",")
        kind, _, preset = name.rpartition(":")
        base = native() if name == "native" else PRESETS.get(preset)
        if base is None or kind not in ("", base.kind):
            raise TargetError(
                f"unknown target {name!r}; expected 'native', one of {', '.join(sorted(PRESETS))}, "
                'or a TVM target such as \'{"kind": "llvm", "mcpu": "skylake-avx512"}\''
            )
        for option in options:
            base = _with_option(base, option)
        return base


def dtype_bits(dtype: str) -> int:
    """Bits of one element of ``dtype`` (``float32`` → 32)."""
    digits = "".join(c for c in dtype if c.isdigit())
    if not digits:
        raise TargetError(f"expected a sized dtype such as 'float32', got {dtype!r}")
    return int(digits)


def _with_option(base: Target, option: str) -> Target:
    field, _, value = option.partition("=")
    count = int(value) if value.strip().isdigit() else 0
    known = "cores" if base.kind == "cpu" else "sms"
    if field.strip() != known or count < 1:
        raise TargetError(f"unknown target option {option!r}; expected '{known}=<positive number>'")
    return base.with_cores(count) if base.kind == "cpu" else dataclasses.replace(base, sm_count=count)


def _dashed(text: str) -> dict[str, Any]:
    kind, *words = text.split()
    fields: dict[str, Any] = {"kind": kind}
    for word in words:
        name, sep, value = word.removeprefix("-").partition("=")
        if not word.startswith("-") or not sep:
            raise TargetError(f"malformed TVM target {text!r}: expected '-option=value', got {word!r}")
        fields[name] = int(value) if value.isdigit() else value
    return fields


def _from_tvm_fields(fields: Mapping[str, Any]) -> Target:
    kind = fields.get("kind")
    if kind not in ("llvm", "cuda"):
        raise TargetError(f"expected a TVM target of kind 'llvm' or 'cuda', got kind {kind!r} in {dict(fields)}")
    if kind == "cuda":
        arch = str(fields.get("arch", "sm_80"))
        if arch not in PRESETS:
            raise TargetError(f"unknown CUDA arch {arch!r}; expected one of {[n for n in PRESETS if n[:3] == 'sm_']}")
        return PRESETS[arch]
    triple = str(fields.get("mtriple", "")) or host_triple()
    mcpu = str(fields.get("mcpu", "")) or ("generic" if triple.startswith("aarch64") else "x86-64")
    base = PRESETS.get(mcpu) or _from_llvm(mcpu, triple)
    cores = int(fields.get("num-cores", base.cores))
    return dataclasses.replace(base, triple=triple).with_cores(cores)


def _from_llvm(mcpu: str, triple: str) -> Target:
    """Limits of a CPU that only LLVM knows: ask it which features ``mcpu`` implies."""
    import tvm

    try:
        probe = tvm.target.Target({"kind": "llvm", "mcpu": mcpu, "mtriple": triple})
        names = tvm.get_global_func("target.llvm_get_cpu_archlist")(probe)
        if mcpu not in {str(name) for name in names}:
            raise TargetError(
                f"unknown mcpu {mcpu!r} for {triple}; expected one LLVM knows, such as {sorted(map(str, names))[-5:]}"
            )
        llvm_features = {str(name) for name in tvm.get_global_func("target.llvm_get_cpu_features")(probe)}
    except TargetError:
        raise
    except Exception as error:  # TVM raises many kinds
        raise TargetError(f"TVM rejects mcpu {mcpu!r} with triple {triple!r}: {error}") from None
    features = tuple(sorted(set(CPUINFO_FEATURES.values()) & llvm_features))
    bits, registers = vector_shape(features)
    return _with_issue(Target("cpu", mcpu, mcpu, triple, features, bits, registers, cores=1))


def vector_shape(features: tuple[str, ...]) -> tuple[int, int]:
    """Vector width in bits and architectural vector registers implied by ISA features."""
    if "avx512f" in features:
        return 512, 32
    if "avx2" in features:
        return 256, 16
    if "neon" in features:
        return 128, 32
    return 128, 16


def _x86(
    name: str, features: tuple[str, ...], cores: int, l1: int, l2: int, l3: int, mcpu: str | None = None
) -> Target:
    bits, registers = vector_shape(features)
    return _with_issue(Target(
        "cpu", name, mcpu or name, "x86_64-unknown-linux-gnu", tuple(sorted(features)), bits, registers, cores, cores,
        l1 * _KIB, l2 * _KIB, l3 * _MIB,
    ))  # fmt: skip


def _with_issue(target: Target) -> Target:
    """``target`` with what is known of how many vector operations its CPU starts in a cycle."""
    fmas, dots = _ISSUE.get(target.arch, (target.fmas_per_cycle, target.bf16_dots_per_cycle))
    return dataclasses.replace(target, fmas_per_cycle=fmas, bf16_dots_per_cycle=dots)


def _cuda(arch: str, sms: int, l2_mib: int, shared_kib: int, warps: int, blocks: int, *features: str) -> Target:
    return Target(
        "cuda", arch, arch, "x86_64-unknown-linux-gnu", tuple(sorted(features)), l1d_bytes=shared_kib * _KIB,
        l2_bytes=l2_mib * _MIB, l3_bytes=0, sm_count=sms,
        # The system keeps 1 KiB of each block's shared memory for itself.
        shared_memory_bytes=(shared_kib - 1) * _KIB, shared_memory_per_sm_bytes=shared_kib * _KIB,
        registers_per_block=65536, registers_per_sm=65536, registers_per_thread=255, warps_per_sm=warps,
        blocks_per_sm=blocks, threads_per_block=1024,
    )  # fmt: skip


_AMPERE = ("bf16", "cp.async", "ldmatrix", "mma.sync")
_HOPPER = (*_AMPERE, "fp8", "tma")

#: Targets by name. Limits of CUDA architectures are from NVIDIA's "CUDA C++ Programming Guide", appendix "Compute
#: Capabilities"; SM count and L2 are those of the board named beside each, to be changed with ``sms=``.
PRESETS: dict[str, Target] = {
    target.name: target
    for target in (
        _x86("x86-64-v3", _V3, 4, 32, 256, 8),
        _x86("x86-64-v4", _V4, 4, 32, 1024, 16),
        _x86("znver4", (*_V4, "avx512bf16", "avx512vnni"), 8, 32, 1024, 32),
        _x86(
            "sapphirerapids",
            (*_V4, "avx512bf16", "avx512vnni", "avxvnni", "amx-bf16", "amx-int8", "amx-tile"),
            16,
            48,
            2048,
            60,
        ),
        Target(
            "cpu",
            "aarch64-neon",
            "neoverse-n1",
            "aarch64-unknown-linux-gnu",
            ("neon",),
            128,
            32,
            4,
            4,
            64 * _KIB,
            1024 * _KIB,
            32 * _MIB,
        ),
        _cuda("sm_80", 108, 40, 164, 64, 32, *_AMPERE),  # A100
        _cuda("sm_86", 84, 6, 100, 48, 16, *_AMPERE),  # A40
        _cuda("sm_89", 142, 96, 100, 48, 24, *_AMPERE, "fp8"),  # L40S
        _cuda("sm_90a", 132, 50, 228, 64, 32, *_HOPPER, "wgmma"),  # H100 SXM
        _cuda("sm_100", 148, 126, 228, 64, 32, *_HOPPER),  # B200; tcgen05 is sm_100a's
    )
}


#: Presets by the compute capability of the devices they are for.
_CAPABILITIES = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a", (10, 0): "sm_100"}


def capability(target: Target) -> tuple[int, int]:
    """Compute capability, (major, minor), of the devices that a CUDA target is for."""
    digits = target.arch.removeprefix("sm_").rstrip("a")
    return int(digits[:-1]), int(digits[-1])


def cuda_target(major: int, minor: int, sm_count: int) -> Target:
    """The preset for a CUDA device of this compute capability, with as many SMs as it has.

    Raises:
        TargetError: there is no such preset.
    """
    name = _CAPABILITIES.get((major, minor))
    if name is None:
        known = ", ".join(f"{a}.{b} ({preset})" for (a, b), preset in _CAPABILITIES.items())
        raise TargetError(f"expected a CUDA device of compute capability {known}; got one of {major}.{minor}")
    return dataclasses.replace(PRESETS[name], sm_count=sm_count)


@lru_cache(maxsize=1)
def native() -> Target:
    """The machine this process runs on, limited to the physical cores it may use."""
    features = host_features()
    bits, registers = vector_shape(features)
    mcpu = _native_mcpu(features)
    return _with_issue(Target(
        "cpu", mcpu, mcpu, host_triple(), features, bits, registers, physical_cores(), len(available_cpus()),
        cache_bytes(1, "Data", 32 * _KIB), cache_bytes(2, "Unified", 512 * _KIB),
        cache_bytes(3, "Unified", 8 * _MIB),
    ))  # fmt: skip


def _native_mcpu(features: tuple[str, ...]) -> str:
    """LLVM's name for this CPU; the x86-64 level its features reach where LLVM only says 'generic'."""
    try:
        import tvm

        name = str(tvm.get_global_func("target.llvm_get_system_cpu")())
    except Exception:  # runtime-only installations have no LLVM
        name = ""
    if name and name not in ("generic", "x86-64"):
        return name
    if set(_V4) <= set(features):
        return "x86-64-v4"
    if set(_V3) <= set(features):
        return "x86-64-v3"
    return "generic" if "neon" in features else "x86-64"
