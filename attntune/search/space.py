"""Knobs, configs and the space of legal ones. Knows nothing of TVM."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from attntune.errors import ConfigError

Value = int | str | bool


@dataclass(frozen=True)
class Config(Mapping[str, Value]):
    """One choice of every knob; an immutable, hashable mapping."""

    items_: tuple[tuple[str, Value], ...]

    @classmethod
    def of(cls, **knobs: Value) -> Config:
        """``Config.of(rows=8, columns=32)``; knobs are kept sorted by name."""
        return cls(tuple(sorted(knobs.items())))

    @classmethod
    def from_json(cls, knobs: Mapping[str, Value]) -> Config:
        """From a plain mapping, as a record holds it."""
        return cls.of(**dict(knobs))

    def to_json(self) -> dict[str, Value]:
        """A plain dict, as a record holds it."""
        return dict(self.items_)

    def key(self) -> str:
        """Canonical JSON, for comparing and sorting."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    def replace(self, **knobs: Value) -> Config:
        """The same config with some knobs changed."""
        return Config.of(**{**self.to_json(), **knobs})

    @cached_property
    def _lookup(self) -> dict[str, Value]:
        return dict(self.items_)

    def __getitem__(self, name: str) -> Value:
        return self._lookup[name]

    def integer(self, name: str) -> int:
        """A knob known to be an integer."""
        value = self._lookup[name]
        if not isinstance(value, int):
            raise ConfigError(f"expected knob {name!r} to be an integer, got {value!r}")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._lookup)

    def __len__(self) -> int:
        return len(self.items_)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.items_)


@dataclass(frozen=True)
class Knob:
    """One tunable and the values it may take, in an order in which neighbours are alike."""

    name: str
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) != len(self.values):
            raise ConfigError(f"knob {self.name!r}: expected distinct values and at least one, got {self.values}")


Constraint = Callable[[Config], bool]


class ConfigSpace:
    """The legal configs: the product of the knobs less what a constraint forbids.

    Args:
        knobs: in a fixed order.
        constraints: predicates over a full config, each derived from a target's limits.
    """

    def __init__(self, knobs: Sequence[Knob], constraints: Sequence[Constraint] = ()) -> None:
        self.knobs = tuple(knobs)
        self.constraints = tuple(constraints)
        names = [knob.name for knob in self.knobs]
        if len(set(names)) != len(names):
            raise ConfigError(f"expected distinct knob names, got {names}")

    @cached_property
    def configs(self) -> tuple[Config, ...]:
        """Every legal config, in a fixed order."""
        products = itertools.product(*(knob.values for knob in self.knobs))
        names = [knob.name for knob in self.knobs]
        every = (Config.of(**dict(zip(names, values, strict=True))) for values in products)
        legal = tuple(config for config in every if self._allowed(config))
        if not legal:
            raise ConfigError(f"no legal config: the constraints forbid every combination of knobs {names}")
        return legal

    def _allowed(self, config: Config) -> bool:
        return all(constraint(config) for constraint in self.constraints)

    @cached_property
    def _members(self) -> frozenset[Config]:
        return frozenset(self.configs)

    def __len__(self) -> int:
        return len(self.configs)

    def __iter__(self) -> Iterator[Config]:
        return iter(self.configs)

    def __contains__(self, config: object) -> bool:
        return config in self._members

    def check(self, config: Mapping[str, Any]) -> Config:
        """``config`` as a member of this space.

        Raises:
            ConfigError: naming the missing or unknown knob, the value out of range, or the constraint broken.
        """
        known = {knob.name: knob for knob in self.knobs}
        for name, value in config.items():
            if name not in known:
                raise ConfigError(f"unknown knob {name!r}; expected {sorted(known)}")
            # By type too: True == 1 and 8.0 == 8, but they are written differently in a record.
            if not any(value == allowed and type(value) is type(allowed) for allowed in known[name].values):
                raise ConfigError(f"knob {name!r}: expected one of {list(known[name].values)}, got {value!r}")
        if missing := set(known) - set(config):
            raise ConfigError(f"missing knobs {sorted(missing)}")
        checked = Config.of(**dict(config))
        if not self._allowed(checked):
            raise ConfigError(f"config {checked} is outside the target's limits")
        return checked

    def sample(self, rng: random.Random) -> Config:
        """One legal config, uniformly."""
        return rng.choice(self.configs)

    def neighbours(self, config: Config) -> tuple[Config, ...]:
        """Legal configs that differ in exactly one knob, nearest values first."""
        found = []
        for knob in self.knobs:
            at = knob.values.index(config[knob.name])
            distances = sorted((abs(i - at), i) for i in range(len(knob.values)) if i != at)
            found += [config.replace(**{knob.name: knob.values[i]}) for _, i in distances]
        return tuple(c for c in found if c in self._members)
