"""PyTorch twins of the operators of decoder-only models. Caches are written in place, as the kernels do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attntune.models.model import OpCall


def rms_norm(call: OpCall) -> Callable[..., Any]:
    """``h / √(mean(h²) + eps) · weight`` with ``h = x + residual``."""
    from torch.nn import functional as F

    eps = float(call.attrs["eps"])

    def step(_: Any, x: Any, *rest: Any) -> Any:
        if len(rest) > 1:
            x = x + rest[0]
        return F.rms_norm(x, x.shape[-1:], rest[-1], eps)

    return step


def head_norm(call: OpCall) -> Callable[..., Any]:
    """Queries and keys of packed qkv over their root mean square, head by head."""
    import torch
    from torch.nn import functional as F

    head_dim, eps = call.attrs["head_dim"], float(call.attrs["eps"])
    normed = call.attrs["heads"] + call.attrs["kv_heads"]

    def step(_: Any, qkv: Any, weight: Any) -> Any:
        heads = qkv.unflatten(-1, (-1, head_dim))
        scaled = F.rms_norm(heads[..., :normed, :], (head_dim,), None, eps) * weight
        return torch.cat([scaled, heads[..., normed:, :]], -2).flatten(-2)

    return step


def positions(x: Any, lengths: Any | None, offset: int = 0) -> Any:
    """Of the tokens of x (batch, seq, …): (seq,), or (batch, seq) counted back from ``lengths``."""
    import torch

    at = torch.arange(offset, offset + x.shape[1], device=x.device)
    return at if lengths is None else at + (lengths.long() - x.shape[1])[:, None]


def embedding(call: OpCall) -> Callable[..., Any]:
    """``scale · table[ids] + position[p]``."""
    from torch.nn import functional as F

    scale, offset = float(call.attrs.get("scale", 1.0)), int(call.attrs.get("position_offset", 0))

    def step(_: Any, ids: Any, table: Any, *rest: Any) -> Any:
        y = F.embedding(ids, table)
        if scale != 1.0:
            y = y * scale
        if not rest:
            return y
        at = positions(ids, rest[1] if len(rest) > 1 else None, offset).clamp(0, rest[0].shape[0] - 1)
        return y + rest[0][at]

    return step


def rotated(x: Any, cos: Any, sin: Any, head_dim: int, style: str) -> Any:
    """X (batch, seq, n·head_dim) turned by angles ([batch,] seq, head_dim/2)."""
    import torch

    half = style == "half"
    pairs = x.unflatten(-1, (-1, 2, head_dim // 2) if half else (-1, head_dim // 2, 2))
    axis = -2 if half else -1
    a, b = pairs.unbind(axis)
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], axis).flatten(2)


def rope(call: OpCall) -> Callable[..., Any]:
    """Queries and keys of packed qkv rotated."""
    import torch

    head_dim, style = call.attrs["head_dim"], call.attrs["style"]
    rotates = (call.attrs["heads"] + call.attrs["kv_heads"]) * head_dim

    def step(_: Any, qkv: Any, cos: Any, sin: Any) -> Any:
        seq = qkv.shape[1]
        turned = rotated(qkv[..., :rotates], cos[:seq], sin[:seq], head_dim, style)
        return torch.cat([turned, qkv[..., rotates:]], -1)

    return step


def kv_append(call: OpCall) -> Callable[..., Any]:
    """The query, rotated, and the caches, which gain the new rows that fit."""
    heads, kv_heads, head_dim = (call.attrs[name] for name in ("heads", "kv_heads", "head_dim"))
    style = call.attrs.get("style", "")
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]

    def step(_: Any, qkv: Any, lengths: Any, key_cache: Any, value_cache: Any, *tables: Any) -> Any:
        query, key, value = qkv.split(widths, -1)
        at = positions(qkv, lengths)
        if style:
            rows = at.clamp(0, tables[0].shape[0] - 1)
            cos, sin = (table[rows] for table in tables)
            query, key = (rotated(x, cos, sin, head_dim, style) for x in (query, key))
        sequence, new = ((at >= 0) & (at < key_cache.shape[2])).nonzero(as_tuple=True)
        for cache, rows in ((key_cache, key), (value_cache, value)):
            cache[sequence, :, at[sequence, new]] = rows[sequence, new].unflatten(-1, (kv_heads, head_dim))
        return query, key_cache, value_cache

    return step


def relative_bias(call: OpCall) -> Callable[..., Any]:
    """``table[:, j - p + zero]``, the index clamped; p counted from the start or back from ``lengths``."""
    import torch

    zero = int(call.attrs["zero"])

    def step(_: Any, rows: Any, table: Any, *rest: Any) -> Any:
        keys = torch.arange(rest[1].shape[2] if rest else rows.shape[1], device=rows.device)
        at = positions(rows, rest[0] if rest else None)[..., None]
        found = table[:, (keys - at + zero).clamp(0, table.shape[1] - 1)]
        return found.transpose(0, 1) if rest else found[None]

    return step


def argmax(call: OpCall) -> Callable[..., Any]:
    """The first largest of each row."""
    return lambda _, x: x.argmax(-1)


def top_k(call: OpCall) -> Callable[..., Any]:
    """Values and indices, largest first."""
    return lambda _, x: tuple(x.topk(int(call.attrs["k"]), dim=-1))


#: Makers by operator name.
MAKERS: dict[str, Callable[[OpCall], Callable[..., Any]]] = {
    "argmax": argmax,
    "embedding": embedding,
    "head_norm": head_norm,
    "kv_append": kv_append,
    "relative_bias": relative_bias,
    "rms_norm": rms_norm,
    "rope": rope,
    "top_k": top_k,
}
