"""How a register tile multiplies: float32 by multiply-adds, bfloat16 by pairs, int8 by fours; 4 or 8 bits unpacked.

Each reads ``group`` consecutive values of a row of x as one scalar, spread over the lanes, and a vector of the weight's
panel that holds the same ``group`` values for each of ``lanes`` columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from attntune.ops.grouped import GROUPED, WEIGHT_GROUP
from attntune.ops.linear import Linear
from attntune.target import Target
from attntune.templates.cpu import bf16
from attntune.templates.cpu.products import ByteProduct, byte_product, multiplies_bytes

#: Added to an int8 weight to make it an unsigned operand; kernels take off what it adds to a sum.
INT8_OFFSET = 128


class Arithmetic(ABC):
    """One way to multiply; stateless, but for the target whose instructions it takes."""

    group: ClassVar[int]
    """Reduction steps that one instruction takes."""
    word: ClassVar[str]
    """Dtype of a group, in panels and in x."""
    accumulator: ClassVar[str]
    """Dtype of a sum."""
    bits: ClassVar[int]
    """Of one element of the weight."""

    @abstractmethod
    def supports(self, w: Linear, target: Target) -> bool:
        """Whether it computes this workload with the instructions ``target`` has."""

    def on(self, target: Target) -> Arithmetic:
        """The same with the instructions of ``target``, where they differ."""
        return self

    def steps(self, w: Linear) -> int:
        """Vectors of a panel."""
        return math.ceil(w.in_features / self.group)

    @abstractmethod
    def multiply_add(self, acc: Any, x: Any, weight: Any) -> Any:
        """``acc + Σ x · weight`` over a group, lane by lane."""

    def pack(self, panels: np.ndarray) -> np.ndarray:
        """Panels (panels, lanes, in_features) → (panels, in_features/group, lanes·group), in the kernel's dtype.

        in_features must be a multiple of ``group``.
        """
        count, lanes, width = panels.shape
        grouped = panels.reshape(count, lanes, width // self.group, self.group).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(grouped).reshape(count, width // self.group, lanes * self.group)


class Float32(Arithmetic):
    """Fused multiply-adds."""

    group = 1
    word = "float32"
    accumulator = "float32"
    bits = 32

    def supports(self, w: Linear, target: Target) -> bool:
        """See :class:`Arithmetic`."""
        return w.dtype == "float32" and not w.quantized and not w.grouped

    def multiply_add(self, acc: Any, x: Any, weight: Any) -> Any:
        """See :class:`Arithmetic`."""
        return acc + x * weight


class Bfloat16(Arithmetic):
    """``vdpbf16ps``: pairs of bfloat16, float32 sums."""

    group = 2
    word = "int32"
    accumulator = "float32"
    bits = 16

    def supports(self, w: Linear, target: Target) -> bool:
        """See :class:`Arithmetic`."""
        return w.dtype == "bfloat16" and not w.quantized and w.in_features % 2 == 0 and bf16.available(target)

    def multiply_add(self, acc: Any, x: Any, weight: Any) -> Any:
        """See :class:`Arithmetic`."""
        return bf16.dot(acc, x, weight)


class Int8(Arithmetic):
    """Quadruples of unsigned weights (int8 + 128) and signed x, exact int32 sums; see ``products.py``."""

    group = 4
    word = "int32"
    accumulator = "int32"
    bits = 8

    def __init__(self, target: Target | None = None) -> None:
        self.target = target

    def supports(self, w: Linear, target: Target) -> bool:
        """See :class:`Arithmetic`."""
        return w.quantized and multiplies_bytes(target) and (w.dtype == "float32" or bf16.available(target))

    def on(self, target: Target) -> Arithmetic:
        """See :class:`Arithmetic`."""
        return Int8(target)

    @property
    def product(self) -> ByteProduct:
        """How the target multiplies."""
        return _product(self.target, self.bits)

    def multiply_add(self, acc: Any, x: Any, weight: Any) -> Any:
        """See :class:`Arithmetic`."""
        return self.product.add(acc, weight, x)

    def pack(self, panels: np.ndarray) -> np.ndarray:
        """See :class:`Arithmetic`; values come out unsigned."""
        return super().pack((panels.astype(np.int16) + INT8_OFFSET).astype(np.uint8))


class Grouped(Arithmetic):
    """Multiply-adds on a weight of 4 or 8 bits, a 32-bit word of them for each column.

    An element goes to the top of the fraction of a float that is 1 without it: a shift and operations on bits, which
    AVX-512 has combined in one, make ``1 + q / 2**bits``, exactly. Or it is masked where it lies and converted, what
    x is multiplied by making up for its place in the word.
    """

    word = "int32"
    accumulator = "float32"

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.bits = GROUPED[dtype]  # type: ignore[misc]
        self.group = 32 // self.bits  # type: ignore[misc]

    def supports(self, w: Linear, target: Target) -> bool:
        """See :class:`Arithmetic`."""
        return w.weight_dtype == self.dtype and not w.x_dtype

    def steps(self, w: Linear) -> int:
        """See :class:`Arithmetic`; whole groups of the weight's scales."""
        return w.weight_groups * (WEIGHT_GROUP // self.group)

    def multiply_add(self, acc: Any, x: Any, weight: Any) -> Any:
        """``acc + x · weight``, of one element that :meth:`unpacked` gave."""
        return acc + x * weight

    def unpacked(self, words: Any, j: int, lanes: int) -> Any:
        """``1 + q / 2**bits`` of element ``j`` of each of ``lanes`` words."""
        from tvm import tirx

        def spread(value: int) -> Any:
            return tirx.Broadcast(tirx.const(value, "int32"), lanes)

        at, place = j * self.bits, 23 - self.bits
        moved = words
        if at != place:
            moved = words << spread(place - at) if at < place else words >> spread(at - place)
        return tirx.reinterpret(
            f"float32x{lanes}", (moved & spread(((1 << self.bits) - 1) << place)) | spread(0x3F800000)
        )

    def converted(self, words: Any, j: int, lanes: int) -> Any:
        """``q / factor(j)`` of element ``j`` of each of ``lanes`` words: masked where it lies, then converted."""
        from tvm import tirx

        def spread(dtype: str, value: int) -> Any:
            return tirx.Broadcast(tirx.const(value, dtype), lanes)

        if j == self.group - 1:  # in place it would be the sign's
            moved = tirx.reinterpret(f"uint32x{lanes}", words) >> spread("uint32", 32 - self.bits)
            kept = tirx.reinterpret(f"int32x{lanes}", moved)
        else:
            kept = words & spread("int32", ((1 << self.bits) - 1) << (j * self.bits))
        return tirx.Cast(f"float32x{lanes}", kept)

    def factor(self, j: int) -> float:
        """What :meth:`converted` leaves to multiply an element by: an exact power of two."""
        return 1.0 if j == self.group - 1 else 2.0 ** (-self.bits * j)

    def pack(self, panels: np.ndarray) -> np.ndarray:
        """Panels (panels, lanes, in_features) uint8 → words (panels, in_features/group, lanes) int32."""
        count, lanes, width = panels.shape
        split = panels.reshape(count, lanes, width // self.group, self.group).astype(np.uint32)
        words = np.zeros(split.shape[:3], np.uint32)
        for j in range(self.group):
            words |= split[..., j] << np.uint32(j * self.bits)
        return np.ascontiguousarray(words.transpose(0, 2, 1)).view(np.int32)


class GroupedBytes(Grouped):
    """Products of bytes of a weight of 4 or 8 bits and x of int8: exact int32 sums within a group of the weight.

    A word of 4 bits holds two quadruples: one in the lower halves of its bytes, the next in the upper ones.
    """

    accumulator = "int32"
    """Once a group is summed up."""

    def __init__(self, dtype: str, target: Target | None = None) -> None:
        super().__init__(dtype)
        self.target = target

    def supports(self, w: Linear, target: Target) -> bool:
        """See :class:`Arithmetic`."""
        return w.weight_dtype == self.dtype and w.x_dtype == "int8" and multiplies_bytes(target)

    def on(self, target: Target) -> Arithmetic:
        """See :class:`Arithmetic`."""
        return GroupedBytes(self.dtype, target)

    @property
    def product(self) -> ByteProduct:
        """How the target multiplies."""
        return _product(self.target, self.bits)

    def multiply_add(self, acc: Any, x: Any, weight: Any) -> Any:
        """See :class:`Arithmetic`; of one of the :meth:`quadruples`, sums as :attr:`product` has them."""
        return self.product.add(acc, weight, x)

    def quadruples(self, words: Any, lanes: int) -> list[Any]:
        """What ``words`` hold, in the order of x: vectors of four unsigned bytes a lane."""
        from tvm import tirx

        if self.bits == 8:
            return [words]

        def spread(value: int) -> Any:
            return tirx.Broadcast(tirx.const(value, "int32"), lanes)

        half = spread(0x0F0F0F0F)
        return [words & half, (words >> spread(4)) & half]

    def pack(self, panels: np.ndarray) -> np.ndarray:
        """See :class:`Grouped`."""
        count, lanes, width = panels.shape
        if self.bits == 8:
            packed = np.ascontiguousarray(panels)
        else:
            lower, upper = np.moveaxis(panels.reshape(count, lanes, width // 8, 2, 4), 3, 0)
            packed = (lower | upper << np.uint8(4)).reshape(count, lanes, width // 2)
        return np.ascontiguousarray(packed.view(np.int32).transpose(0, 2, 1))


ARITHMETICS: tuple[Arithmetic, ...] = (
    Float32(), Bfloat16(), Int8(), *map(Grouped, GROUPED), *map(GroupedBytes, GROUPED),
)  # fmt: skip


def _product(target: Target | None, bits: int) -> ByteProduct:
    assert target is not None, "expected arithmetic_for, which says which target's instructions"
    return byte_product(target, bits)


def arithmetic_for(w: Linear, target: Target) -> Arithmetic | None:
    """The one that computes ``w``; None where the target lacks the instructions."""
    return next((each.on(target) for each in ARITHMETICS if each.supports(w, target)), None)
