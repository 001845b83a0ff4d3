"""What hand-written CUDA kernels have in common: operands as arguments, a grid of blocks, threads of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from attntune.ops.workload import Workload


def kernel(
    w: Workload, grid: Sequence[int], threads: int, body: Callable[[dict[str, Any], list[Any], Any], None]
) -> Any:
    """A ``PrimFunc`` ``main`` over the inputs and fresh outputs of ``w`` that launches one kernel.

    Args:
        w: names, shapes and dtypes of the arguments.
        grid: blocks along x, then along y.
        threads: of a block.
        body: writes the kernel, given the operands by name, the block's indices as ordered in ``grid``, and the thread.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        specs = (*w.inputs(), *w.fresh())
        operand = {spec.name: T.arg(spec.name, T.buffer(spec.shape, spec.dtype)) for spec in specs}
        with contextlib.ExitStack() as stack:
            stack.enter_context(T.sblock("root"))
            axes = list(zip(("blockIdx.x", "blockIdx.y"), grid, strict=False))
            blocks = [stack.enter_context(T.launch_thread(name, extent)) for name, extent in reversed(axes)]
            thread = stack.enter_context(T.launch_thread("threadIdx.x", threads))
            stack.enter_context(T.sblock("kernel"))
            T.reads()
            T.writes()
            body(operand, blocks[::-1], thread)
    return builder.get()
