"""A model as plain data, for processes that must not import the compiler: calls as JSON, weights as an npz file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attntune.errors import EngineError
from attntune.models.model import Entry, InputSpec, OpCall

if TYPE_CHECKING:
    from attntune.models.model import Model

_GRAPH, _WEIGHTS = "graph.json", "weights.npz"


@dataclass(frozen=True)
class ModelGraph:
    """The part of a :class:`~attntune.models.model.Model` that export and engines read; it can stand in for one."""

    name: str
    config: Mapping[str, Any]
    weights: dict[str, np.ndarray] = field(repr=False)
    entries: Mapping[str, Entry]
    entry_calls: Mapping[str, tuple[OpCall, ...]] = field(repr=False)

    @classmethod
    def of(cls, model: Model, *entries: str) -> ModelGraph:
        """The named entries of ``model`` (all, when none is named) with every weight they read."""
        names = entries or tuple(model.entries)
        calls = {name: tuple(model.calls(name)) for name in names}
        used = {arg for per_entry in calls.values() for call in per_entry for arg in call.args}
        weights = {name: value for name, value in model.weights.items() if name in used}
        return cls(model.name, dict(model.config), weights, {name: model.entries[name] for name in names}, calls)

    def calls(self, entry: str = "forward") -> tuple[OpCall, ...]:
        """The operator calls of ``entry`` in execution order."""
        return self.entry_calls[entry]

    def save(self, folder: Path) -> None:
        """Write ``graph.json`` and ``weights.npz`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        fields = {
            "name": self.name,
            "config": self.config,
            "entries": {name: asdict(entry) for name, entry in self.entries.items()},
            "calls": {name: [asdict(call) for call in calls] for name, calls in self.entry_calls.items()},
            "weight_dtypes": {name: value.dtype.name for name, value in self.weights.items()},
        }
        (folder / _GRAPH).write_text(json.dumps(fields, default=str))
        # npz has no bfloat16: bytes travel as integers and get their dtype back on loading.
        raw = {n: v.view(np.uint16) if v.dtype.name == "bfloat16" else v for n, v in self.weights.items()}
        np.savez(folder / _WEIGHTS, **raw)  # type: ignore[arg-type]  # keyword arrays, which numpy's stub mistakes

    @classmethod
    def load(cls, folder: str | Path) -> ModelGraph:
        """Inverse of :meth:`save`; raises :class:`EngineError` when the folder does not hold a graph."""
        folder = Path(folder)
        try:
            fields = json.loads((folder / _GRAPH).read_text())
            stored = dict(np.load(folder / _WEIGHTS))
        except (OSError, ValueError) as error:
            raise EngineError(f"expected {_GRAPH} and {_WEIGHTS} in {folder}: {error}") from error
        weights = {
            name: _bfloat16(value) if fields["weight_dtypes"][name] == "bfloat16" else value
            for name, value in stored.items()
        }
        entries = {name: _entry(entry) for name, entry in fields["entries"].items()}
        calls = {name: tuple(_call(call) for call in calls) for name, calls in fields["calls"].items()}
        return cls(fields["name"], fields["config"], weights, entries, calls)


def _bfloat16(raw: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return raw.view(ml_dtypes.bfloat16)


def _entry(fields: Mapping[str, Any]) -> Entry:
    def specs(rows: list[dict[str, Any]]) -> tuple[InputSpec, ...]:
        return tuple(InputSpec(**{**row, "dims": tuple(row["dims"])}) for row in rows)

    return Entry(specs(fields["inputs"]), specs(fields["outputs"]), dict(fields["updates"]), fields["on_request"])


def _call(fields: Mapping[str, Any]) -> OpCall:
    tuples = {name: tuple(fields[name]) for name in ("args", "arg_dtypes", "results", "result_dtypes")}
    shapes = {name: tuple(map(tuple, fields[name])) for name in ("arg_shapes", "result_shapes")}
    return OpCall(**{**fields, **tuples, **shapes})
