"""Engines that run one operator on a CUDA device: attntune's own kernels, and PyTorch's functions, one engine each.

Times are the device's, between events around a series of calls. PyTorch's series is replayed from a CUDA graph, so that
its dispatch costs nothing; attntune's is launched call by call from TVM's own loop.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from attntune.engines.kernel_engines import Call, KernelEngine, KernelSource, TorchKernels
from attntune.errors import AttntuneError, EngineError
from attntune.measure.worker import IsolatedProcess
from attntune.ops import Attention, Linear
from attntune.target import Target

_PEAK_SIZE = 8192
_PEAK_BYTES = 2 * 1024**3
_PEAK_REPEATS = 12
_PEAKS_TIMEOUT_SECS = 300.0


class AttntuneCudaKernels(KernelEngine):
    """``source.library`` on the device; its worker process imports TVM, which timed trials do too."""

    name: ClassVar[str] = "attntune"
    title: ClassVar[str] = "attntune"
    sample_secs: ClassVar[float] = 1e-3

    def __init__(self, threads: int) -> None:
        from attntune.measure.cuda_evaluator import start

        super().__init__(threads)
        start(threads)

    def ways(self, source: KernelSource, sets: Sequence[Sequence[np.ndarray]]) -> dict[str, list[Call]]:
        """The kernel, on constants packed as its template wants them."""
        import tvm

        from attntune.measure.buffers import numpy_dtype
        from attntune.templates import load_template

        workload, device = source.workload, tvm.cuda(0)
        packings = load_template(source.template).pack(workload, source.target)
        names = [spec.name for spec in workload.inputs()]
        self._outputs = [
            tvm.runtime.tensor(np.zeros(spec.shape, numpy_dtype(spec.dtype)), device=device)
            for spec in workload.outputs()
        ]
        tensors: dict[int, Any] = {}
        for name, operand in ((n, x) for operands in sets for n, x in zip(names, operands, strict=True)):
            if id(operand) not in tensors:
                packed = packings[name].apply(operand) if name in packings else operand
                tensors[id(operand)] = tvm.runtime.tensor(np.ascontiguousarray(packed), device=device)
        module = tvm.runtime.load_module(source.library)
        return {"": [_Launch(module, device, [*(tensors[id(x)] for x in o), *self._outputs]) for o in sets]}

    def secs(self, call: Call, number: int) -> float:
        """Of calls to one set of operands."""
        if not isinstance(call, _Launch):
            raise EngineError("expected caches to be 'hot' on a CUDA device")
        return call.secs(number)

    def to_numpy(self, result: Any) -> list[np.ndarray]:
        """What the kernel wrote."""
        return [output.numpy().astype(np.float32) for output in self._outputs]

    def describe(self) -> dict[str, Any]:
        """Version."""
        from attntune import __version__

        return {"version": __version__}


class _Launch:
    """A kernel with its operands; calling it returns before the device has run it."""

    def __init__(self, module: Any, device: Any, tensors: Sequence[Any]) -> None:
        self._module, self._device, self._tensors = module, device, tensors
        self._main = module.get_function("main")

    def __call__(self) -> None:
        self._main(*self._tensors)

    def secs(self, number: int) -> float:
        timer = self._module.time_evaluator("main", self._device, number=number, repeat=1)
        return float(timer(*self._tensors).results[0])


class TorchCudaKernels(TorchKernels):
    """Base of PyTorch's engines on the device: operands there, events, CUDA graphs."""

    env: ClassVar[Mapping[str, str]] = {}
    sample_secs: ClassVar[float] = 1e-3

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        require_cuda(self._torch)
        self._graphs: dict[tuple[int, int], Any] = {}

    def ways(self, source: KernelSource, sets: Sequence[Sequence[np.ndarray]]) -> dict[str, list[Call]]:
        """One way; graphs of the workload before are forgotten."""
        self._graphs.clear()
        self._torch.cuda.empty_cache()
        return super().ways(source, sets)

    def _tensor(self, array: np.ndarray) -> Any:
        return super()._tensor(array).cuda()

    def secs(self, call: Call, number: int) -> float:
        """Of a CUDA graph of ``number`` calls; of plain calls where they cannot be captured."""
        cuda = self._torch.cuda
        key = id(call), number
        if key not in self._graphs:
            self._graphs[key] = _captured(self._torch, call, number)
        graph = self._graphs[key]
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        if graph is not None:
            graph.replay()
        else:
            for _ in range(number):
                call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / number

    def to_numpy(self, result: Any) -> list[np.ndarray]:
        """As on the CPU."""
        return super().to_numpy(result.cpu())

    def describe(self) -> dict[str, Any]:
        """Versions of PyTorch, CUDA and cuDNN, and the device."""
        torch = self._torch
        return {
            "version": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "device": torch.cuda.get_device_name(),
        }  # fmt: skip


class TorchCublas(TorchCudaKernels):
    """``F.linear``."""

    name: ClassVar[str] = "cublas"
    title: ClassVar[str] = "PyTorch F.linear (cuBLAS)"

    def _linear(self, w: Linear, given: list[list[Any]]) -> dict[str, list[Call]]:
        if w.activation or w.residual or w.gated:
            raise EngineError(f"expected a linear layer without activation and residual, got {w}")
        return {"F.linear": [partial(self._torch.nn.functional.linear, *operands) for operands in given]}


class TorchCompiled(TorchCudaKernels):
    """A linear layer with all of its epilogue through ``torch.compile``: cuBLAS's product or Triton's, fused or not.

    Both of its best modes are tried, and the faster one is what is compared: ``max-autotune`` without CUDA graphs, of
    which the timing makes its own, and the default.
    """

    name: ClassVar[str] = "compiled"
    title: ClassVar[str] = "torch.compile"

    @classmethod
    def unavailable(cls) -> str | None:
        """PyTorch or Triton is missing."""
        return super().unavailable() or _without_triton("torch.compile")

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Without gradients."""
        manager: contextlib.AbstractContextManager[Any] = self._torch.no_grad()
        return manager

    def _linear(self, w: Linear, given: list[list[Any]]) -> dict[str, list[Call]]:
        self._torch.compiler.reset()
        ways: dict[str, list[Call]] = {}
        for mode in ("default", "max-autotune-no-cudagraphs"):
            layer = self._torch.compile(fused_linear(self._torch, w), dynamic=False, mode=mode)
            ways[f"torch.compile, {mode}"] = [partial(layer, *operands) for operands in given]
        return ways


def fused_linear(torch: Any, w: Linear) -> Callable[..., Any]:
    """The layer ``w`` in PyTorch's functions, of its operands in their order.

    Raises:
        EngineError: weights are quantised, or rows of padding are left out.
    """
    if w.quantized or w.grouped or w.seq:
        raise EngineError(f"expected a linear layer of whole rows with float weights, got {w}")
    functions = torch.nn.functional
    activations: dict[str, Callable[[Any], Any]] = {
        "": lambda x: x, "relu": functions.relu, "silu": functions.silu, "gelu": functions.gelu,
        "gelu_tanh": partial(functions.gelu, approximate="tanh"),
    }  # fmt: skip
    activation, names = activations[w.activation], [spec.name for spec in w.inputs()]

    def layer(*operands: Any) -> Any:
        operand = dict(zip(names, operands, strict=True))
        y = functions.linear(operand["x"], operand["weight"], operand.get("bias"))
        if w.gated:
            gate, up = y.chunk(2, dim=-1)
            y = activation(gate) * up
        else:
            y = activation(y)
        return y + operand["residual"] if w.residual else y

    return layer


def _without_triton(what: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return f"{what} needs the package triton, which torch.compile writes kernels for: pip install triton"
    return None


class _TorchSDPA(TorchCudaKernels):
    """``F.scaled_dot_product_attention`` with one of its backends."""

    backend: ClassVar[str]
    """In ``torch.nn.attention.SDPBackend``."""

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Inference mode, and no other backend than this."""
        return self._backend_alone()

    @contextlib.contextmanager
    def _backend_alone(self) -> Iterator[None]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with self._torch.inference_mode(), sdpa_kernel([getattr(SDPBackend, self.backend)]):
            yield


class TorchFlash(_TorchSDPA):
    """FlashAttention as PyTorch ships it."""

    name: ClassVar[str] = "flash"
    title: ClassVar[str] = "PyTorch SDPA, flash"
    backend: ClassVar[str] = "FLASH_ATTENTION"


class TorchCudnn(_TorchSDPA):
    """cuDNN's attention."""

    name: ClassVar[str] = "cudnn"
    title: ClassVar[str] = "PyTorch SDPA, cuDNN"
    backend: ClassVar[str] = "CUDNN_ATTENTION"


class TorchFlex(TorchCudaKernels):
    """FlexAttention through ``torch.compile`` with its default settings; blocks that no query sees are left out.

    It is Triton's attention as PyTorch writes it; the package triton itself ships none.
    """

    name: ClassVar[str] = "flex"
    title: ClassVar[str] = "PyTorch FlexAttention, compiled"

    @classmethod
    def unavailable(cls) -> str | None:
        """PyTorch or Triton is missing."""
        return super().unavailable() or _without_triton("FlexAttention")

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Without gradients."""
        manager: contextlib.AbstractContextManager[Any] = self._torch.no_grad()
        return manager

    def _attention(self, w: Attention, query: Any, key: Any, value: Any) -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if w.layout != "bhsd":
            raise EngineError(f"expected attention of layout 'bhsd', got {w}")
        self._turned = False
        self._torch.compiler.reset()
        block_mask = None
        if w.causal:
            block_mask = create_block_mask(
                lambda b, h, i, j: i >= j, B=None, H=None, Q_LEN=w.q_len, KV_LEN=w.kv_len, device="cuda"
            )
        attend = self._torch.compile(flex_attention, dynamic=False)
        return partial(
            attend, query, key, value, block_mask=block_mask, scale=w.scale, enable_gqa=w.heads != w.kv_heads
        )


#: By name, attntune first. A new engine adds one line here.
CUDA_KERNEL_ENGINES: dict[str, type[KernelEngine]] = {
    cls.name: cls for cls in (AttntuneCudaKernels, TorchCublas, TorchCompiled, TorchFlash, TorchCudnn, TorchFlex)
}


def cuda_peaks(target: Target, process: Callable[..., IsolatedProcess] = IsolatedProcess) -> dict[str, Any]:
    """What PyTorch reaches on this machine's device; empty where it cannot be measured. Some seconds.

    Returns:
        ``flops_per_sec``: dtype to operations per second of a square matrix product by cuBLAS. ``read_bytes_per_sec``:
        of summing a buffer larger than every cache, or of copying it, bytes read and written together, whichever is
        more. ``source``: that, in words.
    """
    try:
        with process(threads=target.cores) as worker:
            measured = worker.call(f"{__name__}:measure_peaks", timeout_secs=_PEAKS_TIMEOUT_SECS)
    except AttntuneError:
        return {}
    return dict(measured)


def measure_peaks() -> dict[str, Any]:
    """See :func:`cuda_peaks`; runs in a worker process."""
    if not importlib.util.find_spec("torch"):
        raise EngineError("expected the package torch, found none")
    import torch

    require_cuda(torch)
    flops = {}
    for dtype in ("float32", "bfloat16", "float16"):
        a, b = (torch.randn(_PEAK_SIZE, _PEAK_SIZE, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
        flops[dtype] = 2 * _PEAK_SIZE**3 / _best(torch, partial(torch.matmul, a, b))
        del a, b
    source = torch.ones(_PEAK_BYTES // 4, device="cuda")
    read = _PEAK_BYTES / _best(torch, source.sum)
    copy = 2 * _PEAK_BYTES / _best(torch, partial(torch.empty_like(source).copy_, source))
    return {
        "flops_per_sec": flops, "read_bytes_per_sec": max(read, copy),
        "source": f"PyTorch {torch.__version__}: a product of {_PEAK_SIZE}×{_PEAK_SIZE} matrices by cuBLAS, "
        f"{_PEAK_BYTES // 1024**3} GiB summed or copied",
    }  # fmt: skip


def require_cuda(torch: Any) -> None:
    """Raise :class:`EngineError` unless this PyTorch finds a CUDA device."""
    if not torch.cuda.is_available():
        raise EngineError(f"expected a PyTorch that finds a CUDA device; torch {torch.__version__} finds none")


def _best(torch: Any, call: Callable[[], Any]) -> float:
    """Shortest of several runs, in seconds."""
    call()
    found = []
    for _ in range(_PEAK_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(float(start.elapsed_time(end)) / 1e3)
    return min(found)


def _captured(torch: Any, call: Call, number: int) -> Any:
    """A CUDA graph of so many calls; None where they cannot be captured."""
    for _ in range(2):  # what is made at a first call must not be made while capturing
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(number):
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph
