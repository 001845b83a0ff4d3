"""Decoder-only language models with pre-normalisation: what Llama and GPT-2 have in common, and where they differ.

Entries: ``forward`` recomputes everything and has no cache; ``prefill`` and ``decode`` keep keys and values in caches
that are updated in place; ``attend`` is ``forward`` with the attention weights of every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from attntune.models.model import Dim, Entry, Generation, InputSpec, Model
from attntune.ops.rope import angles

#: Capacity of a cache that is compiled when no other is asked for.
DEFAULT_CONTEXT = 1024
#: Lengths of a prompt (or of a chunk of one) that are compiled by batch, when no shapes are asked for.
_PROMPTS = {1: (16, 64, 128, 256, 512), 4: (16, 64, 128)}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and variants of a pre-norm decoder."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    """Features between the two halves of a feed-forward layer."""
    positions: int
    """Longest sequence."""
    norm: str
    """``"rms"`` or ``"layer"``."""
    eps: float
    activation: str
    gated: bool
    rope: str = ""
    """Style of rotary embedding, see :class:`attntune.ops.Rope`; ``""``: learned positions are added to the input."""
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] = ()
    """What the frequency of each pair of elements is divided by, for texts longer than a model was first trained on;
    empty: by nothing."""
    rope_magnitude: float = 1.0
    """What cosines and sines of positions are multiplied by."""
    window: int = 0
    """How many tokens a token attends to, itself the last; 0: all before it."""
    head_norm: bool = False
    """Whether each head of queries and keys is normalised before the rotation."""
    qkv_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name of every weight."""
        h, width = self.hidden_size, self.heads * self.head_dim
        qkv, up = width + 2 * self.kv_heads * self.head_dim, self.inner * (2 if self.gated else 1)
        shapes: dict[str, tuple[int, ...]] = {"embedding.table": (self.vocab_size, h)}
        if self.rope:
            shapes |= dict.fromkeys(("rope.cos", "rope.sin"), (self.positions, self.head_dim // 2))
        else:
            shapes["embedding.position"] = (self.positions, h)

        def norm(name: str) -> None:
            shapes[f"{name}.weight"] = (h,)
            if self.norm == "layer":
                shapes[f"{name}.bias"] = (h,)

        for index in range(self.num_layers):
            at = f"layers.{index}."
            for name, rows, columns, bias in (
                ("attention.qkv", qkv, h, self.qkv_bias),
                ("attention.output", h, width, self.output_bias),
                ("feed_forward.up", up, h, self.feed_forward_bias),
                ("feed_forward.down", h, self.inner, self.feed_forward_bias),
            ):
                shapes[f"{at}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{at}{name}.bias"] = (rows,)
            if self.head_norm:
                shapes[f"{at}attention.norm.weight"] = (self.heads + self.kv_heads, self.head_dim)
            norm(f"{at}attention_norm")
            norm(f"{at}feed_forward_norm")
        norm("norm")
        shapes["head.weight"] = (self.vocab_size, h)
        return shapes


def build(
    config: DecoderConfig,
    weights: Mapping[str, np.ndarray],
    name: str,
    *,
    family: str,
    stop: tuple[int, ...] = (),
    start: tuple[int, ...] = (),
) -> Model:
    """A :class:`Model` of ``config``; ``weights`` by the names of :meth:`DecoderConfig.shapes`, angles left out.

    Args:
        config: sizes and variants.
        weights: float32. A tied ``head.weight`` is the embedding's table under a second name.
        name: of the model.
        family: for its manifest.
        stop: tokens that end a text.
        start: tokens put before a prompt.
    """
    weights = dict(weights)
    if config.rope:
        weights["rope.cos"], weights["rope.sin"] = angles(
            config.positions, config.head_dim, config.rope_theta, config.rope_factors, config.rope_magnitude
        )
    context = min(DEFAULT_CONTEXT, config.positions)
    return Model(
        name=name,
        family=family,
        config=asdict(config),
        weights=weights,
        entries=_entries(config),
        make_module=lambda: _module(config),
        max_lengths={"seq": config.positions, "context": config.positions},
        default_dims={"context": context},
        shapes=tuple(
            {"batch": batch, "seq": seq, "context": context}
            for batch, lengths in _PROMPTS.items()
            for seq in lengths
            if seq <= context
        ),
        generation=Generation("decoder", start=start, stop=stop, max_length=config.positions),
    )


def random_weights(config: DecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded weights: matrices normal with variance 1/columns, norms about 1, biases small; the head is tied."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in config.shapes().items():
        if name.startswith("rope.") or name == "head.weight":
            continue
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1 and "norm.weight" not in name:
            values /= np.float32(np.sqrt(shape[1]))
        else:
            values = np.float32(0.1) * values + np.float32(1.0 if "norm.weight" in name else 0.0)
        weights[name] = values
    weights["head.weight"] = weights["embedding.table"]
    return weights


def _entries(c: DecoderConfig) -> dict[str, Entry]:
    def ids(*dims: Dim) -> InputSpec:
        return InputSpec("input_ids", dims, "int64", upper=c.vocab_size)

    whole = InputSpec("logits", ("batch", "seq", c.vocab_size), "float32")
    last = InputSpec("logits", ("batch", c.vocab_size), "float32")
    lengths = InputSpec("lengths", ("batch",), "int32")
    caches = tuple(
        InputSpec(f"{kind}_cache.{index}", ("batch", c.kv_heads, "context", c.head_dim), "float32", carried=True)
        for index in range(c.num_layers)
        for kind in ("key", "value")
    )
    updates = {cache.name: cache.name for cache in caches}
    maps = tuple(
        InputSpec(f"attention.{index}", ("batch", c.heads, "seq", "seq"), "float32") for index in range(c.num_layers)
    )
    return {
        "forward": Entry((ids("batch", "seq"),), (whole,), on_request=True),
        "prefill": Entry(
            (ids("batch", "seq"), lengths, InputSpec("last", ("batch",), "int64"), *caches), (last,), updates
        ),
        "decode": Entry((ids("batch", 1), lengths, *caches), (last,), updates),
        "attend": Entry((ids("batch", "seq"),), (whole, *maps), on_request=True),
    }


def _module(c: DecoderConfig) -> Any:
    from tvm.relax.frontend import nn

    from attntune.models import decoder_layers as decoder
    from attntune.models import layers
    from attntune.models import operators as op

    class Embedding(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter((c.vocab_size, c.hidden_size), "float32")
            self.position = None if c.rope else nn.Parameter((c.positions, c.hidden_size), "float32")

        def forward(self, ids: Any, lengths: Any | None = None) -> Any:
            return op.embedding(ids, self.table, self.position, lengths=None if c.rope else lengths)

    class Decoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embedding = Embedding()
            self.rope = decoder.Angles(c.positions, c.head_dim) if c.rope else None
            self.layers = nn.ModuleList([decoder.PreNormLayer(c) for _ in range(c.num_layers)])
            self.norm = decoder.norm(c)
            self.head = layers.Linear(c.hidden_size, c.vocab_size, bias=False)

        def forward(self, input_ids: Any) -> Any:
            x = self.embedding(input_ids)
            for layer in self.layers:
                x = layer(x, self.rope)
            return self.head(self.norm(x))

        def attend(self, input_ids: Any) -> Any:
            x, maps = self.embedding(input_ids), []
            for layer in self.layers:
                x, weights = layer.attend(x, self.rope)
                maps.append(weights)
            return self.head(self.norm(x)), *maps

        def _cached(self, input_ids: Any, lengths: Any, caches: Any) -> Any:
            x = self.embedding(input_ids, lengths)
            for index, layer in enumerate(self.layers):
                x = layer.cached(x, self.rope, lengths, caches[2 * index], caches[2 * index + 1])
            return x

        def prefill(self, input_ids: Any, lengths: Any, last: Any, *caches: Any) -> Any:
            x = op.select_rows(self._cached(input_ids, lengths, caches), last)
            return self.head(self.norm(x))

        def decode(self, input_ids: Any, lengths: Any, *caches: Any) -> Any:
            return self.head(self.norm(self._cached(input_ids, lengths, caches)), squeeze=True)

    return Decoder()
