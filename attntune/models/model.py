"""A model: a Relax module of attntune's operator calls with symbolic dimensions, its weights, and its entry points."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import ModelError
from attntune.models.operators import PREFIX
from attntune.models.precision import retyped
from attntune.models.shapes import Shape, by_name, of_entry
from attntune.ops import TensorSpec, Workload, operator

Dim = int | str


@dataclass(frozen=True)
class InputSpec:
    """An input or output of an entry point; symbolic dimensions are names such as ``batch`` and ``seq``."""

    name: str
    dims: tuple[Dim, ...]
    dtype: str
    optional: bool = False
    """Whether a caller may leave it out; ``fill`` is used then."""
    upper: int | None = None
    """Integers must lie in [0, upper)."""
    fill: int = 0
    carried: bool = False
    """Made by :meth:`TunedModel.state` or an entry's call, for later calls: it has a compiled shape, padding included,
    and follows the model's precision."""


@dataclass(frozen=True)
class Entry:
    """One callable function of a model, such as ``forward``."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    updates: Mapping[str, str] = field(default_factory=dict)
    """Inputs that hold what a sequence of calls has come to: name → the output that takes its place in the next call;
    a cache that is updated in place maps to itself and is no output."""
    on_request: bool = False
    """Compiled only when asked for by name."""
    ragged: str = ""
    """The entry that computes the same without the padding, which ``attention_mask`` shows at the right: it takes the
    same inputs, then ``lengths`` (batch,) int32; rows past them are zero in its outputs. The runtime goes to it by
    itself where it is compiled."""

    def dims(self) -> tuple[str, ...]:
        """Names of the symbolic dimensions of its inputs, in order of appearance."""
        return tuple(dict.fromkeys(dim for spec in self.inputs for dim in spec.dims if isinstance(dim, str)))


@dataclass(frozen=True)
class Generation:
    """How a model that writes one token after another begins and ends; token ids."""

    kind: str
    """``"decoder"``: entries prefill and decode; ``"encoder-decoder"``: encode before them; ``"rnn"``: encode, then
    decode with states that are replaced at every call."""
    start: tuple[int, ...] = ()
    """Tokens the decoder's side begins with; before the prompt in a decoder."""
    stop: tuple[int, ...] = ()
    max_length: int = 0
    """Tokens a sequence may have, prompt included; 0: no limit but the cache's."""
    suppress: tuple[int, ...] = ()
    """Tokens that are never generated."""
    suppress_first: tuple[int, ...] = ()
    """Tokens that are not generated first; Whisper's keep a transcript from being blank."""
    renormalize: bool = False
    """Whether the probability of tokens that are not generated goes to the others; it matters to beam search, which
    multiplies probabilities."""
    beams: int = 1
    """Of the beam search that its authors decode by; 1: none."""
    length_penalty: float = 1.0
    """Of that search."""


@dataclass(frozen=True)
class OpCall:
    """One operator call of a model, in execution order; names refer to inputs, weights or earlier results."""

    op: str
    attrs: Mapping[str, Any]
    args: tuple[str, ...]
    arg_shapes: tuple[tuple[Dim, ...], ...]
    arg_dtypes: tuple[str, ...]
    results: tuple[str, ...]
    result_shapes: tuple[tuple[Dim, ...], ...]
    result_dtypes: tuple[str, ...]

    @property
    def result(self) -> str:
        """The first result's name; of most operators the only one."""
        return self.results[0]

    @property
    def result_shape(self) -> tuple[Dim, ...]:
        """The first result's shape."""
        return self.result_shapes[0]

    @property
    def result_dtype(self) -> str:
        """The first result's dtype."""
        return self.result_dtypes[0]

    def workload(self, dims: Mapping[str, int], constants: frozenset[str] = frozenset()) -> Workload:
        """The workload of this call with symbolic dimensions bound."""
        specs = [
            TensorSpec(name, bind(shape, dims), dtype, constant=name in constants)
            for name, shape, dtype in zip(self.args, self.arg_shapes, self.arg_dtypes, strict=True)
        ]
        return operator(self.op).from_call(self.attrs, specs)


def bind(shape: Sequence[Dim], dims: Mapping[str, int]) -> tuple[int, ...]:
    """A concrete shape; raises :class:`ModelError` naming the dimension that has no value."""
    try:
        return tuple(dims[dim] if isinstance(dim, str) else dim for dim in shape)
    except KeyError as error:
        raise ModelError(f"expected a value for dimension {error}, got {dict(dims)}") from None


@dataclass
class Model:
    """A model that can be tuned, compiled, exported and compared."""

    name: str
    family: str
    config: Mapping[str, Any]
    weights: dict[str, np.ndarray]
    entries: Mapping[str, Entry]
    make_module: Callable[[], Any] = field(repr=False)
    """Builds the ``tvm.relax.frontend.nn.Module`` whose methods are the entry points."""
    max_lengths: Mapping[str, int] = field(default_factory=dict)
    """Largest value of a symbolic dimension, e.g. the number of position embeddings."""
    directory: Path | None = None
    """Where it was read from, and where its tokenizer is."""
    precision: str = "float32"
    """What it computes in; see :mod:`attntune.models.precision`."""
    bits: Mapping[str, int] = field(default_factory=dict)
    """Bits by name of weights that their file holds quantised, so many that int4 finds what it holds again; at int4 and
    w4a8, of every weight that is quantised."""
    default_dims: Mapping[str, int] = field(default_factory=dict)
    """Values of symbolic dimensions where a shape leaves them out, such as the capacity ``context`` of a cache."""
    shapes: tuple[Mapping[str, int], ...] = ()
    """What is compiled when no shapes are asked for; empty: batches 1, 2, 4 and 8 by lengths up to the longest."""
    generation: Generation | None = None
    """For models that write one token after another."""
    prompts: tuple[int, ...] = (1,)
    """Of an encoder-decoder with a cache: how many tokens of its target are read at once, where a shape does not say
    so but gives the ``target``'s length."""
    vocabulary: Mapping[str, Any] | None = None
    """Symbols of a model without a tokenizer, as :class:`attntune.runtime.vocabulary.Vocabulary` reads them."""
    tokenizer: str | None = None
    """``tokenizer.json``, where the loader made it from a vocabulary of another kind."""

    def entry(self, name: str) -> Entry:
        """The entry point called ``name``; raises :class:`ModelError` naming those there are."""
        try:
            return self.entries[name]
        except KeyError:
            raise ModelError(f"{self.name} has no entry {name!r}; expected one of {sorted(self.entries)}") from None

    @cached_property
    def _exported(self) -> tuple[Any, list[str]]:
        from tvm.relax.frontend import nn

        made = self.make_module()
        # Inputs by position, so that their names need not be those of a Python function's parameters.
        spec = {
            name: nn.spec.MethodSpec(
                getattr(made, name),
                [s.name.replace(".", "_") for s in entry.inputs],
                [nn.spec.Tensor(list(s.dims), s.dtype) for s in entry.inputs],
                param_mode="plain",
                effect_mode="plain",
            )
            for name, entry in self.entries.items()
        }
        module, parameters = made.export_tvm(spec)
        names = [name for name, _ in parameters]
        if missing := set(names) - set(self.weights):
            raise ModelError(f"{self.name}: weights lack {sorted(missing)}")
        for name, parameter in parameters:
            shape = tuple(int(dim) for dim in parameter.shape)
            if self.weights[name].shape != shape:
                raise ModelError(f"{self.name}: weight {name} is {self.weights[name].shape}, expected {shape}")
        return module, names

    def ir_module(self) -> Any:
        """The Relax ``IRModule``: one function per entry, inputs then weights as parameters, symbolic dimensions."""
        return self._exported[0]

    def calls(self, entry: str = "forward") -> tuple[OpCall, ...]:
        """The operator calls of ``entry`` in execution order, raised from the Relax function."""
        self.entry(entry)
        cache: dict[str, tuple[OpCall, ...]] = self.__dict__.setdefault("_calls", {})
        if entry not in cache:
            module, names = self._exported
            outputs = [spec.name for spec in self.entries[entry].outputs]
            calls = _raise_calls(module[entry], [s.name for s in self.entries[entry].inputs] + names, outputs)
            if self.precision != "float32":
                wide = [spec.name for spec in self.entries[entry].outputs if spec.dtype == "float32"]
                given = [s.name for s in self.entries[entry].inputs if s.dtype == "float32" and not s.carried]
                calls = retyped(calls, self.precision, wide, self.weights, given, self.bits)
            cache[entry] = calls
        return cache[entry]

    def weight_names(self, entry: str = "forward") -> tuple[str, ...]:
        """Weights that ``entry`` reads, in order of first use."""
        used = dict.fromkeys(arg for call in self.calls(entry) for arg in call.args if arg in self.weights)
        return tuple(used)

    def updated(self, entry: str) -> dict[str, str]:
        """Inputs that ``entry`` updates in place → the last result that stands for them."""
        return updated_in_place(self.calls(entry), self.entry(entry), frozenset(self.weights))

    def workloads(self, shapes: Sequence[Mapping[str, int]], entry: str = "forward") -> dict[Workload, int]:
        """Workload → how many of its calls one run at each of ``shapes`` makes, in execution order."""
        constants = frozenset(self.weights)
        counts: Counter[Workload] = Counter()
        for dims in self.entry_shapes(shapes, entry):
            counts.update(call.workload(dims, constants) for call in self.calls(entry))
        return dict(counts)

    def entry_shapes(self, shapes: Sequence[Mapping[str, int]], entry: str) -> list[dict[str, int]]:
        """The distinct values of the symbolic dimensions of ``entry`` among ``shapes``; :attr:`default_dims` fill gaps.

        A ``target`` stands for what the length of an encoder-decoder's target is to the entry, see
        :func:`attntune.models.shapes.of_entry`.

        Raises:
            ModelError: a dimension has no value, is not positive or longer than the model allows.
        """
        found: list[dict[str, int]] = []
        names = self.entry(entry).dims()
        for shape in shapes:
            self.check_dims(shape)
            for given in of_entry(shape, names, self.prompts):
                given = {**self.default_dims, **given}
                if missing := [name for name in names if name not in given]:
                    raise ModelError(
                        f"{self.name}: expected values for {missing} of entry {entry!r}, got {dict(shape)}"
                        + self._advice()
                    )
                dims = {name: given[name] for name in names}
                if dims not in found:
                    found.append(dims)
        return found

    def named_shape(self, shape: Shape) -> dict[str, int]:
        """A shape as users give it, (batch, seq), (batch, source, target) or by name, as sizes by name.

        Raises:
            ModelError: naming a dimension that no entry has, or one that is not positive or longer than allowed.
        """
        sizes = by_name(shape)
        known = dict.fromkeys(dim for entry in self.entries.values() for dim in entry.dims())
        if self._writes_a_target():
            known["target"] = None
        if unknown := [name for name in sizes if name not in known]:
            raise ModelError(
                f"{self.name} has no dimensions {unknown}: expected some of {list(known)}, got {sizes}" + self._advice()
            )
        self.check_dims(sizes)
        return sizes

    def _writes_a_target(self) -> bool:
        """Whether one sequence is made of another."""
        return "encode" in self.entries

    def _advice(self) -> str:
        """How to give both lengths of a model that has two."""
        if not self._writes_a_target():
            return ""
        if any("source" in entry.dims() for entry in self.entries.values()):
            return "; give batch x source length x target length, such as 1x32x16"
        return "; give the batch and the target's length, such as batch=1xtarget=16"

    def check_dims(self, dims: Mapping[str, int]) -> None:
        """Raise :class:`ModelError` when a dimension is not positive or longer than the model allows."""
        limits = dict(self.max_lengths)
        if self.generation is not None and (longest := limits.get("context") or self.generation.max_length):
            limits["target"] = longest
        for name, value in dims.items():
            limit = limits.get(name)
            if value < 1 or (limit is not None and value > limit):
                allowed = f"between 1 and {limit}" if limit is not None else "of at least 1"
                advice = "" if {"source", "target"} & set(dims) else self._advice()
                raise ModelError(f"{self.name}: expected {name} {allowed}, got {value}{advice}")


def _raise_calls(function: Any, parameter_names: list[str], outputs: list[str]) -> tuple[OpCall, ...]:
    from tvm import relax

    names: dict[Any, Any] = dict(zip(function.params, parameter_names, strict=True))
    calls: list[OpCall] = []
    taken = set(parameter_names)
    returned = function.body.body
    final = list(returned.fields) if isinstance(returned, relax.Tuple) else [returned]

    def unused(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    for block in function.body.blocks:
        for binding in block.bindings:
            var, value = binding.var, binding.value
            if isinstance(value, relax.Var):
                names[var] = names[value]
                continue
            if isinstance(value, relax.TupleGetItem):
                names[var] = names[value.tuple_value][int(value.index)]
                continue
            if isinstance(value, relax.Tuple):
                final = list(value.fields) if len(final) == 1 and final[0].same_as(var) else final
                continue
            symbol = value.args[0] if isinstance(value, relax.Call) and value.args else None
            if not isinstance(symbol, relax.ExternFunc) or not str(symbol.global_symbol).startswith(PREFIX):
                raise ModelError(f"expected only attntune operator calls in a model, got {value}")
            *tensors, attrs = list(value.args)[1:]
            several = isinstance(var.ty, relax.TupleType)
            types = list(var.ty.fields) if several else [var.ty]
            results = tuple(unused(f"{var.name}_{i}" if several else str(var.name)) for i in range(len(types)))
            names[var] = results if several else results[0]
            calls.append(
                OpCall(
                    op=str(symbol.global_symbol).removeprefix(PREFIX),
                    attrs=json.loads(attrs.value),
                    args=tuple(names[tensor] for tensor in tensors),
                    arg_shapes=tuple(_dims(tensor.ty) for tensor in tensors),
                    arg_dtypes=tuple(str(tensor.ty.dtype) for tensor in tensors),
                    results=results,
                    result_shapes=tuple(map(_dims, types)),
                    result_dtypes=tuple(str(type_.dtype) for type_ in types),
                )
            )
    renamed = {names[var]: output for var, output in zip(final, outputs, strict=True)}

    def rename(found: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(renamed.get(name, name) for name in found)

    return tuple(replace(call, args=rename(call.args), results=rename(call.results)) for call in calls)


def updated_in_place(calls: Sequence[OpCall], entry: Entry, constants: frozenset[str]) -> dict[str, str]:
    """Inputs of ``entry`` that ``calls`` update in place → the last result that stands for them."""
    ones = dict.fromkeys(entry.dims(), 1)
    origin = {spec.name: spec.name for spec in entry.inputs}
    last: dict[str, str] = {}
    for call in calls:
        workload = call.workload(ones, constants)
        if not workload.updated:
            continue
        args = dict(zip((spec.name for spec in workload.inputs()), call.args, strict=True))
        for name, result in zip(workload.updated, call.results[-len(workload.updated) :], strict=True):
            if args[name] in origin:
                origin[result] = origin[args[name]]
                last[origin[result]] = result
    return last


def _dims(type_: Any) -> tuple[Dim, ...]:
    return tuple(int(d) if hasattr(d, "value") else str(d.name) for d in type_.shape)
