"""RNN encoder-decoders: with one fixed context vector, and with additive attention.

Sources: Sutskever, Vinyals, Le, "Sequence to Sequence Learning with Neural Networks" (2014) and Cho et al. (2014),
where the encoder's last state is all that the decoder knows of the source; Bahdanau, Cho, Bengio (2014), where it looks
back at every position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attntune.errors import ModelError
from attntune.models.model import Entry, Generation, InputSpec, Model


@dataclass(frozen=True)
class RNNConfig:
    """Sizes of an encoder-decoder of GRUs."""

    source_vocab: int
    target_vocab: int
    source_embedding: int
    target_embedding: int
    encoder_hidden: int
    """Units of the encoder, of each direction."""
    hidden: int
    """Units of the decoder, and of what attention compares."""
    bidirectional: bool = False
    attention: bool = False
    """Whether the decoder attends to all of the source; else it starts from the encoder's last state, which is all it
    knows of it."""

    def __post_init__(self) -> None:
        if not self.attention and (self.bidirectional or self.encoder_hidden != self.hidden):
            raise ModelError(
                f"rnn: expected an encoder of one direction and {self.hidden} units where there is no attention, got "
                f"bidirectional={self.bidirectional}, encoder_hidden={self.encoder_hidden}"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight's shape by name; matrices are (out, in), gates in the order reset, update, new."""

        def gru(name: str, width: int, units: int) -> dict[str, tuple[int, ...]]:
            return {
                f"{name}.input.weight": (3 * units, width),
                f"{name}.input.bias": (3 * units,),
                f"{name}.recurrent_weight": (3 * units, units),
                f"{name}.recurrent_bias": (3 * units,),
            }

        found: dict[str, tuple[int, ...]] = {"encoder.embedding": (self.source_vocab, self.source_embedding)}
        found |= gru("encoder.gru", self.source_embedding, self.encoder_hidden)
        if self.bidirectional:
            found |= gru("encoder.reverse_gru", self.source_embedding, self.encoder_hidden)
        if self.attention:
            found["encoder.memory.weight"] = (self.hidden, self.encoder_hidden)
            found["encoder.memory.bias"] = (self.hidden,)
            if self.bidirectional:
                found["encoder.reverse_memory.weight"] = (self.hidden, self.encoder_hidden)
            found["decoder.scale"] = (self.hidden,)
            found["decoder.context.weight"] = (self.target_vocab, self.hidden)
        found["decoder.embedding"] = (self.target_vocab, self.target_embedding)
        found |= gru("decoder.gru", self.target_embedding, self.hidden)
        found["decoder.output.weight"] = (self.target_vocab, self.hidden)
        found["decoder.output.bias"] = (self.target_vocab,)
        return found


def build(
    config: RNNConfig,
    weights: Mapping[str, np.ndarray],
    name: str,
    *,
    generation: Generation | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    source_length: int = 0,
) -> Model:
    """A :class:`Model` of ``config``.

    Entries: ``encode`` (input_ids, source_lengths) gives the first ``state``, or with attention the ``memory`` (batch,
    source, hidden) that the decoder looks back at; ``decode`` (input_ids (batch, 1), state, …) gives logits, the next
    state, and with attention the weights ``cross_attention.0`` (batch, 1, 1, source); ``forward`` (input_ids,
    source_lengths, decoder_input_ids) gives logits (batch, seq, vocab) of a given target; ``attend`` the same and the
    weights (batch, 1, seq, source). With attention the decoder's first state is zero.

    Args:
        config: sizes.
        weights: of the names and shapes that :meth:`RNNConfig.shapes` gives.
        name: of the model.
        generation: tokens it begins and ends with.
        vocabulary: what :class:`attntune.runtime.vocabulary.Vocabulary` reads.
        source_length: the only length of a source, where there is one.

    Raises:
        ModelError: naming every weight that is missing, unknown or of another shape.
    """
    check_weights(config, weights)
    lengths = (source_length,) if source_length else (8, 16, 32, 64)
    return Model(
        name=name,
        family="rnn",
        config={**config.__dict__},
        weights={key: np.ascontiguousarray(value, np.float32) for key, value in weights.items()},
        entries=_entries(config),
        make_module=lambda: _module(config),
        max_lengths={"source": lengths[-1]},
        default_dims={"source": lengths[-1], "seq": 32},
        shapes=tuple({"batch": batch, "source": source, "seq": 32} for batch in (1, 4) for source in lengths),
        generation=generation,
        vocabulary=vocabulary,
    )


def check_weights(config: RNNConfig, weights: Mapping[str, np.ndarray]) -> None:
    """Raise :class:`ModelError` naming every weight that is missing, unknown or of another shape."""
    shapes = config.shapes()
    problems = [f"{name} is missing" for name in shapes if name not in weights]
    problems += [f"{name} is not known" for name in weights if name not in shapes]
    problems += [
        f"{name} has shape {weights[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        raise ModelError("weights do not fit: " + "; ".join(problems[:8]) + ("; …" if problems[8:] else ""))


def random_model(config: RNNConfig, name: str = "rnn", seed: int = 0) -> Model:
    """A model of ``config`` with seeded weights: normal, of variance 1/columns."""
    rng = np.random.default_rng(seed)
    weights = {
        key: rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))
        for key, shape in config.shapes().items()
    }
    return build(config, weights, name, generation=Generation("rnn", start=(1,), stop=(2,), max_length=32))


def _entries(c: RNNConfig) -> dict[str, Entry]:
    source = InputSpec("input_ids", ("batch", "source"), "int64", upper=c.source_vocab)
    lengths = InputSpec("source_lengths", ("batch",), "int32")
    target = InputSpec("decoder_input_ids", ("batch", "seq"), "int64", upper=c.target_vocab)
    token = InputSpec("input_ids", ("batch", 1), "int64", upper=c.target_vocab)
    state, following = (
        InputSpec(name, ("batch", c.hidden), "float32", carried=True) for name in ("state", "next_state")
    )
    memory = InputSpec("memory", ("batch", "source", c.hidden), "float32", carried=True)
    logits = InputSpec("logits", ("batch", "seq", c.target_vocab), "float32")
    last = InputSpec("logits", ("batch", c.target_vocab), "float32")
    updates = {"state": "next_state"}
    forward = Entry((source, lengths, target), (logits,))
    if not c.attention:
        return {
            "forward": forward,
            "encode": Entry((source, lengths), (state,)),
            "decode": Entry((token, state), (last, following), updates),
        }
    maps, one = (InputSpec("cross_attention.0", ("batch", 1, q, "source"), "float32") for q in ("seq", 1))
    return {
        "forward": forward,
        "attend": Entry(forward.inputs, (logits, maps), on_request=True),
        "encode": Entry((source, lengths), (memory,)),
        "decode": Entry((token, lengths, state, memory), (last, following, one), updates),
    }


def _module(c: RNNConfig) -> Any:
    from tvm.relax.frontend import nn

    from attntune.models import layers
    from attntune.models import operators as op

    class Encoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Parameter((c.source_vocab, c.source_embedding), "float32")
            self.gru = layers.GRU(c.source_embedding, c.encoder_hidden)
            if c.bidirectional:
                self.reverse_gru = layers.GRU(c.source_embedding, c.encoder_hidden, reverse=True)
            if c.attention:
                self.memory = layers.Linear(c.encoder_hidden, c.hidden)
                if c.bidirectional:
                    self.reverse_memory = layers.Linear(c.encoder_hidden, c.hidden, bias=False)

        def forward(self, ids: Any, lengths: Any) -> Any:
            """The last state, or with attention what the decoder looks back at."""
            x = op.embedding(ids, self.embedding)
            outputs, state = self.gru(x, lengths=lengths)
            if not c.attention:
                return state
            memory = self.memory(outputs)
            # The product with both directions side by side is the sum of the products with each.
            return self.reverse_memory(self.reverse_gru(x, lengths=lengths)[0], memory) if c.bidirectional else memory

    class Decoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Parameter((c.target_vocab, c.target_embedding), "float32")
            self.gru = layers.GRU(c.target_embedding, c.hidden)
            self.output = layers.Linear(c.hidden, c.target_vocab)
            if c.attention:
                self.scale = nn.Parameter((c.hidden,), "float32")
                self.context = layers.Linear(c.hidden, c.target_vocab, bias=False)

        def logits(self, states: Any, memory: Any, lengths: Any) -> tuple[Any, ...]:
            """Of states (…, hidden); with attention also its weights."""
            if not c.attention:
                return (self.output(states),)
            context, weights = op.additive_attention(states, memory, memory, self.scale, lengths=lengths)
            return self.context(context, self.output(states)), weights

        def forward(self, ids: Any, state: Any, memory: Any, lengths: Any) -> tuple[Any, ...]:
            outputs, _ = self.gru(op.embedding(ids, self.embedding), state)
            return self.logits(outputs, memory, lengths)

        def step(self, ids: Any, state: Any, memory: Any, lengths: Any) -> tuple[Any, ...]:
            following = self.gru.step(op.embedding(ids, self.embedding), state)
            logits, *weights = self.logits(following, memory, lengths)
            return logits, following, *weights

    class EncoderDecoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()
            self.decoder = Decoder()

        def attend(self, input_ids: Any, source_lengths: Any, decoder_input_ids: Any) -> tuple[Any, ...]:
            encoded = self.encoder(input_ids, source_lengths)
            state, memory = (None, encoded) if c.attention else (encoded, None)
            found: tuple[Any, ...] = self.decoder(decoder_input_ids, state, memory, source_lengths)
            return found

        def forward(self, input_ids: Any, source_lengths: Any, decoder_input_ids: Any) -> Any:
            return self.attend(input_ids, source_lengths, decoder_input_ids)[0]

        def encode(self, input_ids: Any, source_lengths: Any) -> Any:
            return self.encoder(input_ids, source_lengths)

    class WithoutAttention(EncoderDecoder):
        def decode(self, input_ids: Any, state: Any) -> tuple[Any, ...]:
            return self.decoder.step(input_ids, state, None, None)

    class WithAttention(EncoderDecoder):
        def decode(self, input_ids: Any, source_lengths: Any, state: Any, memory: Any) -> tuple[Any, ...]:
            return self.decoder.step(input_ids, state, memory, source_lengths)

    return WithAttention() if c.attention else WithoutAttention()
