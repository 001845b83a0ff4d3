"""PyTorch's compilers on the CPU: torch.compile (default, max-autotune) and AMD's zentorch, float32 and bfloat16."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from attntune.engines.engine import ModelSource
from attntune.engines.fastest import fastest
from attntune.engines.parity import FLOAT32
from attntune.engines.pytorch import PyTorchEngine

_MANY = 1000
_VARIANTS = {False: "weights as they are", True: "weights frozen"}


class PyTorchCompileEngine(PyTorchEngine):
    """The model's calls through ``torch.compile``, for each shape anew; needs a C++ compiler.

    Compiled with and without freezing, which lets the compiler repack constant weights, and the faster is kept.
    """

    name: ClassVar[str] = "torch-compile"
    title: ClassVar[str] = "torch.compile"
    inspect: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Any]] = {}
    """Of ``torch.compile``."""
    freezing: ClassVar[tuple[bool, ...]] = (False, True)
    """Settings of ``torch._inductor.config.freezing`` to try."""

    @classmethod
    def unavailable(cls) -> str | None:
        """The package, or a C++ compiler, is missing."""
        if (reason := super().unavailable()) is not None:
            return reason
        if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            return f"{cls.title} needs a C++ compiler: install g++ or clang++"
        return None

    def load(self, source: ModelSource, threads: int) -> None:
        """Build the twin; compilation waits for a shape."""
        super().load(source, threads)
        import torch._dynamo.config as dynamo

        # Every shape and setting is one compilation of the same code, which must not count as one too many.
        for limit in ("recompile_limit", "cache_size_limit"):  # its name since PyTorch 2.7, and before
            if hasattr(dynamo, limit):
                setattr(dynamo, limit, _MANY)
        dynamo.accumulated_recompile_limit = _MANY
        self._compiled: dict[Any, tuple[Any, str]] = {}
        self._variant = ""

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """The fastest compilation for this shape on tensors made beforehand."""
        tensors = self._tensors(inputs)
        shape = tuple((name, value.shape) for name, value in tensors.items())
        if shape not in self._compiled:
            found = {_VARIANTS[frozen]: self._compile(frozen, tensors) for frozen in self.freezing}
            calls = {name: self._call(compiled, tensors) for name, compiled in found.items()}
            chosen = fastest(calls)
            self._compiled[shape] = (found[chosen], chosen)
        compiled, self._variant = self._compiled[shape]
        return self._call(compiled, tensors)

    def _call(self, compiled: Any, tensors: Mapping[str, Any]) -> Callable[[], object]:
        no_grad, float32, exact = self._torch.no_grad, self._torch.float32, self.precision == FLOAT32

        def call() -> object:
            with no_grad():
                outputs = compiled(**tensors)
                return outputs if exact else {name: value.to(float32) for name, value in outputs.items()}

        return call

    def _compile(self, frozen: bool, tensors: Mapping[str, Any]) -> Any:
        """Compile now, while the setting that is read then is in force."""
        import torch._inductor.config as inductor

        from attntune.engines.torch_reference import torch_module

        # A module of its own: the compiler caches by class, and would hand out the other setting's compilation.
        compiled = self._torch.compile(torch_module(self._model), dynamic=False, fullgraph=True, **self.options)
        with inductor.patch(freezing=frozen), self._torch.no_grad():
            compiled(**tensors)
        return compiled

    def describe(self) -> dict[str, Any]:
        """Version and mode."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return {
            "version": self._torch.__version__,
            "mode": f"torch.compile, static shapes{', ' if options else ''}{options}",
        }

    def bound_variant(self) -> str:
        """Whether weights are frozen."""
        return self._variant


class PyTorchMaxAutotuneEngine(PyTorchCompileEngine):
    """The same with every matrix product's template tuned by measurement, which takes minutes."""

    name: ClassVar[str] = "torch-compile-max-autotune"
    title: ClassVar[str] = "torch.compile max-autotune"
    options: ClassVar[Mapping[str, Any]] = {"mode": "max-autotune"}


class ZentorchEngine(PyTorchCompileEngine):
    """The same through AMD's plug-in, whose kernels are ZenDNN's."""

    name: ClassVar[str] = "zentorch"
    title: ClassVar[str] = "zentorch"
    packages: ClassVar[tuple[str, ...]] = ("torch", "zentorch", "deprecated")
    install: ClassVar[str] = "pip install 'attntune[zentorch]'"
    options: ClassVar[Mapping[str, Any]] = {"backend": "zentorch"}

    def load(self, source: ModelSource, threads: int) -> None:
        """Import the plug-in, which registers its backend, and build the twin."""
        import zentorch

        super().load(source, threads)
        self._version = zentorch.__version__

    def describe(self) -> dict[str, Any]:
        """Versions of the plug-in and of PyTorch, and mode."""
        return {**super().describe(), "version": self._version, "PyTorch": self._torch.__version__}


class ZentorchBFloat16Engine(ZentorchEngine):
    """The same with weights and activations in bfloat16."""

    name: ClassVar[str] = "zentorch-bf16"
    title: ClassVar[str] = "zentorch bfloat16"
    precision: str = "bfloat16"
