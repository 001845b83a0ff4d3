"""Operator calls in a model: Relax calls named ``attntune.<op>`` that the compiler later raises to workloads.

Each function takes and returns ``tvm.relax.frontend.nn.Tensor``; shapes may be symbolic. Semantics: ``attntune/ops``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

PREFIX = "attntune."


def emit(op: str, attrs: dict[str, Any], args: Sequence[Any], shape: Sequence[Any], dtype: str) -> Any:
    """Emit a call of operator ``op``; ``attrs`` travel as JSON beside the tensor arguments."""
    return _call(op, attrs, args, [(shape, dtype)])


def emit_many(
    op: str, attrs: dict[str, Any], args: Sequence[Any], results: Sequence[tuple[Sequence[Any], str]]
) -> tuple[Any, ...]:
    """Emit a call of an operator with several results, each given by shape and dtype."""
    return tuple(_call(op, attrs, args, results))


def _call(op: str, attrs: dict[str, Any], args: Sequence[Any], results: Sequence[tuple[Sequence[Any], str]]) -> Any:
    import tvm
    from tvm import relax
    from tvm.relax.frontend import nn

    types = [relax.TensorType(tuple(shape), dtype) for shape, dtype in results]
    call = relax.op.call_pure_packed(
        PREFIX + op,
        *(arg._expr for arg in args),
        tvm.ir.StringImm(json.dumps(attrs, sort_keys=True)),
        ty_args=types[0] if len(types) == 1 else relax.TupleType(types),
    )
    return nn.op.wrap_nested(call, op)


def linear(x: Any, weight: Any, bias: Any | None = None, *, activation: str = "", residual: Any | None = None) -> Any:
    """X (…, in), weight (out, in), bias (out,), residual (…, out) → (…, out)."""
    attrs = {"bias": bias is not None, "activation": activation, "residual": residual is not None}
    args = [arg for arg in (x, weight, bias, residual) if arg is not None]
    return emit("linear", attrs, args, (*x.shape[:-1], weight.shape[0]), x.dtype)


def attention(
    *operands: Any,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    mask: Any | None = None,
    bias: Any | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Any:
    """One operand: packed qkv (batch, seq, (heads + 2·kv_heads)·head_dim); three: query, key, value.

    mask (batch, kv_len) int64, bias (1|batch, 1|heads, q_len, kv_len) → (batch, q_len, heads·head_dim).
    """
    attrs = {
        "heads": heads, "kv_heads": kv_heads or heads, "head_dim": head_dim, "packed": len(operands) == 1,
        "causal": causal, "mask": mask is not None, "bias": bias is not None, "scale": scale,
    }  # fmt: skip
    args = [*operands, *(arg for arg in (mask, bias) if arg is not None)]
    first = operands[0]
    return emit("attention", attrs, args, (first.shape[0], first.shape[1], heads * head_dim), first.dtype)


def layer_norm(x: Any, weight: Any, bias: Any, *, eps: float, residual: Any | None = None) -> Any:
    """LN(x + residual) over the last axis; x (…, features)."""
    args = [x, *([residual] if residual is not None else []), weight, bias]
    return emit("layer_norm", {"eps": eps, "residual": residual is not None}, args, x.shape, x.dtype)


def softmax(x: Any) -> Any:
    """Softmax over the last axis; x (…, features)."""
    return emit("softmax", {}, [x], x.shape, x.dtype)


def embedding_norm(
    input_ids: Any, token_type_ids: Any, word: Any, position: Any, type_: Any, weight: Any, bias: Any, *, eps: float
) -> Any:
    """LN(word[ids] + position[0…seq) + type[token types]) → (batch, seq, features)."""
    args = [input_ids, token_type_ids, word, position, type_, weight, bias]
    return emit("embedding_norm", {"eps": eps}, args, (*input_ids.shape, word.shape[1]), word.dtype)


def mean_pool(x: Any, mask: Any, *, eps: float = 1e-9, normalize: bool = True) -> Any:
    """Mean of x (batch, seq, features) over positions where mask (batch, seq) is nonzero → (batch, features)."""
    return emit("mean_pool", {"eps": eps, "normalize": normalize}, [x, mask], (x.shape[0], x.shape[2]), x.dtype)
