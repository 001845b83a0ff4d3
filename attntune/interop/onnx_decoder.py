"""How the operators of decoder-only models are written in ONNX: embedding, rotation, cache, normalisation, selection.

A cache that a kernel updates in place is a value here: the old one goes in, the new one comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attntune.interop.onnx_graph import GraphBuilder, element_type, reduce

if TYPE_CHECKING:
    from attntune.models.model import OpCall


def rms_norm(builder: GraphBuilder, call: OpCall) -> str:
    """``h / √(mean(h²) + eps) · weight`` with ``h = x + residual``, over the last axis."""
    x, *residual, weight = call.args
    if residual:
        x = builder.node("Add", x, residual[0])
    return _over_root_mean_square(builder, call, x, weight)


def head_norm(builder: GraphBuilder, call: OpCall) -> str:
    """Queries and keys of packed qkv over their root mean square, head by head."""
    qkv, weight = call.args
    attrs = call.attrs
    normed = attrs["heads"] + attrs["kv_heads"]
    sizes = builder.ints(normed * attrs["head_dim"], attrs["kv_heads"] * attrs["head_dim"])
    together, value = builder.nodes_out("Split", qkv, sizes, outputs=2, axis=-1)
    heads = builder.node("Reshape", together, builder.ints(0, 0, normed, attrs["head_dim"]))
    scaled = _over_root_mean_square(builder, call, heads, weight)
    return builder.node("Concat", builder.node("Reshape", scaled, builder.ints(0, 0, -1)), value, axis=-1)


def _over_root_mean_square(builder: GraphBuilder, call: OpCall, x: str, weight: str) -> str:
    mean = reduce(builder, "ReduceMean", builder.node("Mul", x, x), -1, keepdims=1)
    root = builder.node(
        "Sqrt", builder.node("Add", mean, builder.constant(float(call.attrs["eps"]), call.result_dtype))
    )
    return builder.node("Mul", builder.node("Div", x, root), weight)


def embedding(builder: GraphBuilder, call: OpCall) -> str:
    """``scale · table[ids] + position[p]``."""
    ids, table, *rest = call.args
    y = builder.node("Gather", table, ids, axis=0)
    if call.attrs.get("scale", 1.0) != 1.0:
        y = builder.node("Mul", y, builder.constant(float(call.attrs["scale"]), call.result_dtype))
    if not call.attrs.get("position"):
        return y
    position, *lengths = rest
    at = positions(builder, ids, lengths[0] if lengths else None, int(call.attrs.get("position_offset", 0)))
    rows = clamped(builder, at, int(call.arg_shapes[2][0]))
    return builder.node("Add", y, builder.node("Gather", position, rows, axis=0))


def rope(builder: GraphBuilder, call: OpCall) -> str:
    """Queries and keys of packed qkv rotated by the angles of their positions."""
    qkv, cos, sin = call.args
    attrs = call.attrs
    rotates = (attrs["heads"] + attrs["kv_heads"]) * attrs["head_dim"]
    sizes = builder.ints(rotates, attrs["kv_heads"] * attrs["head_dim"])
    turning, value = builder.nodes_out("Split", qkv, sizes, outputs=2, axis=-1)
    at = positions(builder, qkv, None)
    angles = [table_rows(builder, table, at) for table in (cos, sin)]
    turned = rotated(builder, call, turning, attrs["heads"] + attrs["kv_heads"], *angles)
    return builder.node("Concat", turned, value, axis=-1)


def kv_append(builder: GraphBuilder, call: OpCall) -> tuple[str, str, str]:
    """The query, rotated, and the caches with the new rows in them."""
    qkv, lengths, key_cache, value_cache, *tables = call.args
    heads, kv_heads, head_dim = (call.attrs[name] for name in ("heads", "kv_heads", "head_dim"))
    sizes = builder.ints(heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    query, key, value = builder.nodes_out("Split", qkv, sizes, outputs=3, axis=-1)
    if tables:
        count = int(call.arg_shapes[4][0])
        at = clamped(builder, positions(builder, qkv, lengths), count)
        angles = [table_rows(builder, table, at) for table in tables]
        query = rotated(builder, call, query, heads, *angles)
        key = rotated(builder, call, key, kv_heads, *angles)
    inside, source = _slots(builder, qkv, lengths, key_cache, kv_heads)
    caches = []
    for cache, new in ((key_cache, key), (value_cache, value)):
        heads_apart = builder.node("Reshape", new, builder.ints(0, 0, kv_heads, head_dim))
        rows = builder.node("GatherND", builder.node("Transpose", heads_apart, perm=[0, 2, 1, 3]), source, batch_dims=2)
        caches.append(builder.node("Where", inside, rows, cache))
    return query, caches[0], caches[1]


def _slots(builder: GraphBuilder, new: str, lengths: str, cache: str, kv_heads: int) -> tuple[str, str]:
    """Of each slot of a cache, whether it is written (batch, 1, context, 1), and by which row (…, kv_heads, …)."""

    def rows() -> str:
        # The first new row goes to slot lengths - q_len.
        first = builder.node("Sub", long(builder, lengths), builder.dim(new, 1))
        every = counted(builder, cache, 2)
        return builder.node("Unsqueeze", builder.node("Sub", every, first_axis(builder, first)), builder.ints(1, 3))

    row = builder.shared(("slot row", lengths, new), rows)

    def inside() -> str:
        after = builder.node("GreaterOrEqual", row, builder.ints(0))
        return builder.node("And", after, builder.node("Less", row, builder.dim(new, 1)))

    def source() -> str:
        last = builder.node("Sub", builder.dim(new, 1), builder.ints(1))
        existing = builder.node("Max", builder.node("Min", row, last), builder.ints(0))
        return builder.node("Expand", existing, builder.ints(1, kv_heads, 1, 1))

    return builder.shared(("slot inside", row), inside), builder.shared(("slot source", row, kv_heads), source)


def argmax(builder: GraphBuilder, call: OpCall) -> str:
    """The first largest of each row."""
    return builder.node("ArgMax", call.args[0], axis=-1, keepdims=0)


def top_k(builder: GraphBuilder, call: OpCall) -> tuple[str, ...]:
    """Values and indices, largest first; of equal ones the first."""
    return builder.nodes_out("TopK", call.args[0], builder.ints(int(call.attrs["k"])), outputs=2, axis=-1)


def long(builder: GraphBuilder, x: str) -> str:
    """``x`` as int64."""
    return builder.shared(("int64", x), lambda: builder.node("Cast", x, to=element_type("int64")))


def first_axis(builder: GraphBuilder, x: str) -> str:
    """``x`` (batch,) as (batch, 1)."""
    return builder.node("Unsqueeze", x, builder.ints(1))


def counted(builder: GraphBuilder, x: str, axis: int = 1) -> str:
    """0, 1, … along an axis of ``x``, int64."""

    def make() -> str:
        zero, one = builder.constant(0, "int64"), builder.constant(1, "int64")
        return builder.node("Range", zero, builder.node("Squeeze", builder.dim(x, axis), builder.ints(0)), one)

    return builder.shared(("counted", x, axis), make)


def positions(builder: GraphBuilder, x: str, lengths: str | None, offset: int = 0) -> str:
    """Positions of the tokens of ``x`` (batch, seq, …): (seq,), or (batch, seq) counted back from ``lengths``."""

    def make() -> str:
        at = counted(builder, x)
        if offset:
            at = builder.node("Add", at, builder.constant(offset, "int64"))
        if lengths is None:
            return at
        first = builder.node("Sub", long(builder, lengths), builder.dim(x, 1))
        return builder.node("Add", first_axis(builder, first), at)

    return builder.shared(("positions", x, lengths, offset), make)


def clamped(builder: GraphBuilder, at: str, count: int) -> str:
    """Indices of a table of ``count`` rows."""
    last, zero = builder.constant(count - 1, "int64"), builder.constant(0, "int64")
    return builder.shared(("clamped", at, count), lambda: builder.node("Max", builder.node("Min", at, last), zero))


def table_rows(builder: GraphBuilder, table: str, at: str) -> str:
    """Rows ``at`` of a table, gathered once."""
    return builder.shared(("rows", table, at), lambda: builder.node("Gather", table, at, axis=0))


def rotated(builder: GraphBuilder, call: OpCall, x: str, count: int, cos: str, sin: str) -> str:
    """X (batch, seq, count·head_dim) turned by angles ([batch,] seq, head_dim/2)."""
    head_dim = call.attrs["head_dim"]
    half = call.attrs["style"] == "half"
    # The two of a pair lie along an axis of 2: before the pairs, or after them.
    shape = (0, 0, count, 2, head_dim // 2) if half else (0, 0, count, head_dim // 2, 2)
    axis = 3 if half else 4
    pairs = builder.node("Reshape", x, builder.ints(*shape))
    a, b = builder.nodes_out("Split", pairs, builder.ints(1, 1), outputs=2, axis=axis)
    new = (-3, -2) if half else (-3, -1)

    def shaped(table: str) -> str:
        return builder.shared((*new, table), lambda: builder.node("Unsqueeze", table, builder.ints(*new)))

    cos, sin = shaped(cos), shaped(sin)
    turned = builder.node("Sub", builder.node("Mul", a, cos), builder.node("Mul", b, sin))
    other = builder.node("Add", builder.node("Mul", b, cos), builder.node("Mul", a, sin))
    return builder.node(
        "Reshape", builder.node("Concat", turned, other, axis=axis), builder.ints(0, 0, count * head_dim)
    )  # fmt: skip


#: Emitters by operator name.
EMITTERS: dict[str, Callable[[GraphBuilder, OpCall], str | tuple[str, ...]]] = {
    "argmax": argmax,
    "embedding": embedding,
    "head_norm": head_norm,
    "kv_append": kv_append,
    "rms_norm": rms_norm,
    "rope": rope,
    "top_k": top_k,
}
