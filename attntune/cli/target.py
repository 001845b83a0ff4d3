"""``attntune target``: what a schedule may assume of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from attntune.cli.common import Reply, fields_text, table
from attntune.errors import TargetError

#: Fields that say nothing of a GPU.
_NOT_OF_CUDA = ("vector_bits", "vector_registers", "cores", "logical_cores")


def target(
    name: Annotated[str, typer.Argument(help="native, a preset, or a TVM target.")] = "native",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine's FMA rate per dtype and memory bandwidth.")
    ] = False,
    presets: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
) -> Reply:
    """Show a target's ISA, vectors, cores and caches; measure this machine's peaks."""
    from attntune.target import PRESETS, Target

    if presets:
        rows = [
            (p.name, p.kind, p.arch, p.vector_bits, p.cores, "-")
            if p.kind == "cpu"
            else (p.name, p.kind, p.arch, "-", p.sm_count, _shown("_bytes", p.shared_memory_bytes))
            for p in PRESETS.values()
        ]
        return Reply(
            [p.to_json() for p in PRESETS.values()],
            table(("name", "kind", "arch", "vector bits", "cores or SMs", "shared memory"), rows),
        )
    chosen = Target.parse(name)
    document: dict[str, Any] = {"key": chosen.key(), **chosen.to_json()}
    hidden = _NOT_OF_CUDA if chosen.kind == "cuda" else ()
    shown = {
        field: _shown(field, value)
        for field, value in document.items()
        if value not in (0, [], None) and field not in hidden
    }
    if measure:
        if chosen.kind == "cuda":
            raise TargetError(f"expected a CPU target with --measure, got {name!r}")
        from attntune.measure.machine import cached_peaks

        document["peaks"] = cached_peaks(chosen, refresh=True)
        shown |= _peaks_text(document["peaks"])
    return Reply(document, fields_text(shown))


def _shown(field: str, value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if field.endswith("_bytes") and isinstance(value, int):
        return f"{value // 1024} KiB" if value < 1 << 20 else f"{value / (1 << 20):g} MiB"
    return str(value)


def _peaks_text(peaks: Mapping[str, Any]) -> dict[str, str]:
    rates = {f"{dtype} peak": f"{rate / 1e9:.1f} GFLOP/s" for dtype, rate in peaks["flops_per_sec"].items()}
    reads, copies = peaks["read_bytes_per_sec"], peaks["copy_bytes_per_sec"]
    return {**rates, "memory read": f"{reads / 1e9:.1f} GB/s", "memory copy": f"{copies / 1e9:.1f} GB/s"}
