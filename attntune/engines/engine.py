"""What an engine is: something that runs the same model, to be compared with."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from attntune.engines.parity import FLOAT32

#: Environment of engines whose threads are OpenMP's: each on a CPU of its own. Left to the system, two may share one,
#: and then wait for each other a time slice long: PyTorch was seen at 1/50 of its speed.
OPENMP_ENV: Mapping[str, str] = {"OMP_PROC_BIND": "spread", "OMP_PLACES": "threads"}


@dataclass(frozen=True)
class ModelSource:
    """Where an engine finds the model it runs; every engine takes what it needs. Pickled to worker processes."""

    entry: str
    outputs: tuple[str, ...]
    """Names of the entry's outputs."""
    graph: str = ""
    """Folder of a :class:`~attntune.engines.graph.ModelGraph`."""
    onnx: Mapping[str, str] = field(default_factory=dict)
    """Attention style → ``.onnx`` file, see :func:`attntune.interop.export_onnx`."""
    artifact: str = ""
    """A compiled artifact."""
    tuning_secs: float = 0.0
    """What an engine that tunes may spend on one shape."""


class Engine(ABC):
    """Runs a model in its best configuration with a given number of threads; one instance per process.

    ``load`` once, then ``run`` or ``bind`` for any inputs.
    """

    name: ClassVar[str]
    """In the registry and on the command line."""
    title: ClassVar[str]
    """In reports."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Python packages it needs beyond attntune's own."""
    install: ClassVar[str] = ""
    """Command that installs it."""
    env: ClassVar[Mapping[str, str]] = {}
    """Environment of its worker process."""
    onnx_styles: ClassVar[tuple[str, ...]] = ()
    """Attention styles of the ONNX files it wants, see :func:`attntune.interop.export_onnx`."""
    tunes: ClassVar[bool] = False
    """Whether it spends ``source.tuning_secs`` on every shape; such an engine runs only when it is named."""
    precision: str = FLOAT32
    """What it multiplies in: one of :data:`attntune.models.precision.PRECISIONS`. Sets the parity asked of it and the
    engines that it is compared with; ``load`` may change it."""

    @classmethod
    def unavailable(cls) -> str | None:
        """Why this engine cannot run here, with the command that changes it; None when it can."""
        missing = [name for name in cls.packages if importlib.util.find_spec(name) is None]
        if missing:
            plural = "s" if len(missing) > 1 else ""
            return f"{cls.title} needs the package{plural} {' and '.join(missing)}: {cls.install}"
        return None

    @abstractmethod
    def load(self, source: ModelSource, threads: int) -> None:
        """Load the model and take ``threads`` threads."""

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for NumPy inputs by name."""

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """What is timed: a call without arguments that computes the outputs of ``inputs``, conversions done before."""
        return lambda: self.run(inputs)

    def describe(self) -> dict[str, Any]:
        """Version and configuration, for the report; a ``title`` here replaces the class's."""
        return {}

    def bound_variant(self) -> str:
        """Which of several configurations the last ``bind`` chose; empty when there is only one."""
        return ""
