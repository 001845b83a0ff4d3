"""OpenVINO on the CPU, in float32 and bfloat16: the ONNX twin compiled for each shape, or once for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from attntune.engines.engine import Engine, ModelSource
from attntune.engines.fastest import fastest
from attntune.errors import EngineError

#: Precision hints by precision.
_HINTS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoEngine(Engine):
    """Every ONNX file of the source, each with dynamic shapes and with the shape at hand; ``bind`` keeps the fastest.

    One inference request with its tensors set beforehand, so that no call converts, copies or allocates inputs.
    """

    name: ClassVar[str] = "openvino"
    title: ClassVar[str] = "OpenVINO"
    packages: ClassVar[tuple[str, ...]] = ("openvino", "onnx")
    install: ClassVar[str] = "pip install 'attntune[openvino]'"
    onnx_styles: ClassVar[tuple[str, ...]] = ("decomposed", "standard")

    @classmethod
    def unavailable(cls) -> str | None:
        """A package is missing, or this CPU lacks the instructions of the precision."""
        if (reason := super().unavailable()) is not None or cls.precision != "bfloat16":
            return reason
        from attntune.host import host_features

        # Without them OpenVINO computes in float32 whatever the hint says.
        if not {"avx512bf16", "amx-bf16"} & set(host_features()):
            return f"{cls.title} needs a CPU with bfloat16 instructions (avx512bf16 or amx-bf16)"
        return None

    def load(self, source: ModelSource, threads: int) -> None:
        """Read every file and compile it with dynamic shapes."""
        import openvino

        files = {style: path for style, path in source.onnx.items() if style in self.onnx_styles}
        if not files:
            raise EngineError(f"the {self.name} engine needs ONNX files; expected source.onnx to name at least one")
        self._openvino, self._core = openvino, openvino.Core()
        self._config = {
            "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        self._files: dict[str, str] = {}
        self._dynamic: dict[str, Any] = {}
        self._rejected: dict[str, str] = {}
        for style, path in files.items():
            try:
                self._dynamic[style] = self._core.compile_model(self._core.read_model(path), "CPU", self._config)
            except RuntimeError as error:  # a version that lacks an operator
                self._rejected[style] = str(error).strip().splitlines()[-1]
            else:
                self._files[style] = path
        if not self._files:
            raise EngineError(f"OpenVINO {openvino.__version__} rejects every file: {self._rejected}")
        self._outputs = source.outputs
        self._variant = ""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """By the variant that is the fastest for inputs of this shape."""
        request, _ = self._fastest(inputs)
        request.infer()
        return {name: np.array(request.get_tensor(name).data, np.float32) for name in self._outputs}

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """The fastest variant at this shape, by the median of a few calls taken in turn."""
        request, self._variant = self._fastest(inputs)
        return lambda: request.infer()

    def _fastest(self, inputs: Mapping[str, np.ndarray]) -> tuple[Any, str]:
        shape = {name: value.shape for name, value in inputs.items()}
        if getattr(self, "_chosen_shape", None) != shape:
            models = {f"{style}, dynamic shapes": model for style, model in self._dynamic.items()}
            for style, path in self._files.items():
                models[f"{style}, static shapes"] = self._static(path, shape)
            requests = {name: self._request(model, inputs) for name, model in models.items()}
            chosen = fastest({name: request.infer for name, request in requests.items()})
            self._chosen_shape, self._chosen = shape, (models[chosen], chosen)
        model, variant = self._chosen
        return self._request(model, inputs), variant

    def _static(self, path: str, shape: Mapping[str, tuple[int, ...]]) -> Any:
        model = self._core.read_model(path)
        model.reshape({port.any_name: list(shape[port.any_name]) for port in model.inputs})
        return self._core.compile_model(model, "CPU", self._config)

    def _request(self, model: Any, inputs: Mapping[str, np.ndarray]) -> Any:
        request = model.create_infer_request()
        for port in model.inputs:
            # A tensor of OpenVINO's own: its memory is aligned as its kernels like it.
            value = inputs[port.any_name]
            tensor = self._openvino.Tensor(port.get_element_type(), self._openvino.Shape(value.shape))
            tensor.data[...] = value
            request.set_tensor(port, tensor)
        return request

    def describe(self) -> dict[str, Any]:
        """Version, precision in use, hints, and the files this version rejects."""
        return {
            "version": self._openvino.__version__.split("-")[0],
            "hints": ", ".join(f"{name} {value}" for name, value in self._config.items()),
            "variants": [f"{style}, {kind} shapes" for style in self._files for kind in ("dynamic", "static")],
            "rejected": self._rejected,
        }

    def bound_variant(self) -> str:
        """Attention style of the fastest file, and whether its shapes are static."""
        return self._variant


class OpenVinoBFloat16Engine(OpenVinoEngine):
    """The same with matrix products in bfloat16, by OpenVINO's own precision hint."""

    name: ClassVar[str] = "openvino-bf16"
    title: ClassVar[str] = "OpenVINO bfloat16"
    precision: str = "bfloat16"
