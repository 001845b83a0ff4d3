"""What a workload is: one operator with every shape, dtype and variant fixed.

A new operator is one file with one frozen dataclass deriving from :class:`Workload`, and one line in
``attntune/ops/__init__.py``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from attntune.errors import WorkloadError
from attntune.target import dtype_bits

W = TypeVar("W", bound="Workload")

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
INDEX_DTYPES = ("int32", "int64")

#: By dtype, (rtol, atol) of a kernel against its float64 reference.
TOLERANCES = {
    "float32": (2.0**-18, 2.0**-18),
    "bfloat16": (2.0**-8, 2.0**-11),
    "float16": (2.0**-10, 2.0**-13),
}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape, dtype of one operand.

    ``constant`` marks operands that are weights: known when a model is compiled, so a template may re-lay them out.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    constant: bool = False

    @property
    def bytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * dtype_bits(self.dtype) // 8


@dataclass(frozen=True)
class Workload(ABC):
    """One operator with every shape, dtype and variant fixed; hashable, and identified by :meth:`key`."""

    op: ClassVar[str]
    """Name in keys, records and the registry, e.g. ``linear``."""

    @abstractmethod
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Operands in call order."""

    @abstractmethod
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Results in call order."""

    @property
    def updated(self) -> tuple[str, ...]:
        """Inputs that the kernel updates in place, such as a cache; none by default.

        Such a kernel is called as ``main(*inputs, *fresh)``: its updated tensors come last in :meth:`outputs`, equal to
        the inputs of those names, and are not passed again. A second call with the same operands changes nothing more.
        """
        return ()

    @property
    def resident(self) -> tuple[str, ...]:
        """Inputs that a model keeps from call to call, each layer its own, beside its constants; none by default."""
        return ()

    def fresh(self) -> tuple[TensorSpec, ...]:
        """The outputs that the kernel is given memory for: all but the updated ones."""
        specs = self.outputs()
        return specs[: len(specs) - len(self.updated)]

    @abstractmethod
    def compute(self) -> list[Any]:
        """The tensor expression: ``te.Tensor`` placeholders in the order of :meth:`inputs`, then the results."""

    @abstractmethod
    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """NumPy in float64; the oracle every schedule is checked against."""

    def reference_sample(self, *inputs: np.ndarray) -> Iterator[tuple[tuple[Any, ...], tuple[np.ndarray, ...]]]:
        """Parts of :meth:`reference` that stand for the whole, where the whole would take long or not fit in memory.

        Yields pairs: for each output the index of a part, and the parts expected there. By default everything.
        """
        expected = self.reference(*inputs)
        yield (...,) * len(expected), expected

    @abstractmethod
    def flops(self) -> int:
        """Floating-point operations that the definition needs (a fused multiply-add is two)."""

    @classmethod
    @abstractmethod
    def from_call(cls: type[W], attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> W:
        """The workload of one call in a model, from its attributes and the concrete shapes of its arguments."""

    @property
    def compute_dtype(self) -> str:
        """What is multiplied; the machine's peak in this dtype bounds the workload's speed."""
        return str(getattr(self, "dtype", "float32"))

    def bytes_moved(self) -> int:
        """Bytes read and written when each operand crosses memory once."""
        return sum(spec.bytes for spec in (*self.inputs(), *self.outputs()))

    def tolerance(self) -> tuple[float, float]:
        """``(rtol, atol)`` against :meth:`reference`.

        In float32, 32 units of rounding. In bfloat16 and float16, operands are exact, arithmetic is float32, and the
        result is rounded once, by half a unit; a whole one is allowed, for a value that lies between two.
        """
        return TOLERANCES.get(getattr(self, "dtype", "float32"), (0.0, 0.0))

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Seeded operands with which every variant of the operator is exercised; operators with masks override it."""
        rng = np.random.default_rng(seed)
        return tuple(random_operand(rng, spec) for spec in self.inputs())

    def key(self) -> str:
        """Canonical JSON, sorted: operator and every field that is not at its default.

        With the target's key it identifies a record. Defaults are left out so that a field added later leaves the keys
        of all records before it as they are.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value != defaults[name]}
        return json.dumps({"op": self.op, **fields}, sort_keys=True, separators=(",", ":"))

    def replace(self: W, **fields: Any) -> W:
        """The same workload with some fields changed."""
        return dataclasses.replace(self, **fields)

    def __str__(self) -> str:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        shown = (f"{n}={v}" for n, v in dataclasses.asdict(self).items() if v != defaults[n])
        return f"{self.op}({', '.join(shown)})"


def example_lengths(rng: np.random.Generator, batch: int, longest: int) -> np.ndarray:
    """(batch,) int32: the first sequence full; with three or more, the last empty; the others of any length."""
    lengths = rng.integers(1, longest + 1, batch).astype(np.int32)
    lengths[0] = longest
    if batch >= 3:
        lengths[-1] = 0
    return lengths


def random_operand(rng: np.random.Generator, spec: TensorSpec) -> np.ndarray:
    """Standard normal floats (constants scaled by 1/√fan-in), zeros for integers."""
    if spec.dtype in INDEX_DTYPES:
        return np.zeros(spec.shape, spec.dtype)
    values = rng.standard_normal(spec.shape, dtype=np.float32)
    if spec.constant and len(spec.shape) > 1:
        values *= 1.0 / math.sqrt(spec.shape[-1])
    return as_dtype(values, spec.dtype)


def as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` in ``dtype``, bfloat16 included."""
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(dtype)


def require(condition: bool, message: str) -> None:
    """Raise :class:`WorkloadError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise WorkloadError(message)


def positive(op: str, **fields: int) -> None:
    """Raise :class:`WorkloadError` unless every field is a positive integer."""
    for name, value in fields.items():
        require(
            isinstance(value, int) and not isinstance(value, bool) and value > 0,
            f"{op}: expected {name} to be a positive integer, got {value!r}",
        )


def one_of(op: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise :class:`WorkloadError` unless ``value`` is one of ``allowed``."""
    require(value in allowed, f"{op}: expected {name} to be one of {list(allowed)}, got {value!r}")
