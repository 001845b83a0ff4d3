"""PyTorch twins of recurrent layers and additive attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attntune.models.model import OpCall


def _gru(x: Any, s: Any, states: list[Any]) -> list[Any]:
    (xr, xz, xn), (sr, sz, sn) = x.chunk(3, -1), s.chunk(3, -1)
    update = (xz + sz).sigmoid()
    new = (xn + (xr + sr).sigmoid() * sn).tanh()
    return [(1 - update) * new + update * states[0]]


def _lstm(x: Any, s: Any, states: list[Any]) -> list[Any]:
    i, f, g, o = (x + s).chunk(4, -1)
    cell = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return [o.sigmoid() * cell.tanh(), cell]


def _sequence(call: OpCall, cell: Callable[[Any, Any, list[Any]], list[Any]], count: int) -> Callable[..., Any]:
    """Outputs and last states, position by position: the input projections are done, so torch's layers do not fit."""
    import torch

    attrs = call.attrs

    def step(_: Any, projected: Any, weight: Any, *rest: Any) -> Any:
        extra = iter(rest)
        bias = next(extra) if attrs.get("bias") else None
        x = projected if projected.dim() == 3 else projected[:, None]
        batch, seq, hidden = x.shape[0], x.shape[1], weight.shape[1]
        initial = bool(attrs.get("initial"))
        states = [next(extra) if initial else x.new_zeros(batch, hidden) for _ in range(count)]
        lengths = next(extra).long() if attrs.get("lengths") else None
        outputs = x.new_zeros(batch, seq, hidden)
        for index in range(seq):
            position = seq - 1 - index if attrs.get("reverse") else index
            fresh = cell(x[:, position], torch.nn.functional.linear(states[0], weight, bias), states)
            if lengths is None:
                states, outputs[:, position] = fresh, fresh[0]
                continue
            inside = (position < lengths)[:, None]
            states = [torch.where(inside, new, old) for new, old in zip(fresh, states, strict=True)]
            outputs[:, position] = fresh[0].masked_fill(~inside, 0.0)
        return (outputs if projected.dim() == 3 else outputs[:, 0], *states)

    return step


def gru_sequence(call: OpCall) -> Callable[..., Any]:
    """Gates r, z, n, the reset gate after the product."""
    return _sequence(call, _gru, 1)


def lstm_sequence(call: OpCall) -> Callable[..., Any]:
    """Gates i, f, g, o."""
    return _sequence(call, _lstm, 2)


def additive_attention(call: OpCall) -> Callable[..., Any]:
    """Context and weights; both zero where no key is seen."""
    import torch

    scaled, masked, ragged = (bool(call.attrs.get(name)) for name in ("scale", "mask", "lengths"))

    def step(_: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
        extra = iter(rest)
        hidden = (query.unsqueeze(1) if query.dim() == 2 else query).unsqueeze(2) + key.unsqueeze(1)
        scores = hidden.tanh() @ next(extra) if scaled else hidden.tanh().sum(-1)
        seen = torch.ones(key.shape[:2], dtype=torch.bool)
        if masked:
            seen = seen & (next(extra) != 0)
        if ragged:
            seen = seen & (torch.arange(key.shape[1]) < next(extra)[:, None])
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        context = weights @ value.masked_fill(~seen[:, :, None], 0.0)
        return context.squeeze(1) if query.dim() == 2 else context, weights.unsqueeze(1).float()

    return step


#: Makers by operator name.
MAKERS: dict[str, Callable[[OpCall], Callable[..., Any]]] = {
    "additive_attention": additive_attention,
    "gru_sequence": gru_sequence,
    "lstm_sequence": lstm_sequence,
}
