"""Sums of products of bytes, four to a word: what a CPU has for unsigned weights times signed x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attntune.target import Target

#: ``(sums, weights, x)``, vectors of words → sums, to each word of which the products of its four bytes are added.
Product = Callable[[Any, Any, Any], Any]


def multiplies_bytes(target: Target) -> bool:
    """Whether :func:`byte_product` has instructions for it."""
    wanted = "avx512bw" if target.vector_bits == 512 else "avx2"
    return target.has(wanted) and target.vector_bits >= 256


def byte_product(target: Target, bits: int) -> Product:
    """How vectors of ``target`` multiply unsigned weights of so many bits by x of 8, signed; exactly.

    ``vpdpbusd`` where there is one. Else ``pmaddubsw`` adds two products in 16 bits, which those of 4-bit weights never
    overflow; of 8-bit weights it multiplies all but the lowest bit, then that.
    """
    wide, lanes = target.vector_bits == 512, target.lanes("float32")
    words = f"int32x{lanes}"

    def as_bytes(values: Any) -> Any:
        from tvm import tirx

        return tirx.reinterpret(f"int8x{4 * lanes}", values)

    if target.has("avx512vnni") or (target.has("avxvnni") and not wide):
        name = f"llvm.x86.avx512.vpdpbusd.{target.vector_bits}"
        return lambda sums, weights, x: _call(words, name, sums, as_bytes(weights), as_bytes(x))
    pairs, fours = (
        ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512")
        if wide
        else ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd")
    )

    def times(weights: Any, x: Any, factor: int) -> Any:
        from tvm import tirx

        two = _call(f"int16x{2 * lanes}", pairs, as_bytes(weights), as_bytes(x))
        return _call(words, fours, two, tirx.Broadcast(tirx.const(factor, "int16"), 2 * lanes))

    def product(sums: Any, weights: Any, x: Any) -> Any:
        from tvm import tirx

        if bits < 8:
            return sums + times(weights, x, 1)

        def spread(value: int) -> Any:
            return tirx.Broadcast(tirx.const(value, "int32"), lanes)

        upper, lowest = (weights >> spread(1)) & spread(0x7F7F7F7F), weights & spread(0x01010101)
        return sums + times(upper, x, 2) + times(lowest, x, 1)

    return product


def _call(dtype: str, name: str, *arguments: Any) -> Any:
    from tvm.tirx.script.builder import ir as T

    return T.call_llvm_pure_intrin(dtype, name, *arguments)
