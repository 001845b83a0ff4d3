"""bfloat16 on CPUs with AVX512-BF16: products of pairs by ``vdpbf16ps``, and the way around TVM's missing type.

TVM's LLVM backend has no bfloat16: a pass before it turns every bfloat16 value into a float32 computed from bits, and
calls keep no bfloat16 vector. So kernels here never hold a bfloat16 value. Arguments are declared ``bfloat16``, for so
the runtime, Relax and DLPack see them, and are read and written through views of the same memory: ``int32`` for pairs
(the lower address in the low half, as ``vdpbf16ps`` wants it), ``uint16`` for single elements. A view is a declared
buffer over the argument's data pointer, which every pass of TVM knows; imported load functions taking ``address_of``
would also work, but hide their reads from TVM and their alignment from LLVM. A kernel should write through one view
only, and not read what it wrote through another: to LLVM, two views are different memory.

What an instruction is needed for is LLVM IR, imported by a ``pragma_import_llvm`` on any loop of the kernel, and
called as an extern. The functions are inlined, and several kernels of one module may import them.

All vectors have 16 lanes. ``vdpbf16ps`` rounds after each of its two products and takes denormals as zeros.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from typing import Any

from attntune.target import Target

LANES = 16

# 2^f for f in [0, 1), highest power first: minimax in relative error with 1 at 0, at most 8.6e-5 off.
_EXP2_DEGREE_3 = (0.07706704, 0.22764499, 0.69511679, 1.0)

# log2(Φ(-m)) for m in [0, 5.6], highest power first: -1 at 0, at most 2e-4 off where m · Φ(-m) is above 1e-4.
_LOG2_TAIL = (-2.97991217e-4, 5.62709033e-3, -4.76721409e-2, -4.64602648e-1, -1.14927052, -1.0)
_TAIL_END = 5.6
_GELU_TANH = 2.0 * math.sqrt(2.0 / math.pi) * math.log2(math.e)
"""What GELU's tanh approximation multiplies x + 0.044715 x³ by in the exponent of a logistic function."""


def _vector(value: float) -> str:
    """``value`` in every lane, as an LLVM constant."""
    (single,) = struct.unpack("f", struct.pack("f", value))
    bits = f"float 0x{struct.unpack('Q', struct.pack('d', single))[0]:016X}"
    return f"<{', '.join([bits] * LANES)}>"


LLVM_IR = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)

define linkonce_odr <16 x float> @attntune_bf16_dot(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}

define linkonce_odr <16 x i16> @attntune_bf16_round(<16 x float> %x) alwaysinline {
  %y = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %x)
  %r = bitcast <16 x bfloat> %y to <16 x i16>
  ret <16 x i16> %r
}

define linkonce_odr <16 x i32> @attntune_bf16_round_pair(<16 x float> %low, <16 x float> %high) alwaysinline {
  %y = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %z = bitcast <32 x bfloat> %y to <32 x i16>
  %s = shufflevector <32 x i16> %z, <32 x i16> poison, <32 x i32> <SHUFFLE>
  %r = bitcast <32 x i16> %s to <16 x i32>
  ret <16 x i32> %r
}

declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x float> @llvm.x86.avx512.mask.reduce.ps.512(<16 x float>, i32, <16 x float>, i16, i32)
declare <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(<16 x float>, <16 x float>, <16 x float>, i16, i32)

define linkonce_odr <16 x float> @attntune_bf16_exp2(<16 x float> %x) alwaysinline {
  %f = call <16 x float> @llvm.x86.avx512.mask.reduce.ps.512(<16 x float> %x, i32 9, <16 x float> poison, i16 -1, i32 4)
  %a = call <16 x float> @llvm.fma.v16f32(<16 x float> C3, <16 x float> %f, <16 x float> C2)
  %b = call <16 x float> @llvm.fma.v16f32(<16 x float> %a, <16 x float> %f, <16 x float> C1)
  %c = call <16 x float> @llvm.fma.v16f32(<16 x float> %b, <16 x float> %f, <16 x float> C0)
  %r = call <16 x float> @llvm.x86.avx512.mask.scalef.ps.512(
    <16 x float> %c, <16 x float> %x, <16 x float> poison, i16 -1, i32 4)
  ret <16 x float> %r
}
""".replace("SHUFFLE", ", ".join(f"i32 {lane}, i32 {lane + LANES}" for lane in range(LANES)))
LLVM_IR += """
declare <16 x float> @llvm.fabs.v16f32(<16 x float>)
declare <16 x float> @llvm.x86.avx512.rcp14.ps.512(<16 x float>, <16 x float>, i16)

define linkonce_odr <16 x float> @attntune_bf16_gelu(<16 x float> %x) alwaysinline {
  %size = call <16 x float> @llvm.fabs.v16f32(<16 x float> %x)
  %past = fcmp olt <16 x float> END, %size
  %m = select <16 x i1> %past, <16 x float> END, <16 x float> %size
  %t4 = call <16 x float> @llvm.fma.v16f32(<16 x float> T5, <16 x float> %m, <16 x float> T4)
  %t3 = call <16 x float> @llvm.fma.v16f32(<16 x float> %t4, <16 x float> %m, <16 x float> T3)
  %t2 = call <16 x float> @llvm.fma.v16f32(<16 x float> %t3, <16 x float> %m, <16 x float> T2)
  %t1 = call <16 x float> @llvm.fma.v16f32(<16 x float> %t2, <16 x float> %m, <16 x float> T1)
  %t0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %t1, <16 x float> %m, <16 x float> T0)
  %tail = call <16 x float> @attntune_bf16_exp2(<16 x float> %t0)
  %below = fcmp ogt <16 x float> ZERO, %x
  %kept = select <16 x i1> %below, <16 x float> ZERO, <16 x float> %x
  %less = fneg <16 x float> %m
  %r = call <16 x float> @llvm.fma.v16f32(<16 x float> %less, <16 x float> %tail, <16 x float> %kept)
  ret <16 x float> %r
}

define linkonce_odr <16 x float> @attntune_bf16_logistic(<16 x float> %x, <16 x float> %exponent) alwaysinline {
  %e = call <16 x float> @attntune_bf16_exp2(<16 x float> %exponent)
  %d = fadd <16 x float> %e, ONE
  %i = call <16 x float> @llvm.x86.avx512.rcp14.ps.512(<16 x float> %d, <16 x float> poison, i16 -1)
  %r = fmul <16 x float> %x, %i
  ret <16 x float> %r
}

define linkonce_odr <16 x float> @attntune_bf16_silu(<16 x float> %x) alwaysinline {
  %e = fmul <16 x float> %x, SILU
  %r = call <16 x float> @attntune_bf16_logistic(<16 x float> %x, <16 x float> %e)
  ret <16 x float> %r
}

define linkonce_odr <16 x float> @attntune_bf16_gelu_tanh(<16 x float> %x) alwaysinline {
  %s = fmul <16 x float> %x, %x
  %p = call <16 x float> @llvm.fma.v16f32(<16 x float> %s, <16 x float> CUBIC, <16 x float> LINEAR)
  %e = fmul <16 x float> %x, %p
  %r = call <16 x float> @attntune_bf16_logistic(<16 x float> %x, <16 x float> %e)
  ret <16 x float> %r
}
"""
_CONSTANTS = {
    "END": _TAIL_END, "ZERO": 0.0, "ONE": 1.0, "SILU": -math.log2(math.e), "LINEAR": -_GELU_TANH,
    "CUBIC": -0.044715 * _GELU_TANH,
    **{f"C{power}": value for power, value in enumerate(reversed(_EXP2_DEGREE_3))},
    **{f"T{power}": value for power, value in enumerate(reversed(_LOG2_TAIL))},
}  # fmt: skip
for _name, _value in _CONSTANTS.items():
    LLVM_IR = re.sub(rf"\b{_name}\b", _vector(_value), LLVM_IR)

#: Annotation for one loop of a kernel that calls functions of this module.
IMPORT: Mapping[str, str] = {"pragma_import_llvm": LLVM_IR}


def available(target: Target) -> bool:
    """Whether ``target`` multiplies pairs of bfloat16 in 512-bit registers."""
    return target.kind == "cpu" and target.has("avx512bf16") and target.vector_bits == 512


def slower_than_float32(target: Target) -> bool:
    """Whether ``target`` multiplies float32 faster than it multiplies pairs of bfloat16.

    Emerald Rapids starts two multiply-adds a cycle but one product of pairs in two: 344 GFLOP/s against 172.
    """
    return target.fmas_per_cycle > 2 * target.bf16_dots_per_cycle


# -- vectors -----------------------------------------------------------------------------------------------------------


def dot(acc: Any, a: Any, b: Any) -> Any:
    """``acc + a.low · b.low + a.high · b.high`` lane by lane: float32x16 from float32x16 and two int32x16 of pairs."""
    from tvm import tirx

    return tirx.call_pure_extern("float32x16", "attntune_bf16_dot", acc, a, b)


def round_to_bits(x: Any) -> Any:
    """float32x16 to the bits of bfloat16, uint16x16, to nearest even; denormals become zero, NaN stays NaN."""
    from tvm import tirx

    return tirx.call_pure_extern("uint16x16", "attntune_bf16_round", x)


def round_to_pairs(low: Any, high: Any) -> Any:
    """Two float32x16 to one int32x16 of pairs, rounded as :func:`round_to_bits`."""
    from tvm import tirx

    return tirx.call_pure_extern("int32x16", "attntune_bf16_round_pair", low, high)


def exp2(x: Any) -> Any:
    """2**x of float32x16, as accurate as a bfloat16 needs it: relative error at most 1e-4, exact at integers.

    The fraction (``vreduceps``) goes through a cubic, the power of two is applied by ``vscalefps``: 5 instructions.
    Results that are denormal are kept; whatever rounds them to bfloat16 makes them zero.
    """
    from tvm import tirx

    return tirx.call_pure_extern("float32x16", "attntune_bf16_exp2", x)


ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
"""Those of :func:`activation`."""


def activation(name: str, x: Any) -> Any:
    """``name`` of float32x16, as accurate as a bfloat16 needs it: relative error at most 3e-4, or 1e-6 absolute.

    As in :mod:`attntune.ops.math`, with half the instructions. -inf gives a denormal (gelu) or NaN.
    """
    from tvm import tirx

    assert name in ACTIVATIONS, f"expected one of {ACTIVATIONS}, got {name!r}"
    return tirx.call_pure_extern("float32x16", f"attntune_bf16_{name}", x)


def pairs_of_bits(low: Any, high: Any) -> Any:
    """Two uint16x16 of bits to one int32x16 of pairs."""
    from tvm import tirx

    wide = f"int32x{LANES}"
    return tirx.Cast(wide, low) | (tirx.Cast(wide, high) << tirx.Broadcast(tirx.const(16, "int32"), LANES))


def from_bits(bits: Any, lanes: int = 1) -> Any:
    """Bits of bfloat16, uint16 with ``lanes`` lanes, to float32, exactly."""
    from tvm import tirx

    suffix = f"x{lanes}" if lanes > 1 else ""
    shift = tirx.const(16, "int32")
    wide = tirx.Cast(f"int32{suffix}", bits) << (tirx.Broadcast(shift, lanes) if lanes > 1 else shift)
    return tirx.reinterpret(f"float32{suffix}", wide)


def from_pairs(pairs: Any, lanes: int) -> tuple[Any, Any]:
    """int32 pairs to their lower and their higher values, float32, exactly."""
    from tvm import tirx

    def spread(value: int) -> Any:
        return tirx.Broadcast(tirx.const(value, "int32"), lanes)

    wide = f"float32x{lanes}"
    return tirx.reinterpret(wide, pairs << spread(16)), tirx.reinterpret(wide, pairs & spread(-65536))


class Widened:
    """A bfloat16 argument that is read as if it were a float32 buffer."""

    def __init__(self, argument: Any) -> None:
        self.bits = view(argument, "uint16")

    def __getitem__(self, at: Any) -> Any:
        """One element, float32."""
        return from_bits(self.bits[at])

    def vload(self, at: list[Any], dtype: str) -> Any:
        """Elements from ``at`` on along the last axis, as many as ``dtype`` (float32 vectors) has."""
        lanes = int(dtype.removeprefix("float32x"))
        return from_bits(self.bits.vload(at, dtype=f"uint16x{lanes}"), lanes)


# -- arguments ---------------------------------------------------------------------------------------------------------


def view(argument: Any, dtype: str) -> Any:
    """In a kernel being written by ``IRBuilder``: a bfloat16 argument's memory as ``int32`` pairs or ``uint16`` bits.

    Pairs run along the last axis, whose extent must be even.
    """
    from tvm.tirx.script.builder import ir as T

    *lead, last = (int(extent) for extent in argument.shape)
    assert dtype == "uint16" or last % 2 == 0, f"expected an even last axis to view as pairs, got {last}"
    return T.decl_buffer((*lead, last if dtype == "uint16" else last // 2), dtype, data=argument.data)


def declare_arguments(function: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """A scheduled PrimFunc, with the arguments named in ``shapes`` declared as bfloat16 of that shape.

    ::

        main(x: int32[m, k/2], …): root block
        →
        main(x: bfloat16[m, k], …): root block with x_view: int32[m, k/2] over x's memory

    For kernels that ``te.create_prim_func`` and schedules make on ``int32`` pairs or ``uint16`` bits. The shapes must
    have as many bytes as those they replace, in the same order in memory.
    """
    from tvm import tirx

    parameters, views = [], []
    for parameter in function.params:
        if parameter.name in shapes:
            argument = tirx.decl_buffer(shapes[parameter.name], "bfloat16", parameter.name)
            views.append(tirx.DeclBuffer(parameter, data=argument.data))
            parameters.append(argument)
        else:
            parameters.append(parameter)
    assert len(views) == len(shapes), f"expected parameters {sorted(shapes)}, got {[p.name for p in function.params]}"
    realize = function.body
    root = realize.block
    block = type(root)(
        root.iter_vars, root.reads, root.writes, root.name_hint, tirx.SeqStmt([*views, root.body]), root.init,
        root.alloc_buffers, root.match_buffers, root.annotations,
    )  # fmt: skip
    body = type(realize)(realize.iter_values, realize.predicate, block)
    return tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)
