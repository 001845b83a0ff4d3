"""Kernels that reach a machine's limits: multiply-adds held in registers, and memory read and copied.

Runs in a process of its own, called by ``machine.measure_peaks`` and, beside the kernels that are compared with these
limits, by :mod:`attntune.engines.kernel_comparison`. Multiplicands are bound before the loop: a load
inside it might alias the accumulators, which LLVM then keeps in memory (75 instead of 215 GFLOP/s).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from attntune.measure.buffers import GuardedArray, as_tensor
from attntune.target import Target
from attntune.templates.cpu import amx
from attntune.templates.cpu.products import byte_product, multiplies_bytes
from attntune.templates.cpu.vectors import PREFETCH_IR
from attntune.templates.lowering import build

_CHAINS = 12
"""Independent accumulators: more than latency × issue width of any core, and few enough to stay in registers."""
_STEPS = 200_000
_REPEATS = 12
_MIN_BUFFER_BYTES = 64 * 1024**2
_AHEAD = 1024
"""Values that memory is asked for ahead of adding them, to the second-level cache."""

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


@dataclass(frozen=True)
class Limit:
    """A kernel that reaches one of the machine's limits, ready to run."""

    call: Callable[[], None]
    work: float
    """Operations, or bytes read and written, of one call."""


def measure(target: Target) -> dict[str, Any]:
    """See ``machine.measure_peaks``."""
    flops = {"float32": _best(_compute_limit(target, "float32"))}
    if target.has("avx512bf16"):
        flops["bfloat16"] = _best(_compute_limit(target, "bfloat16"))
    if amx.available(target):
        flops["bfloat16"] = max(flops["bfloat16"], _best(_amx_limit(target)))
    if multiplies_bytes(target):
        flops["int8"] = _best(_compute_limit(target, "int8"))
    return {
        "flops_per_sec": flops,
        "read_bytes_per_sec": _best(_read_limit(target)),
        "copy_bytes_per_sec": _best(_copy_limit(target)),
    }


def rates(target: Target, limit: str, secs: float) -> list[float]:
    """What the machine does now: operations or bytes a second of each of several runs.

    Args:
        target: this machine.
        limit: ``"read"``, or a dtype of ``flops_per_sec``.
        secs: how long to go on; two runs at least. Building the kernel comes on top, once a process.
    """
    found = _limit(target, limit)
    found.call()
    measured: list[float] = []
    start = time.perf_counter()
    while len(measured) < 2 or time.perf_counter() - start < secs:
        measured.append(found.work / _secs(found.call))
    return measured


@cache
def _limit(target: Target, name: str) -> Limit:
    if name == "read":
        return _read_limit(target)
    if name == "bfloat16" and amx.available(target):
        return _amx_limit(target)
    return _compute_limit(target, name)


def _compute_limit(target: Target, dtype: str) -> Limit:
    """Independent multiply-add chains on every core."""
    lanes = target.lanes("float32")
    kernel, operand, sum_dtype, per_lane = {
        "float32": (
            partial(_fma_kernel, target.cores, lanes), np.full(2 * lanes, 0.5, np.float32), np.float32, 2,
        ),
        "bfloat16": (partial(_dpbf16_kernel, target.cores, lanes), np.zeros(2 * lanes, np.int32), np.float32, 4),
        "int8": (partial(_bytes_kernel, target), np.full(lanes, 0x01010101, np.int32), np.int32, 8),
    }[dtype]  # fmt: skip
    results = [np.zeros((target.cores, _CHAINS * lanes), sum_dtype)]
    call, results = _prepare(kernel(_CHAINS, _STEPS), target, [operand], results)
    call()
    assert np.isfinite(results[0]).all()
    return Limit(call, target.cores * _CHAINS * lanes * per_lane * _STEPS)


def _amx_limit(target: Target) -> Limit:
    """Products of tiles on every core."""
    values = np.full((2 * amx.ROWS, 2 * amx.PAIRS), 0x3F80, np.uint16)  # ones, as bfloat16
    call, results = _prepare(
        _amx_kernel(target.cores, _STEPS), target, [values],
        [np.zeros((target.cores, _AMX_TILES, amx.ROWS, amx.ROWS), np.float32)],
    )  # fmt: skip
    call()
    assert (results[0] == 2 * amx.PAIRS * _STEPS).all()
    return Limit(call, target.cores * _AMX_TILES * _AMX_FLOPS * _STEPS)


def _read_limit(target: Target) -> Limit:
    """A buffer larger than every cache, added up in whichever way is the fastest."""
    source, lanes = GuardedArray.holding(_large(target)), target.lanes("float32")
    rows, row = source.array.shape
    ways = []
    for places, ahead in itertools.product((1, 4), (False, True)):
        kernel = _sum_kernel(rows // places, places, row, lanes, _CHAINS, ahead)
        call, sums = _prepare(kernel, target, [source], [np.zeros((rows // places, _CHAINS * lanes), np.float32)])
        call()
        assert sums[0].sum(dtype=np.float64) == source.array.size
        ways.append(Limit(call, source.array.nbytes))
    return max(ways, key=lambda way: _best(way, 3))


def _copy_limit(target: Target) -> Limit:
    """The same buffer copied: read plus written."""
    source = _large(target)
    rows, row = source.shape
    kernel = _copy_kernel(rows, row, target.lanes("float32"))
    call, copies = _prepare(kernel, target, [source], [np.zeros_like(source)])
    call()
    assert (copies[0] == 1).all()
    return Limit(call, 2 * source.nbytes)


def _large(target: Target) -> np.ndarray:
    """Ones, in rows of whole steps of the kernels that read them."""
    rows, step = target.cores * 64, _CHAINS * target.lanes("float32")
    row = max(4 * target.l3_bytes, _MIN_BUFFER_BYTES) // (4 * rows)
    return np.ones((rows, -(-row // step) * step), np.float32)


def _prepare(
    function: Any, target: Target, inputs: Sequence[np.ndarray | GuardedArray], outputs: Sequence[np.ndarray]
) -> tuple[Callable[[], None], list[np.ndarray]]:
    """What calls the kernel on its operands, copied to where they are aligned, and the outputs it writes."""
    import tvm

    executable = build(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target)
    operands = [x if isinstance(x, GuardedArray) else GuardedArray.holding(x) for x in (*inputs, *outputs)]
    tensors = [as_tensor(operand.array) for operand in operands]
    main = executable["main"]
    return lambda: main(*tensors), [operand.array for operand in operands[len(inputs) :]]


def _best(limit: Limit, runs: int = _REPEATS) -> float:
    """Work a second of the shortest of several runs: a peak is what the machine can do undisturbed."""
    return limit.work / min(_secs(limit.call) for _ in range(runs))


def _secs(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


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


def _bytes_kernel(target: Target, chains: int, steps: int) -> Any:
    """Products of bytes: ``main(x (lanes), sums (cores, chains · lanes))``, words of four.

    What is multiplied are the sums themselves, so that no product is the same in every step.
    """
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    product, lanes = byte_product(target, 4), target.lanes("float32")
    kind, width = product.sums.split("x")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        values = T.arg("x", T.buffer((lanes,), "int32"))
        sums = T.arg("sums", T.buffer((target.cores, chains * lanes), "int32"))
        with T.sblock("root"), T.parallel(target.cores) as core, T.sblock("core"):
            T.reads()
            T.writes()
            x = T.bind(values.vload([0], dtype=product.words))
            acc = T.sblock_alloc_buffer((chains, int(width)), kind, scope="local")
            each = tirx.Ramp(0, 1, int(width))
            for c in range(chains):
                T.buffer_store(acc, tirx.Broadcast(tirx.const(c, kind), int(width)), [c, each])
            with T.serial(steps):
                for c in range(chains):
                    held = acc.vload([c, 0], dtype=product.sums)
                    weights = tirx.reinterpret(product.words, held) if held.ty.dtype != product.words else held
                    T.buffer_store(acc, product.add(held, weights, x), [c, each])
            for c in range(chains):
                total = product.total(acc.vload([c, 0], dtype=product.sums))
                T.buffer_store(sums, total, [core, tirx.Ramp(c * lanes, 1, lanes)])
    return builder.get()


def _sum_kernel(tasks: int, places: int, row: int, lanes: int, chains: int, ahead: bool) -> Any:
    """Each task adds up ``places`` rows, a few vectors of each in turns; ``ahead``: lines are asked for before that."""
    from tvm.script import tirx as T

    code = {"pragma_import_llvm": PREFETCH_IR} if ahead else {}
    each = chains // places

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def main(a: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (tasks * places, row), "float32")
        C = T.match_buffer(c, (tasks, chains * lanes), "float32")
        with T.sblock("root"):
            for t in T.parallel(tasks, annotations=code):
                with T.sblock("row"):
                    v = T.axis.spatial(tasks, t)
                    T.reads(A[v * places : v * places + places, 0:row])
                    T.writes(C[v, 0 : chains * lanes])
                    acc = T.sblock_alloc_buffer((chains * lanes,), "float32", scope="local")
                    for j in T.unroll(chains):
                        acc[T.ramp(j * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
                    for k in T.serial(row // (each * lanes)):
                        for j in T.unroll(chains):
                            if ahead:
                                T.evaluate(T.call_extern("int32", "attntune_prefetch_2", T.address_of(
                                    A[v * places + j // each, (k * each + j % each) * lanes + _AHEAD]
                                )))  # fmt: skip
                            acc[T.ramp(j * lanes, 1, lanes)] = (
                                acc[T.ramp(j * lanes, 1, lanes)]
                                + A[v * places + j // each, T.ramp((k * each + j % each) * lanes, 1, lanes)]
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
