"""What running a compiled model takes from the device that it was compiled for: tensors, buffers, threads or a stream.

Both kinds of device take NumPy arrays and CPU tensors of torch and give the same back. A CUDA device also reads tensors
that lie on it, torch's and (DLPack) other libraries'. Where some are torch's, kernels are queued on torch's current
stream and the results are torch's, on the device.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from attntune.errors import ArtifactError, InputError
from attntune.measure.buffers import as_array, numpy_dtype
from attntune.measure.threads import load_runtime
from attntune.runtime.buckets import Piece
from attntune.runtime.cuda import CUDA, CudaMemory, Exported, OnDevice, check_device, compile_when_loaded, is_torch
from attntune.runtime.inputs import (
    Padded,
    aligned_zeros,
    as_numpy,
    describe,
    fit,
    in_place,
    inside,
    lay_out,
)
from attntune.runtime.kernel_thread import KERNEL_THREAD, device_tensors
from attntune.target import Target

T = TypeVar("T")
_CPU, _POOLED = 1, 2  # kDLCPU; the VM's pooling allocator


class Device(ABC):
    """One device, for one loaded model."""

    vm: tuple[int, ...]
    """Arguments of ``vm_initialization``."""

    @abstractmethod
    def run(self, call: Callable[[], T], inputs: Mapping[str, Any]) -> T:
        """The result of ``call``, which runs kernels on ``inputs``; one call at a time."""

    @abstractmethod
    def library(self, path: Path) -> Any:
        """The module in an artifact's library."""

    @abstractmethod
    def constant(self, array: np.ndarray) -> Any:
        """A weight as a tensor."""

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """What a state starts from."""

    @abstractmethod
    def read(self, value: Any, name: str) -> Any:
        """A caller's value as an array; raises :class:`InputError` where it is none."""

    @abstractmethod
    def buffer(self, shape: tuple[int, ...], dtype: str) -> Any:
        """For an input of a bucket, kept from call to call."""

    @abstractmethod
    def fit(self, array: Any, spec: Mapping[str, Any], piece: Piece, dims: Mapping[str, int], buffer: Any) -> Any:
        """The rows of ``piece`` as a tensor of its bucket's shape."""

    @abstractmethod
    def carried(self, spec: Mapping[str, Any], value: Any, at: str) -> Any:
        """A tensor over what a caller hands on from call to call; raises :class:`InputError` where it is not such."""

    def permute(self, value: Any, parents: np.ndarray) -> None:
        """Let the first rows of a state that is no array be copies of its rows ``parents``, in place."""
        raise InputError(f"expected a state on a device, got {type(value).__name__}")

    @abstractmethod
    def kept(self, tensor: Any, form: str) -> Any:
        """A kernel's result for the caller to hand on."""

    @abstractmethod
    def results(
        self, parts: Sequence[Any], pieces: Sequence[Piece], spec: Mapping[str, Any], dims: Mapping[str, int], form: str
    ) -> Any:
        """The results of all pieces as one, without padding."""

    def form(self, inputs: Mapping[str, Any]) -> str:
        """What the caller gets: ``"numpy"``; ``"torch"``; ``"torch-device"`` where torch's tensors are there."""
        return "torch" if any(is_torch(value) for value in inputs.values()) else "numpy"


class HostDevice(Device):
    """The CPU: kernels run on the kernel thread, results share memory with what the caller gets."""

    vm = (_CPU, 0, _POOLED)

    def __init__(self, cores: int) -> None:
        self._cores = cores

    def run(self, call: Callable[[], T], inputs: Mapping[str, Any]) -> T:
        """See :class:`Device`."""
        return KERNEL_THREAD.run(self._cores, call)

    def library(self, path: Path) -> Any:
        """See :class:`Device`."""
        return load_runtime().load_module(str(path))

    def constant(self, array: np.ndarray) -> Any:
        """See :class:`Device`."""
        return device_tensors([array])[0]

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See :class:`Device`."""
        return aligned_zeros(shape, numpy_dtype(dtype))

    def read(self, value: Any, name: str) -> Any:
        """See :class:`Device`."""
        return as_numpy(value, name)

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See :class:`Device`."""
        return Padded.zeros(shape, numpy_dtype(dtype))

    def fit(self, array: Any, spec: Mapping[str, Any], piece: Piece, dims: Mapping[str, int], buffer: Any) -> Any:
        """See :class:`Device`."""
        return fit(array, spec, piece, dims, buffer)

    def carried(self, spec: Mapping[str, Any], value: Any, at: str) -> Any:
        """See :class:`Device`."""
        if not isinstance(value, np.ndarray) or value.dtype != numpy_dtype(spec["dtype"]):
            kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise InputError(f"{at} is {kind}; expected {describe(spec)} as state() or an entry gave it")
        if not in_place(value):
            raise InputError(
                f"{at} is not contiguous, writable and at a multiple of 64 bytes; "
                "expected what state() or an entry gave"
            )
        return device_tensors([value])[0]

    def kept(self, tensor: Any, form: str) -> Any:
        """See :class:`Device`."""
        return _given(as_array(tensor), form)

    def results(
        self, parts: Sequence[Any], pieces: Sequence[Piece], spec: Mapping[str, Any], dims: Mapping[str, int], form: str
    ) -> Any:
        """See :class:`Device`."""
        return _given(joined([as_array(part) for part in parts], pieces, spec, dims), form)


@dataclass(frozen=True)
class _Staged:
    """An input's tensor on the device, and host memory of the same shape to lay a caller's values into."""

    array: np.ndarray
    tensor: Any


class CudaDevice(Device):
    """One CUDA device. Calls queue kernels from their own threads, one after another.

    Raises:
        ArtifactError: no device that runs what was compiled for ``target``.
        ToolchainError: the artifact carries source, and there is no nvcc to compile it.
    """

    def __init__(self, target: Target, code: str, what: str, index: int = 0) -> None:
        check_device(target, code, what, index)
        if code == "source":
            compile_when_loaded(target)
        self.vm = (CUDA, index, _POOLED, _CPU, 0, _POOLED)
        self._memory = CudaMemory(index)
        self._lock = threading.RLock()

    def run(self, call: Callable[[], T], inputs: Mapping[str, Any]) -> T:
        """See :class:`Device`."""
        with self._lock, self._memory.on(self._stream(inputs)):
            return call()

    def _stream(self, inputs: Mapping[str, Any]) -> int:
        """Torch's current one, where tensors of torch lie on the device; else the null stream."""
        if self.form(inputs) != "torch-device":
            return 0
        cuda = sys.modules["torch"].cuda
        return int(cuda.current_stream(self._memory.device.index).cuda_stream)

    def form(self, inputs: Mapping[str, Any]) -> str:
        """See :class:`Device`."""
        tensors = [value for value in inputs.values() if is_torch(value)]
        return "torch-device" if any(OnDevice.of(value, self._memory) for value in tensors) else super().form(inputs)

    def library(self, path: Path) -> Any:
        """See :class:`Device`."""
        return load_runtime().load_module(str(path))

    def constant(self, array: np.ndarray) -> Any:
        """See :class:`Device`."""
        return self._memory.upload(array)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See :class:`Device`."""
        with self._lock:
            return self._memory.upload(np.zeros(shape, numpy_dtype(dtype)))

    def read(self, value: Any, name: str) -> Any:
        """See :class:`Device`."""
        return OnDevice.of(value, self._memory) or as_numpy(value, name)

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See :class:`Device`."""
        return _Staged(np.zeros(shape, numpy_dtype(dtype)), self._memory.empty(shape, dtype))

    def fit(self, array: Any, spec: Mapping[str, Any], piece: Piece, dims: Mapping[str, int], buffer: Any) -> Any:
        """See :class:`Device`."""
        cut = spec["dims"][0] == "batch"
        if isinstance(array, OnDevice):
            part = slice(piece.start, piece.stop) if cut else slice(0, array.shape[0])
            tensor = array.laid_out(part, inside(spec, piece, dims), buffer.array.shape)
            if tensor is not None:
                return tensor
            array = array.on_host()
        rows = array[piece.start : piece.stop] if cut and array is not None else array
        lay_out(rows, spec, piece, dims, buffer.array)
        self._memory.write(buffer.tensor, buffer.array)
        return buffer.tensor

    def carried(self, spec: Mapping[str, Any], value: Any, at: str) -> Any:
        """See :class:`Device`."""
        found = OnDevice.of(value, self._memory)
        if found is None or found.dtype != numpy_dtype(spec["dtype"]):
            kind = type(value).__name__ if found is None else f"{found.dtype}"
            raise InputError(f"{at} is {kind}; expected {describe(spec)} on the device as state() or an entry gave it")
        return self._memory.imported(value) if is_torch(value) else value

    def permute(self, value: Any, parents: np.ndarray) -> None:
        """See :class:`Device`."""
        with self._lock:
            tensor = self._memory.imported(value) if is_torch(value) else value
            host = self._memory.download(tensor)
            host[: len(parents)] = host[parents]
            self._memory.write(tensor, host)

    def kept(self, tensor: Any, form: str) -> Any:
        """See :class:`Device`."""
        return _as_torch(tensor) if form == "torch-device" else tensor

    def results(
        self, parts: Sequence[Any], pieces: Sequence[Piece], spec: Mapping[str, Any], dims: Mapping[str, int], form: str
    ) -> Any:
        """See :class:`Device`."""
        if form != "torch-device":
            return _given(joined([self._memory.download(part) for part in parts], pieces, spec, dims), form)
        torch = sys.modules["torch"]
        found = [
            _as_torch(part)[inside(spec, piece, dims)].contiguous() for piece, part in zip(pieces, parts, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)


def joined(
    parts: Sequence[np.ndarray], pieces: Sequence[Piece], spec: Mapping[str, Any], dims: Mapping[str, int]
) -> np.ndarray:
    """The rows of all pieces as one array, without padding."""
    first = parts[0]
    shape = tuple(dims[dim] if isinstance(dim, str) else dim for dim in spec["dims"])
    if len(parts) == 1 and first.shape == shape:
        return first
    whole = np.empty(shape, first.dtype)
    for piece, part in zip(pieces, parts, strict=True):
        whole[piece.start : piece.stop] = part[inside(spec, piece, dims)]
    return whole


def _given(array: np.ndarray, form: str) -> Any:
    if form != "torch":
        return array
    import torch

    return torch.from_numpy(array)


def _as_torch(tensor: Any) -> Any:
    return sys.modules["torch"].from_dlpack(Exported(tensor))


def device_for(manifest: Mapping[str, Any], what: str, cores: int, index: int) -> Device:
    """The device that an artifact runs on.

    Args:
        manifest: of the artifact.
        what: it is, for messages.
        cores: threads of the CPU.
        index: of the CUDA device.

    Raises:
        ArtifactError: see :class:`CudaDevice`.
    """
    target = Target.from_json(manifest["target"])
    if target.kind == "cpu":
        return HostDevice(cores)
    if target.kind != "cuda":
        raise ArtifactError(f"{what} is for a target of kind {target.kind!r}; expected 'cpu' or 'cuda'")
    return CudaDevice(target, str(manifest.get("cuda_code", "cubin")), what, index)
