"""What torch alone makes of each operator's workload; operands and results are float64."""

from __future__ import annotations

from itertools import pairwise

from attntune.ops import (
    AdditiveAttention,
    AddPositions,
    ArgMax,
    Attention,
    Embedding,
    EmbeddingNorm,
    HeadNorm,
    KVAppend,
    LayerNorm,
    Linear,
    MeanPool,
    Patchify,
    PrependToken,
    RelativeBias,
    RMSNorm,
    Rope,
    SelectRows,
    Softmax,
    TopK,
    Unfold,
)


def ungrouped(weight, scale, minimum):
    """A weight of which 32 neighbours in a row share a scale and a minimum."""
    wide = (part.repeat_interleave(32, 1)[:, : weight.shape[1]].double() for part in (scale, minimum))
    return weight * next(wide) + next(wide)


def rounded(x, width):
    """X with one scale of 127 steps for so many values of a row, in float32 as the definition has it."""
    import torch

    exact = []
    for group in x.float().split(width, dim=1):
        top = group.abs().amax(1, keepdim=True)
        whole = torch.round(group * (torch.full_like(top, 127) / top)).double()
        exact.append(whole * (top * torch.tensor(1 / 127)).double())
    return torch.cat(exact, dim=1)


def linear(w: Linear, x, weight, *rest):
    from torch.nn import functional as F

    rest = list(rest)
    lengths = rest.pop() if w.seq else None
    if w.quantized:
        weight = weight * rest.pop(0)[:, None]
        x = rounded(x, 64)
    if w.x_dtype:
        x = rounded(x, 32)
    if w.grouped:
        weight = ungrouped(weight, rest.pop(0), rest.pop(0))
    y = F.linear(x, weight, rest.pop(0) if w.bias else None)
    activation = {
        "": lambda v: v,
        "relu": F.relu,
        "gelu": F.gelu,
        "silu": F.silu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    }[w.activation]
    if w.gated:
        gate, up = y.chunk(2, dim=-1)
        y = activation(gate) * up
    else:
        y = activation(y)
    y = y + rest.pop(0) if w.residual else y
    return y if lengths is None else _ended(y, w.seq, lengths)


def _ended(rows, seq, lengths):
    """Zeros in rows of (batch·seq, features) past each sequence's end."""
    for b, length in enumerate(lengths.tolist()):
        rows[b * seq + length : (b + 1) * seq] = 0
    return rows


def halve_far_scores(score, b, h, i, j):
    """A ``score_mod``: arithmetic alone, so that it serves tensor expressions and NumPy."""
    return score * (1.0 - 0.5 * ((i - j) % 2)) + 0.25 * h - 0.125 * b


def attention(w: Attention, *operands):
    """One (batch, head, query) at a time, so that no shape, mask or offset is shared with the reference."""
    import torch
    from torch.nn import functional as F

    given = dict(zip((spec.name for spec in w.inputs()), operands, strict=True))
    if w.packed:
        widths = [w.heads * w.head_dim, w.kv_heads * w.head_dim, w.kv_heads * w.head_dim]
        query, key, value = given["qkv"].split(widths, dim=-1)
    else:
        query, key, value = given["query"], given["key"], given["value"]
    if w.ragged:
        ends = given["offsets"].tolist()
        sequences = [range(a, b) for a, b in pairwise(ends)]
        query, key, value = (
            [
                x[s.start : s.stop].reshape(len(s), x.shape[1] // w.head_dim, w.head_dim).transpose(0, 1)
                for s in sequences
            ]
            for x in (query, key, value)
        )
    else:
        query, key, value = (
            x if x.dim() == 4 else x.reshape(w.batch, x.shape[1], -1, w.head_dim).transpose(1, 2)
            for x in (query, key, value)
        )
    out = torch.zeros(w.outputs()[0].shape, dtype=torch.float64)
    weights = torch.zeros(w.batch, w.heads, w.q_len, w.kv_len, dtype=torch.float64)
    for b in range(w.batch):
        length = int(given["lengths"][b]) if w.lengths else key[b].shape[1]
        queries = min(query[b].shape[1], length) if w.lengths == "qkv" else query[b].shape[1]
        for h in range(w.heads):
            q, k, v = query[b][h], key[b][h // (w.heads // w.kv_heads)], value[b][h // (w.heads // w.kv_heads)]
            for i in range(queries):
                at = i + w.causal_offset + (length - w.q_len if w.lengths == "kv" else 0)
                last = min(at + 1, length) if w.causal else length
                seen = range(max(0, at + 1 - w.window) if w.window else 0, last)
                seen = [j for j in seen if not w.mask or given["mask"][b, j] != 0]
                if not seen:
                    continue
                j = torch.tensor(seen)
                score = k[j] @ q[i] * (w.head_dim**-0.5 if w.scale is None else w.scale)
                if w.softcap:
                    score = w.softcap * torch.tanh(score / w.softcap)
                if w.bias_heads:
                    bias = given["bias"]
                    score = score + bias[b % bias.shape[0], h % bias.shape[1], i % bias.shape[2]][j]
                if w.alibi:
                    score = score + given["slopes"][h] * (j - at)
                if w.score_mod:
                    score = halve_far_scores(score, b, h, i, j)
                share = F.softmax(score, dim=0).nan_to_num(0.0)
                weights[b, h, i, j] = share
                columns = slice(h * w.head_dim, (h + 1) * w.head_dim)
                if w.layout == "bhsd":
                    out[b, h, i] = share @ v[j]
                elif w.ragged:
                    out[sequences[b].start + i, columns] = share @ v[j]
                else:
                    out[b, i, columns] = share @ v[j]
    return (out, weights) if w.weights else out


def layer_norm(w: LayerNorm, x, *rest):
    from torch.nn import functional as F

    *rest, lengths = rest if w.seq else (*rest, None)
    *residual, weight, bias = rest
    y = F.layer_norm(x + residual[0] if residual else x, (w.features,), weight, bias, w.eps)
    return y if lengths is None else _ended(y, w.seq, lengths)


def embedding_norm(w: EmbeddingNorm, ids, type_ids, word, position, type_, weight, bias):
    from torch.nn import functional as F

    row = F.embedding(ids, word) + position[: w.seq] + F.embedding(type_ids, type_)
    return F.layer_norm(row, (w.features,), weight, bias, w.eps)


def mean_pool(w: MeanPool, x, mask):
    from torch.nn import functional as F

    chosen = (mask != 0)[:, :, None]
    mean = x.masked_fill(~chosen, 0.0).sum(1) / chosen.sum(1).clamp(min=w.eps)
    return F.normalize(mean) if w.normalize else mean


def softmax(w: Softmax, x):
    from torch.nn import functional as F

    return F.softmax(x, dim=-1)


def rms_norm(w: RMSNorm, x, *rest):
    from torch.nn import functional as F

    *residual, weight = rest
    return F.rms_norm(x + residual[0] if residual else x, (w.features,), weight, w.eps)


def embedding(w: Embedding, ids, table, *rest):
    from torch.nn import functional as F

    rest = list(rest)
    if w.weight_dtype:
        table = ungrouped(table, rest.pop(0), rest.pop(0))
    y = F.embedding(ids, table) * w.scale
    if w.positions:
        position = rest.pop(0)
        for b in range(w.batch):
            first = int(rest[0][b]) - w.seq if w.lengths else 0
            for i in range(w.seq):
                y[b, i] += position[min(max(first + i + w.position_offset, 0), w.positions - 1)]
    return y


def patchify(w: Patchify, x):
    from torch.nn import functional as F

    return F.unfold(x, w.patch, stride=w.patch).transpose(1, 2)


def unfold(w: Unfold, x):
    from torch.nn import functional as F

    x = x if w.layout == "bcl" else x.transpose(1, 2)
    windows = F.unfold(x[:, :, None, :], (1, w.kernel), stride=(1, w.stride), padding=(0, w.padding))
    return windows.reshape(w.batch, w.channels, w.kernel, w.steps).permute(0, 3, 2, 1).flatten(2)


def add_positions(w: AddPositions, x, position):
    return x + position[: w.seq].expand_as(x)


def relative_bias(w: RelativeBias, rows, table, *rest):
    import torch

    ends = rest[0].tolist() if rest else [w.q_len]
    made = []
    for end in ends:
        first = end - w.q_len
        made.append([
            [table[:, min(max(j - (first + i) + w.zero, 0), w.distances - 1)] for j in range(w.kv_len)]
            for i in range(w.q_len)
        ])  # fmt: skip
    return torch.stack([torch.stack([torch.stack(row) for row in rows]) for rows in made]).permute(0, 3, 1, 2)


def prepend_token(w: PrependToken, x, token, position):
    import torch

    return torch.stack([torch.cat([token[None], rows]) + position for rows in x])


def select_rows(w: SelectRows, x, *index):
    import torch

    if w.row >= 0:
        return x[:, w.row]
    (index,) = index
    return torch.stack([x[b, min(max(int(index[b]), 0), w.seq - 1)] for b in range(w.batch)])


def _turn(head, cos, sin, style):
    """One head as complex numbers, turned by multiplication."""
    import torch

    half = len(head) // 2
    a, b = (head[:half], head[half:]) if style == "half" else (head[0::2], head[1::2])
    turned = torch.complex(a, b) * torch.complex(cos.double(), sin.double())
    if style == "half":
        return torch.cat([turned.real, turned.imag])
    return torch.stack([turned.real, turned.imag], dim=1).flatten()


def rope(w: Rope, qkv, cos, sin):
    y = qkv.clone()
    for b in range(w.batch):
        for s in range(w.seq):
            for h in range(w.heads + w.kv_heads):
                at = slice(h * w.head_dim, (h + 1) * w.head_dim)
                y[b, s, at] = _turn(qkv[b, s, at], cos[s], sin[s], w.style)
    return y


def head_norm(w: HeadNorm, qkv, weight):
    from torch.nn import functional as F

    y = qkv.clone()
    for h in range(w.heads + w.kv_heads):
        at = slice(h * w.head_dim, (h + 1) * w.head_dim)
        y[:, at] = F.rms_norm(qkv[:, at], (w.head_dim,), weight[h], w.eps)
    return y


def kv_append(w: KVAppend, qkv, lengths, key_cache, value_cache, *angles):
    import torch

    query, keys, values = [], key_cache.clone(), value_cache.clone()
    for b in range(w.batch):
        for i in range(w.q_len):
            at = int(lengths[b]) - w.q_len + i
            heads = list(qkv[b, i].reshape(-1, w.head_dim))
            if w.style:
                angle = min(max(at, 0), w.positions - 1)
                turned = heads[: w.heads + w.kv_heads]
                heads[: len(turned)] = [_turn(head, angles[0][angle], angles[1][angle], w.style) for head in turned]
            query.append(torch.cat(heads[: w.heads]))
            if 0 <= at < w.context:
                for head in range(w.kv_heads):
                    keys[b, head, at] = heads[w.heads + head]
                    values[b, head, at] = heads[w.heads + w.kv_heads + head]
    return torch.stack(query).reshape(w.batch, w.q_len, -1), keys, values


def argmax(w: ArgMax, x):
    import torch

    return torch.stack([(row == row.max()).nonzero()[0, 0] for row in x])


def top_k(w: TopK, x):
    values, indices = x.sort(dim=-1, descending=True, stable=True)
    return values[:, : w.k], indices[:, : w.k]


def recurrent(w, *operands):
    """One sequence at a time through torch's own layer, its input weights an identity."""
    import torch

    given = dict(zip((spec.name for spec in w.inputs()), operands, strict=True))
    wide = w.gates * w.hidden
    layer = {"gru_sequence": torch.nn.GRU, "lstm_sequence": torch.nn.LSTM}[w.op](wide, w.hidden, batch_first=True)
    layer = layer.double()
    outputs = torch.zeros(w.batch, w.seq, w.hidden, dtype=torch.float64)
    zero = torch.zeros(w.batch, w.hidden, dtype=torch.float64)
    states = [given.get(f"initial_{name}", zero).clone() for name in w.states]
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(wide))
        layer.bias_ih_l0.zero_()
        layer.weight_hh_l0.copy_(given["recurrent_weight"])
        layer.bias_hh_l0.copy_(given["recurrent_bias"] if w.bias else torch.zeros(wide))
        for b in range(w.batch):
            length = int(given["lengths"][b]) if w.lengths else w.seq
            if length == 0:
                continue
            x = given["projected"][b : b + 1, :length]
            start = tuple(state[None, b : b + 1].clone() for state in states)
            y, last = layer(x.flip(1) if w.reverse else x, start if len(start) > 1 else start[0])
            outputs[b, :length] = (y.flip(1) if w.reverse else y)[0]
            for state, value in zip(states, last if len(states) > 1 else (last,), strict=True):
                state[b] = value[0, 0]
    return (outputs, *states)


def additive_attention(w: AdditiveAttention, *operands):
    """One query at a time, over the keys it sees."""
    import torch

    given = dict(zip((spec.name for spec in w.inputs()), operands, strict=True))
    context, weights = (torch.zeros(spec.shape, dtype=torch.float64) for spec in w.outputs())
    for b in range(w.batch):
        seen = [
            j
            for j in range(int(given["lengths"][b]) if w.lengths else w.kv_len)
            if not w.mask or given["mask"][b, j] != 0
        ]
        for i in range(w.q_len):
            energy = torch.tanh(given["query"][b, i] + given["key"][b, seen])
            share = torch.softmax((energy * given["scale"] if w.scale else energy).sum(-1), dim=0)
            weights[b, i, seen] = share
            context[b, i] = share @ given["value"][b, seen]
    return context, weights
