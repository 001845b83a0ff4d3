"""Kernels written out in CUDA C++, launched on the emulated device with NumPy arrays; TVM has no part in it."""

from __future__ import annotations

import ctypes
from typing import Any

import emulation
import numpy as np


class LaunchConfig(ctypes.Structure):
    """The driver's ``CUlaunchConfig``."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared_bytes")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip


def launch(
    code: str, arrays: list[np.ndarray], threads: int, shared_bytes: int, late: bool = True, seed: int = 0,
    tensor: dict[str, Any] | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """Run ``main_kernel(*arrays)`` in one block; the arrays as it leaves them.

    Args:
        code: CUDA C++.
        arrays: in the order of its parameters.
        threads: of the block.
        shared_bytes: dynamic shared memory.
        late: see ``emulation.check``.
        seed: the same.
        tensor: a tensor map of the first array comes before the arrays; its dims, strides (bytes), box and swizzle.
    """
    driver = emulation._driver
    kernel = ctypes.CDLL(str(emulation._kernel(code))).main_kernel_emulated
    arrays = [array.copy() for array in arrays]
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    places = [ctypes.addressof(pointer) for pointer in pointers]
    memory = np.zeros(256, np.uint8)
    if tensor is not None:
        place = -(-memory.ctypes.data // 128) * 128
        error = encode(place, arrays[0], **tensor)
        if error:
            raise ValueError(f"cuTensorMapEncodeTiled gave {error}")
        places.insert(0, place)
    driver.emulation_mode(int(late), seed)
    config = LaunchConfig(1, 1, 1, threads, 1, 1, shared_bytes)
    arguments = (ctypes.c_void_p * len(places))(*places)
    driver.cuLaunchKernelEx(ctypes.byref(config), kernel, arguments, None)
    return arrays


def encode(
    place: int, array: np.ndarray, dims: list[int], strides: list[int], box: list[int], swizzle: int, dtype: int = 6
) -> int:
    """``cuTensorMapEncodeTiled``; the numbers of its enumerations are those of cuda.h (6: float16)."""
    rank = len(dims)
    return int(
        emulation._driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(place), dtype, rank, ctypes.c_void_p(array.ctypes.data),
            (ctypes.c_uint64 * rank)(*dims), (ctypes.c_uint64 * rank)(*strides), (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*([1] * rank)), 0, swizzle, 2, 0,
        )
    )  # fmt: skip
