"""The oracle of a whole model: its calls, one after another, by the operators' float64 NumPy references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from attntune.errors import InputError
from attntune.models.model import bind, updated_in_place

if TYPE_CHECKING:
    from attntune.models.model import Model


def evaluate(model: Model, inputs: Mapping[str, np.ndarray], entry: str = "forward") -> dict[str, np.ndarray]:
    """Outputs of ``entry`` in float64, by name.

    Slow (no blocking, float64 throughout) and independent of every engine and compiler.

    Raises:
        InputError: an input is missing, or axes of the same name differ in length.
    """
    spec = model.entries[entry]
    dims: dict[str, int] = {}
    for tensor in spec.inputs:
        if tensor.name not in inputs:
            raise InputError(f"expected inputs {[t.name for t in spec.inputs]}, got {sorted(inputs)}")
        shape = inputs[tensor.name].shape
        if len(shape) != len(tensor.dims):
            raise InputError(f"{tensor.name}: expected axes {tensor.dims}, got shape {shape}")
        for dim, extent in zip(tensor.dims, shape, strict=True):
            if isinstance(dim, str) and dims.setdefault(dim, extent) != extent:
                raise InputError(f"{tensor.name}: expected {dim}={dims[dim]}, got shape {shape}")
    values: dict[str, np.ndarray] = {**model.weights, **inputs}
    constants = frozenset(model.weights)
    for call in model.calls(entry):
        workload = call.workload(dims, constants)
        operands = [
            np.asarray(values[name]).reshape(operand.shape)
            for name, operand in zip(call.args, workload.inputs(), strict=True)
        ]
        for name, shape, result in zip(call.results, call.result_shapes, workload.reference(*operands), strict=True):
            values[name] = result.reshape(bind(shape, dims))
    found = {tensor.name: values[tensor.name] for tensor in spec.outputs}
    for name, last in updated_in_place(model.calls(entry), spec, constants).items():
        found[next_name(name)] = values[last]
    return found


def next_name(name: str) -> str:
    """What a functional twin calls the output that takes the place of an input updated in place."""
    return f"next_{name}"


def sample_inputs(
    model: Model, dims: Mapping[str, int], *, entry: str = "forward", mask: str = "full", seed: int = 0
) -> dict[str, np.ndarray]:
    """Seeded inputs of one shape.

    Args:
        model: whose entry the inputs are for.
        dims: value of each symbolic axis.
        entry: which of the model's entries.
        mask: ``"full"``: every position attends; ``"ragged"``: rows end at different lengths, the last row always
            shorter than ``seq``; ``"empty_row"``: ragged, and the first row attends to nothing at all.
        seed: of the token ids (integers below each input's ``upper``) and of the lengths.
    """
    rng = np.random.default_rng(seed)
    inputs: dict[str, np.ndarray] = {}
    for tensor in model.entries[entry].inputs:
        shape = bind(tensor.dims, dims)
        if "mask" in tensor.name:
            inputs[tensor.name] = _mask(shape, mask, rng).astype(tensor.dtype)
        elif tensor.name == "lengths" and "attention_mask" in inputs:
            inputs[tensor.name] = inputs["attention_mask"].sum(axis=1).astype(tensor.dtype)
        elif tensor.name == "source_lengths":
            rows = _mask((dims["batch"], dims["source"]), mask, rng)
            inputs[tensor.name] = rows.sum(axis=1).astype(tensor.dtype)
        elif tensor.dtype.startswith("int"):
            inputs[tensor.name] = rng.integers(0, tensor.upper or 1, shape, dtype=np.int64).astype(tensor.dtype)
        else:
            inputs[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
    return inputs


def _mask(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind not in ("full", "ragged", "empty_row"):
        raise InputError(f"unknown mask {kind!r}; expected 'full', 'ragged' or 'empty_row'")
    rows, length = shape
    if kind == "full":
        return np.ones(shape)
    lengths = rng.integers(1, length + 1, rows)
    lengths[-1] = max(1, length // 2)
    if kind == "empty_row":
        lengths[0] = 0
    return (np.arange(length)[None, :] < lengths[:, None]).astype(np.float64)
