"""``attntune target``: what a schedule may assume of a machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from attntune.cli.common import Reply, fields_text, table


def target(
    name: Annotated[str, typer.Argument(help="native, a preset, or a TVM target.")] = "native",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine's FMA rate per dtype and memory bandwidth.")
    ] = False,
    presets: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
) -> Reply:
    """Show a target's ISA, vectors, cores and caches; measure this machine's peaks."""
    from attntune.errors import TargetError
    from attntune.target import PRESETS, Target, native

    if presets:
        rows = [(p.name, p.kind, p.arch, p.vector_bits if p.kind == "cpu" else "-", p.cores) for p in PRESETS.values()]
        return Reply(
            [p.to_json() for p in PRESETS.values()],
            table(("name", "kind", "arch", "vector bits", "cores"), rows),
        )
    chosen = Target.parse(name)
    document: dict[str, Any] = {"key": chosen.key(), **chosen.to_json()}
    shown = {field: _shown(field, value) for field, value in document.items() if value not in (0, [], None)}
    if measure:
        if chosen.kind != "cpu" or not set(chosen.features) <= set(native().features):
            raise TargetError(
                f"expected a target that this machine can run to measure its peaks, got {chosen.name}; "
                "try: attntune target native --measure"
            )
        from attntune.measure.machine import measure_peaks

        document["peaks"] = dict(measure_peaks(chosen))
        shown |= {name: _rate(name, rate) for name, rate in document["peaks"].items()}
    return Reply(document, fields_text(shown))


def _shown(field: str, value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if field.endswith("_bytes") and isinstance(value, int):
        return f"{value // 1024} KiB" if value < 1 << 20 else f"{value / (1 << 20):g} MiB"
    return str(value)


def _rate(name: str, rate: object) -> str:
    if not isinstance(rate, int | float):
        return str(rate)
    return f"{rate / 1e9:.1f} GB/s" if "band" in name or "byte" in name else f"{rate / 1e9:.1f} GFLOP/s"
