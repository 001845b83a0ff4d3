"""Operands of eager operators: what describes one, how it reaches a kernel, and where a result is written."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from attntune.errors import InputError
from attntune.measure.buffers import numpy_dtype
from attntune.runtime.artifact import ALIGNMENT
from attntune.runtime.dltensor import TensorSlot
from attntune.runtime.inputs import aligned_zeros


def described(operand: Any) -> Any:
    """What of an operand decides how it is handled; hashable."""
    if operand is None:
        return None
    if isinstance(operand, np.ndarray):
        return operand.dtype, operand.shape, operand.strides
    return operand.dtype, operand.shape, operand.stride(), operand.requires_grad, operand.is_cpu


class Given:
    """An operand as it is described: library, dtype by name, shape, strides in elements.

    Args:
        name: of the parameter, for errors.
        operand: a NumPy array or a torch tensor on the CPU.

    Raises:
        InputError: it is neither, or a sparse tensor.
    """

    def __init__(self, name: str, operand: Any) -> None:
        self.name = name
        self.torch = type(operand).__module__.split(".")[0] == "torch" or _is_torch_tensor(operand)
        if self.torch:
            if not operand.is_cpu:
                raise InputError(f"expected {name} to be a CPU tensor, got one on {operand.device}")
            if operand.layout is not sys.modules["torch"].strided:
                raise InputError(f"expected {name} to be a strided tensor, got {operand.layout}")
            self.dtype = str(operand.dtype).removeprefix("torch.")
            self.strides = tuple(operand.stride())
            self.requires_grad = bool(operand.requires_grad)
        elif isinstance(operand, np.ndarray):
            self.dtype = operand.dtype.name
            item = operand.dtype.itemsize
            # A stride that is no multiple of an element matches no contiguous layout, so it is copied.
            self.strides = tuple(s // item if s % item == 0 else -1 for s in operand.strides)
            self.requires_grad = False
        else:
            raise InputError(f"expected {name} to be a NumPy array or a torch tensor, got {type(operand).__name__}")
        self.shape = tuple(int(extent) for extent in operand.shape)

    def contiguous(self, *, transposed: bool = False) -> bool:
        """Whether it lies densely in the order of its axes; or, ``transposed``, of (…, seq, heads, head_dim)."""
        axes = list(range(len(self.shape)))
        if transposed:
            if len(axes) < 3:
                return False
            axes[-3], axes[-2] = axes[-2], axes[-3]
        expected = 1
        for axis in reversed(axes):
            if self.shape[axis] != 1 and self.strides[axis] != expected:
                return False
            expected *= self.shape[axis]
        return True


def _is_torch_tensor(operand: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(operand, torch.Tensor)


class Operand:
    """One input: read where it lies if it may be, else copied into a buffer that is kept from call to call.

    Args:
        shape: of the kernel's argument.
        dtype: of the kernel's argument, by name.
        fill: ``fill(buffer, array)`` writes the operand into the buffer as the kernel wants it.
        in_place: whether the operand lies as the kernel wants it.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: str,
        fill: Callable[[np.ndarray, np.ndarray], None],
        *,
        in_place: bool,
    ) -> None:
        self.slot = TensorSlot(shape, dtype)
        self._shape, self._dtype, self._fill, self._in_place = shape, numpy_dtype(dtype), fill, in_place
        self._buffer: np.ndarray | None = None

    def bind(self, operand: Any, address: int) -> None:
        """Point the kernel's argument at the operand, or at a copy of it. Runs on the kernel thread.

        An operand that starts elsewhere than at a multiple of 64 bytes is copied; ``address`` is where it starts.
        """
        if self._in_place and address % ALIGNMENT == 0:
            self.slot.point_at(address)
            return
        if self._buffer is None:
            self._buffer = aligned_zeros(self._shape, self._dtype)
            self._buffer_address = self._buffer.ctypes.data
        self._fill(self._buffer, as_numpy(operand))
        self.slot.point_at(self._buffer_address)


def empty(shape: tuple[int, ...], dtype: Any) -> tuple[Any, int]:
    """An array for a result, at a multiple of 64 bytes, and its address; of torch where ``dtype`` is torch's."""
    if not isinstance(dtype, np.dtype):
        torch = sys.modules["torch"]
        tensor = torch.empty(shape, dtype=dtype)
        address = tensor.data_ptr()
        if address % ALIGNMENT == 0:  # always so with torch's own allocator
            return tensor, address
        raw = torch.empty(tensor.nbytes + ALIGNMENT, dtype=torch.uint8)
        start = -raw.data_ptr() % ALIGNMENT
        tensor = raw[start : start + tensor.nbytes].view(dtype).view(shape)
        return tensor, tensor.data_ptr()
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    base = memory.__array_interface__["data"][0]
    start = -base % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape), base + start


def as_numpy(operand: Any) -> np.ndarray:
    """A view of the operand; of bfloat16 tensors as NumPy's bfloat16."""
    if isinstance(operand, np.ndarray):
        return operand
    tensor = operand.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        bits: np.ndarray = tensor.view(sys.modules["torch"].int16).numpy()
        return bits.view(numpy_dtype("bfloat16"))
    return np.asarray(tensor.numpy())
