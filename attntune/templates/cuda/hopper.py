"""What compute capability 9.0 adds, for kernels in TIR: tensor maps, mbarriers, wgmma.

Copies of tiles (TMA) are in :mod:`attntune.templates.cuda.tma`.

Sources: NVIDIA, "PTX ISA", sections on ``cp.async.bulk.tensor``, ``mbarrier``, ``wgmma`` and ``setmaxnreg``; the driver
API's ``cuTensorMapEncodeTiled``; the canonical layouts in CUTLASS's documentation of its descriptors.

Shared memory is addressed by numbers, from a base that is a multiple of 1,024 bytes. A tile there is a run of rows of
:data:`ROW_BYTES`, 64 elements of 16 bits. Eight rows are the pattern of the 128-byte swizzle, in which the 16-byte
chunk c of row r lies at c xor (r mod 8): copies write it and wgmma reads it. Longer rows are several tiles. Two forms
of descriptors suffice:

    K-major    rows are of M or N, 64 elements of K in each; 16 of K further is 32 bytes further
    MN-major   rows are of K, 64 elements of N in each; 16 of K further is 16 rows further, 64 of N further is a tile

Sums of m64nNk16, by thread: the same as those of ``mma.m16n8k16`` (see :mod:`attntune.templates.cuda.intrinsics`), each
of the four warps with 16 rows, register 4j + r in the columns from 8j on. So are registers of A.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attntune.ops.workload import Workload
from attntune.target import Target
from attntune.templates.cuda.intrinsics import emit
from attntune.templates.cuda.launch import dynamic_shared, when
from attntune.templates.cuda.tma import prefetch

#: Bytes of a row of a tile in shared memory: one row of the swizzle's pattern.
ROW_BYTES = 128
#: Elements of 16 bits in it.
ROW = ROW_BYTES // 2
#: Bytes that the swizzle's pattern repeats after: where tiles begin.
PATTERN_BYTES = 8 * ROW_BYTES
#: Threads that issue a wgmma together.
WARPGROUP = 128
#: Rows or columns of a tile that one copy brings at most.
MAX_BOX = 256
#: Registers of the producer's threads, from which consumers have the rest; 0 leaves all threads equally many. With one
#: consumer, a block of 256 threads may have as many as there are.
PRODUCER_REGISTERS = (0, 24, 40)
_ALL_REGISTERS, _MAX_REGISTERS = 65536, 255

_SWIZZLE_128B, _L2_128B = 3, 2  # of the driver's enumerations CUtensorMapSwizzle and CUtensorMapL2promotion
_PTX = {"bfloat16": "bf16", "float16": "f16"}


def available(target: Target) -> bool:
    """Whether the target has these instructions."""
    return target.has("tma", "wgmma")


@dataclass(frozen=True)
class TensorMap:
    """How the copies of one operand see it; lists begin with the dimension whose elements are contiguous."""

    operand: str
    dtype: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements from one to the next, of every dimension but the first; multiples of 8."""
    box: tuple[int, ...]
    """Elements of a tile; the first is :data:`ROW`."""

    def encode(self, buffer: Any) -> Any:
        """Emit the host's code that encodes it; the variable that kernels take it by."""
        from tvm.tirx.script.builder import ir as T

        rank = len(self.dims)
        name = f"{self.operand}_map"
        variable = T.bind(T.tvm_stack_alloca("tensormap", 1), var=T.Var(name, ty=T.handle("tensormap").ty))
        T.evaluate(
            T.call_packed(
                "runtime.cuTensorMapEncodeTiled", variable, self.dtype, rank, buffer.data, *self.dims,
                *(2 * stride for stride in self.strides), *self.box, *([1] * rank), 0, _SWIZZLE_128B, _L2_128B, 0,
            )
        )  # fmt: skip
        return variable


def kernel(
    w: Workload, maps: Mapping[str, TensorMap], grid: Sequence[int], threads: int,
    body: Callable[[dict[str, Any], dict[str, Any], list[Any], Any], None],
) -> Any:  # fmt: skip
    """As :func:`attntune.templates.cuda.launch.kernel`, and ``body`` is also given the tensor maps, by name."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        specs = (*w.inputs(), *w.outputs())
        operand = {spec.name: T.arg(spec.name, T.buffer(spec.shape, spec.dtype)) for spec in specs}
        encoded = {name: tensor_map.encode(operand[tensor_map.operand]) for name, tensor_map in maps.items()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(T.sblock("root"))
            axes = list(zip(("blockIdx.x", "blockIdx.y"), grid, strict=False))
            blocks = [stack.enter_context(T.launch_thread(name, extent)) for name, extent in reversed(axes)]
            thread = stack.enter_context(T.launch_thread("threadIdx.x", threads))
            # So that the assembler knows how many registers a block begins with, or it ignores setmaxnreg.
            stack.enter_context(T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1}))
            stack.enter_context(T.sblock("kernel"))
            T.reads()
            T.writes()
            body(operand, encoded, blocks[::-1], thread)
    return builder.get()


def shared_memory(payload_bytes: int) -> Any:
    """Allocate ``payload_bytes`` of shared memory; the address of the first, a multiple of the pattern."""
    from tvm.tirx.script.builder import ir as T

    buffer = dynamic_shared(payload_bytes + PATTERN_BYTES, "uint8")
    source = f"""__forceinline__ __device__ unsigned attntune_shared_base(const void* shared) {{
  return ((unsigned)__cvta_generic_to_shared(shared) + {PATTERN_BYTES - 1}u) & ~{PATTERN_BYTES - 1}u;
}}
"""
    return T.bind(T.cuda.func_call("attntune_shared_base", buffer.data, source_code=source, return_type="uint32"))


def uniform(value: Any) -> Any:
    """A number that is the same in a whole warp, so that the compiler knows."""
    from tvm import tirx
    from tvm.tirx.script.builder import ir as T

    return T.bind(T.tvm_warp_shuffle(tirx.const(0xFFFFFFFF, "uint32"), value, 0, 32, 32))


# -- mbarriers ---------------------------------------------------------------------------------------------------------


class Barriers:
    """``count`` mbarriers that lie side by side in shared memory."""

    def __init__(self, address: Any, count: int, arrivals: int) -> None:
        self.address, self.count, self.arrivals = address, count, arrivals

    @property
    def end(self) -> Any:
        """The address after the last."""
        return self.address + 8 * self.count

    def at(self, i: Any) -> Any:
        """Address of barrier ``i``."""
        from tvm import tirx

        return self.address + (8 * i if isinstance(i, int) else tirx.Cast("uint32", i * 8))

    def initialise(self) -> None:
        """By one thread, before :func:`barriers_are_visible`."""
        for i in range(self.count):
            emit(
                "mbarrier_init", "unsigned barrier, unsigned arrivals",
                '  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");',
                self.at(i), self.arrivals,
            )  # fmt: skip

    def expect(self, i: Any, count: int) -> None:
        """Arrive, and have the phase wait for so many bytes of copies too."""
        emit(
            "mbarrier_expect", "unsigned barrier, unsigned bytes",
            """  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(barrier), "r"(bytes) : "memory");""",
            self.at(i), count,
        )  # fmt: skip

    def arrive(self, i: Any) -> None:
        """Arrive."""
        emit(
            "mbarrier_arrive", "unsigned barrier",
            '  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");', self.at(i),
        )  # fmt: skip

    def wait(self, i: Any, parity: Any) -> None:
        """Wait until the phase of this parity is complete; of the phase before the first, 1, it always is."""
        emit(
            "mbarrier_wait", "unsigned barrier, unsigned parity",
            """  unsigned done;
  do {
    asm volatile("{ .reg .pred complete; mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2; "
                 "selp.u32 %0, 1, 0, complete; }"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (!done);""",
            self.at(i), parity,
        )  # fmt: skip


def barriers_are_visible() -> None:
    """By the thread that initialised mbarriers: to copies and to other threads, after a barrier of the block."""
    emit(
        "fence_mbarrier_init", "",
        """  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");""",
    )  # fmt: skip


def named_barrier(identifier: Any, threads: int, *, wait: bool) -> None:
    """Arrive at a barrier of the block that ``threads`` threads meet at; and wait for them."""
    verb = "sync" if wait else "arrive"
    emit(
        f"named_barrier_{verb}", "int barrier, int threads",
        f'  asm volatile("bar.{verb} %0, %1;" :: "r"(barrier), "r"(threads) : "memory");', identifier, threads,
    )  # fmt: skip


def split_is_legal(consumers: int, producer: int) -> bool:
    """Whether registers may be split so: one consumer has what it may address, split or not."""
    return producer in PRODUCER_REGISTERS and (consumers > 1 or not producer)


def consumer_registers(consumers: int, producer: int) -> int:
    """Registers of a consumer's thread where the producer's have ``producer`` (0: as many), in multiples of 8."""
    each = _ALL_REGISTERS // (WARPGROUP * (1 + consumers)) // 8 * 8
    if not producer:
        return min(each, _MAX_REGISTERS)
    return (each * (1 + consumers) - producer) // consumers // 8 * 8


def set_registers(count: int, *, more: bool) -> None:
    """All warps of a warpgroup: have ``count`` registers a thread from here on."""
    verb = "inc" if more else "dec"
    line = f'  asm volatile("setmaxnreg.{verb}.sync.aligned.u32 {count};" ::: "memory");'
    emit(f"registers_{verb}_{count}", "", line)


# -- wgmma -------------------------------------------------------------------------------------------------------------


def descriptor(address: Any, tile_bytes: int = 0) -> Any:
    """Of an operand at ``address``: K-major; MN-major where ``tile_bytes`` says how far apart 64 elements of N are."""
    from tvm.tirx.script.builder import ir as T

    source = f"""__forceinline__ __device__ unsigned long long
attntune_descriptor(unsigned address, unsigned leading) {{
  // Start, leading and stride offset in units of 16 bytes; 1: the 128-byte swizzle.
  return (unsigned long long)((address & 0x3FFFF) >> 4) | (unsigned long long)(leading >> 4) << 16 |
         (unsigned long long)({PATTERN_BYTES} >> 4) << 32 | 1ull << 62;
}}
"""
    leading = tile_bytes or 16  # K-major: not used
    made = T.cuda.func_call("attntune_descriptor", address, leading, source_code=source, return_type="uint64")
    return T.bind(made)


def advanced(described: Any, count: int) -> Any:
    """The descriptor of what lies ``count`` bytes further."""
    from tvm import tirx

    return described + tirx.const(count // 16, "uint64") if count else described


def multiply(sums: Any, n: int, dtype: str, a: Any, b: Any, accumulate: Any, *, registers: bool = False,
             transposed: bool = False) -> None:  # fmt: skip
    """Issue ``sums (64 × n) += A (64 × 16) · B (16 × n)``, or ``=`` where ``accumulate`` is 0.

    Args:
        sums: pointer to n / 2 float32 registers.
        n: a multiple of 8 up to 256.
        dtype: of A and B.
        a: a descriptor, K-major; or, where ``registers`` says so, a pointer to four registers of pairs.
        b: a descriptor: K-major; MN-major where ``transposed`` says so.
        accumulate: an integer.
        registers: whether A is in registers.
        transposed: whether B is MN-major.
    """
    count = n // 2
    listed = ", ".join(f"%{i}" for i in range(count))
    if registers:
        left, parameter, inputs = (
            "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}", "const unsigned* a",
            ", ".join(f'"r"(a[{i}])' for i in range(4)),
        )  # fmt: skip
    else:
        left, parameter, inputs = f"%{count}", "unsigned long long a", '"l"(a)'
    following = count + (4 if registers else 1)
    flags = f"{int(transposed)}" if registers else f"0, {int(transposed)}"
    name = f"wgmma_{n}_{dtype}_{'rs' if registers else 'ss'}{'_t' if transposed else ''}"
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    ptx = _PTX[dtype]
    emit(
        name, f"float* d, {parameter}, unsigned long long b, int accumulate",
        f"""  asm volatile("{{ .reg .pred accumulates; setp.ne.b32 accumulates, %{following + 1}, 0; "
               "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx}.{ptx} {{{listed}}}, "
               "{left}, %{following}, accumulates, 1, 1, {flags}; }}"
               : {outputs}
               : {inputs}, "l"(b), "r"(accumulate));""",
        sums, a, b, accumulate,
    )  # fmt: skip


def hold(registers: Any, count: int, dtype: str = "float32") -> None:
    """Have the compiler neither read nor write ``count`` registers across this point; no instruction."""
    kind, letter = {"float32": ("float", "f"), "uint32": ("unsigned", "r")}[dtype]
    emit(
        f"hold_{kind}_{count}", f"{kind}* r",
        f"""#pragma unroll
  for (int i = 0; i < {count}; ++i) asm volatile("" : "+{letter}"(r[i]) :: "memory");""",
        registers,
    )  # fmt: skip


def begin() -> None:
    """Before wgmmas whose registers were touched."""
    emit("wgmma_begin", "", '  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");')


def commit() -> None:
    """End a group of wgmmas."""
    emit("wgmma_commit", "", '  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");')


def wait(pending: int) -> None:
    """Wait until at most so many groups are still computed."""
    emit(f"wgmma_wait_{pending}", "", f'  asm volatile("wgmma.wait_group.sync.aligned {pending};" ::: "memory");')


def start(thread: Any, maps: Mapping[str, Any], barriers: Sequence[Barriers]) -> None:
    """What comes before a block's roles: barriers, for all of its threads to see, and tensor maps, asked for."""
    from tvm.tirx.script.builder import ir as T

    with when(thread == 0):
        for tensor_map in maps.values():
            prefetch(tensor_map)
        for each in barriers:
            each.initialise()
        barriers_are_visible()
    T.evaluate(T.tvm_storage_sync("shared"))


def divide(
    thread: Any, consumers: int, producer_registers: int, produce: Callable[[], None], consume: Callable[[Any], None]
) -> None:  # fmt: skip
    """One thread of the first warpgroup produces; the other warpgroups consume, with registers that it gives up.

    ``consume`` is told its warpgroup, from 1 on.
    """
    from tvm.tirx.script.builder import ir as T

    fewer = producer_registers
    more = consumer_registers(consumers, producer_registers) if fewer else 0
    warpgroup = uniform(thread // WARPGROUP)
    with T.If(warpgroup == 0):
        with T.Then():
            if fewer:
                set_registers(fewer, more=False)
            with when(thread == 0):
                produce()
        with T.Else():
            if more:
                set_registers(more, more=True)
            consume(warpgroup)
