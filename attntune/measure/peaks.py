"""Kernels that reach a machine's limits: multiply-adds held in registers, and memory read and copied.

Runs in a process of its own, called by ``machine.measure_peaks``. Multiplicands are bound before the loop: a load
inside it might alias the accumulators, which LLVM then keeps in memory (75 instead of 215 GFLOP/s).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from attntune.measure.buffers import GuardedArray, as_tensor
from attntune.target import Target
from attntune.templates.cpu import amx
from attntune.templates.lowering import build

_CHAINS = 12
"""Independent accumulators: more than latency × issue width of any core, and few enough to stay in registers."""
_STEPS = 200_000
_REPEATS = 12
_MIN_BUFFER_BYTES = 64 * 1024**2

_DPBF16 = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define <16 x float> @attntune_peak_dpbf16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) alwaysinline nounwind {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
"""


_AMX_TILES = 4
"""Independent tiles of sums, each of 16 × 16 with products of 32 values."""
_AMX_FLOPS = 2 * 16 * 16 * 32


def measure(target: Target) -> dict[str, Any]:
    """See ``machine.measure_peaks``."""
    flops = {"float32": _compute_peak(target, "float32")}
    if target.has("avx512bf16"):
        flops["bfloat16"] = _compute_peak(target, "bfloat16")
    if amx.available(target):
        flops["bfloat16"] = max(flops["bfloat16"], _amx_peak(target))
    if target.has("avx512vnni"):
        flops["int8"] = _compute_peak(target, "int8")
    read, copy = _bandwidth(target)
    return {"flops_per_sec": flops, "read_bytes_per_sec": read, "copy_bytes_per_sec": copy}


def _compute_peak(target: Target, dtype: str) -> float:
    """Operations per second of independent multiply-add chains on every core."""
    lanes = target.lanes("float32")
    kernel, a_dtype, sum_dtype, per_lane = {
        "float32": (_fma_kernel, "float32", "float32", 2),
        "bfloat16": (_dpbf16_kernel, "int32", "float32", 4),
        "int8": (_vpdpbusd_kernel, "int32", "int32", 8),
    }[dtype]
    call, results = _prepare(
        kernel(target.cores, lanes, _CHAINS, _STEPS), target,
        [np.full(2 * lanes, 0.5 if a_dtype == "float32" else 0, a_dtype)],
        [np.zeros((target.cores, _CHAINS * lanes), sum_dtype)],
    )  # fmt: skip
    secs = _best(call)
    assert np.isfinite(results[0]).all()
    return target.cores * _CHAINS * lanes * per_lane * _STEPS / secs


def _amx_peak(target: Target) -> float:
    """Operations per second of products of tiles on every core."""
    values = np.full((2 * amx.ROWS, 2 * amx.PAIRS), 0x3F80, np.uint16)  # ones, as bfloat16
    call, results = _prepare(
        _amx_kernel(target.cores, _STEPS), target, [values],
        [np.zeros((target.cores, _AMX_TILES, amx.ROWS, amx.ROWS), np.float32)],
    )  # fmt: skip
    secs = _best(call)
    assert (results[0] == 2 * amx.PAIRS * _STEPS).all()
    return target.cores * _AMX_TILES * _AMX_FLOPS * _STEPS / secs


def _bandwidth(target: Target) -> tuple[float, float]:
    """Bytes per second of summing a buffer larger than every cache, and of copying one (read plus written)."""
    lanes = target.lanes("float32")
    rows = target.cores * 64
    row = max(4 * target.l3_bytes, _MIN_BUFFER_BYTES) // (4 * rows)
    row = -(-row // (_CHAINS * lanes)) * _CHAINS * lanes
    source = np.ones((rows, row), np.float32)
    read, sums = _prepare(
        _sum_kernel(rows, row, lanes, _CHAINS), target, [source], [np.zeros((rows, _CHAINS * lanes), np.float32)]
    )
    read_secs = _best(read)
    assert sums[0].sum(dtype=np.float64) == source.size
    copy, copies = _prepare(_copy_kernel(rows, row, lanes), target, [source], [np.zeros_like(source)])
    copy_secs = _best(copy)
    assert (copies[0] == 1).all()
    return source.nbytes / read_secs, 2 * source.nbytes / copy_secs


def _prepare(
    function: Any, target: Target, inputs: list[np.ndarray], outputs: list[np.ndarray]
) -> tuple[Callable[[], None], list[np.ndarray]]:
    """What calls the kernel on aligned copies of its operands, and the outputs it writes."""
    import tvm

    executable = build(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target)
    operands = [GuardedArray.holding(values) for values in (*inputs, *outputs)]
    tensors = [as_tensor(operand.array) for operand in operands]
    main = executable["main"]
    return lambda: main(*tensors), [operand.array for operand in operands[len(inputs) :]]


def _best(call: Callable[[], None]) -> float:
    """Shortest of several runs, in seconds: a peak is what the machine can do undisturbed."""
    call()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _fma_kernel(cores: int, lanes: int, chains: int, steps: int) -> Any:
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(a: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (2 * lanes,), "float32")
        C = T.match_buffer(c, (cores, chains * lanes), "float32")
        with T.sblock("root"):
            for t in T.parallel(cores):
                with T.sblock("core"):
                    v = T.axis.spatial(cores, t)
                    T.reads(A[0 : 2 * lanes])
                    T.writes(C[v, 0 : chains * lanes])
                    acc = T.sblock_alloc_buffer((chains * lanes,), "float32", scope="local")
                    for j in T.unroll(chains):
                        acc[T.ramp(j * lanes, 1, lanes)] = A[T.ramp(0, 1, lanes)]
                    x: T.let = A[T.ramp(0, 1, lanes)]
                    y: T.let = A[T.ramp(lanes, 1, lanes)]
                    for _ in T.serial(steps):
                        for j in T.unroll(chains):
                            acc[T.ramp(j * lanes, 1, lanes)] = acc[T.ramp(j * lanes, 1, lanes)] * x + y
                    for j in T.unroll(chains):
                        C[v, T.ramp(j * lanes, 1, lanes)] = acc[T.ramp(j * lanes, 1, lanes)]

    return main


def _dpbf16_kernel(cores: int, lanes: int, chains: int, steps: int) -> Any:
    from tvm.script import tirx as T

    vector = f"float32x{lanes}"
    ll = _DPBF16

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(a: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (2 * lanes,), "int32")
        C = T.match_buffer(c, (cores, chains * lanes), "float32")
        with T.sblock("root"):
            for t in T.parallel(cores, annotations={"pragma_import_llvm": ll}):
                with T.sblock("core"):
                    v = T.axis.spatial(cores, t)
                    T.reads(A[0 : 2 * lanes])
                    T.writes(C[v, 0 : chains * lanes])
                    acc = T.sblock_alloc_buffer((chains * lanes,), "float32", scope="local")
                    for j in T.unroll(chains):
                        acc[T.ramp(j * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
                    x: T.let = A[T.ramp(0, 1, lanes)]
                    y: T.let = A[T.ramp(lanes, 1, lanes)]
                    for _ in T.serial(steps):
                        for j in T.unroll(chains):
                            acc[T.ramp(j * lanes, 1, lanes)] = T.call_pure_extern(
                                vector, "attntune_peak_dpbf16", acc[T.ramp(j * lanes, 1, lanes)],
                                x, y,
                            )  # fmt: skip
                    for j in T.unroll(chains):
                        C[v, T.ramp(j * lanes, 1, lanes)] = acc[T.ramp(j * lanes, 1, lanes)]

    return main


def _amx_kernel(cores: int, steps: int) -> Any:
    """Each core multiplies the same tiles again and again: ``main(values (tile rows, values), sums)``."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    tiles, row_bytes = amx.Tiles(2 * amx.ROWS, _AMX_TILES // 2), 4 * amx.PAIRS
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        values = T.arg("values", T.buffer((2 * amx.ROWS, 2 * amx.PAIRS), "uint16"))
        sums = T.arg("sums", T.buffer((cores, _AMX_TILES, amx.ROWS, amx.ROWS), "float32"))
        code = {"pragma_import_llvm": amx.llvm_ir([tiles])}
        with T.sblock("root"), T.parallel(cores, annotations=code) as core, T.sblock("core"):
            T.reads()
            T.writes()
            tiles.begin()
            tiles.zero()
            for n in range(2):
                tiles.load(tiles.left(n), values[n * amx.ROWS, 0], row_bytes)
                tiles.load(tiles.right(n), values[n * amx.ROWS, 0], row_bytes)
            with T.serial(steps):
                for i in range(2):
                    for v in range(_AMX_TILES // 2):
                        tiles.dot(i, v)
            for n in range(_AMX_TILES):
                tiles.store(tiles.sums(n // 2, n % 2), sums[core, n, 0, 0], row_bytes)
            amx.end()
    return builder.get()


def _vpdpbusd_kernel(cores: int, lanes: int, chains: int, steps: int) -> Any:
    from tvm.script import tirx as T

    vector, multiplicands = f"int32x{lanes}", f"int8x{4 * lanes}"

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(a: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (2 * lanes,), "int32")
        C = T.match_buffer(c, (cores, chains * lanes), "int32")
        with T.sblock("root"):
            for t in T.parallel(cores):
                with T.sblock("core"):
                    v = T.axis.spatial(cores, t)
                    T.reads(A[0 : 2 * lanes])
                    T.writes(C[v, 0 : chains * lanes])
                    acc = T.sblock_alloc_buffer((chains * lanes,), "int32", scope="local")
                    for j in T.unroll(chains):
                        acc[T.ramp(j * lanes, 1, lanes)] = T.broadcast(0, lanes)
                    x: T.let = A[T.ramp(0, 1, lanes)]
                    y: T.let = A[T.ramp(lanes, 1, lanes)]
                    for _ in T.serial(steps):
                        for j in T.unroll(chains):
                            acc[T.ramp(j * lanes, 1, lanes)] = T.call_llvm_pure_intrin(
                                vector, "llvm.x86.avx512.vpdpbusd.512", acc[T.ramp(j * lanes, 1, lanes)],
                                T.reinterpret(multiplicands, x), T.reinterpret(multiplicands, y),
                            )  # fmt: skip
                    for j in T.unroll(chains):
                        C[v, T.ramp(j * lanes, 1, lanes)] = acc[T.ramp(j * lanes, 1, lanes)]

    return main


def _sum_kernel(rows: int, row: int, lanes: int, chains: int) -> Any:
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(a: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (rows, row), "float32")
        C = T.match_buffer(c, (rows, chains * lanes), "float32")
        with T.sblock("root"):
            for t in T.parallel(rows):
                with T.sblock("row"):
                    v = T.axis.spatial(rows, t)
                    T.reads(A[v, 0:row])
                    T.writes(C[v, 0 : chains * lanes])
                    acc = T.sblock_alloc_buffer((chains * lanes,), "float32", scope="local")
                    for j in T.unroll(chains):
                        acc[T.ramp(j * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
                    for k in T.serial(row // (chains * lanes)):
                        for j in T.unroll(chains):
                            acc[T.ramp(j * lanes, 1, lanes)] = (
                                acc[T.ramp(j * lanes, 1, lanes)] + A[v, T.ramp((k * chains + j) * lanes, 1, lanes)]
                            )
                    for j in T.unroll(chains):
                        C[v, T.ramp(j * lanes, 1, lanes)] = acc[T.ramp(j * lanes, 1, lanes)]

    return main


def _copy_kernel(rows: int, row: int, lanes: int) -> Any:
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(a: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (rows, row), "float32")
        C = T.match_buffer(c, (rows, row), "float32")
        with T.sblock("root"):
            for t in T.parallel(rows):
                with T.sblock("row"):
                    v = T.axis.spatial(rows, t)
                    T.reads(A[v, 0:row])
                    T.writes(C[v, 0:row])
                    for k in T.serial(row // lanes):
                        C[v, T.ramp(k * lanes, 1, lanes)] = A[v, T.ramp(k * lanes, 1, lanes)]

    return main
