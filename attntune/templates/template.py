"""What a schedule template is: for one operator and target kind, the space of its schedules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import TensorSpec, Workload
from attntune.search.space import Config, ConfigSpace
from attntune.target import Target


@dataclass(frozen=True)
class Packing:
    """A constant operand in the layout a kernel wants: ``apply`` runs once, when a model is compiled."""

    spec: TensorSpec
    """Shape and dtype after packing."""
    apply: Callable[[np.ndarray], np.ndarray]


class ScheduleTemplate(ABC):
    """How to compute one operator on one kind of target.

    Stateless. ``space`` and ``default`` depend only on the workload and the target's limits, never on the host.
    """

    op: ClassVar[str]
    """Name of the operator it schedules."""
    kind: ClassVar[str]
    """``"cpu"`` or ``"cuda"``."""

    def reference_name(self) -> str:
        """``module:Class``, by which a worker process finds this template again."""
        return f"{type(self).__module__}:{type(self).__qualname__}"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Whether it schedules this variant (dtype, options) with the instructions ``target`` has."""
        return True

    @abstractmethod
    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Every legal config, derived from the target's limits."""

    @abstractmethod
    def default(self, workload: Workload, target: Target) -> Config:
        """A good config with no measurement; a member of :meth:`space`."""

    @abstractmethod
    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """An ``IRModule`` whose ``main`` takes the operands in order (packed ones in their packing) and the results."""

    def pack(self, workload: Workload, target: Target) -> Mapping[str, Packing]:
        """Layouts of constant operands, by name; unnamed operands stay as they are.

        The same for every config, so that kernels of many shapes share one copy of a weight.
        """
        return {}

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """What a cost model learns from: the knobs, and quantities derived from them and the target's limits.

        The same names for every config of one template. The base class gives numeric knobs; templates add footprints
        per cache level, registers in use and arithmetic intensity.
        """
        return {name: float(value) for name, value in config.items() if not isinstance(value, str)}
