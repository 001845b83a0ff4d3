"""Marian and T5 in plain PyTorch, from the tensors and configs of their checkpoints, one pair of texts at a time.

Nothing is padded or cached, heads are einsum axes, T5's bias is made pair by pair of positions.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

ACTIVATIONS = {"swish": F.silu, "relu": F.relu, "gated-gelu": lambda x: F.gelu(x, approximate="tanh")}


def attend(q, k, v, heads, scale, bias=None):
    """(rows, heads·dim) of q over k and v; and the weights (heads, rows, keys)."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1), weights


def past(rows):
    """-inf (rows, rows) above the diagonal."""
    return torch.full((rows, rows), -torch.inf).triu(1)


@torch.inference_mode()
def marian(t, config, source, target):
    """Logits (target, vocab), and weights by kind and layer."""
    hidden, heads = config["d_model"], config["encoder_attention_heads"]
    activation = ACTIVATIONS[config["activation_function"]]
    maps = {"encoder_attention": [], "attention": [], "cross_attention": []}

    def linear(x, name):
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (hidden,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)

    def embed(ids, table):
        angle = torch.arange(len(ids))[:, None].double() / 10000 ** (torch.arange(0, hidden, 2).double() / hidden)
        position = torch.cat([angle.sin(), angle.cos()], 1).float()
        return t[table][torch.tensor(ids)] * (math.sqrt(hidden) if config["scale_embedding"] else 1.0) + position

    def attention(x, memory, at, kind, bias=None):
        q, k, v = (linear(y, f"{at}.{part}_proj") for y, part in ((x, "q"), (memory, "k"), (memory, "v")))
        mixed, weights = attend(q, k, v, heads, (hidden // heads) ** -0.5, bias)
        maps[kind].append(weights)
        return norm(x + linear(mixed, f"{at}.out_proj"), f"{at}_layer_norm")

    def feed_forward(x, at):
        return norm(x + linear(activation(linear(x, f"{at}.fc1")), f"{at}.fc2"), f"{at}.final_layer_norm")

    tables = ["model.shared.weight"] * 2
    if tables[0] not in t:
        tables = [f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    memory = embed(source, tables[0])
    for i in range(config["encoder_layers"]):
        at = f"model.encoder.layers.{i}"
        memory = feed_forward(attention(memory, memory, f"{at}.self_attn", "encoder_attention"), at)
    x = embed(target, tables[1])
    for i in range(config["decoder_layers"]):
        at = f"model.decoder.layers.{i}"
        x = attention(x, x, f"{at}.self_attn", "attention", past(len(target)))
        x = feed_forward(attention(x, memory, f"{at}.encoder_attn", "cross_attention"), at)
    return F.linear(x, t[tables[1]]) + t["final_logits_bias"][0], maps


@torch.inference_mode()
def t5(t, config, source, target):
    """Logits (target, vocab), and weights by kind and layer."""
    heads, buckets = config["num_heads"], config["relative_attention_num_buckets"]
    maps = {"encoder_attention": [], "attention": [], "cross_attention": []}
    gated = config["feed_forward_proj"].startswith("gated")
    activation = ACTIVATIONS[config["feed_forward_proj"]]

    def linear(x, name):
        return F.linear(x, t[f"{name}.weight"])

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + config["layer_norm_epsilon"]).rsqrt() * t[f"{name}.weight"]

    def bucket(distance, side):
        exact, longest = side // 2, config["relative_attention_max_distance"]
        if distance < exact:
            return distance
        grown = math.log(distance / exact) / math.log(longest / exact) * (side - exact)
        # What is a whole number up to rounding begins a bucket.
        return min(exact + math.floor(grown + 1e-6), side - 1)

    def bias(side, rows):
        table = t[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        half = buckets // 2
        if side == "encoder":
            at = [[half * (j > i) + bucket(abs(j - i), half) for j in range(rows)] for i in range(rows)]
        else:
            at = [[bucket(max(i - j, 0), buckets) for j in range(rows)] for i in range(rows)]
        return table[torch.tensor(at)].permute(2, 0, 1)

    def attention(x, memory, at, name, kind, bias=None):
        y = norm(x, f"{at}.layer_norm")
        memory = y if memory is None else memory
        q, k, v = (linear(z, f"{at}.{name}.{part}") for z, part in ((y, "q"), (memory, "k"), (memory, "v")))
        mixed, weights = attend(q, k, v, heads, 1.0, bias)
        maps[kind].append(weights)
        return x + linear(mixed, f"{at}.{name}.o")

    def feed_forward(x, at):
        y = norm(x, f"{at}.layer_norm")
        at = f"{at}.DenseReluDense"
        inner = activation(linear(y, f"{at}.wi_0" if gated else f"{at}.wi"))
        return x + linear(inner * linear(y, f"{at}.wi_1") if gated else inner, f"{at}.wo")

    memory, own = t["shared.weight"][torch.tensor(source)], bias("encoder", len(source))
    for i in range(config["num_layers"]):
        at = f"encoder.block.{i}.layer"
        memory = attention(memory, None, f"{at}.0", "SelfAttention", "encoder_attention", own)
        memory = feed_forward(memory, f"{at}.1")
    memory = norm(memory, "encoder.final_layer_norm")
    x, own = t["shared.weight"][torch.tensor(target)], bias("decoder", len(target)) + past(len(target))
    for i in range(config["num_decoder_layers"]):
        at = f"decoder.block.{i}.layer"
        x = attention(x, None, f"{at}.0", "SelfAttention", "attention", own)
        x = attention(x, memory, f"{at}.1", "EncDecAttention", "cross_attention")
        x = feed_forward(x, f"{at}.2")
    x = norm(x, "decoder.final_layer_norm")
    if config["tie_word_embeddings"]:
        return F.linear(x * config["d_model"] ** -0.5, t["shared.weight"]), maps
    return linear(x, "lm_head"), maps


def greedy(logits, start, stop, never, most):
    """What ``logits(target)`` writes after ``start``, everything recomputed at every token."""
    written = list(start)
    while len(written) - len(start) < most:
        scores = logits(written)[-1].clone()
        scores[list(never)] = -torch.inf
        if (token := int(scores.argmax())) in stop:
            break
        written.append(token)
    return written[len(start) :]


def beams(logits, start, stop, never, most, width):
    """The best sequence and its mean log probability, of at most ``most`` tokens: beam search of ``width``."""
    going, done = [(0.0, ())], []
    for _ in range(most):
        found = []
        for total, tokens in going:
            scores = logits([*start, *tokens])[-1].double()
            scores[list(never)] = -torch.inf
            found += [(total + float(s), (*tokens, k)) for k, s in enumerate(scores.log_softmax(-1)) if s > -torch.inf]
        found.sort(key=lambda item: -item[0])
        going = [item for item in found if item[1][-1] not in stop][:width]
        # Ends are taken as they rank among those that may be looked at.
        done += [item for item in found[: width * (1 + len(stop))] if item[1][-1] in stop]
    total, tokens = max((*done, *going), key=lambda item: item[0] / len(item[1]))
    return [token for token in tokens if token not in stop], total / len(tokens)
