"""What hand-written CUDA kernels have in common: operands as arguments, a grid of blocks, threads of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attntune.ops.workload import Workload

#: Threads of a warp, and the mask of all of them.
WARP, EVERY_LANE = 32, 0xFFFFFFFF

Body = Callable[[dict[str, Any], list[Any], Any], None]
"""Writes a kernel, given the operands by name, the block's indices as ordered in its grid, and the thread."""


@dataclass(frozen=True)
class Launch:
    """One kernel."""

    grid: Sequence[int]
    """Blocks along x, then along y, then along z."""
    threads: int
    """Of a block."""
    body: Body


def kernel(w: Workload, grid: Sequence[int], threads: int, body: Body) -> Any:
    """A ``PrimFunc`` ``main`` over the inputs and fresh outputs of ``w`` that launches one kernel."""
    return kernels(w, {}, [Launch(grid, threads, body)])


def kernels(
    w: Workload, scratch: Mapping[str, tuple[int, ...]], launches: Sequence[Launch],
    packed: Mapping[str, tuple[int, ...]] | None = None,
) -> Any:  # fmt: skip
    """A ``PrimFunc`` ``main`` over the inputs and fresh outputs of ``w`` that launches kernels one after another.

    Args:
        w: names, shapes and dtypes of the arguments.
        scratch: shapes of float32 buffers in device memory by name, for what one kernel leaves for the next; among the
            operands that a body is given.
        launches: the kernels.
        packed: shapes of inputs whose layout is not the workload's, by name.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        specs = (*w.inputs(), *w.fresh())
        shapes = {**{spec.name: spec.shape for spec in specs}, **(packed or {})}
        operand = {spec.name: T.arg(spec.name, T.buffer(shapes[spec.name], spec.dtype)) for spec in specs}
        with T.sblock("root"):
            for name, shape in scratch.items():
                operand[name] = T.sblock_alloc_buffer(shape, "float32", scope="global")
            for number, launch in enumerate(launches):
                with contextlib.ExitStack() as stack:
                    axes = list(zip(("blockIdx.x", "blockIdx.y", "blockIdx.z"), launch.grid, strict=False))
                    blocks = [stack.enter_context(T.launch_thread(name, extent)) for name, extent in reversed(axes)]
                    thread = stack.enter_context(T.launch_thread("threadIdx.x", launch.threads))
                    stack.enter_context(T.sblock(f"kernel_{number}" if number else "kernel"))
                    T.reads()
                    T.writes()
                    launch.body(operand, blocks[::-1], thread)
    return builder.get()


@contextlib.contextmanager
def when(condition: Any) -> Iterator[None]:
    """What is emitted inside runs where ``condition`` holds."""
    from tvm.tirx.script.builder import ir as T

    with T.If(condition), T.Then():
        yield


def over_lanes(combine: Callable[[Any, Any], Any], value: Any, distances: Sequence[int]) -> Any:
    """``value`` combined over lanes of a warp that are these powers of two apart; every lane gets the result."""
    from tvm import tirx
    from tvm.tirx.script.builder import ir as T

    for distance in distances:
        value = T.bind(value)
        mask = tirx.const(EVERY_LANE, "uint32")
        value = combine(value, T.tvm_warp_shuffle_xor(mask, value, distance, WARP, WARP))
    return value


def dynamic_shared(count: int, dtype: str) -> Any:
    """Allocate ``count`` elements of a block's dynamic shared memory.

    Named by dtype: the kernels of a module are one translation unit of CUDA C++, where what has one name must have one
    type.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    return IRBuilder.name(f"shared_{dtype}", T.sblock_alloc_buffer((count,), dtype, scope="shared.dyn"))
