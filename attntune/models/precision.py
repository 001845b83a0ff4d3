"""A float32 model at a lower precision: its operator calls retyped, its weights converted."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from attntune.errors import ModelError, PrecisionWarning
from attntune.models import int4
from attntune.ops.int8 import quantize_weight
from attntune.ops.workload import as_dtype
from attntune.target import Target

if TYPE_CHECKING:
    from attntune.models.model import InputSpec, Model, OpCall

PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int8_float32", "int4", "w4a8")

#: Operators that can write float32 from operands of 16 bits, as a model's outputs are.
_WIDENING = ("add_positions", "embedding", "layer_norm", "linear", "mean_pool", "rms_norm", "select_rows")
#: Operators whose last two operands, where they have a ``style``, are cosines and sines: float32 at any precision.
_ROTATING = ("rope", "kv_append")
_SCALE = ":scale"
#: What CPUs need for it, those of :data:`_WIDE` with vectors of 512 bits.
_NEEDED = {
    "bfloat16": ("avx512bf16",), "int8": ("avx512bf16", "avx512vnni"), "int8_float32": ("avx2",), "w4a8": ("avx2",),
}  # fmt: skip
_WIDE = ("bfloat16", "int8")
#: What CPUs without it run, if they can, in place of float32.
_INSTEAD = {"int8": "int8_float32", "w4a8": "int4"}
#: Weights of linear layers in 8 bits, a scale an output feature.
_INT8 = ("int8", "int8_float32")
#: Precisions that are float32 but for linear layers and embeddings, whose weights are quantised by groups.
_BY_GROUPS = ("int4", "w4a8")
_FLOAT32_BETWEEN = ("float32", "int8_float32", *_BY_GROUPS)
#: Operators without kernels that multiply 16 bits.
_FLOAT32_ONLY = ("additive_attention", "gru_sequence", "lstm_sequence")


def supported(precision: str, target: Target) -> tuple[str, str]:
    """The precision that ``target`` can run in place of the one asked for, and why (empty when it is that one).

    On CPUs bfloat16 needs AVX512-BF16; int8 needs that and AVX512-VNNI, for everything but its linear layers is
    bfloat16, and is int8_float32 elsewhere, which needs AVX2; int4 is float32 but for the weights, and needs nothing;
    w4a8 is that where there is no AVX2; nothing multiplies float16. On CUDA, bfloat16 and float16 are what tensor cores
    multiply, and quantised weights have no kernels.

    Raises:
        ModelError: the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ModelError(f"unknown precision {precision!r}; expected one of {PRECISIONS}")
    if target.kind == "cuda":
        if precision in (*_INT8, *_BY_GROUPS):
            return "bfloat16", f"no CUDA template multiplies quantised weights: bfloat16 instead of {precision}"
        return precision, ""
    if precision == "float16":
        return "float32", f"no template multiplies float16 on {target.name}: float32 instead of float16"
    missing = [feature for feature in _NEEDED.get(precision, ()) if not target.has(feature)]
    if missing or (precision in _WIDE and target.vector_bits < 512):
        instead, _ = supported(_INSTEAD.get(precision, "float32"), target)
        lacks = ", ".join(missing or ["512-bit vectors"])
        return instead, f"{target.name} lacks {lacks}: {instead} instead of {precision}"
    return precision, ""


def fitting(
    precision: str, target: Target, tell: Callable[[str], None] | None = None, model: Model | None = None
) -> str:
    """The precision that ``target`` runs in place of the one asked for, see :func:`supported`.

    Where it is another, ``tell`` is called with the reason, or a :class:`PrecisionWarning` says it.

    Args:
        precision: that was asked for.
        target: that is compiled or tuned for.
        tell: called with a line.
        model: some have operators that compute float32 only, such as recurrent layers.

    Raises:
        ModelError: the precision is unknown.
    """
    found, reason = supported(precision, target)
    if model is not None and found not in _FLOAT32_BETWEEN:
        called = {call.op for entry in model.entries for call in model.calls(entry)}
        if only := sorted(called & set(_FLOAT32_ONLY)):
            found, _ = supported(_INSTEAD.get(precision, "float32"), target)
            reason = f"{model.name}: {', '.join(only)} compute float32 only: {found} instead of {precision}"
    if reason and tell is not None:
        tell(reason)
    elif reason:
        warnings.warn(reason, PrecisionWarning, stacklevel=3)
    return found


def at_precision(model: Model, precision: str) -> Model:
    """``model`` with the same entries, inputs and float32 outputs, computed at ``precision``.

    ``bfloat16`` and ``float16``: weights and what operators hand on are of that dtype; sums, softmax and normalisation
    stay float32.
    ``int8``: the same, and weights of linear layers are int8 with one scale an output feature, multiplied with
    activations that the kernels quantise, 64 values of a row at a time.
    ``int8_float32``: these linear layers, and float32 elsewhere.
    ``int4``: float32, but for the weights of linear layers, of 4 bits with a scale and a minimum for 32 values of a
    row, and 8 bits where rounding costs more and for embeddings (:mod:`attntune.models.int4`). What a GGUF file holds
    as Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 is kept exactly.
    ``w4a8``: the same weights, multiplied with activations that the kernels quantise to 8 bits, 32 values at a time.
    """
    if precision == model.precision:
        return model
    if model.precision != "float32":
        raise ModelError(f"expected a float32 model to convert to {precision}, got one at {model.precision}")
    if precision not in PRECISIONS:
        raise ModelError(f"unknown precision {precision!r}; expected one of {PRECISIONS}")
    if precision in _BY_GROUPS:
        bits = int4.bits_of_weights(model)
        return dataclasses.replace(model, precision=precision, weights=int4.converted(model, bits), bits=bits)
    return dataclasses.replace(
        model,
        precision=precision,
        weights=_weights(model, precision),
        entries={
            name: dataclasses.replace(
                entry, inputs=_narrowed(entry.inputs, precision), outputs=_narrowed(entry.outputs, precision)
            )
            for name, entry in model.entries.items()
        },
    )


def _float(precision: str) -> str:
    """The float dtype that operators hand on at a precision other than float32."""
    return {"float16": "float16", "int8_float32": "float32"}.get(precision, "bfloat16")


def _narrowed(specs: tuple[InputSpec, ...], precision: str) -> tuple[InputSpec, ...]:
    """What is carried from call to call has the precision's own dtype."""
    return tuple(
        dataclasses.replace(spec, dtype=_float(precision)) if spec.carried and spec.dtype == "float32" else spec
        for spec in specs
    )


def retyped(
    calls: Sequence[OpCall],
    precision: str,
    outputs: Sequence[str],
    weights: Mapping[str, object],
    inputs: Sequence[str] = (),
    bits: Mapping[str, int] | None = None,
) -> tuple[OpCall, ...]:
    """Operator calls of a float32 entry at ``precision``; ``inputs`` are float32 still, and ``outputs`` made so.

    At int4 and w4a8, ``bits`` says which weights are quantised.

    Raises:
        ModelError: naming an operator that makes an output and cannot write float32 from 16 bits.
    """
    if precision in _BY_GROUPS:
        activations = "int8" if precision == "w4a8" else ""
        return tuple(int4.retyped(call, bits or {}, activations) for call in calls)
    read = {arg for call in calls for arg in call.args}
    found = []
    for call in calls:
        retyped_call = _retyped(call, precision, call.result in outputs, call.result in read, weights)
        found.append(_reading(retyped_call, call, inputs))
    return tuple(found)


def _reading(call: OpCall, before: OpCall, inputs: Sequence[str]) -> OpCall:
    """``call`` with those of its arguments that are ``inputs`` as they were ``before``."""
    kept = dict(zip(before.args, before.arg_dtypes, strict=True))
    dtypes = tuple(kept[arg] if arg in inputs else dtype for arg, dtype in zip(call.args, call.arg_dtypes, strict=True))
    if dtypes == call.arg_dtypes:
        return call
    return dataclasses.replace(call, arg_dtypes=dtypes, attrs={**call.attrs, "out_dtype": call.result_dtype})


def _retyped(call: OpCall, precision: str, is_output: bool, is_read: bool, weights: Mapping[str, object]) -> OpCall:
    exact, narrow = _exact(call), _float(precision)
    widens = is_output and narrow != "float32"
    if widens and (call.op not in _WIDENING or is_read):
        raise ModelError(
            f"{precision}: expected output {call.result!r} to be made by one of {_WIDENING} and read by no other "
            f"operator, got {call.op!r}"
        )
    dtypes = [
        narrow if dtype == "float32" and name not in exact else dtype
        for name, dtype in zip(call.args, call.arg_dtypes, strict=True)
    ]
    args, shapes, attrs = list(call.args), list(call.arg_shapes), dict(call.attrs)
    if _quantizes(call, precision, weights):
        dtypes[1] = "int8"
        args.insert(2, args[1] + _SCALE)
        shapes.insert(2, shapes[1][:1])
        dtypes.insert(2, "float32")
    if widens:
        attrs["out_dtype"] = "float32"
    first, *others = call.result_dtypes
    if first == "float32" and not is_output:
        first = narrow
    if call.op == "kv_append":
        others = [narrow] * len(others)
    return dataclasses.replace(
        call, args=tuple(args), arg_shapes=tuple(shapes), arg_dtypes=tuple(dtypes), attrs=attrs,
        result_dtypes=(first, *others),
    )  # fmt: skip


def _exact(call: OpCall) -> frozenset[str]:
    """Operands that stay float32."""
    return frozenset(call.args[-2:] if call.op in _ROTATING and call.attrs.get("style") else ())


def _quantizes(call: OpCall, precision: str, weights: Mapping[str, object]) -> bool:
    return precision in _INT8 and call.op == "linear" and call.args[1] in weights


def _weights(model: Model, precision: str) -> dict[str, np.ndarray]:
    quantized = {
        call.args[1] for entry in model.entries for call in model.calls(entry)
        if _quantizes(call, precision, model.weights)
    }  # fmt: skip
    exact = {name for entry in model.entries for call in model.calls(entry) for name in _exact(call)}
    converted: dict[str, np.ndarray] = {}
    for name, values in model.weights.items():
        if name in quantized:
            converted[name], converted[name + _SCALE] = quantize_weight(values)
        else:
            narrows = values.dtype == np.float32 and name not in exact
            converted[name] = as_dtype(values, _float(precision)) if narrows else values
    return converted
