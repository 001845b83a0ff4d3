"""Precisions ``int4`` and ``w4a8``: which weights are stored in 4 bits and which in 8, and the calls that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from attntune.errors import ModelError
from attntune.ops.grouped import GROUPED, WEIGHT_GROUP, quantize_groups

if TYPE_CHECKING:
    from attntune.models.model import Model, OpCall

_SCALE = ":scale"
_MINIMUM = ":minimum"
#: Operators whose second operand may be quantised by groups.
_READERS = ("linear", "embedding")
#: Operators whose queries, keys and values come of layers that stay at 8 bits.
_ATTENTION = ("attention", "rope", "kv_append")
_DTYPES = {bits: dtype for dtype, bits in GROUPED.items()}


def bits_of_weights(model: Model) -> dict[str, int]:
    """Bits by name of the weights that int4 quantises in a float32 model: those of linear layers and embeddings.

    What a file holds quantised keeps the bits that find it again (:attr:`Model.bits`). Of others 8 bits go to
    embeddings, to layers that make an output, such as a language model's logits, and to those whose result an attention
    reads: rounding costs most in values. (all-MiniLM-L6-v2, least cosine of embeddings with float32's: 0.961 with 4
    bits for all layers, 0.980 with 8 for queries, keys and values.)
    """
    bits: dict[str, int] = {}
    refused: set[str] = set()
    for name, entry in model.entries.items():
        calls = model.calls(name)
        wide = {spec.name for spec in entry.outputs}
        wide.update(arg for call in calls if call.op in _ATTENTION for arg in call.args)
        for call in calls:
            for at, arg in enumerate(call.args):
                if arg not in model.weights:
                    continue
                if call.op not in _READERS or at != 1:
                    refused.add(arg)
                    continue
                kept = 8 if call.op == "embedding" or call.result in wide else 4
                bits[arg] = max(bits.get(arg, 4), kept)
    return {name: model.bits.get(name, count) for name, count in bits.items() if name not in refused}


def converted(model: Model, bits: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The model's weights, those of ``bits`` quantised. A tied weight stays one array under its names.

    Raises:
        ModelError: naming a weight that cannot be quantised.
    """
    weights: dict[str, np.ndarray] = {}
    done: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}
    for name, values in model.weights.items():
        if name not in bits:
            weights[name] = values
            continue
        key = id(values), bits[name]
        if key not in done:
            try:
                done[key] = quantize_groups(values, bits[name])
            except ValueError as error:
                raise ModelError(f"int4: weight {name!r}: {error}") from None
        weights.update(zip((name, name + _SCALE, name + _MINIMUM), done[key], strict=True))
    return weights


def retyped(call: OpCall, bits: Mapping[str, int], activations: str) -> OpCall:
    """``call`` of a float32 entry, reading its weight as it is stored; of a linear layer x as ``activations``."""
    if call.op not in _READERS or call.args[1] not in bits:
        return call
    x, weight, *others = call.args
    x_shape, (rows, width), *other_shapes = call.arg_shapes
    x_dtype, _, *other_dtypes = call.arg_dtypes
    groups = (rows, -(-int(width) // WEIGHT_GROUP))
    quantised = {"x_dtype": activations} if activations and call.op == "linear" else {}
    return dataclasses.replace(
        call,
        args=(x, weight, weight + _SCALE, weight + _MINIMUM, *others),
        arg_shapes=(x_shape, (rows, width), groups, groups, *other_shapes),
        arg_dtypes=(x_dtype, "uint8", "float16", "float16", *other_dtypes),
        attrs={**call.attrs, "weight_dtype": _DTYPES[bits[weight]], **quantised},
    )
