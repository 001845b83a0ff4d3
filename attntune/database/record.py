"""Everything that is known of one trial."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from attntune.errors import DatabaseError, WorkloadError
from attntune.ops import workload_from_key
from attntune.search.space import Config

SCHEMA_VERSION = 2


class Status(StrEnum):
    """How a trial ended. Only ``correct`` trials carry a time, and only they are dispatched."""

    CORRECT = "correct"
    WRONG_RESULT = "wrong_result"
    BUILD_ERROR = "build_error"
    RUN_ERROR = "run_error"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class TuningRecord:
    """One trial of one config of one workload on one target, failed ones too."""

    workload: str
    """:meth:`Workload.key`."""
    target: str
    """:meth:`Target.key`."""
    template: str
    """``module:Class`` of the schedule template."""
    config: Config
    status: Status
    run_secs: tuple[float, ...] = ()
    """Every sample, in seconds per call, in the order taken. Empty unless ``status`` is ``correct``."""
    cache: str = "hot"
    """``hot``: activations stay in cache between calls, weights do not; ``cold``: caches are flushed before each."""
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    rtol: float = 0.0
    atol: float = 0.0
    seed: int = 0
    """Of the operands it was validated with."""
    is_default: bool = False
    """Whether ``config`` is the template's default."""
    final: bool = False
    """Whether it was re-measured in turns with other correct configs; records of one such round share ``time``."""
    build_secs: float = 0.0
    resources: Mapping[str, Any] = field(default_factory=dict)
    """For CUDA, by kernel: registers, spilled bytes, shared memory, threads, blocks an SM holds. Empty for CPUs."""
    message: str = ""
    """Why it failed; empty when correct."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """CPU model, cores used, load average, governor, versions; see ``measure/machine.py``."""
    time: str = ""
    """UTC, ISO 8601."""
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.run_secs and self.status is not Status.CORRECT:
            raise DatabaseError(f"a {self.status} trial cannot carry times; got {len(self.run_secs)} samples")
        if self.status is Status.CORRECT and not self.run_secs:
            raise DatabaseError("a correct trial must carry at least one sample in run_secs")

    @property
    def median_secs(self) -> float:
        """Median seconds per call; infinity for failed trials."""
        return statistics.median(self.run_secs) if self.run_secs else math.inf

    @property
    def spread_secs(self) -> float:
        """Interquartile range of the samples, in seconds."""
        if len(self.run_secs) < 4:
            return max(self.run_secs, default=0.0) - min(self.run_secs, default=0.0)
        low, _, high = statistics.quantiles(self.run_secs, n=4)
        return high - low

    def to_json(self) -> dict[str, Any]:
        """JSON-ready fields."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if not self.resources:
            del fields["resources"]
        return {**fields, "config": self.config.to_json(), "status": str(self.status), "run_secs": list(self.run_secs),
                "machine": dict(self.machine)}  # fmt: skip

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TuningRecord:
        """Inverse of :meth:`to_json`.

        Raises:
            DatabaseError: naming the field that is missing, unknown or of the wrong type, or a newer schema.
        """
        if not isinstance(fields, Mapping):
            raise DatabaseError(f"expected a record to be a JSON object, got {type(fields).__name__}")
        schema = fields.get("schema")
        if not isinstance(schema, int) or schema > SCHEMA_VERSION:
            raise DatabaseError(f"expected a record of schema {SCHEMA_VERSION} or older, got schema {schema!r}")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(fields) - known:
            raise DatabaseError(f"unknown record fields {sorted(unknown)}")
        try:
            return cls(
                **{
                    **fields,
                    "workload": fields["workload"] if schema > 1 else _canonical(fields["workload"]),
                    "schema": SCHEMA_VERSION,
                    "config": Config.from_json(fields["config"]),
                    "status": Status(fields["status"]),
                    "run_secs": tuple(float(s) for s in fields.get("run_secs", ())),
                }
            )
        except KeyError as error:
            raise DatabaseError(f"record lacks the field {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise DatabaseError(f"malformed record: {error}") from None


def _canonical(key: str) -> str:
    """A workload's key as it is written today: those of schema 1 held every field, today's leave out defaults."""
    try:
        return workload_from_key(key).key()
    except WorkloadError:  # of an operator that is not in this version
        return key
