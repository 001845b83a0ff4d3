"""Records and a template to make tests of the database short; no compiler."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from attntune.database.record import Status, TuningRecord
from attntune.ops.workload import TensorSpec, Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import PRESETS
from attntune.templates.template import ScheduleTemplate

ZNVER4 = PRESETS["znver4"].with_cores(2)


@dataclass(frozen=True)
class Scale(Workload):
    """y = factor · x."""

    op: ClassVar[str] = "scale"

    rows: int
    columns: int = 64
    factor: str = "two"
    dtype: str = "float32"

    def inputs(self):
        return (TensorSpec("x", (self.rows, self.columns), self.dtype),)

    def outputs(self):
        return (TensorSpec("y", (self.rows, self.columns), self.dtype),)

    def compute(self):
        raise NotImplementedError

    def reference(self, *inputs):
        return (np.asarray(inputs[0], np.float64) * 2,)

    def flops(self):
        return self.rows * self.columns

    @classmethod
    def from_call(cls, attrs, args):
        return cls(*args[0].shape)


class ScaleTemplate(ScheduleTemplate):
    """Tiles no larger than the number of rows."""

    op: ClassVar[str] = "scale"
    kind: ClassVar[str] = "cpu"

    def space(self, workload, target):
        return ConfigSpace([Knob("tile", tuple(t for t in (1, 2, 4, 8, 16, 32) if t <= workload.rows))])

    def default(self, workload, target):
        return Config.of(tile=min(8, workload.rows))

    def schedule(self, workload, target, config):
        raise NotImplementedError


TEMPLATE = ScaleTemplate()


def record(tile=1, secs=(1.0,), *, workload=None, target=ZNVER4, status=Status.CORRECT, **fields):
    """A record of :class:`Scale` with `tile`; failed ones carry no samples."""
    made = TuningRecord(
        (workload or Scale(64)).key(), target.key(), TEMPLATE.reference_name(), Config.of(tile=tile), status,
        tuple(secs) if status is Status.CORRECT else (), machine={"target": target.to_json()},
        time="2026-01-01T00:00:00.000000+00:00",
    )  # fmt: skip
    return dataclasses.replace(made, **fields)
