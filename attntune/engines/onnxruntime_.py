"""ONNX Runtime on the CPU, in the fastest of its ways to run this model at the shape at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from attntune.engines.engine import Engine, ModelSource
from attntune.engines.fastest import fastest
from attntune.errors import EngineError


class OnnxRuntimeEngine(Engine):
    """Every ONNX file of the source, all graph optimizations; ``bind`` times them and keeps the fastest.

    Inputs and outputs are bound beforehand (``run_with_iobinding``), so that no call converts or allocates inputs.
    """

    name: ClassVar[str] = "onnxruntime"
    title: ClassVar[str] = "ONNX Runtime"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")
    install: ClassVar[str] = "pip install 'attntune[onnx]'"
    onnx_styles: ClassVar[tuple[str, ...]] = ("decomposed", "standard", "onnxruntime")

    def load(self, source: ModelSource, threads: int) -> None:
        """One session per file that this version accepts."""
        import onnxruntime

        if not source.onnx:
            raise EngineError("the onnxruntime engine needs ONNX files; expected source.onnx to name at least one")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        self._sessions: dict[str, Any] = {}
        self._rejected: dict[str, str] = {}
        for style, path in source.onnx.items():
            try:
                self._sessions[style] = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
            except Exception as error:  # a version that lacks an operator
                self._rejected[style] = str(error)
        if not self._sessions:
            raise EngineError(f"ONNX Runtime {onnxruntime.__version__} rejects every file: {self._rejected}")
        self._version = onnxruntime.__version__
        self._variant = ""
        self._first = next(iter(self._sessions))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """By the variant that the last ``bind`` chose, else by the first."""
        session = self._sessions[self._variant or self._first]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, self._accepted(session, inputs)), strict=True))

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """The fastest variant at this shape, by the median of a few calls taken in turn."""
        calls = {style: self._bound(session, inputs) for style, session in self._sessions.items()}
        self._variant = fastest(calls)
        return calls[self._variant]

    def _bound(self, session: Any, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        import onnxruntime

        binding = session.io_binding()
        for name, value in self._accepted(session, inputs).items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        return lambda: session.run_with_iobinding(binding)

    @staticmethod
    def _accepted(session: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = {value.name for value in session.get_inputs()}
        return {name: np.ascontiguousarray(value) for name, value in inputs.items() if name in wanted}

    def describe(self) -> dict[str, Any]:
        """Version, the variants tried, and those this version rejects."""
        return {
            "version": self._version,
            "optimizations": "all",
            "variants": list(self._sessions),
            "rejected": self._rejected,
        }

    def bound_variant(self) -> str:
        """Attention style of the fastest file."""
        return self._variant
