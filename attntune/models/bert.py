"""BERT encoders (Devlin et al., 2018), with mean pooling where a sentence-transformers directory asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attntune.errors import ModelError
from attntune.models.config import choose, require_fields, require_fixed, require_sizes
from attntune.models.model import Entry, InputSpec, Model
from attntune.models.tensors import Checkpoint

#: Activations by the name that `config.json` gives them.
ACTIVATIONS = {
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}


#: Fields whose only supported value is the default.
_FIXED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
#: What checkpoints hold beside the encoder: buffers, and heads by the beginning of their names.
_IGNORED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
_HEADS = ("cls.",)


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder; field names as in Hugging Face's ``config.json``."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_act: str
    layer_norm_eps: float
    pooling: bool = False

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], *, pooling: bool = False) -> BertConfig:
        """Check and take what is needed of a ``config.json``.

        Raises:
            ModelError: naming the field that is missing or asks for something unsupported.
        """
        names = [name for name in cls.__dataclass_fields__ if name != "pooling"]
        require_fields(fields, "bert", *names)
        require_sizes(fields, *(name for name in names if name not in ("hidden_act", "layer_norm_eps")))
        require_fixed(fields, _FIXED)
        choose(fields, "hidden_act", ACTIVATIONS)
        if fields["hidden_size"] % fields["num_attention_heads"]:
            raise ModelError(
                f"config.json: hidden_size {fields['hidden_size']} is not a multiple of "
                f"num_attention_heads {fields['num_attention_heads']}"
            )
        return cls(**{name: fields[name] for name in names}, pooling=pooling)


def build(config: BertConfig, weights: Mapping[str, np.ndarray], name: str) -> Model:
    """A :class:`Model` of ``config`` with attntune's own weight names, as :func:`rename` gives them."""
    ids = tuple(
        InputSpec(input_name, ("batch", "seq"), "int64", optional=optional, upper=upper, fill=fill)
        for input_name, optional, upper, fill in (
            ("input_ids", False, config.vocab_size, 0),
            ("attention_mask", True, None, 1),
            ("token_type_ids", True, config.type_vocab_size, 0),
        )
    )
    hidden = InputSpec("last_hidden_state", ("batch", "seq", config.hidden_size), "float32")
    maps = tuple(
        InputSpec(f"attention.{index}", ("batch", config.num_attention_heads, "seq", "seq"), "float32")
        for index in range(config.num_hidden_layers)
    )
    ragged = (*ids, InputSpec("lengths", ("batch",), "int32"))
    entries = {
        "forward": Entry(ids, (hidden,), ragged="forward_ragged"),
        "forward_ragged": Entry(ragged, (hidden,), on_request=True),
        "attend": Entry(ids, (hidden, *maps), on_request=True),
    }
    if config.pooling:
        embedding = InputSpec("sentence_embedding", ("batch", config.hidden_size), "float32")
        entries["embed"] = Entry(ids, (embedding,), ragged="embed_ragged")
        entries["embed_ragged"] = Entry(ragged, (embedding,), on_request=True)
    return Model(
        name=name,
        family="bert",
        config={**config.__dict__},
        weights=dict(weights),
        entries=entries,
        make_module=lambda: _module(config),
        max_lengths={"seq": config.max_position_embeddings},
    )


#: Sizes of well-known encoders.
PRESETS: dict[str, BertConfig] = {
    "minilm-l6": BertConfig(30522, 384, 6, 12, 1536, 512, 2, "gelu", 1e-12, pooling=True),
    "bert-base": BertConfig(30522, 768, 12, 12, 3072, 512, 2, "gelu", 1e-12),
}


def random_model(config: BertConfig, name: str, seed: int = 0) -> Model:
    """A model of ``config`` with seeded weights: matrices normal with variance 1/columns, for measuring speed."""
    rng = np.random.default_rng(seed)
    h, inner = config.hidden_size, config.intermediate_size
    matrices = {
        "embeddings.word": (config.vocab_size, h),
        "embeddings.position": (config.max_position_embeddings, h),
        "embeddings.type": (config.type_vocab_size, h),
    }
    norms = ["embeddings.norm"]
    for index in range(config.num_hidden_layers):
        at = f"layers.{index}."
        matrices[f"{at}attention.qkv.weight"] = (3 * h, h)
        matrices[f"{at}attention.output.weight"] = (h, h)
        matrices[f"{at}feed_forward.up.weight"] = (inner, h)
        matrices[f"{at}feed_forward.down.weight"] = (h, inner)
        norms += [f"{at}attention_norm", f"{at}output_norm"]
    weights = {}
    for key, shape in matrices.items():
        weights[key] = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[1]))
        if key.endswith(".weight"):
            weights[key.removesuffix("weight") + "bias"] = rng.standard_normal(shape[0], dtype=np.float32) * 0.1
    for key in norms:
        weights[f"{key}.weight"] = 1.0 + 0.1 * rng.standard_normal(h, dtype=np.float32)
        weights[f"{key}.bias"] = 0.1 * rng.standard_normal(h, dtype=np.float32)
    return build(config, {k: np.ascontiguousarray(v, np.float32) for k, v in weights.items()}, name)


def _module(c: BertConfig) -> Any:
    from tvm.relax.frontend import nn

    from attntune.models import layers
    from attntune.models import operators as op

    class Embeddings(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.word = nn.Parameter((c.vocab_size, c.hidden_size), "float32")
            self.position = nn.Parameter((c.max_position_embeddings, c.hidden_size), "float32")
            self.type = nn.Parameter((c.type_vocab_size, c.hidden_size), "float32")
            self.norm = layers.LayerNorm(c.hidden_size, c.layer_norm_eps)

        def forward(self, ids: Any, types: Any) -> Any:
            return op.embedding_norm(
                ids, types, self.word, self.position, self.type, self.norm.weight, self.norm.bias, eps=c.layer_norm_eps
            )

    class Bert(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = Embeddings()
            self.layers = nn.ModuleList(
                [
                    layers.PostNormEncoderLayer(
                        c.hidden_size,
                        c.num_attention_heads,
                        c.intermediate_size,
                        ACTIVATIONS[c.hidden_act],
                        c.layer_norm_eps,
                        "float32",
                    )
                    for _ in range(c.num_hidden_layers)
                ]
            )

        def forward(
            self,
            input_ids: Any,
            attention_mask: Any,
            token_type_ids: Any,
            maps: list[Any] | None = None,
            lengths: Any | None = None,
        ) -> Any:
            x = self.embeddings(input_ids, token_type_ids)
            for layer in self.layers:
                x = layer(x, attention_mask if lengths is None else None, maps, lengths)
            return x

        def forward_ragged(self, input_ids: Any, attention_mask: Any, token_type_ids: Any, lengths: Any) -> Any:
            return self.forward(input_ids, attention_mask, token_type_ids, lengths=lengths)

        def embed_ragged(self, input_ids: Any, attention_mask: Any, token_type_ids: Any, lengths: Any) -> Any:
            return op.mean_pool(self.forward_ragged(input_ids, attention_mask, token_type_ids, lengths), attention_mask)

        def attend(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            maps: list[Any] = []
            return (self.forward(input_ids, attention_mask, token_type_ids, maps), *maps)

        def embed(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return op.mean_pool(self.forward(input_ids, attention_mask, token_type_ids), attention_mask)

    return Bert()


_LAYER_NAMES = {
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "output.LayerNorm": "output_norm",
}
_TABLES = {
    "embeddings.word_embeddings.weight": "embeddings.word",
    "embeddings.position_embeddings.weight": "embeddings.position",
    "embeddings.token_type_embeddings.weight": "embeddings.type",
    "embeddings.LayerNorm.weight": "embeddings.norm.weight",
    "embeddings.LayerNorm.bias": "embeddings.norm.bias",
}


def rename(config: BertConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face tensors under attntune's names; query, key and value of a layer become one weight.

    Raises:
        ModelError: naming every tensor that is missing, unknown or of the wrong shape; the pooler and the heads of
            pre-training are left out.
    """
    checkpoint = Checkpoint({name: value for name, value in tensors.items() if not name.startswith(_HEADS)})
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    h, inner = config.hidden_size, config.intermediate_size
    shapes = {"weight": {"feed_forward.up": (inner, h), "feed_forward.down": (h, inner), "attention.output": (h, h)}}

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return checkpoint.take(prefix + name, *shape)

    table_rows = {
        "embeddings.word": config.vocab_size,
        "embeddings.position": config.max_position_embeddings,
        "embeddings.type": config.type_vocab_size,
    }
    weights = {
        ours: take(theirs, (table_rows[ours], h) if ours in table_rows else (h,)) for theirs, ours in _TABLES.items()
    }
    for index in range(config.num_hidden_layers):
        source, target = f"encoder.layer.{index}.", f"layers.{index}."
        for kind, shape in (("weight", (h, h)), ("bias", (h,))):
            parts = [take(f"{source}attention.self.{part}.{kind}", shape) for part in ("query", "key", "value")]
            weights[f"{target}attention.qkv.{kind}"] = np.concatenate(parts)
        for theirs, ours in _LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                width = inner if ours == "feed_forward.up" else h
                shape_ = shapes["weight"].get(ours, (h,)) if kind == "weight" else (width,)
                weights[f"{target}{ours}.{kind}"] = take(f"{source}{theirs}.{kind}", shape_)
    checkpoint.check(ignored=_IGNORED)
    return weights
