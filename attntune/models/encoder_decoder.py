"""Encoder-decoder Transformers: what those of 2017, Marian, T5 and Whisper have in common, and where they differ.

Entries: ``encode`` computes every layer's cross-attention keys and values once; ``prefill`` and ``decode`` write one
token after another over them and over caches of the decoder's own keys and values, updated in place; ``forward`` takes
source and target and recomputes everything; ``attend`` is ``forward`` with all attention weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attntune.errors import ModelError
from attntune.models.model import Entry, Generation, InputSpec, Model

if TYPE_CHECKING:
    from attntune.models.layers import Variant


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes and variants of an encoder-decoder Transformer."""

    vocab_size: int
    """Of what the decoder reads and writes."""
    hidden_size: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    inner: int
    """Features between the two halves of a feed-forward layer."""
    source_positions: int
    """Longest source, in rows of the encoder; with ``relative`` any is possible, and this one is usual."""
    positions: int
    """Longest target; with ``relative`` any is possible, and this is what a cache holds unless asked for more."""
    source_vocab_size: int = 0
    """0: the source is not tokens but ``mels``."""
    mels: int = 0
    """Channels of a spectrogram of 2·source_positions frames; 0: the source is tokens."""
    activation: str = "relu"
    norm_first: bool = False
    """Normalisation before each branch, and once after the last layer; else after each residual."""
    eps: float = 1e-5
    embedding_scale: float = 1.0
    """What token embeddings are multiplied by before positions are added."""
    head_bias: bool = False
    relative: int = 0
    """Positions are no embeddings but a bias of self-attention's scores by distance, the same in every layer (T5), and
    the same from this distance on; 0: embeddings."""
    norm: str = "layer"
    """``"layer"`` or ``"rms"``."""
    bias: bool = True
    """Whether linear layers but the head have one."""
    gated: bool = False
    """Of the feed-forward layers."""
    head_dim: int = 0
    """0 means hidden_size/heads."""
    scale: float | None = None
    """Of attention's scores; None means 1/√head_dim."""

    def __post_init__(self) -> None:
        if not self.head_dim and self.hidden_size % self.heads:
            raise ModelError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        if bool(self.mels) == bool(self.source_vocab_size):
            raise ModelError("expected either mels or source_vocab_size to be set")
        if self.mels and self.relative:
            raise ModelError("expected relative positions with a source of tokens, got mels")

    @property
    def width(self) -> int:
        """Features of all heads together."""
        return self.heads * (self.head_dim or self.hidden_size // self.heads)

    def variant(self) -> Variant:
        """Of the layers."""
        from attntune.models.layers import Variant

        return Variant(
            norm=self.norm, bias=self.bias, gated=self.gated, head_dim=self.head_dim, scale=self.scale
        )  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name of every weight."""
        h, width = self.hidden_size, self.width
        shapes: dict[str, tuple[int, ...]] = {}
        if self.relative:
            shapes["encoder.relative"] = (self.heads, 2 * self.relative + 1)
        else:
            shapes["encoder.position"] = (self.source_positions, h)

        def linear(name: str, rows: int, columns: int, bias: bool = self.bias) -> None:
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)

        def norm(name: str) -> None:
            shapes[f"{name}.weight"] = (h,)
            if self.norm == "layer":
                shapes[f"{name}.bias"] = (h,)

        def common(at: str, *norms: str) -> None:
            linear(f"{at}attention.qkv", 3 * width, h)
            linear(f"{at}attention.output", h, width)
            linear(f"{at}feed_forward.up", self.inner * (2 if self.gated else 1), h)
            linear(f"{at}feed_forward.down", h, self.inner)
            for name in norms:
                norm(at + name)

        if self.mels:
            linear("encoder.stem.0.projection", h, 3 * self.mels)
            linear("encoder.stem.1.projection", h, 3 * h)
        else:
            shapes["encoder.table"] = (self.source_vocab_size, h)
        for index in range(self.encoder_layers):
            last = "feed_forward_norm" if self.norm_first else "output_norm"
            common(f"encoder.layers.{index}.", "attention_norm", last)
        shapes["decoder.table"] = (self.vocab_size, h)
        if self.relative:
            shapes["decoder.relative"] = (self.heads, self.relative + 1)
        else:
            shapes["decoder.position"] = (self.positions, h)
        for index in range(self.decoder_layers):
            at = f"decoder.layers.{index}."
            common(at, "attention_norm", "cross_attention_norm", "feed_forward_norm")
            for part in ("query", "key", "value"):
                linear(f"{at}cross_attention.{part}", width, h)
            linear(f"{at}cross_attention.output", h, width)
        if self.norm_first:
            norm("encoder.norm")
            norm("decoder.norm")
        linear("head", self.vocab_size, h, self.head_bias)
        return shapes


def build(
    config: EncoderDecoderConfig,
    weights: Mapping[str, np.ndarray],
    name: str,
    *,
    family: str,
    generation: Generation,
    shapes: Sequence[Mapping[str, int]],
) -> Model:
    """A :class:`Model` of ``config``; ``weights`` by the names of :meth:`EncoderDecoderConfig.shapes`.

    Args:
        config: sizes and variants.
        weights: float32. A tied ``head.weight`` is the decoder's table under a second name.
        name: of the model.
        family: for its manifest.
        generation: tokens the decoder starts and stops with.
        shapes: compiled when no others are asked for; the lengths ``seq`` in which a target is read there hold for
            shapes that give a ``target`` too.
    """
    limits = {"seq": config.positions, "context": config.positions}
    if not config.mels:
        limits["source"] = config.source_positions
    return Model(
        name=name,
        family=family,
        config=asdict(config),
        weights=dict(weights),
        entries=_entries(config),
        make_module=lambda: _module(config),
        max_lengths={} if config.relative else limits,
        default_dims={"context": config.positions},
        shapes=tuple(shapes),
        generation=generation,
        prompts=tuple(sorted({shape["seq"] for shape in shapes})) or (1,),
    )


def usual_shapes(
    config: EncoderDecoderConfig, batches: Sequence[int] = (1, 4), sources: Sequence[int] = (32, 128)
) -> list[dict[str, int]]:
    """What is compiled when no shapes are asked for: sources cut at the longest, and few tokens to begin with."""
    lengths = sorted({min(length, config.source_positions) for length in sources})
    return [
        {"batch": batch, "source": source, "seq": seq, "context": config.positions}
        for batch in batches
        for source in lengths
        for seq in (1, min(16, config.positions))
    ]


def sinusoids(positions: int, features: int) -> np.ndarray:
    """Positions of Vaswani et al. (2017), section 3.5, (positions, features) float32: sine, cosine in turns."""
    angles = np.arange(positions)[:, None] / 10000.0 ** (np.arange(0, features, 2) / features)
    table = np.empty((positions, features), np.float32)
    table[:, 0::2] = np.sin(angles)
    table[:, 1::2] = np.cos(angles[:, : features // 2])
    return table


def random_weights(config: EncoderDecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded weights: matrices normal with variance 1/columns, norms about 1, biases small; one table, sinusoids."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for name, shape in config.shapes().items():
        if name.endswith("position"):
            weights[name] = sinusoids(*shape)
            continue
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            values /= np.float32(np.sqrt(shape[1]))
        else:
            values = np.float32(0.1) * values + np.float32(1.0 if "norm.weight" in name else 0.0)
        weights[name] = values
    if config.source_vocab_size == config.vocab_size:
        weights["encoder.table"] = weights["decoder.table"]
    weights["head.weight"] = weights["decoder.table"]
    return weights


def _entries(c: EncoderDecoderConfig) -> dict[str, Entry]:
    source: str | int = c.source_positions if c.mels else "source"
    if c.mels:
        read: tuple[InputSpec, ...] = (
            InputSpec("input_features", ("batch", c.mels, 2 * c.source_positions), "float32"),
        )  # fmt: skip
        source_lengths: tuple[InputSpec, ...] = ()
    else:
        read = (InputSpec("input_ids", ("batch", "source"), "int64", upper=c.source_vocab_size),)
        source_lengths = (InputSpec("source_lengths", ("batch",), "int32"),)

    def each(*names: str, dims: tuple[str | int, ...], layers: int = c.decoder_layers) -> tuple[InputSpec, ...]:
        return tuple(InputSpec(f"{n}.{i}", dims, "float32", carried=True) for i in range(layers) for n in names)

    def maps(name: str, layers: int, queries: str | int, keys: str | int) -> tuple[InputSpec, ...]:
        return tuple(InputSpec(f"{name}.{i}", ("batch", c.heads, queries, keys), "float32") for i in range(layers))

    cross = each("cross_key", "cross_value", dims=("batch", source, c.width))
    caches = each("key_cache", "value_cache", dims=("batch", c.heads, "context", c.width // c.heads))
    updates = {cache.name: cache.name for cache in caches}
    lengths = InputSpec("lengths", ("batch",), "int32")
    last = InputSpec("last", ("batch",), "int64")
    logits = InputSpec("logits", ("batch", c.vocab_size), "float32")
    whole = InputSpec("logits", ("batch", "seq", c.vocab_size), "float32")

    def ids(name: str, length: str | int) -> InputSpec:
        return InputSpec(name, ("batch", length), "int64", upper=c.vocab_size)

    both = (*read, *source_lengths, ids("decoder_input_ids", "seq"))
    attention = (
        *maps("attention", c.decoder_layers, "seq", "seq"),
        *maps("cross_attention", c.decoder_layers, "seq", source),
        *maps("encoder_attention", c.encoder_layers, source, source),
    )
    return {
        "encode": Entry((*read, *source_lengths), cross),
        "prefill": Entry(
            (ids("input_ids", "seq"), lengths, last, *source_lengths, *cross, *caches), (logits,), updates
        ),
        "decode": Entry((ids("input_ids", 1), lengths, *source_lengths, *cross, *caches), (logits,), updates),
        "forward": Entry(both, (whole,), on_request=True),
        "attend": Entry(both, (whole, *attention), on_request=True),
    }


def _module(c: EncoderDecoderConfig) -> Any:
    from tvm.relax.frontend import nn

    from attntune.models import layers
    from attntune.models import operators as op
    from attntune.models.cross_layers import Convolution, DecoderLayer

    h, variant = c.hidden_size, c.variant()

    def positions(rows: int) -> Any:
        return None if c.relative else nn.Parameter((rows, h), "float32")

    def distances(columns: int) -> Any:
        return nn.Parameter((c.heads, columns), "float32") if c.relative else None

    class Encoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.position = positions(c.source_positions)
            self.relative = distances(2 * c.relative + 1)
            self.table = None if c.mels else nn.Parameter((c.source_vocab_size, h), "float32")
            if c.mels:
                first = Convolution(c.mels, h, 3, c.activation, layout="bcl")
                self.stem = nn.ModuleList([first, Convolution(h, h, 3, c.activation, stride=2)])
            layer = layers.PreNormEncoderLayer if c.norm_first else layers.PostNormEncoderLayer
            self.layers = nn.ModuleList(
                [layer(h, c.heads, c.inner, c.activation, c.eps, "float32", variant) for _ in range(c.encoder_layers)]
            )
            self.norm = layers.norm(c.norm, h, c.eps) if c.norm_first else None

        def forward(self, source: Any, lengths: Any | None, maps: list[Any] | None = None) -> Any:
            bias = None
            if self.relative is not None:
                bias = op.relative_bias(source, self.relative, zero=c.relative)
            if self.table is not None:
                x = op.embedding(source, self.table, self.position, scale=c.embedding_scale)
            else:
                for convolution in self.stem:
                    source = convolution(source)
                x = op.add_positions(source, self.position)
            for layer in self.layers:
                x = layer(x, maps=maps, lengths=lengths, bias=bias)
            return x if self.norm is None else self.norm(x)

    class Decoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter((c.vocab_size, h), "float32")
            self.position = positions(c.positions)
            self.relative = distances(c.relative + 1)
            self.layers = nn.ModuleList(
                [
                    DecoderLayer(h, c.heads, c.inner, c.activation, c.eps, norm_first=c.norm_first, variant=variant)
                    for _ in range(c.decoder_layers)
                ]
            )
            self.norm = layers.norm(c.norm, h, c.eps) if c.norm_first else None

        def embed(self, ids: Any, lengths: Any | None = None) -> Any:
            counted = None if self.position is None else lengths
            return op.embedding(ids, self.table, self.position, lengths=counted, scale=c.embedding_scale)

        def bias(self, ids: Any, lengths: Any | None = None, keys: Any | None = None) -> Any:
            if self.relative is None:
                return None
            return op.relative_bias(ids, self.relative, lengths, keys, zero=c.relative)

    class EncoderDecoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()
            self.decoder = Decoder()
            self.head = layers.Linear(h, c.vocab_size, bias=c.head_bias)

        def encode(self, source: Any, source_lengths: Any | None = None) -> Any:
            encoded = self.encoder(source, source_lengths)
            return tuple(
                tensor for layer in self.decoder.layers for tensor in layer.cross_attention.keys_values(encoded)
            )

        def _cached(self, ids: Any, lengths: Any, carried: tuple[Any, ...]) -> Any:
            source_lengths, carried = (None, carried) if c.mels else (carried[0], carried[1:])
            cross, caches = carried[: 2 * c.decoder_layers], carried[2 * c.decoder_layers :]
            x = self.decoder.embed(ids, lengths)
            bias = self.decoder.bias(ids, lengths, caches[0])
            for index, layer in enumerate(self.decoder.layers):
                pair = slice(2 * index, 2 * index + 2)
                x = layer(x, cross[pair], source_lengths, (lengths, *caches[pair]), bias=bias)
            return x

        def _logits(self, x: Any, *, squeeze: bool = False) -> Any:
            return self.head(x if self.decoder.norm is None else self.decoder.norm(x), squeeze=squeeze)

        def prefill(self, input_ids: Any, lengths: Any, last: Any, *carried: Any) -> Any:
            return self._logits(op.select_rows(self._cached(input_ids, lengths, carried), last))

        def decode(self, input_ids: Any, lengths: Any, *carried: Any) -> Any:
            return self._logits(self._cached(input_ids, lengths, carried), squeeze=True)

        def forward(self, *inputs: Any, maps: tuple[list[Any], ...] | None = None) -> Any:
            source, *lengths, ids = inputs
            own, over, encoder = maps or (None, None, None)
            source_lengths = lengths[0] if lengths else None
            encoded = self.encoder(source, source_lengths, encoder)
            x, bias = self.decoder.embed(ids), self.decoder.bias(ids)
            for layer in self.decoder.layers:
                cross = layer.cross_attention.keys_values(encoded)
                x = layer(x, cross, source_lengths, maps=None if own is None else (own, over), bias=bias)
            return self._logits(x)

        def attend(self, *inputs: Any) -> Any:
            maps: tuple[list[Any], ...] = ([], [], [])
            logits = self.forward(*inputs, maps=maps)
            return logits, *maps[0], *maps[1], *maps[2]

    return EncoderDecoder()
