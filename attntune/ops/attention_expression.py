"""The definition of attention as a tensor expression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attntune.ops.attention import Attention


def expression(w: Attention) -> list[Any]:
    """Placeholders in the order of ``w.inputs()``, then the results; products and sums in float32."""
    from tvm import te, tirx

    from attntune.ops import math as tmath
    from attntune.ops.attention import FLOOR

    operands = {spec.name: te.placeholder(spec.shape, spec.dtype, spec.name) for spec in w.inputs()}
    batch = 1 if w.ragged else w.batch
    dim, group = w.head_dim, w.heads // w.kv_heads
    q_width, kv_width = w.heads * dim, w.kv_heads * dim
    key_at, value_at = (q_width, q_width + kv_width) if w.packed else (0, 0)

    def element(name: str, b: Any, h: Any, i: Any, d: Any, column: int) -> Any:
        tensor = operands["qkv" if w.packed else name]
        if w.heads_apart(name):
            found = tensor[b, h, i, d]
        else:
            at = column + h * dim + d
            found = tensor[i, at] if w.ragged else tensor[b, i, at]
        return found if w.dtype == "float32" else found.astype("float32")

    d = te.reduce_axis((0, dim), name="d")
    scores_shape = (batch, w.heads, w.q_len, w.kv_len)
    rows_shape = scores_shape[:3]
    products = te.compute(
        scores_shape,
        lambda b, h, i, j: te.sum(
            element("query", b, h, i, d, 0) * element("key", b, h // group, j, d, key_at), axis=d
        ),
        name="products",
    )  # fmt: skip
    score = _scoring(w, operands, products, _sequence_of(w, operands))
    scores = te.compute(scores_shape, score, name="scores")
    j_max = te.reduce_axis((0, w.kv_len), name="j_max")
    peak = te.compute(rows_shape, lambda b, h, i: te.max(scores[b, h, i, j_max], axis=j_max), name="peak")
    powers = te.compute(
        scores_shape,
        lambda b, h, i, j: tmath.exp(scores[b, h, i, j] - te.max(peak[b, h, i], tirx.const(FLOOR, "float32"))),
        name="powers",
    )
    j_sum = te.reduce_axis((0, w.kv_len), name="j_sum")
    total = te.compute(rows_shape, lambda b, h, i: te.sum(powers[b, h, i, j_sum], axis=j_sum), name="total")
    j_out = te.reduce_axis((0, w.kv_len), name="j_out")
    context = te.compute(
        (*rows_shape, dim),
        lambda b, h, i, e: te.sum(
            powers[b, h, i, j_out] * element("value", b, h // group, j_out, e, value_at), axis=j_out
        ),
        name="context",
    )  # fmt: skip
    tiny = tirx.const(1e-30, "float32")

    def result(b: Any, h: Any, i: Any, e: Any) -> Any:
        divided = context[b, h, i, e] / te.max(total[b, h, i], tiny)
        return divided if w.dtype == "float32" else divided.astype(w.dtype)

    out_shape = w.outputs()[0].shape
    if w.layout == "bhsd":
        out = te.compute(out_shape, result, name="out")
    elif w.ragged:
        out = te.compute(out_shape, lambda i, c: result(0, c // dim, i, c % dim), name="out")
    else:
        out = te.compute(out_shape, lambda b, i, c: result(b, c // dim, i, c % dim), name="out")
    results = [out]
    if w.weights:
        weights = te.compute(
            scores_shape,
            lambda b, h, i, j: powers[b, h, i, j] / te.max(total[b, h, i], tiny),
            name="weights",
        )
        results.append(weights)
    return [*operands.values(), *results]


def _scoring(w: Attention, operands: dict[str, Any], products: Any, sequence: Any) -> Any:
    """``score(b, h, i, j)``: products scaled, capped, biased, modified, masked, in that order."""
    from tvm import tirx

    from attntune.ops.attention import MASKED

    masked = tirx.const(MASKED, "float32")
    modify = w.modification() if w.score_mod else None

    def read(name: str, *at: Any) -> Any:
        return operands[name][at]

    def score(b: Any, h: Any, i: Any, j: Any) -> Any:
        value = products[b, h, i, j] * tirx.const(w.scaling, "float32")
        at = (b, h, i, j)
        if w.ragged:
            start = operands["offsets"][sequence[i]]
            at = (sequence[i], h, i - start, j - start)
        value = modified(w, value, read, modify, *at)
        for allowed in conditions(w, read, b, i, j):
            value = tirx.Select(allowed, value, masked)
        if w.ragged:
            same = tirx.all(sequence[i] == sequence[j], sequence[i] < w.batch)
            value = tirx.Select(same, value, masked)
        return value

    return score


def position(w: Attention, read: Any, b: Any, i: Any) -> Any:
    """Where query ``i`` stands among the keys."""
    if w.lengths == "kv":
        return i + (read("lengths", b) + (w.causal_offset - w.q_len))
    return i + w.causal_offset if w.causal_offset else i


def modified(w: Attention, value: Any, read: Any, modify: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """A scaled score capped, biased and modified; ``read(name, *indices)`` gives an element of an operand."""
    from tvm import tirx

    from attntune.ops import math as tmath
    from attntune.ops.attention import MASKED

    if w.softcap:
        value = tmath.tanh(value * tirx.const(1.0 / w.softcap, "float32")) * tirx.const(w.softcap, "float32")
    if w.bias_heads:
        bias = read("bias", b if w.bias_batch > 1 else 0, h if w.bias_heads > 1 else 0, 0 if w.bias_q == 1 else i, j)
        value = value + (bias if w.dtype == "float32" else bias.astype("float32"))
    if w.alibi:
        distance = tirx.Cast("float32", j - position(w, read, b, i))
        value = value + read("slopes", h) * distance
    if modify is not None:
        value = modify(value, b, h, i, j)
    if w.bias_heads or modify is not None:
        # -inf, or anything as low, masks a key; kept finite so that differences are.
        value = tirx.max(value, tirx.const(MASKED, "float32"))
    return value


def conditions(w: Attention, read: Any, b: Any, i: Any, j: Any) -> list[Any]:
    """What must hold for query ``i`` to attend to key ``j``, sequences of a ragged batch aside."""
    allowed = []
    if w.mask:
        allowed.append(read("mask", b, j) != 0)
    if w.lengths:
        allowed.append(j < read("lengths", b))
    if w.lengths == "qkv":
        allowed.append(i < read("lengths", b))
    if w.causal:
        allowed.append(j <= position(w, read, b, i))
    if w.window:
        allowed.append(j > position(w, read, b, i) - w.window)
    return allowed


def _sequence_of(w: Attention, operands: dict[str, Any]) -> Any:
    """(q_len,): the sequence that each row of a ragged batch belongs to; ``batch`` for rows past the last."""
    from tvm import te, tirx

    if not w.ragged:
        return None
    one, zero = tirx.const(1, "int32"), tirx.const(0, "int32")
    b = te.reduce_axis((0, w.batch), name="sequence_b")
    return te.compute(
        (w.q_len,),
        lambda i: te.sum(tirx.Select(operands["offsets"][b + 1] <= i, one, zero), axis=b),
        name="sequence",
    )
