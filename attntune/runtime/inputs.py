"""What a caller passes, checked, and laid into the shape of the bucket that serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attntune.errors import InputError
from attntune.measure.buffers import numpy_dtype
from attntune.runtime.artifact import ALIGNMENT
from attntune.runtime.buckets import Bucket, Piece
from attntune.runtime.kernel_thread import device_tensors


def check_inputs(
    specs: list[Mapping[str, Any]], inputs: Mapping[str, Any], model: str, read: Callable[[Any, str], Any] | None = None
) -> tuple[list[Any], dict[str, int]]:
    """Inputs as arrays in the order of ``specs`` (None where left out), and the sizes of symbolic dimensions.

    Those that are carried from call to call are not looked at: see :mod:`attntune.runtime.carried`. ``read`` takes a
    caller's value and its name; by default it gives a NumPy array. Values on a device are not checked, only their dtype
    and shape.

    Raises:
        InputError: see :meth:`TunedModel.run`.
    """
    names = [spec["name"] for spec in specs]
    if unknown := sorted(set(inputs) - set(names)):
        raise InputError(f"{model}: unknown inputs {unknown}; expected {names}")
    dims: dict[str, int] = {}
    arrays: list[Any] = []
    for spec in specs:
        name = spec["name"]
        value = inputs.get(name)
        if spec.get("carried"):
            if value is None:
                raise InputError(f"{model}: missing input {name!r}; expected what state() or an entry gave")
            arrays.append(None)
            continue
        if value is None:
            if not spec["optional"]:
                raise InputError(f"{model}: missing input {name!r}; expected {describe(spec)}")
            arrays.append(None)
            continue
        array = (read or as_numpy)(value, name)
        wanted = numpy_dtype(spec["dtype"])
        fits = np.issubdtype(array.dtype, np.integer) if wanted.kind == "i" else array.dtype == wanted
        if wanted.kind == "i" and array.dtype == np.bool_:
            fits = True
        if not fits:
            raise InputError(f"{model}: input {name!r} has dtype {array.dtype}; expected {describe(spec)}")
        if array.ndim != len(spec["dims"]):
            raise InputError(f"{model}: input {name!r} has shape {array.shape}; expected {describe(spec)}")
        for axis, dim in enumerate(spec["dims"]):
            size = array.shape[axis]
            expected = dims.setdefault(dim, size) if isinstance(dim, str) else dim
            if size != expected:
                raise InputError(
                    f"{model}: input {name!r} has shape {array.shape}; expected axis {axis} ({dim}) to be {expected}"
                )
            if size == 0:
                raise InputError(f"{model}: input {name!r} has shape {array.shape}; expected no empty axis")
        looked_at = isinstance(array, np.ndarray) and spec["upper"] is not None
        if looked_at and (int(array.min()) < 0 or int(array.max()) >= spec["upper"]):
            raise InputError(
                f"{model}: input {name!r} holds values from {array.min()} to {array.max()}; "
                f"expected them in [0, {spec['upper']})"
            )
        arrays.append(array.astype(wanted, copy=False))
    return arrays, dims


def describe(spec: Mapping[str, Any]) -> str:
    """Dtype and axes."""
    return f"{spec['dtype']} ({', '.join(map(str, spec['dims']))})"


def as_numpy(value: Any, name: str) -> np.ndarray:
    """A caller's value as a NumPy array; raises :class:`InputError` where it is none."""
    if type(value).__module__.split(".")[0] == "torch":
        if value.device.type != "cpu":
            raise InputError(f"input {name!r} is on {value.device}; expected a CPU tensor")
        return np.asarray(value.detach().numpy())
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (list, tuple)):
        try:
            return np.asarray(value)
        except ValueError:
            raise InputError(f"input {name!r} is ragged; expected rows of equal length") from None
    raise InputError(f"input {name!r} is a {type(value).__name__}; expected a NumPy array or a torch tensor")


def lengths_of(mask: np.ndarray | None, dims: Mapping[str, int]) -> np.ndarray | None:
    """Lengths (batch,) int32 of the sequences that a mask (batch, seq) shows, or None where one is not padded right."""
    if mask is None:
        return np.full(dims["batch"], dims["seq"], np.int32)
    seen = mask != 0
    lengths = seen.sum(axis=1, dtype=np.int32)
    return lengths if bool((seen == (np.arange(mask.shape[1]) < lengths[:, None])).all()) else None


@dataclass(frozen=True)
class Padded:
    """An aligned array as large as a bucket's input, and the tensor over its memory."""

    array: np.ndarray
    tensor: Any

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Padded:
        """A new one."""
        array = aligned_zeros(shape, dtype)
        return cls(array, device_tensors([array])[0])


def bucket_shape(spec: Mapping[str, Any], bucket: Bucket) -> tuple[int, ...]:
    """The shape of an input or output in ``bucket``."""
    return tuple(bucket[dim] if isinstance(dim, str) else int(dim) for dim in spec["dims"])


def fit(
    array: np.ndarray | None, spec: Mapping[str, Any], piece: Piece, dims: Mapping[str, int], padded: Padded
) -> Any:
    """The rows of ``piece`` as a tensor of its bucket's shape.

    Read in place when they have that shape, lie contiguously at a multiple of 64 bytes, and may be exported (DLPack
    refuses read-only memory); else copied into ``padded``, with zeros past them.
    """
    rows = array if array is None or spec["dims"][0] != "batch" else array[piece.start : piece.stop]
    if rows is not None and rows.shape == padded.array.shape and in_place(rows):
        return device_tensors([rows])[0]
    lay_out(rows, spec, piece, dims, padded.array)
    return padded.tensor


def in_place(array: np.ndarray) -> bool:
    """Whether kernels may read an array where it lies."""
    return bool(array.ctypes.data % ALIGNMENT == 0 and array.flags.c_contiguous and array.flags.writeable)


def lay_out(
    rows: np.ndarray | None, spec: Mapping[str, Any], piece: Piece, dims: Mapping[str, int], out: np.ndarray
) -> None:
    """Fill ``out``, of a bucket's shape, with rows, or the value that stands for what was left out; zeros past them."""
    if rows is not None and rows.shape == out.shape:
        np.copyto(out, rows)
        return
    out.fill(0)
    out[inside(spec, piece, dims)] = spec["fill"] if rows is None else rows


def inside(spec: Mapping[str, Any], piece: Piece, dims: Mapping[str, int]) -> tuple[slice, ...]:
    """Where in a bucket's input or output the caller's part of it is."""
    return tuple(
        slice(0, piece.stop - piece.start if dim == "batch" else dims[dim] if isinstance(dim, str) else dim)
        for dim in spec["dims"]
    )


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros whose first element lies at a multiple of 64 bytes, as vector loads want."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
