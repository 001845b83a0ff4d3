"""Values of 8 bits: a weight with one scale an output feature, and x quantised by groups of a row as kernels run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

#: Largest magnitude of a quantised value; -128 is not used, so that the range is symmetric.
INT8_MAX = 127
#: Consecutive values of a row of x that share one scale where the weight is int8.
INT8_GROUP = 64


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float weight (out_features, in_features) as int8 of the same shape and scales (out_features,) float32."""
    values = np.asarray(weight, np.float32)
    scale = np.maximum(np.abs(values).max(axis=1), np.float32(1e-30)) / np.float32(INT8_MAX)
    return np.rint(values / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def dequantized(x: np.ndarray, group: int) -> np.ndarray:
    """X (rows, in_features) after symmetric int8 quantisation by groups of so many values, in float64."""
    rows, width = x.shape
    groups = np.zeros((rows, math.ceil(width / group), group), np.float32)
    groups.reshape(rows, -1)[:, :width] = x
    top = np.abs(groups).max(axis=2, keepdims=True)
    quantized = np.rint(groups * (np.float32(INT8_MAX) / np.maximum(top, np.float32(1e-30))))
    values = quantized.astype(np.float64) * np.asarray(top * np.float32(1.0 / INT8_MAX), np.float64)
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :width])


def rounded(x: Any, group: int) -> Any:
    """Tensor ``rounded`` (rows, in_features) float32: what x of that shape is worth once it is quantised."""
    from tvm import te

    quantized, step = _by_group(x, group)

    def value(i: Any, k: Any) -> Any:
        return quantized[i, k // group, k % group].astype("float32") * step[i, k // group]

    return te.compute(tuple(map(int, x.shape)), value, name="rounded")


def sums_by_group(x: Any, weight: Any, group: int) -> Any:
    """Tensor ``matmul`` (rows, weight_rows) float32: x quantised, times an int8 weight, as integers within a group.

    Args:
        x: (rows, in_features).
        weight: (weight_rows, in_features).
        group: values of x that share a scale.
    """
    from tvm import te

    quantized, step = _by_group(x, group)
    rows, groups, _ = map(int, quantized.shape)
    columns, width = map(int, weight.shape)
    k = te.reduce_axis((0, group), name="k")

    def product(i: Any, j: Any, g: Any) -> Any:
        column = _inside(g, k, weight[j, g * group + k].astype("int32"), group, width)
        return te.sum(quantized[i, g, k].astype("int32") * column, axis=k)

    exact = te.compute((rows, columns, groups), product, name="exact")
    g = te.reduce_axis((0, groups), name="g")
    return te.compute(
        (rows, columns), lambda i, j: te.sum(exact[i, j, g].astype("float32") * step[i, g], axis=g), name="matmul"
    )


def _by_group(x: Any, group: int) -> tuple[Any, Any]:
    """X as integers (rows, groups, group) int8, and what a unit of each group is worth (rows, groups) float32."""
    from tvm import te, tirx

    rows, width = map(int, x.shape)

    def element(i: Any, g: Any, k: Any) -> Any:
        return _inside(g, k, x[i, g * group + k].astype("float32"), group, width)

    limit, tiny = tirx.const(float(INT8_MAX), "float32"), tirx.const(1e-30, "float32")
    shape = (rows, math.ceil(width / group))
    within = te.reduce_axis((0, group), name="k_max")
    top = te.compute(shape, lambda i, g: te.max(tirx.abs(element(i, g, within)), axis=within), name="top")
    quantized = te.compute(
        (*shape, group),
        lambda i, g, k: tirx.nearbyint(element(i, g, k) * (limit / te.max(top[i, g], tiny))).astype("int8"),
        name="quantized",
    )
    step = te.compute(shape, lambda i, g: top[i, g] * tirx.const(1.0 / INT8_MAX, "float32"), name="step")
    return quantized, step


def _inside(g: Any, k: Any, value: Any, group: int, width: int) -> Any:
    """``value`` of element ``k`` of group ``g`` of a row so wide; 0 past the end of the last group."""
    from tvm import tirx

    if width % group == 0:
        return value
    return tirx.if_then_else(g * group + k < width, value, tirx.const(0, value.ty.dtype))
