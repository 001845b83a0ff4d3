"""attntune's own engine: a compiled artifact through the runtime, without compiler or torch in the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from attntune.engines.engine import Engine, ModelSource
from attntune.engines.parity import FLOAT32
from attntune.errors import EngineError


class AttntuneEngine(Engine):
    """Runs ``source.artifact``."""

    name: ClassVar[str] = "attntune"
    title: ClassVar[str] = "attntune"

    def load(self, source: ModelSource, threads: int) -> None:
        """Load the artifact to run with ``threads`` threads."""
        if not source.artifact:
            raise EngineError("the attntune engine needs a compiled artifact; expected source.artifact to be set")
        from attntune.runtime import load

        self._tuned = load(source.artifact, cores=threads)
        self._source = source
        self.precision = str(self._tuned.manifest.get("precision", FLOAT32))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """NumPy in, NumPy out."""
        result = self._tuned.run(self._source.entry, **inputs)
        return named_outputs(result, self._source.outputs)

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """The public call, NumPy in and out: users pay for exactly this."""
        run, entry, arguments = self._tuned.run, self._source.entry, dict(inputs)
        return lambda: run(entry, **arguments)

    def describe(self) -> dict[str, Any]:
        """Version of attntune; the title says the artifact's precision where it is not float32."""
        from attntune import __version__

        title = self.title if self.precision == FLOAT32 else f"{self.title} {self.precision}"
        return {"title": title, "version": __version__}


def named_outputs(result: Any, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What a call returned, a mapping, a tuple or one array, as arrays by output name."""
    if isinstance(result, Mapping):
        return {name: np.asarray(result[name]) for name in names}
    values = result if isinstance(result, tuple | list) else (result,)
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
