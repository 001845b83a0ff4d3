"""Eager operators with PyTorch's signatures, on torch tensors and NumPy arrays, by kernels compiled once per shape.

A call is described by the shapes, strides and dtypes of its operands and by its options. What follows from them (the
workload, its kernel, which operands can be read in place) is worked out once and kept; after that a call sets a few
pointers and runs the kernel on the kernel thread.
"""

from __future__ import annotations

import math
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attntune.errors import InputError
from attntune.kernel_cache import KernelCache
from attntune.measure.buffers import numpy_dtype
from attntune.ops.attention import MASKED, Attention
from attntune.runtime.dltensor import TensorSlot
from attntune.runtime.kernel_thread import KERNEL_THREAD
from attntune.runtime.operands import Given, Operand, described, empty

__all__ = ["clear_cache", "scaled_dot_product_attention"]

_KERNELS = KernelCache()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _KERNELS.forget_workers())
_calls: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
_MOST_CALLS = 1024
"""Descriptions kept; the oldest goes, with its buffers, when there are more."""

_DTYPES = ("float32", "bfloat16")


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_weights: bool = False,
) -> Any:
    """``softmax(scale · query · keyᵀ + mask) · value``, with the signature and layout of PyTorch's function.

    The first call of a shape compiles a kernel (seconds), which is checked against a float64 reference and kept on
    disk; later processes load it. For inference: no gradient is recorded.

    Operands are read in place when they are contiguous, or are transposed views of contiguous (…, seq, heads,
    head_dim) tensors, and start at a multiple of 64 bytes, as torch allocates them; others are copied first.

    Args:
        query: (…, heads, q_len, head_dim), NumPy or torch (CPU), float32 or, where the CPU multiplies it, bfloat16. Two
            or three dimensions work as in PyTorch; leading dimensions broadcast.
        key: (…, heads, kv_len, head_dim), of the same library and dtype; (…, kv_heads, …) with ``enable_gqa``.
        value: (…, heads, kv_len, value_dim); (…, kv_heads, …) with ``enable_gqa``.
        attn_mask: broadcastable to (…, heads, q_len, kv_len). Bool: True where a key may be attended to. float32 or
            the dtype of ``query``: added to the scaled scores; -inf, and everything below -1e29, masks a key.
        dropout_p: only 0.
        is_causal: query i sees keys j <= i, counted from the start of both, as in PyTorch.
        scale: of the scores; 1/√head_dim by default.
        enable_gqa: the numbers of heads of key and value may be divisors of that of query.
        return_weights: also return the attention weights.

    Returns:
        out (…, heads, q_len, value_dim) in the library and dtype of ``query``; with ``return_weights``, ``(out,
        weights)`` with weights (…, heads, q_len, kv_len) float32. A query that may see no key gives zeros. (PyTorch
        does so too for bool and -inf masks; where a finite mask such as ``finfo.min`` covers every key of a query, it
        gives the mean of the values instead.)

    Raises:
        InputError: an operand's library, device, dtype or shape does not fit, or ``dropout_p`` is not 0.
        CompileError: no kernel could be built that matches its reference.
    """
    options = (dropout_p, is_causal, scale, enable_gqa, return_weights)
    signature: Any
    try:
        signature = (described(query), described(key), described(value), described(attn_mask), options)
        call = _calls.get(signature)
    except (AttributeError, RuntimeError):  # neither an array nor a dense tensor: _prepare says what is wrong
        signature = call = None
    if call is None:
        call = _prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_weights)
        _calls[signature] = call
        if len(_calls) > _MOST_CALLS:
            _calls.popitem(last=False)
    return call(query, key, value, attn_mask)


def clear_cache() -> int:
    """Forget every compiled kernel, in this process and on disk; returns how many there were on disk."""
    _calls.clear()
    return _KERNELS.clear()


# -- once per description ----------------------------------------------------------------------------------------------


def _prepare(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_weights: bool,
) -> Callable[..., Any]:
    """Check a call and make what answers calls like it.

    Raises:
        InputError: see :func:`scaled_dot_product_attention`.
    """
    given = [Given(n, x) for n, x in (("query", query), ("key", key), ("value", value))]
    mask = None if attn_mask is None else Given("attn_mask", attn_mask)
    _check_kinds(given, mask, dropout_p)
    q, k, v = given
    for operand in given:
        if len(operand.shape) < 2:
            raise InputError(f"expected {operand.name} to have at least 2 dimensions, got shape {operand.shape}")
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise InputError(
            "expected query and key to have the same last dimension, and key and value the same last but one; got "
            f"query {q.shape}, key {k.shape}, value {v.shape}"
        )
    if q.shape[-1] == 0:
        raise InputError(f"expected head_dim to be at least 1, got query {q.shape}")
    lead, kv_heads = _leading(q, k, v, enable_gqa)
    heads, batch = (lead[-1], math.prod(lead[:-1])) if lead else (1, 1)
    q_len, kv_len, dim, value_dim = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    bias_lead = _mask_leading(mask, lead, q_len, kv_len)
    outputs = [(*lead, q_len, value_dim), *([(*lead, q_len, kv_len)] if return_weights else [])]
    if 0 in (*outputs[0], kv_len):
        return _Zeros(q, outputs)
    # Heads of keys and of values that differ in width are padded with zeros to the wider.
    wide = max(dim, value_dim)
    factor = None if scale is None or float(scale) == 1.0 / math.sqrt(dim) else float(scale)
    if factor is None and wide != dim:
        factor = 1.0 / math.sqrt(dim)
    if factor is not None and not math.isfinite(factor):
        raise InputError(f"expected scale to be finite, got {scale!r}")
    is_padding = mask is not None and mask.dtype == "bool" and _is_padding(mask, lead, q_len)
    fields: dict[str, Any] = {"weights": True} if return_weights else {}
    if is_padding:
        fields["mask"] = True
    elif mask is not None:
        fields["bias_batch"] = 1 if math.prod(bias_lead[:-1]) == 1 else batch
        fields["bias_heads"] = bias_lead[-1] if bias_lead else 1
        fields["bias_q"] = 1 if mask.shape[-2] == 1 else 0
    plain = all(operand.contiguous() for operand in given)
    transposed = not plain and all(operand.contiguous(transposed=True) for operand in given)
    workload = Attention(
        batch, heads, q_len, kv_len, wide, kv_heads=kv_heads, causal=bool(is_causal), scale=factor, dtype=q.dtype,
        layout="bshd" if transposed else "bhsd", **fields,
    )  # fmt: skip
    if q.dtype != "float32" and not _KERNELS.has_template(workload):
        raise InputError(f"expected float32 operands, got {q.dtype}: {_KERNELS.target.key()} has no kernels for that")
    return _Call(workload, given, mask, lead, outputs)


def _check_kinds(given: Sequence[Given], mask: Given | None, dropout_p: float) -> None:
    if dropout_p:
        raise InputError(f"expected dropout_p to be 0, got {dropout_p!r}: these kernels are for inference")
    q = given[0]
    everything = [*given, *([mask] if mask else [])]
    for operand in everything:
        if operand.torch != q.torch:
            raise InputError("expected every operand to be a NumPy array or every one a torch tensor, got both")
    for operand in given:
        if operand.dtype != q.dtype:
            raise InputError(f"expected query, key and value of one dtype, got {[x.dtype for x in given]}")
    if q.dtype not in _DTYPES:
        raise InputError(f"expected operands of dtype {' or '.join(_DTYPES)}, got {q.dtype}")
    if mask is not None and mask.dtype not in ("bool", "float32", q.dtype):
        raise InputError(f"expected attn_mask of dtype bool, float32 or {q.dtype}, got {mask.dtype}")


def _leading(q: Given, k: Given, v: Given, enable_gqa: bool) -> tuple[tuple[int, ...], int]:
    """Leading dimensions of the result, the last of which counts heads; and how many heads keys and values keep."""
    shapes = [operand.shape[:-2] for operand in (q, k, v)]
    problem = f"got query {q.shape}, key {k.shape}, value {v.shape}"
    if enable_gqa:
        if not all(shapes):
            raise InputError(f"expected a dimension of heads with enable_gqa, {problem}")
        heads, k_heads, v_heads = (shape[-1] for shape in shapes)
        if 0 in (k_heads, v_heads) or heads % k_heads or heads % v_heads:
            raise InputError(f"expected heads of key and value to divide those of query, {problem}")
        rest = [shape[:-1] for shape in shapes]
    try:
        if enable_gqa:
            return (*np.broadcast_shapes(*rest), heads), k_heads if k_heads == v_heads else heads
        lead = np.broadcast_shapes(*shapes)
    except ValueError:
        hint = "; heads of key and value may be fewer with enable_gqa=True" if not enable_gqa else ""
        raise InputError(f"expected leading dimensions that broadcast, {problem}{hint}") from None
    kept = [shape[-1] if shape else 1 for shape in shapes[1:]]
    return lead, 1 if kept == [1, 1] else (lead[-1] if lead else 1)


def _mask_leading(mask: Given | None, lead: tuple[int, ...], q_len: int, kv_len: int) -> tuple[int, ...]:
    """The mask's leading dimensions, as many as ``lead`` has."""
    if mask is None:
        return ()
    if len(mask.shape) < 2:
        raise InputError(f"expected attn_mask to have at least 2 dimensions, got shape {mask.shape}")
    scores = (*lead, q_len, kv_len)
    try:
        if np.broadcast_shapes(mask.shape, scores) != scores:
            raise ValueError
    except ValueError:
        raise InputError(f"expected attn_mask to broadcast to {scores}, got shape {mask.shape}") from None
    own = mask.shape[:-2]
    return (1,) * (len(lead) - len(own)) + own


def _is_padding(mask: Given, lead: tuple[int, ...], q_len: int) -> bool:
    """Whether a bool mask says the same for every head and query of a sequence."""
    shape = (1,) * (len(lead) + 2 - len(mask.shape)) + mask.shape
    return (q_len == 1 or shape[-2] == 1) and (not lead or lead[-1] == 1 or shape[len(lead) - 1] == 1)


# -- each call ---------------------------------------------------------------------------------------------------------


class _Zeros:
    """Answers calls with nothing to sum over or nothing to return."""

    def __init__(self, like: Given, shapes: Sequence[tuple[int, ...]]) -> None:
        self._like, self._shapes = like, shapes

    def __call__(self, *_operands: Any) -> Any:
        dtypes = [self._like.dtype, "float32"]
        results = []
        for shape, dtype in zip(self._shapes, dtypes, strict=False):
            if self._like.torch:
                torch = sys.modules["torch"]
                results.append(torch.zeros(shape, dtype=getattr(torch, dtype)))
            else:
                results.append(np.zeros(shape, numpy_dtype(dtype)))
        return results[0] if len(results) == 1 else tuple(results)


class _Call:
    """Answers every call of one description."""

    def __init__(
        self,
        workload: Attention,
        given: Sequence[Given],
        mask: Given | None,
        lead: tuple[int, ...],
        outputs: Sequence[tuple[int, ...]],
    ) -> None:
        self._kernel = _KERNELS.function(workload)
        self._cores = _KERNELS.target.cores
        self._torch = sys.modules["torch"] if given[0].torch else None
        self._requires_grad = any(x.requires_grad for x in (*given, *([mask] if mask else [])))
        transposed = workload.layout == "bshd"
        specs = workload.inputs()
        self._operands = []
        for x, spec, heads in zip(given, specs, (workload.heads, workload.kv_heads, workload.kv_heads), strict=False):
            # Broadcast leading dimensions and wider heads need a copy.
            in_place = math.prod(x.shape) == math.prod(spec.shape) and x.contiguous(transposed=transposed)
            fill = _filler((*lead[:-1], heads) if lead else (1,), x.shape[-2:], transposed)
            self._operands.append(Operand(spec.shape, spec.dtype, fill, in_place=in_place))
        if mask is not None:
            spec = specs[3]
            in_place = (
                mask.dtype == spec.dtype
                and mask.contiguous()
                and mask.shape[-2:] == spec.shape[-2:]
                and math.prod(mask.shape) == math.prod(spec.shape)
            )
            self._operands.append(Operand(spec.shape, spec.dtype, _mask_filler(spec.name, lead), in_place=in_place))
        self._results = [TensorSlot(spec.shape, spec.dtype) for spec in workload.outputs()]
        self._arguments = [slot.argument for slot in (*(operand.slot for operand in self._operands), *self._results)]
        self._views: list[Callable[[Any], Any]] = []
        self._shapes: list[tuple[int, ...]] = []
        self._dtypes: list[Any] = []
        for spec, shape in zip(workload.outputs(), outputs, strict=True):
            turned = transposed and spec.name == "out"
            wide = (*shape[:-1], workload.head_dim) if spec.name == "out" else shape
            self._shapes.append((*wide[:-3], wide[-2], wide[-3], wide[-1]) if turned else wide)
            self._views.append(_view(turned, shape[-1] if shape[-1] != wide[-1] else None))
            self._dtypes.append(getattr(self._torch, spec.dtype) if self._torch else numpy_dtype(spec.dtype))

    def __call__(self, *operands: Any) -> Any:
        if self._requires_grad and self._torch.is_grad_enabled():  # type: ignore[union-attr]
            raise InputError(
                "expected operands that require no gradient, got one that does: these kernels are for inference; "
                "call them under torch.no_grad(), or detach() the operands"
            )
        results, addresses, targets = [], [], []
        for shape, dtype in zip(self._shapes, self._dtypes, strict=True):
            result, address = empty(shape, dtype)
            results.append(result)
            targets.append(address)
        if self._torch is not None:
            addresses = [x.data_ptr() for x in operands if x is not None]
        else:
            addresses = [x.__array_interface__["data"][0] for x in operands if x is not None]

        def run() -> None:
            for operand, x, address in zip(self._operands, operands, addresses, strict=False):
                operand.bind(x, address)
            for slot, address in zip(self._results, targets, strict=True):
                slot.point_at(address)
            self._kernel(*self._arguments)

        KERNEL_THREAD.run(self._cores, run)
        shown = [view(result) for view, result in zip(self._views, results, strict=True)]
        return shown[0] if len(shown) == 1 else tuple(shown)


def _filler(lead: tuple[int, ...], rows: tuple[int, ...], transposed: bool) -> Callable[[np.ndarray, np.ndarray], None]:
    """What writes (…, heads, rows, dim) into a kernel's operand: heads repeated, dimensions broadcast, zeros added."""
    length, dim = rows

    def fill(buffer: np.ndarray, array: np.ndarray) -> None:
        if transposed:
            whole = buffer.reshape(*lead[:-1], length, lead[-1], -1).swapaxes(-2, -3)
        else:
            whole = buffer.reshape(*lead, length, -1)
        own = array.shape[-3] if array.ndim > 2 else 1
        if own not in (1, lead[-1]):
            array = np.repeat(array, lead[-1] // own, axis=-3)
        np.copyto(whole[..., :dim], array)

    return fill


def _mask_filler(name: str, lead: tuple[int, ...]) -> Callable[[np.ndarray, np.ndarray], None]:
    """What writes an attention mask into the kernel's ``mask`` or ``bias`` operand."""

    def fill(buffer: np.ndarray, array: np.ndarray) -> None:
        if name == "mask":
            row = array[..., 0, :]
            row = row[..., 0, :] if row.ndim > 1 else row
            np.copyto(buffer.reshape(*lead[:-1], -1), row)
            return
        whole = buffer.reshape(*_bias_lead(buffer, lead), *buffer.shape[-2:])
        if array.dtype == np.bool_:
            np.copyto(whole, np.where(array, np.float32(0.0), np.float32(MASKED)))
        else:
            np.copyto(whole, array, casting="unsafe")

    return fill


def _bias_lead(buffer: np.ndarray, lead: tuple[int, ...]) -> tuple[int, ...]:
    batch, heads = buffer.shape[:2]
    if not lead:
        return (1,)
    return (*(lead[:-1] if batch > 1 else (1,) * (len(lead) - 1)), heads)


def _view(transposed: bool, width: int | None) -> Callable[[Any], Any]:
    """From an array as the kernel wrote it to what the caller gets."""

    def view(result: Any) -> Any:
        if transposed:
            result = result.swapaxes(-2, -3)
        return result if width is None else result[..., :width]

    return view
