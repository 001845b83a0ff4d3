"""What is to be measured, and how."""

from __future__ import annotations

from dataclasses import dataclass

from attntune.errors import TuningError
from attntune.ops.workload import Workload
from attntune.search.space import Config
from attntune.target import Target

_GIB = 1024**3


@dataclass(frozen=True)
class Trial:
    """One config of one workload on one target, to be built, checked and timed."""

    workload: Workload
    target: Target
    template: str
    """``module:Class`` of the schedule template."""
    config: Config
    seed: int = 0
    """Of the operands."""
    is_default: bool = False
    """Whether ``config`` is the template's default."""

    def key(self) -> tuple[str, str, str, str]:
        """Workload, target, template and config: what a recorded result is found by."""
        return self.workload.key(), self.target.key(), self.template, self.config.key()


@dataclass(frozen=True)
class MeasureOptions:
    """How candidates are built and timed. The defaults take about a tenth of a second of timing for a candidate."""

    warmup_secs: float = 0.02
    min_sample_secs: float = 0.008
    """A sample averages as many calls as fill this time. Cold samples are one call each."""
    samples: int = 8
    cache: str = "hot"
    """``hot``: activations stay in cache between calls, and large weights and key-value caches rotate through copies
    that do not, as in a model of many layers; ``cold``: caches are flushed before each call."""
    build_timeout_secs: float = 30.0
    run_timeout_secs: float = 30.0
    """For checking and timing one candidate together, its operands and reference included."""
    memory_limit_bytes: int = 8 * _GIB
    """Address space of each worker process."""
    builders: int = 2
    """Candidates built at once."""
    plugin_paths: tuple[str, ...] = ()
    """Directories where workers look for templates that are not part of an installed package."""

    def __post_init__(self) -> None:
        if self.cache not in ("hot", "cold"):
            raise TuningError(f"expected cache to be 'hot' or 'cold', got {self.cache!r}")
        for name in ("min_sample_secs", "samples", "build_timeout_secs", "run_timeout_secs", "memory_limit_bytes",
                     "builders"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise TuningError(f"expected {name} to be positive, got {getattr(self, name)!r}")
