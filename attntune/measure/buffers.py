"""Operands with guard bands: writes outside an output, and to an input, are seen."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

ALIGNMENT = 64
"""Bytes; TVM's kernels assume operands aligned to it."""
GUARD_BYTES = 4096
POISON = 0xFF
"""Byte of guard bands and unwritten outputs: NaN in every float format, -1 in integers, so that a kernel that reads
beyond an operand, or leaves an output unwritten, gives a visibly wrong result."""

_DLPACK_DTYPE_CODE_OFFSET = 20
_DLPACK_UINT = 1
_DLPACK_BFLOAT = 4


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of that name, bfloat16 included."""
    if dtype == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(dtype)


class GuardedArray:
    """An aligned array between two guard bands.

    ``array`` is the operand; what ``fill`` puts into it is remembered by :meth:`is_unchanged`.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        size = math.prod(shape) * dtype.itemsize
        self._memory = np.full(size + 2 * GUARD_BYTES + ALIGNMENT, POISON, np.uint8)
        self._start = GUARD_BYTES + -(self._memory.ctypes.data + GUARD_BYTES) % ALIGNMENT
        self._end = self._start + size
        self.array: np.ndarray = self._memory[self._start : self._end].view(dtype).reshape(shape)
        self._pristine: np.ndarray | None = None

    @classmethod
    def holding(cls, values: np.ndarray) -> GuardedArray:
        """A guarded copy of ``values`` that knows when it is changed."""
        guarded = cls(values.shape, values.dtype)
        guarded.array[...] = values
        guarded._pristine = guarded._memory[guarded._start : guarded._end].copy()
        return guarded

    def poison(self) -> None:
        """Fill the operand with NaN (-1 for integers)."""
        self._memory[self._start : self._end] = POISON

    def restore(self) -> None:
        """Put back what :meth:`holding` put into it."""
        if self._pristine is not None:
            self._memory[self._start : self._end] = self._pristine

    def guards_intact(self) -> bool:
        """Whether nothing was written just before or after the operand."""
        outside = (self._memory[: self._start], self._memory[self._end :])
        return all(bool((band == POISON).all()) for band in outside)

    def is_unchanged(self) -> bool:
        """Whether the operand still holds, to the bit, what :meth:`holding` put into it."""
        return self._pristine is None or np.array_equal(self._memory[self._start : self._end], self._pristine)


class _Relabelled:
    """A tensor for DLPack whose dtype code is another: NumPy takes and gives bfloat16 only as uint16."""

    def __init__(self, tensor: Any, code: int) -> None:
        self._tensor, self._code = tensor, code

    def __dlpack__(self, **_: object) -> Any:
        capsule = self._tensor.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        ctypes.c_uint8.from_address(pointer(capsule, b"dltensor") + _DLPACK_DTYPE_CODE_OFFSET).value = self._code
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class _Writable:
    """An array's memory for writing: NumPy takes what comes in a capsule without a version for read-only."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def as_tensor(array: np.ndarray) -> Any:
    """``array`` as a ``tvm_ffi.Tensor`` over the same memory."""
    from attntune.measure.threads import load_runtime

    exported = _Relabelled(array.view(np.uint16), _DLPACK_BFLOAT) if array.dtype.name == "bfloat16" else array
    return load_runtime().from_dlpack(exported)


def as_array(tensor: Any) -> np.ndarray:
    """A ``tvm_ffi.Tensor`` as a NumPy array over the same memory."""
    if str(tensor.dtype) == "bfloat16":
        return np.asarray(_Writable(np.from_dlpack(_Relabelled(tensor, _DLPACK_UINT)))).view(numpy_dtype("bfloat16"))
    return np.from_dlpack(tensor)
