"""TVM's own MetaSchedule, given the seconds that attntune's tuning is given, on the same tensor expressions."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from attntune.engines.attntune_ import named_outputs
from attntune.engines.engine import Engine, ModelSource
from attntune.engines.graph import ModelGraph
from attntune.errors import EngineError

_TUNING = "attntune.engines.metaschedule_tuning"
_WARM_UP_SECS = 300.0


class MetaScheduleEngine(Engine):
    """Tunes for ``source.tuning_secs`` when a shape is bound, then runs the best schedules found.

    The search runs in a process of its own, which is ended when its time is up; what it had measured by then counts.
    Where that is nothing for some kernel, there is no result: TVM would run the kernel as unscheduled loops, hundreds
    of times as slow, which says nothing about MetaSchedule.
    """

    name: ClassVar[str] = "metaschedule"
    title: ClassVar[str] = "TVM MetaSchedule"
    packages: ClassVar[tuple[str, ...]] = ("xgboost", "cloudpickle")
    install: ClassVar[str] = "pip install 'attntune[metaschedule]'"
    tunes: ClassVar[bool] = True

    def load(self, source: ModelSource, threads: int) -> None:
        """Read the model; tuning waits for a shape."""
        from attntune.target import native

        if not source.graph:
            raise EngineError("the metaschedule engine needs the model's graph; expected source.graph to be set")
        if source.tuning_secs <= 0:
            raise EngineError(
                f"the metaschedule engine tunes; expected source.tuning_secs > 0, got {source.tuning_secs}"
            )
        self._source = source
        self._graph = ModelGraph.load(source.graph)
        self._target = native().with_cores(threads)
        self._functions: dict[tuple[tuple[str, int], ...], tuple[Callable[..., Any], str]] = {}
        self._variant = ""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """NumPy in, NumPy out; tunes first where this shape is new."""
        result: Any = self.bind(inputs)()
        tensors = list(result) if len(self._source.outputs) > 1 else [result]
        return named_outputs([np.from_dlpack(tensor) for tensor in tensors], self._source.outputs)

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """The compiled model on tensors made beforehand.

        Raises:
            EngineError: saying for how many kernels nothing was measured in the time given.
        """
        import tvm

        specs = self._graph.entries[self._source.entry].inputs
        dims = {
            str(dim): size
            for spec in specs
            for dim, size in zip(spec.dims, inputs[spec.name].shape, strict=True)
            if isinstance(dim, str)
        }
        key = tuple(sorted(dims.items()))
        if key not in self._functions:
            self._functions[key] = self._tuned(dims)
        function, self._variant = self._functions[key]
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(inputs[spec.name])) for spec in specs]
        return lambda: function(*tensors)

    def _tuned(self, dims: Mapping[str, int]) -> tuple[Callable[..., Any], str]:
        from attntune.engines import metaschedule_tuning as tuning
        from attntune.measure.worker import IsolatedProcess, WorkerTimeout

        workloads = tuning.workloads_of(self._graph, self._source.entry, dims)
        secs = self._source.tuning_secs
        with tempfile.TemporaryDirectory(prefix="attntune-metaschedule-") as folder:
            with IsolatedProcess(threads=self._target.cores) as process:
                # Starting a process and importing a compiler is not counted as tuning.
                process.call(f"{_TUNING}:warm_up", timeout_secs=_WARM_UP_SECS)
                with contextlib.suppress(WorkerTimeout):  # as intended: it tunes until then
                    process.call(
                        f"{_TUNING}:tune", self._source.graph, self._source.entry, dict(dims), self._target.to_json(),
                        folder, timeout_secs=secs,
                    )  # fmt: skip
            kernels, trials = tuning.best_kernels(folder, workloads, self._target)
        missing = [workload.op for workload in workloads if workload not in kernels]
        if missing:
            raise EngineError(
                f"no result in {secs:g} s: MetaSchedule measured {trials} schedules and none for {len(missing)} of "
                f"{len(workloads)} kernels ({', '.join(missing)})"
            )
        function = tuning.compile_model(self._graph, self._source.entry, dims, kernels, self._target)
        return function, f"{trials} trials in {secs:g} s"

    def describe(self) -> dict[str, Any]:
        """Version of TVM and the time given."""
        import tvm

        return {"version": tvm.__version__, "tuning": f"{self._source.tuning_secs:g} s for each shape"}

    def bound_variant(self) -> str:
        """How much was measured."""
        return self._variant
