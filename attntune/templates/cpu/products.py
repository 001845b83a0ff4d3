"""Sums of products of bytes, four to a word: what a CPU has for unsigned weights times signed x."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from attntune.target import Target

#: Largest magnitude of x, of a weight of 4 bits, and of 16 signed bits.
_X, _NIBBLE, _INT16 = 127, 15, 32767


class ByteProduct(ABC):
    """One way to multiply vectors of words with four bytes each; exact."""

    instructions: ClassVar[int]
    """Of one :meth:`add`, but for what is done once a vector of weights."""
    offset: ClassVar[int] = 0
    """What is taken off every weight before it is multiplied."""
    most: ClassVar[int] = 1 << 14
    """Words that a sum holds the products of."""

    def __init__(self, target: Target) -> None:
        self.bits = target.vector_bits
        self.lanes = target.lanes("float32")
        self.words = f"int32x{self.lanes}"
        self.sums = self.words
        """Dtype of a vector of sums, as wide as one of words."""

    @abstractmethod
    def add(self, sums: Any, weights: Any, x: Any) -> Any:
        """``sums``, to each word of which the products of its four bytes are added; words of weights and of x."""

    def total(self, sums: Any) -> Any:
        """Sums as int32, one a word."""
        return sums

    def _as_bytes(self, values: Any) -> Any:
        from tvm import tirx

        return tirx.reinterpret(f"int8x{4 * self.lanes}", values)

    def _spread(self, value: int, dtype: str = "int32") -> Any:
        from tvm import tirx

        return tirx.Broadcast(tirx.const(value, dtype), self.lanes * (2 if dtype == "int16" else 1))

    def _pairs(self, weights: Any, x: Any) -> Any:
        """``pmaddubsw``: two products in each 16 bits, which must hold them."""
        name = "llvm.x86.avx512.pmaddubs.w.512" if self.bits == 512 else "llvm.x86.avx2.pmadd.ub.sw"
        return _call(f"int16x{2 * self.lanes}", name, self._as_bytes(weights), self._as_bytes(x))

    def _fours(self, pairs: Any, factor: int = 1) -> Any:
        """``pmaddwd``: pairs of 16 bits, times a factor, as int32."""
        name = "llvm.x86.avx512.pmaddw.d.512" if self.bits == 512 else "llvm.x86.avx2.pmadd.wd"
        return _call(self.words, name, pairs, self._spread(factor, "int16"))


class Dots(ByteProduct):
    """``vpdpbusd``."""

    instructions = 1

    def add(self, sums: Any, weights: Any, x: Any) -> Any:
        """See :class:`ByteProduct`."""
        name = f"llvm.x86.avx512.vpdpbusd.{self.bits}"
        return _call(self.words, name, sums, self._as_bytes(weights), self._as_bytes(x))


class Pairs(ByteProduct):
    """Weights of 4 bits: sums of 16 bits."""

    instructions = 2
    most = _INT16 // (2 * _NIBBLE * _X)

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.sums = f"int16x{2 * self.lanes}"

    def add(self, sums: Any, weights: Any, x: Any) -> Any:
        """See :class:`ByteProduct`."""
        return sums + self._pairs(weights, x)

    def total(self, sums: Any) -> Any:
        """See :class:`ByteProduct`."""
        return self._fours(sums)


class SignedPairs(ByteProduct):
    """Weights of 8 bits as signed ones: their magnitude times x with their sign, which 16 bits hold in pairs."""

    instructions = 4
    offset = 128

    def add(self, sums: Any, weights: Any, x: Any) -> Any:
        """See :class:`ByteProduct`."""
        signed = weights ^ self._spread(-0x7F7F7F80)  # 0x80 in every byte
        return sums + self._fours(self._pairs(self._with_sign(signed, signed), self._with_sign(x, signed)))

    def _with_sign(self, values: Any, signs: Any) -> Any:
        """``psignb``, which vectors of 512 bits lack."""
        name = "llvm.x86.avx2.psign.b"
        return _call(f"int8x{4 * self.lanes}", name, self._as_bytes(values), self._as_bytes(signs))


class SplitPairs(ByteProduct):
    """Weights of 8 bits without their lowest one, then that."""

    instructions = 6

    def add(self, sums: Any, weights: Any, x: Any) -> Any:
        """See :class:`ByteProduct`."""
        upper = (weights >> self._spread(1)) & self._spread(0x7F7F7F7F)
        lowest = weights & self._spread(0x01010101)
        return sums + self._fours(self._pairs(upper, x), 2) + self._fours(self._pairs(lowest, x))


def multiplies_bytes(target: Target) -> bool:
    """Whether :func:`byte_product` has instructions for it."""
    wanted = "avx512bw" if target.vector_bits == 512 else "avx2"
    return target.has(wanted) and target.vector_bits >= 256


def byte_product(target: Target, bits: int) -> ByteProduct:
    """How ``target`` multiplies unsigned weights of 4 or 8 bits by signed x of 8, -128 excepted."""
    wide = target.vector_bits == 512
    if target.has("avx512vnni") or (target.has("avxvnni") and not wide):
        return Dots(target)
    if bits < 8:
        return Pairs(target)
    return SplitPairs(target) if wide else SignedPairs(target)


def _call(dtype: str, name: str, *arguments: Any) -> Any:
    from tvm.tirx.script.builder import ir as T

    return T.call_llvm_pure_intrin(dtype, name, *arguments)
