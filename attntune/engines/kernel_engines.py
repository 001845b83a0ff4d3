"""Engines that run one operator: attntune's own kernels, and PyTorch's functions for the same workload.

Each runs in a process of its own, which :mod:`attntune.engines.kernel_comparison` calls by name: ``open_engine`` once,
then for each workload ``prepare``, and ``turn`` in turns with the other engines.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.engines.engine import OPENMP_ENV
from attntune.engines.fastest import medians
from attntune.errors import EngineError
from attntune.measure.worker_child import resolve
from attntune.ops import Attention, Linear, Workload
from attntune.target import Target

Call = Callable[[], Any]

_TRIALS = 7
_MAX_COPIES = 2048


@dataclass(frozen=True)
class KernelSource:
    """One kernel, as engines are asked to run it; pickled to their processes."""

    workload: Workload
    target: Target
    library: str = ""
    """attntune's shared object."""
    template: str = ""
    """``module:Class`` of the template it was made by; says how constants are packed."""
    seed: int = 0

    def operands(self) -> tuple[np.ndarray, ...]:
        """The example operands; the same in every process."""
        return self.workload.example_inputs(self.seed)

    def cold_copies(self) -> tuple[list[int], int]:
        """Which operands come from memory when caches are cold, and how many copies of them overflow the last cache.

        The weights of a layer, as in a model of many layers; all operands where there are no weights.
        """
        specs = self.workload.inputs()
        turning = [i for i, spec in enumerate(specs) if spec.constant] or list(range(len(specs)))
        size = sum(specs[i].bytes for i in turning)
        return turning, min(_MAX_COPIES, max(2, math.ceil(2 * self.target.l3_bytes / size)))


class KernelEngine(ABC):
    """Runs single workloads; one instance per process."""

    name: ClassVar[str]
    title: ClassVar[str]
    env: ClassVar[Mapping[str, str]] = {}
    sample_secs: ClassVar[float] = 20e-6
    """A sample averages as many calls as take this long: a clock that is read more often measures itself."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @classmethod
    def reference_name(cls) -> str:
        """``module:Class``, by which a process of its own finds it."""
        return f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot run here; None when it can."""
        return None

    @abstractmethod
    def ways(self, source: KernelSource, sets: Sequence[Sequence[np.ndarray]]) -> dict[str, list[Call]]:
        """By name, each way the engine has of running the workload: one call for each set of operands.

        Operands that are the same object in several sets are given to all of these calls in one copy.

        Raises:
            EngineError: it has none.
        """

    @abstractmethod
    def to_numpy(self, result: Any) -> list[np.ndarray]:
        """What a call returned, as float32 or float64 arrays in the order of the workload's outputs."""

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around every series of calls."""
        return contextlib.nullcontext()

    def secs(self, call: Call, number: int) -> float:
        """Seconds per call of ``number`` calls in a row."""
        clock = time.perf_counter
        start = clock()
        for _ in itertools.repeat(None, number):
            call()
        return (clock() - start) / number

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Version and configuration."""


class AttntuneKernels(KernelEngine):
    """``source.library``, called as a compiled model calls its kernels; TVM's compiler is not loaded."""

    name: ClassVar[str] = "attntune"
    title: ClassVar[str] = "attntune"
    env: ClassVar[Mapping[str, str]] = {"OPENBLAS_THREAD_TIMEOUT": "10"}

    def __init__(self, threads: int) -> None:
        from attntune.measure.threads import load_runtime, pin_pool

        super().__init__(threads)
        load_runtime()
        pin_pool(threads)

    def ways(self, source: KernelSource, sets: Sequence[Sequence[np.ndarray]]) -> dict[str, list[Call]]:
        """The kernel, on constants packed as its template wants them."""
        from functools import partial

        from attntune.measure.buffers import GuardedArray, as_tensor, numpy_dtype
        from attntune.measure.threads import load_runtime
        from attntune.templates import load_template

        workload = source.workload
        packings = load_template(source.template).pack(workload, source.target)
        names = [spec.name for spec in workload.inputs()]
        outputs = [GuardedArray(spec.shape, numpy_dtype(spec.dtype)) for spec in workload.outputs()]
        results = [as_tensor(output.array) for output in outputs]
        self._outputs = outputs
        tensors: dict[int, Any] = {}
        self._held = []
        for name, operand in ((n, x) for operands in sets for n, x in zip(names, operands, strict=True)):
            if id(operand) not in tensors:
                packed = packings[name].apply(operand) if name in packings else operand
                guarded = GuardedArray.holding(np.ascontiguousarray(packed))
                self._held.append(guarded)
                tensors[id(operand)] = as_tensor(guarded.array)
        main = load_runtime().load_module(source.library).get_function("main")
        return {"": [partial(main, *(tensors[id(x)] for x in operands), *results) for operands in sets]}

    def to_numpy(self, result: Any) -> list[np.ndarray]:
        """The buffers that the kernel wrote."""
        return [output.array.astype(np.float32) for output in self._outputs]

    def describe(self) -> dict[str, Any]:
        """Version."""
        from attntune import __version__

        return {"version": __version__}


class TorchKernels(KernelEngine):
    """PyTorch in inference mode: the fastest of what it has for constant weights; its attention function."""

    name: ClassVar[str] = "pytorch"
    title: ClassVar[str] = "PyTorch"
    env: ClassVar[Mapping[str, str]] = OPENMP_ENV

    def __init__(self, threads: int) -> None:
        import torch

        super().__init__(threads)
        torch.set_num_threads(threads)
        self._torch = torch

    @classmethod
    def unavailable(cls) -> str | None:
        """The package is missing."""
        import importlib.util

        return None if importlib.util.find_spec("torch") else "PyTorch needs the package torch: pip install torch"

    def ways(self, source: KernelSource, sets: Sequence[Sequence[np.ndarray]]) -> dict[str, list[Call]]:
        """See :meth:`_linear` and :meth:`_attention`."""
        tensors: dict[int, Any] = {}
        for operand in itertools.chain.from_iterable(sets):
            if id(operand) not in tensors:
                tensors[id(operand)] = self._tensor(operand)
        given = [[tensors[id(x)] for x in operands] for operands in sets]
        workload = source.workload
        if isinstance(workload, Linear):
            return self._linear(workload, given)
        if isinstance(workload, Attention):
            return {"scaled_dot_product_attention": [self._attention(workload, *operands) for operands in given]}
        raise EngineError(f"PyTorch has no function here for {workload}")

    def _tensor(self, array: np.ndarray) -> Any:
        if array.dtype.name == "bfloat16":
            return self._torch.from_numpy(array.view(np.int16).copy()).view(self._torch.bfloat16)
        return self._torch.from_numpy(array.copy())

    def _linear(self, w: Linear, given: list[list[Any]]) -> dict[str, list[Call]]:
        """``F.linear``, and the products with prepacked weights that ``torch.compile`` with freezing calls."""
        from functools import partial

        if w.activation or w.residual:
            raise EngineError(f"expected a linear layer without activation and residual, got {w}")
        if w.quantized:
            return self._quantized_linear(w, given)
        if w.grouped:
            raise EngineError(f"PyTorch multiplies no {w.weight_dtype} weights with float32 x on CPUs")
        torch = self._torch
        linear = torch.nn.functional.linear
        ways: dict[str, list[Call]] = {"F.linear": [partial(linear, *operands) for operands in given]}
        with contextlib.suppress(RuntimeError, AttributeError):  # a build without oneDNN
            reorder = torch.ops.mkldnn._reorder_linear_weight
            packed = {id(x): reorder(x, w.rows) for x in {id(o[1]): o[1] for o in given}.values()}
            call = torch.ops.mkldnn._linear_pointwise
            ways["oneDNN, weights packed"] = [
                partial(call, o[0], packed[id(o[1])], o[2] if w.bias else None, "none", [], "") for o in given
            ]
        if w.dtype == "float32" and torch.backends.mkl.is_available():
            with contextlib.suppress(RuntimeError, AttributeError):
                reorder = torch.ops.mkl._mkl_reorder_linear_weight
                packed = {id(x): reorder(x, w.rows) for x in {id(o[1]): o[1] for o in given}.values()}
                call = torch.ops.mkl._mkl_linear
                ways["MKL, weights packed"] = [
                    partial(call, o[0], packed[id(o[1])], o[1], o[2] if w.bias else None, w.rows) for o in given
                ]
        return ways

    def _quantized_linear(self, w: Linear, given: list[list[Any]]) -> dict[str, list[Call]]:
        """Dynamic quantisation: the same int8 weights by output feature, x by one scale for the whole tensor."""
        from functools import partial

        torch = self._torch
        if w.gated or w.dtype != "float32":
            raise EngineError(f"expected a plain linear layer with float32 x, got {w}")
        ways: dict[str, list[Call]] = {}
        for engine in ("x86", "onednn", "fbgemm"):
            if engine not in torch.backends.quantized.supported_engines:
                continue
            torch.backends.quantized.engine = engine
            packed = {}
            for _, weight, scale, *bias in given:
                if id(weight) not in packed:
                    zeros = torch.zeros(len(scale), dtype=torch.int64)
                    values = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
                    packed[id(weight)] = torch.ops.quantized.linear_prepack(values, bias[0] if bias else None)
            ways[f"linear_dynamic, {engine}"] = [
                partial(torch.ops.quantized.linear_dynamic, o[0], packed[id(o[1])]) for o in given
            ]
        if not ways:
            raise EngineError("this build of PyTorch has no engine for quantised weights")
        return ways

    def _attention(self, w: Attention, query: Any, key: Any, value: Any) -> Call:
        """``F.scaled_dot_product_attention``; of operands whose heads lie side by side it gets transposed views."""
        query, key, value = (
            x if x.dim() == 4 else x.view(w.batch, x.shape[1], -1, w.head_dim).transpose(1, 2)
            for x in (query, key, value)
        )
        attend = self._torch.nn.functional.scaled_dot_product_attention
        options = {"is_causal": w.causal and w.q_len > 1, "scale": w.scale, "enable_gqa": w.heads != w.kv_heads}
        turned = w.layout == "bshd"
        self._turned = turned
        return lambda: attend(query, key, value, **options)

    def to_numpy(self, result: Any) -> list[np.ndarray]:
        """One tensor; heads side by side for layout ``bshd``."""
        if result.dim() == 4 and self._turned:
            result = result.transpose(1, 2).flatten(2)
        return [result.float().numpy()]

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Inference mode."""
        manager: contextlib.AbstractContextManager[Any] = self._torch.inference_mode()
        return manager

    def describe(self) -> dict[str, Any]:
        """Version."""
        return {"version": self._torch.__version__}


#: By name, attntune first. A new engine adds one line here.
KERNEL_ENGINES: dict[str, type[KernelEngine]] = {cls.name: cls for cls in (AttntuneKernels, TorchKernels)}

# -- in the engine's process -------------------------------------------------------------------------------------------

_engine: KernelEngine | None = None
_turns: dict[str, Call] = {}
_outputs: list[np.ndarray] = []


@dataclass(frozen=True)
class Prepared:
    """An engine that is ready to be timed on a workload in one state of the caches."""

    way: str
    """The fastest of its ways."""
    secs: float
    """Estimate of one call."""


def open_engine(reference: str, threads: int) -> None:
    """Start the engine of class ``reference``, as ``module:Class``, in this process."""
    global _engine
    _engine = resolve(reference)(threads)


def describe() -> dict[str, Any]:
    """Version and configuration of the engine."""
    assert _engine is not None, "expected open_engine before describe"
    return _engine.describe()


def prepare(
    source: KernelSource, caches: Sequence[str], places: Sequence[Sequence[Any]] = (), keep: str = ""
) -> tuple[dict[str, list[list[np.ndarray]]], dict[str, Prepared]]:
    """Bind the operands hot, cold or both: by state of the caches, parts of the outputs, and how they will be timed.

    Outputs are those of the first set of operands, which is the same for every engine and state.

    Args:
        source: the kernel.
        caches: states of the caches.
        places: of each part, an index into each output; everything by default.
        keep: a file that the whole first output of the first state is written to.
    """
    if _engine is None:
        raise EngineError("expected open_engine before prepare")
    _turns.clear()
    _outputs.clear()
    gc.collect()
    operands = source.operands()
    turning, copies = source.cold_copies()
    found: dict[str, list[list[np.ndarray]]] = {}
    prepared = {}
    for cache in caches:
        sets = [operands]
        for _ in range(copies - 1 if cache == "cold" else 0):
            sets.append(tuple(x.copy() if i in turning else x for i, x in enumerate(operands)))
        with _engine.context():
            ways = _engine.ways(source, sets)
            turns = {name: _next_of(calls) for name, calls in ways.items()}
            secs = medians(turns, _TRIALS if len(turns) > 1 else 3, lambda call: _engine.secs(call, 1))
            way = min(secs, key=lambda name: secs[name])
            outputs = _engine.to_numpy(ways[way][0]())
        parts = places or [(...,) * len(outputs)]
        found[cache] = [[x[at] for x, at in zip(outputs, part, strict=True)] for part in parts]
        _outputs[:] = _outputs or outputs[:1]
        _turns[cache] = turns[way]
        prepared[cache] = Prepared(way, secs[way])
    if keep:
        np.save(keep, _outputs[0])
    return found, prepared


def difference(kept: str) -> float:
    """Largest difference between the first output and the one in ``kept``, as a share of the former's largest value."""
    theirs = np.load(kept, mmap_mode="r")
    if theirs.shape != _outputs[0].shape:
        return math.inf
    largest = float(np.abs(_outputs[0]).max(initial=0.0))
    found = float(np.abs(_outputs[0] - theirs).max(initial=0.0))
    return found / largest if largest else found


def turn(cache: str, warmup: int, samples: int, secs: float) -> list[float]:
    """Seconds per call: ``samples`` samples of calls that take about ``secs`` each, after ``warmup`` calls."""
    assert _engine is not None
    call = _turns[cache]
    number = max(1, round(_engine.sample_secs / secs))
    with _engine.context(), _no_collection():
        for _ in range(warmup):
            call()
        return [_engine.secs(call, number) for _ in range(samples)]


def _next_of(calls: Sequence[Call]) -> Call:
    """Calls the next of ``calls`` each time."""
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
