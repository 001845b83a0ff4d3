"""A CUDA device through TVM's runtime alone: no compiler, TVM's or NVIDIA's, unless an artifact carries source.

Needed are NVIDIA's driver (``libcuda.so.1``), its CUDA runtime library (``libcudart.so.13``; of the toolkit, or pip's
``nvidia-cuda-runtime``) and ``libtvm_runtime_cuda.so``, which comes with apache-tvm. Where one is missing, or the
device is not what an artifact was compiled for, the error names what was expected.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import ArtifactError
from attntune.host import cuda_home
from attntune.measure.buffers import numpy_dtype
from attntune.measure.threads import load_runtime
from attntune.runtime.artifact import ALIGNMENT
from attntune.target import Target, capability

CUDA = 2  # kDLCUDA
#: What an artifact's kernels are kept as.
CODES = ("cubin", "ptx", "source")
_RUNTIME = "libcudart.so.13"
_EXISTS, _COMPUTE_VERSION, _NAME = 0, 4, 5  # TVM's DeviceAttrKind


@cache
def load_cuda() -> Any:
    """The ``tvm_ffi`` module, with TVM's CUDA runtime loaded.

    Raises:
        ArtifactError: naming the library that is missing.
    """
    tvm_ffi = load_runtime()
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
        return tvm_ffi
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(
            f"expected NVIDIA's driver to run CUDA kernels with, and cannot load libcuda.so.1: {error}"
        ) from None
    if not any(_loads(path) for path in _runtime_libraries()):
        raise ArtifactError(
            f"expected {_RUNTIME}, NVIDIA's CUDA runtime library, in the library path, in {cuda_home()} or from "
            "pip install nvidia-cuda-runtime; found none"
        )
    spec = importlib.util.find_spec("tvm")
    assert spec is not None
    library = Path(next(iter(spec.submodule_search_locations or ()))) / "lib" / "libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(
            f"expected TVM's CUDA runtime, libtvm_runtime_cuda.so of apache-tvm, and cannot load it: {error}"
        ) from None
    return tvm_ffi


def _runtime_libraries() -> Iterator[str]:
    """Where the CUDA runtime library may be: the library path, a toolkit, pip's packages."""
    yield _RUNTIME
    for folder in ("lib64", "lib"):
        yield str(cuda_home() / folder / _RUNTIME)
    for name in ("purelib", "platlib"):
        for path in Path(sysconfig.get_paths()[name]).glob(f"nvidia/*/lib/{_RUNTIME}"):
            yield str(path)


def _loads(path: str) -> bool:
    try:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def check_device(target: Target, code: str, what: str, index: int = 0) -> None:
    """Raise :class:`ArtifactError` unless CUDA device ``index`` runs what was compiled for ``target``.

    A cubin runs on devices of its own compute capability and, but for those with an ``a`` in their name, on later ones
    of the same major version; PTX on every later one.

    Args:
        target: of kind ``cuda``.
        code: one of :data:`CODES`.
        what: was compiled, for the message.
        index: of the device.
    """
    try:
        tvm_ffi = load_cuda()
    except ArtifactError as error:
        raise ArtifactError(f"{what} was compiled for {_described(target)}: {error}") from None
    attribute = tvm_ffi.get_global_func("runtime.GetDeviceAttr")
    if not attribute(CUDA, index, _EXISTS):
        raise ArtifactError(
            f"{what} was compiled for {_described(target)}: expected such a device as cuda:{index}, found none"
        )
    found = str(attribute(CUDA, index, _COMPUTE_VERSION))
    major, minor = (int(part) for part in found.split("."))
    wanted = capability(target)
    exact = target.arch.endswith("a")
    fits = (major, minor) == wanted if exact else (major, minor) >= wanted and (code == "ptx" or major == wanted[0])
    if not fits:
        more = "" if exact else " or later" if code == "ptx" else f" to {wanted[0]}.9"
        raise ArtifactError(
            f"{what} was compiled for {_described(target)}: expected a device of compute capability "
            f"{wanted[0]}.{wanted[1]}{more}, cuda:{index} ({attribute(CUDA, index, _NAME)}) has {found}"
        )


def _described(target: Target) -> str:
    major, minor = capability(target)
    return f"CUDA devices of compute capability {major}.{minor} ({target.name})"


def compile_when_loaded(target: Target) -> None:
    """Let TVM's CUDA runtime hand CUDA source of an artifact to nvcc, as it asks for when it loads one.

    Raises:
        ToolchainError: there is no nvcc.
    """
    from attntune.templates.nvcc import compile_source, find_nvcc

    find_nvcc()
    load_cuda().register_global_func(
        "tvm_callback_cuda_compile", lambda code: compile_source(str(code), target).binary, override=True
    )


class CudaMemory:
    """Tensors on one device, and the stream that their work is queued on.

    TVM copies between host and device on the null stream, whatever stream kernels run on, so a copy waits first for the
    stream that was used last. Work on another stream than the last is queued behind it: both share buffers.
    """

    def __init__(self, index: int = 0) -> None:
        self._ffi = load_cuda()
        self.device = self._ffi.device("cuda", index)
        named = self._ffi.get_global_func
        self._allocate = named("runtime.TVMTensorAllocWithScope")
        self._from_bytes = named("runtime.TVMTensorCopyFromBytes")
        self._to_bytes = named("runtime.TVMTensorCopyToBytes")
        self._wait = named("runtime.Device_StreamSync")
        self._queue_behind = named("runtime.Device_StreamSyncFromTo")
        self._stream: int | None = None
        """With work that may not have ended; None: there is none."""

    def imported(self, value: Any) -> Any:
        """A tensor over the memory of another library's."""
        return self._ffi.from_dlpack(Exported(value))

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A new tensor."""
        return self._allocate(self._ffi.Shape(shape), self._ffi.dtype(dtype), self.device, None)

    def upload(self, values: np.ndarray) -> Any:
        """A new tensor with these values."""
        tensor = self.empty(values.shape, str(values.dtype))
        self.write(tensor, values)
        return tensor

    def write(self, tensor: Any, values: np.ndarray) -> None:
        """Put values of the same shape and dtype into a tensor."""
        self.wait()
        values = np.ascontiguousarray(values)
        self._from_bytes(tensor, values.ctypes.data_as(ctypes.c_void_p), values.nbytes)

    def download(self, tensor: Any) -> np.ndarray:
        """The values of a contiguous tensor, once they are computed."""
        self.wait()
        values = np.empty(tuple(tensor.shape), numpy_dtype(str(tensor.dtype)))
        self._to_bytes(tensor, values.ctypes.data_as(ctypes.c_void_p), values.nbytes)
        return values

    def wait(self) -> None:
        """Until all work has ended."""
        if self._stream is not None:
            self._wait(self.device, self._stream)
            self._stream = None

    def on(self, stream: int) -> Any:
        """A context in which kernels are queued on ``stream``, a ``cudaStream_t``, by this thread."""
        if self._stream is not None and self._stream != stream:
            self._queue_behind(self.device, self._stream, stream)
        self._stream = stream
        return self._ffi.use_raw_stream(self.device, stream)


class OnDevice:
    """A tensor that a caller passes on the device, torch's or another library's (DLPack), read in place if possible.

    What it holds is not looked at, for that would have to wait for the device.
    """

    def __init__(self, value: Any, memory: CudaMemory) -> None:
        self.value = value.detach() if is_torch(value) else value
        self.is_torch = is_torch(value)
        self.shape = tuple(int(size) for size in value.shape)
        self.ndim = len(self.shape)
        self.dtype = numpy_dtype(str(value.dtype).removeprefix("torch."))
        self._memory = memory

    @classmethod
    def of(cls, value: Any, memory: CudaMemory) -> OnDevice | None:
        """``value``, if it is a tensor on this device."""
        if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack_device__"):
            return None
        kind, index = value.__dlpack_device__()
        return cls(value, memory) if (int(kind), int(index)) == (CUDA, memory.device.index) else None

    def astype(self, dtype: np.dtype[Any], copy: bool = False) -> OnDevice | np.ndarray:
        """The same values in another dtype; those of other libraries than torch come to the host for it."""
        if dtype == self.dtype:
            return self
        if not self.is_torch:
            return self.on_host().astype(dtype)
        return OnDevice(self.value.to(getattr(sys.modules["torch"], dtype.name)), self._memory)

    def on_host(self) -> np.ndarray:
        """A copy of what another library than torch holds."""
        return self._memory.download(self._memory.imported(self.value))

    def laid_out(self, rows: slice, inside: tuple[slice, ...], shape: tuple[int, ...]) -> Any:
        """Rows of it as a tensor of ``shape``, with zeros outside of ``inside``.

        None where that is not the whole tensor of another library than torch. Read in place when they have that shape
        and lie contiguously at a multiple of 64 bytes.
        """
        if not self.is_torch:
            whole = self.shape == shape and rows == slice(0, shape[0])
            return self._memory.imported(self.value) if whole else None
        part = self.value[rows]
        if tuple(part.shape) != shape:
            padded = part.new_zeros(shape)
            padded[inside] = part
            part = padded
        part = part.contiguous()
        return self._memory.imported(part.clone() if part.data_ptr() % ALIGNMENT else part)


def is_torch(value: Any) -> bool:
    """Whether it is a tensor of torch."""
    return type(value).__module__.split(".")[0] == "torch"


class Exported:
    """For ``from_dlpack``: without waiting, as work on the tensor is queued on the stream that its own is on."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __dlpack__(self, **options: Any) -> Any:
        return self._value.__dlpack__(**{**options, "stream": -1})

    def __dlpack_device__(self) -> Any:
        return self._value.__dlpack_device__()
