"""The one way kernels become machine code, in tuning and in compiled artifacts alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attntune.target import Target

#: Loops that a template marks with ``pragma_loop_partition_hint`` are split into a main part and a tail, so that the
#: bounds check of a tile that does not divide its dimension stays out of the main part.
PASS_CONFIG = {"s_tir.LoopPartition": {"partition_const_loop": True}}


def build(module: Any, target: Target) -> Any:
    """Compile an ``IRModule`` of scheduled kernels (or a Relax module) for ``target``; returns a TVM executable."""
    import tvm

    tvm_target = target.to_tvm()
    with tvm_target, tvm.transform.PassContext(opt_level=3, config=PASS_CONFIG):
        return tvm.compile(module, target=tvm_target)


def export(module: Any, target: Target, path: Path) -> None:
    """Compile ``module`` and write it as a shared library with a function ``main(*inputs, *outputs)``."""
    build(module, target).export_library(str(path))
