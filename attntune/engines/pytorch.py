"""PyTorch on the CPU, eager: fused operators (linear, layer norm, SDPA), in float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from attntune.engines.engine import OPENMP_ENV, Engine, ModelSource
from attntune.engines.parity import FLOAT32
from attntune.errors import EngineError


class PyTorchEngine(Engine):
    """The model's calls as torch calls in inference mode, weights and inputs bound beforehand.

    At another precision than float32 every floating-point weight is of that dtype, and so is every step; outputs come
    back as float32.
    """

    name: ClassVar[str] = "pytorch"
    title: ClassVar[str] = "PyTorch"
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    install: ClassVar[str] = "pip install 'attntune[torch]'"
    env: ClassVar[Mapping[str, str]] = OPENMP_ENV
    inspect: ClassVar[bool] = True
    """Whether a mask of ones may be dropped at run time; see :class:`TorchModel`."""

    def load(self, source: ModelSource, threads: int) -> None:
        """Build the twin from ``source.graph``."""
        import torch

        from attntune.engines.graph import ModelGraph
        from attntune.engines.torch_reference import TorchModel

        if not source.graph:
            raise EngineError(f"the {self.name} engine needs the model's graph; expected source.graph to be set")
        torch.set_num_threads(threads)
        self._torch = torch
        graph = ModelGraph.load(source.graph)
        self._model: Any = TorchModel(graph, source.entry, self.precision, inspect=self.inspect)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """NumPy in, NumPy out."""
        result: Any = self.bind(inputs)()
        return {name: value.numpy() for name, value in result.items()}

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """The model on tensors made beforehand, in inference mode."""
        tensors, model, inference_mode = self._tensors(inputs), self._model, self._torch.inference_mode
        float32, exact = self._torch.float32, self.precision == FLOAT32

        def call() -> object:
            with inference_mode():
                outputs = model(**tensors)
                return outputs if exact else {name: value.to(float32) for name, value in outputs.items()}

        return call

    def _tensors(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        tensors = {name: self._torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        dtype = getattr(self._torch, self.precision)
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}

    def describe(self) -> dict[str, Any]:
        """Version, mode and SDPA."""
        return {"version": self._torch.__version__, "mode": "eager, inference_mode, scaled_dot_product_attention"}


class PyTorchBFloat16Engine(PyTorchEngine):
    """The same with weights and activations in bfloat16."""

    name: ClassVar[str] = "pytorch-bf16"
    title: ClassVar[str] = "PyTorch bfloat16"
    precision: str = "bfloat16"
