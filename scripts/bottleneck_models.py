"""The three encoder-decoders of scripts/bottleneck.py: sizes, training in PyTorch, attntune models."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch.nn import functional as F

from attntune.models import encoder_decoder, rnn
from attntune.models.model import Generation

PAD, START, STOP, FIRST = 0, 1, 2, 3
SYMBOLS = 32
VOCAB = FIRST + SYMBOLS
LONGEST = 48
HIDDEN = 64


def config(kind, width=HIDDEN, longest=256):
    """Sizes; each encoder gives ``width`` features a position, each decoder has as many units."""
    if kind == "transformer":
        return encoder_decoder.EncoderDecoderConfig(
            vocab_size=VOCAB, source_vocab_size=VOCAB, hidden_size=width, heads=max(4, width // 64),
            encoder_layers=2, decoder_layers=2, inner=4 * width, source_positions=longest, positions=longest,
            norm_first=True,
        )  # fmt: skip
    attention = kind == "additive"
    units = width // 2 if attention else width
    return rnn.RNNConfig(
        VOCAB, VOCAB, width // 2, width // 2, units, width, bidirectional=attention, attention=attention
    )


def batch(rng, rows, length):
    """Random symbols (rows, length), and the same in reverse order."""
    source = rng.integers(FIRST, VOCAB, (rows, length))
    return source, source[:, ::-1].copy()


# -- training ----------------------------------------------------------------------------------------------------------


def gru(w, name, x, state=None, *, reverse=False):
    """torch's GRU with weights by attntune's names; x (batch, seq, features)."""
    names = ("input.weight", "recurrent_weight", "input.bias", "recurrent_bias")
    flat = [w[f"{name}.{part}"] for part in names]
    start = x.new_zeros(1, x.shape[0], flat[1].shape[1]) if state is None else state[None]
    y, last = torch._VF.gru(x.flip(1) if reverse else x, start, flat, True, 1, 0.0, True, False, True)
    return (y.flip(1) if reverse else y), last[0]


def rnn_logits(w, c, source, target):
    """Logits (batch, seq, vocab) of either GRU."""
    x = w["encoder.embedding"][source]
    outputs, state = gru(w, "encoder.gru", x)
    inputs = w["decoder.embedding"][target]
    if not c.attention:
        states, _ = gru(w, "decoder.gru", inputs, state)
        return F.linear(states, w["decoder.output.weight"], w["decoder.output.bias"])
    back, _ = gru(w, "encoder.reverse_gru", x, reverse=True)
    memory = F.linear(outputs, w["encoder.memory.weight"], w["encoder.memory.bias"])
    memory = memory + F.linear(back, w["encoder.reverse_memory.weight"])
    states, _ = gru(w, "decoder.gru", inputs)
    scores = torch.tanh(states[:, :, None] + memory[:, None]) @ w["decoder.scale"]
    context = torch.softmax(scores, -1) @ memory
    logits = F.linear(states, w["decoder.output.weight"], w["decoder.output.bias"])
    return logits + F.linear(context, w["decoder.context.weight"])


def transformer_logits(w, c, source, target):
    """Logits (batch, seq, vocab) of the pre-norm Transformer."""

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (c.hidden_size,), w[f"{name}.weight"], w[f"{name}.bias"], c.eps)

    def attend(q, k, v, name, causal=False):
        q, k, v = (t.unflatten(-1, (c.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return linear(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2), name)

    def self_attention(x, at, causal):
        packed = linear(norm(x, f"{at}attention_norm"), f"{at}attention.qkv")
        return x + attend(*packed.chunk(3, -1), f"{at}attention.output", causal)

    def feed_forward(x, at):
        inner = torch.relu(linear(norm(x, f"{at}feed_forward_norm"), f"{at}feed_forward.up"))
        return x + linear(inner, f"{at}feed_forward.down")

    x = w["encoder.table"][source] + w["encoder.position"][: source.shape[1]]
    for index in range(c.encoder_layers):
        x = feed_forward(self_attention(x, f"encoder.layers.{index}.", False), f"encoder.layers.{index}.")
    memory = norm(x, "encoder.norm")
    x = w["decoder.table"][target] + w["decoder.position"][: target.shape[1]]
    for index in range(c.decoder_layers):
        at = f"decoder.layers.{index}."
        x = self_attention(x, at, True)
        query = linear(norm(x, f"{at}cross_attention_norm"), f"{at}cross_attention.query")
        keys, values = (linear(memory, f"{at}cross_attention.{part}") for part in ("key", "value"))
        x = feed_forward(x + attend(query, keys, values, f"{at}cross_attention.output"), at)
    return F.linear(norm(x, "decoder.norm"), w["head.weight"])


def train(kind, steps, rows, seed):
    """Weights by name after ``steps`` batches of one length each, drawn up to the longest."""
    c = config(kind)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    w = {}
    for name, shape in c.shapes().items():
        if name.endswith("position"):
            w[name] = torch.from_numpy(encoder_decoder.sinusoids(*shape))
            continue
        value = torch.randn(shape) / (shape[-1] ** 0.5 if len(shape) > 1 else 1.0)
        if len(shape) == 1:
            value = torch.ones(shape) if name.endswith("norm.weight") or name == "decoder.scale" else torch.zeros(shape)
        w[name] = value.requires_grad_()
    logits = transformer_logits if kind == "transformer" else rnn_logits
    trained = [value for value in w.values() if value.requires_grad]
    peak = 1e-3 if kind == "transformer" else 3e-3
    optimizer = torch.optim.Adam(trained, lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    started = time.perf_counter()
    for step in range(steps):
        # Short sequences first: from the start at full length, neither GRU leaves the plateau within minutes.
        most = min(LONGEST, 4 + int(LONGEST * 2 * step / steps))
        source, target = batch(rng, rows, int(rng.integers(2, most + 1)))
        given = np.concatenate([np.full((rows, 1), START), target], 1)
        wanted = np.concatenate([target, np.full((rows, 1), STOP)], 1)
        found = logits(w, c, torch.from_numpy(source), torch.from_numpy(given))
        loss = F.cross_entropy(found.flatten(0, 1), torch.from_numpy(wanted).flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"{kind}: step {step}, loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return {name: value.detach().numpy() for name, value in w.items()}


def model(kind, weights, c=None):
    """The attntune model, by default of the sizes that are trained."""
    c = c or config(kind)
    if kind != "transformer":
        generation = Generation("rnn", start=(START,), stop=(STOP,))
        built = rnn.build(c, weights, kind, generation=generation)
        built.max_lengths = {}
        return built
    generation = Generation("encoder-decoder", start=(START,), stop=(STOP,), max_length=c.positions)
    return encoder_decoder.build(c, weights, kind, family="transformer", generation=generation, shapes=())


def seeded_weights(c, seed):
    """Weights of an untrained model of either config."""
    if isinstance(c, rnn.RNNConfig):
        return rnn.random_model(c, seed=seed).weights
    return encoder_decoder.random_weights(c, seed)
