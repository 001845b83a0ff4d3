"""The PyTorch twin of attention, and the masks that its calls share in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attntune.ops.attention import FLOOR

if TYPE_CHECKING:
    from attntune.models.model import OpCall

#: Where a run's shared values say whether masks may be looked into.
INSPECT = "inspect"


def attention(call: OpCall) -> Callable[..., Any]:
    """Scaled dot-product attention by PyTorch's own operator, with every mask as one that is added to scores."""
    from torch.nn import functional as F

    attrs = call.attrs
    heads, kv_heads, head_dim = attrs["heads"], attrs["kv_heads"], attrs["head_dim"]
    packed, causal, scale = bool(attrs["packed"]), bool(attrs["causal"]), attrs.get("scale")
    window = int(attrs.get("window", 0))
    at = 1 if packed else 3
    places: list[int | None] = []
    for given in (attrs["mask"], attrs["bias"], attrs.get("lengths")):
        places.append(at if given else None)
        at += bool(given)
    sources = tuple(None if place is None else call.args[place] for place in places)
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]

    def step(shared: dict[Any, Any], *operands: Any) -> Any:
        query, key, value = operands[0].split(widths, -1) if packed else operands[:3]
        batch, q_len, kv_len = query.shape[0], query.shape[1], key.shape[-2]
        mask, bias, lengths = (None if place is None else operands[place] for place in places)
        name = (*sources, causal, window, q_len, kv_len)
        if name not in shared:
            exist = None if lengths is None else _exist(lengths, attrs["lengths"], causal, q_len, kv_len)
            if window:
                exist = _inside(window, lengths if attrs.get("lengths") == "kv" else None, exist, q_len, kv_len)
            triangle = causal and attrs.get("lengths") != "kv"
            shared[name] = _additive_mask(mask, bias, exist, triangle, query, kv_len, shared[INSPECT])
        additive, attends = shared[name]
        query, key, value = (
            x if x.dim() == 4 else x.view(batch, x.shape[1], count, head_dim).transpose(1, 2)
            for x, count in ((query, heads), (key, kv_heads), (value, kv_heads))
        )  # fmt: skip
        if attrs.get("weights"):
            return _with_weights(query, key, value, additive, attends, causal, scale)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=additive,
            is_causal=causal and additive is None,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )
        if attends is not None:
            out = out.masked_fill(~attends, 0.0)
        return out.transpose(1, 2).reshape(batch, q_len, heads * head_dim)

    return step


def _exist(lengths: Any, kind: str, causal: bool, q_len: int, kv_len: int) -> Any:
    """Bool (batch, 1, q_len|1, kv_len): pairs within sequences of ``lengths``; with "kv" and causal, of the past."""
    import torch

    column = lengths.long()[:, None, None, None]
    keys, index = torch.arange(kv_len), torch.arange(q_len)[:, None]
    found = keys < column
    if kind == "qkv":
        return found & (index < column)
    return found & (keys <= index + column - q_len) if causal else found


def _inside(window: int, lengths: Any, exist: Any, q_len: int, kv_len: int) -> Any:
    """``exist`` where keys are less than ``window`` before a query, whose position ``lengths`` may tell."""
    import torch

    at = torch.arange(q_len)[:, None]
    if lengths is not None:
        at = at + lengths.long()[:, None, None, None] - q_len
    found = torch.arange(kv_len) > at - window
    return found if exist is None else exist & found


def _with_weights(
    query: Any, key: Any, value: Any, additive: Any, attends: Any, causal: bool, scale: float | None
) -> tuple[Any, Any]:
    """Attention of operands (batch, heads, len, head_dim), spelled out, and its weights."""
    import torch

    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if additive is not None:
        scores = scores + additive
    elif causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    weights = scores.softmax(-1)
    if attends is not None:
        weights = weights.masked_fill(~attends, 0.0)
    return (weights @ value).transpose(1, 2).flatten(2), weights


def _additive_mask(
    mask: Any, bias: Any, exist: Any, causal: bool, query: Any, kv_len: int, inspect: bool
) -> tuple[Any, Any]:
    """What SDPA adds to scores (None where nothing is masked), and where a query may attend no key (else None).

    Built once per run and mask, as Hugging Face does. With ``inspect``, a mask of ones is dropped, which frees SDPA's
    faster path; without, no branch depends on values, so that torch.compile captures one graph.
    """
    import torch

    allowed = exist
    if mask is not None and not (inspect and bool(mask.all())):
        kept = (mask != 0)[:, None, None, :]
        allowed = kept if allowed is None else allowed & kept
    if bias is not None:
        finite = bias > FLOOR
        if not (inspect and bool(finite.all())):
            allowed = finite if allowed is None else allowed & finite
    if allowed is None and bias is None:
        return None, None
    if causal:
        triangle = torch.ones(query.shape[1], kv_len, dtype=torch.bool, device=query.device).tril()
        allowed = triangle if allowed is None else allowed & triangle
    if allowed is None:
        return bias, None
    attends = allowed.any(-1, keepdim=True)
    base = torch.zeros((), dtype=query.dtype, device=query.device) if bias is None else bias
    additive = torch.where(allowed, base, torch.finfo(query.dtype).min)
    return additive, None if inspect and bool(attends.all()) else attends
