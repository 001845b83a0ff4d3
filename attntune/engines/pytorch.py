"""PyTorch on the CPU: eager with fused operators (linear, layer norm, SDPA), and the same through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from attntune.engines.engine import Engine, ModelSource
from attntune.errors import EngineError


class PyTorchEngine(Engine):
    """The model's calls as torch calls in inference mode, weights and inputs bound beforehand."""

    name: ClassVar[str] = "pytorch"
    title: ClassVar[str] = "PyTorch"
    package: ClassVar[str] = "torch"
    install: ClassVar[str] = "pip install 'attntune[torch]'"
    inspect: ClassVar[bool] = True
    """Whether a mask of ones may be dropped at run time; see :class:`TorchModel`."""

    def load(self, source: ModelSource, threads: int) -> None:
        """Build the twin from ``source.graph``."""
        import torch

        from attntune.engines.graph import ModelGraph
        from attntune.engines.torch_reference import TorchModel

        if not source.graph:
            raise EngineError("the pytorch engine needs the model's graph; expected source.graph to be set")
        torch.set_num_threads(threads)
        self._torch = torch
        self._model: Any = TorchModel(ModelGraph.load(source.graph), source.entry, inspect=self.inspect)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """NumPy in, NumPy out."""
        with self._torch.inference_mode():
            return {name: value.numpy() for name, value in self._model(**self._tensors(inputs)).items()}

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """The model on tensors made beforehand, in inference mode."""
        tensors, model, inference_mode = self._tensors(inputs), self._model, self._torch.inference_mode

        def call() -> object:
            with inference_mode():
                return model(**tensors)

        return call

    def _tensors(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {name: self._torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}

    def describe(self) -> dict[str, Any]:
        """Version, mode and SDPA."""
        return {"version": self._torch.__version__, "mode": "eager, inference_mode, scaled_dot_product_attention"}


class PyTorchCompileEngine(PyTorchEngine):
    """The same calls through ``torch.compile``; needs a C++ compiler. Compiles anew for each shape."""

    name: ClassVar[str] = "torch-compile"
    title: ClassVar[str] = "torch.compile"
    inspect: ClassVar[bool] = False

    @classmethod
    def unavailable(cls) -> str | None:
        """The package, or a C++ compiler, is missing."""
        import shutil

        if (reason := super().unavailable()) is not None:
            return reason
        if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            return "torch.compile needs a C++ compiler: install g++ or clang++"
        return None

    def load(self, source: ModelSource, threads: int) -> None:
        """Build the twin and wrap it."""
        super().load(source, threads)
        self._model = self._torch.compile(self._model.__call__, dynamic=False, fullgraph=True)

    def describe(self) -> dict[str, Any]:
        """Version and mode."""
        return {"version": self._torch.__version__, "mode": "torch.compile, static shapes"}
