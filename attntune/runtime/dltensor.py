"""DLPack tensors whose shape is fixed and whose memory changes from call to call.

A kernel of one shape is called with pointers to the same ``DLTensor`` structures each time; only their data pointers
change. That takes a tenth of a microsecond an operand, whatever library the memory belongs to, read-only or not.
Source: ``dlpack.h``, DLPack 1.0.
"""

from __future__ import annotations

import ctypes
import math

from attntune.errors import InputError
from attntune.target import dtype_bits

_CPU = 1  # kDLCPU
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4}


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class TensorSlot:
    """One contiguous operand of a kernel. Not thread-safe: a kernel's slots belong to the thread that runs it."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.bytes = math.prod(shape) * dtype_bits(dtype) // 8
        kind = dtype.rstrip("0123456789")
        if kind not in _CODES:
            raise InputError(f"expected a dtype of {sorted(_CODES)} with its bits, got {dtype!r}")
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._tensor = _DLTensor(
            None, _CPU, 0, len(shape), _CODES[kind], dtype_bits(dtype), 1, ctypes.addressof(self._shape), None, 0
        )
        self.argument = ctypes.c_void_p(ctypes.addressof(self._tensor))
        """What stands for the operand among a kernel's arguments; valid as long as this slot lives."""

    def point_at(self, address: int) -> None:
        """Let the operand lie at ``address``, a multiple of 64 bytes, from now on."""
        self._tensor.data = address
