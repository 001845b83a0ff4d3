"""Keras files: ``.keras`` (a zip of JSON and HDF5) and whole models in ``.h5``; GRU encoder-decoders with attention.

Nothing in a file is executed: the architecture is JSON, the weights are arrays, and of a pickle with tokenizers beside
it only plain data is taken.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import ModelError
from attntune.models import rnn
from attntune.models.model import Generation, Model

#: What the decoder's token sequences begin and end with, by habit of Keras's tutorials.
_START, _STOP = "\t", "\n"
_MOST_TOKENS = 32


@dataclass(frozen=True)
class KerasLayer:
    """One layer of a functional model."""

    kind: str
    """Its class's name."""
    name: str
    config: Mapping[str, Any]
    sources: tuple[str, ...]
    """Names of the layers whose results it takes."""
    weights: tuple[np.ndarray, ...]


def read(path: Path) -> list[KerasLayer]:
    """The layers of a functional model, in the file's order.

    Raises:
        ModelError: it is no Keras model, or h5py is missing.
    """
    try:
        import h5py
    except ImportError:
        raise ModelError("reading Keras files needs h5py; install it with: pip install h5py") from None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json"))
                with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
                    weights = _by_layer(file)
        else:
            with h5py.File(path) as file:
                config = json.loads(file.attrs["model_config"])
                weights = _by_weight_names(file["model_weights"])
        layers = config["config"]["layers"]
        return [
            KerasLayer(
                kind=str(layer["class_name"]),
                name=str(layer["config"]["name"]),
                config=layer["config"],
                sources=tuple(dict.fromkeys(_sources(layer["inbound_nodes"]))),
                weights=tuple(weights.get(str(layer["config"]["name"]), ())),
            )
            for layer in layers
        ]
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"expected a functional Keras model in {path}: {error!r}") from None


def _sources(node: Any) -> list[str]:
    """Layers that a node refers to: Keras 3 writes ``keras_history``, Keras 2 lists ``[name, node, tensor, …]``."""
    if isinstance(node, Mapping):
        if "keras_history" in node:
            return [str(node["keras_history"][0])]
        return [name for value in node.values() for name in _sources(value)]
    if isinstance(node, list):
        if len(node) >= 3 and isinstance(node[0], str) and isinstance(node[1], int):
            return [node[0]]
        return [name for value in node for name in _sources(value)]
    return []


def _by_layer(file: Any) -> dict[str, list[np.ndarray]]:
    """Weights of Keras 3's layout, whose groups' ``vars`` are marked with the layer's own name."""
    found: dict[str, list[np.ndarray]] = {}

    def variables(group: Any) -> list[np.ndarray]:
        own = [np.asarray(group["vars"][key]) for key in sorted(group["vars"], key=int)] if "vars" in group else []
        inner = [name for name in ("cell", "layer", "forward_layer", "backward_layer") if name in group]
        return own + [array for name in inner for array in variables(group[name])]

    for group in file["layers"].values():
        if "vars" in group:
            found[str(group["vars"].attrs["name"])] = variables(group)
    return found


def _by_weight_names(root: Any) -> dict[str, list[np.ndarray]]:
    """Weights of Keras 2's layout: each layer's group lists its weights in order."""

    def text(name: Any) -> str:
        return name.decode() if isinstance(name, bytes) else str(name)

    return {
        name: [np.asarray(group[text(weight)]) for weight in group.attrs["weight_names"]]
        for name, group in root.items()
        if "weight_names" in group.attrs
    }


# -- GRU encoder-decoder with additive attention ----------------------------------------------------------------------


def load(path: Path) -> Model:
    """A GRU encoder-decoder with ``AdditiveAttention``, as Keras's tutorials build it.

    Embedding, GRU or Bidirectional(GRU) and TimeDistributed(Dense) on the source's side; Embedding, GRU,
    AdditiveAttention over the dense layer's results, Concatenate and Dense with a softmax on the target's.

    Raises:
        ModelError: naming the layer or option that is not supported, or the weights that do not fit.
    """
    layers = {layer.name: layer for layer in read(path)}
    kinds = {"InputLayer", "Embedding", "Bidirectional", "GRU", "TimeDistributed", "AdditiveAttention", "Concatenate",
             "Dense", "Dropout"}  # fmt: skip
    if strange := sorted({layer.kind for layer in layers.values()} - kinds):
        raise ModelError(f"{path}: layers {strange} are not supported; expected some of {sorted(kinds)}")

    def source(layer: KerasLayer, *allowed: str) -> KerasLayer:
        found = [layers[name] for name in layer.sources]
        while found and found[0].kind == "Dropout":
            found = [layers[name] for name in found[0].sources]
        if not found or found[0].kind not in allowed:
            raise ModelError(f"{path}: expected {layer.name} to follow one of {allowed}, got {layer.sources}")
        return found[0]

    attention = _only(path, layers, "AdditiveAttention")
    output = next((x for x in layers.values() if x.kind == "Dense" and x.config["activation"] == "softmax"), None)
    if output is None:
        raise ModelError(f"{path}: expected a Dense layer with a softmax")
    query, memory = (layers[name] for name in (attention.sources + attention.sources)[:2])
    if query.kind != "GRU" or memory.kind != "TimeDistributed" or len(attention.sources) != 2:
        raise ModelError(
            f"{path}: expected {attention.name} of a GRU and a TimeDistributed layer, got {attention.sources}"
        )
    joined = source(output, "Concatenate")
    if joined.sources != (query.name, attention.name):
        raise ModelError(f"{path}: expected {joined.name} of {query.name} and {attention.name}, got {joined.sources}")
    encoder = source(memory, "Bidirectional", "GRU")
    tables = source(encoder, "Embedding"), source(query, "Embedding")
    two_ways = encoder.kind == "Bidirectional"
    _check(path, encoder, query, memory, *tables)
    _options(path, output.name, output.config, {"use_bias": True})
    _options(path, joined.name, joined.config, {"axis": -1})

    weights = {"encoder.embedding": tables[0].weights[0], "decoder.embedding": tables[1].weights[0]}
    weights |= _gru("encoder.gru", encoder.weights[:3]) | _gru("decoder.gru", query.weights)
    if two_ways:
        weights |= _gru("encoder.reverse_gru", encoder.weights[3:])
    units = weights["encoder.gru.recurrent_weight"].shape[1]
    dense, bias = memory.weights
    hidden = dense.shape[1]
    weights |= {"encoder.memory.weight": dense[:units].T, "encoder.memory.bias": bias}
    if two_ways:
        weights["encoder.reverse_memory.weight"] = dense[units:].T
    weights["decoder.scale"] = attention.weights[0] if attention.weights else np.ones(hidden, np.float32)
    weights["decoder.output.weight"], weights["decoder.context.weight"] = (
        part.T for part in (output.weights[0][:hidden], output.weights[0][hidden:])
    )
    weights["decoder.output.bias"] = output.weights[1]
    config = rnn.RNNConfig(
        source_vocab=tables[0].weights[0].shape[0],
        target_vocab=tables[1].weights[0].shape[0],
        source_embedding=tables[0].weights[0].shape[1],
        target_embedding=tables[1].weights[0].shape[1],
        encoder_hidden=units,
        hidden=hidden,
        bidirectional=two_ways,
        attention=True,
    )
    vocabulary, length = _vocabulary(path.parent, config)
    generation = None
    if vocabulary is not None:
        tokens = vocabulary["target"]["tokens"]
        generation = Generation(
            "rnn", start=(tokens.index(_START),), stop=(tokens.index(_STOP),), max_length=_MOST_TOKENS
        )
    return rnn.build(config, weights, path.stem, generation=generation, vocabulary=vocabulary, source_length=length)


def _only(path: Path, layers: Mapping[str, KerasLayer], kind: str) -> KerasLayer:
    found = [layer for layer in layers.values() if layer.kind == kind]
    if len(found) != 1:
        raise ModelError(f"{path}: expected one {kind} layer, got {len(found)}")
    return found[0]


#: What a GRU's options must be.
_GRU = {"activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True, "use_bias": True,
        "return_sequences": True, "go_backwards": False}  # fmt: skip


def _check(path: Path, encoder: KerasLayer, decoder: KerasLayer, dense: KerasLayer, *tables: KerasLayer) -> None:
    """Raise :class:`ModelError` naming an option that is not supported."""
    recurrent = [decoder.config]
    if encoder.kind == "Bidirectional":
        wanted = {"merge_mode": "concat"}
        recurrent.append(encoder.config["layer"]["config"])
        _options(path, encoder.name, encoder.config, wanted)
        if encoder.config["layer"]["class_name"] != "GRU":
            raise ModelError(f"{path}: {encoder.name} of {encoder.config['layer']['class_name']}; expected GRU")
        if backward := encoder.config.get("backward_layer"):
            _options(path, str(backward["config"]["name"]), backward["config"], {**_GRU, "go_backwards": True})
    else:
        recurrent.append(encoder.config)
    for config in recurrent:
        _options(path, str(config["name"]), config, _GRU)
    for table in tables:
        _options(path, table.name, table.config, {"mask_zero": False})
    if dense.config["layer"]["class_name"] != "Dense":
        raise ModelError(f"{path}: {dense.name} of {dense.config['layer']['class_name']}; expected Dense")
    _options(path, dense.name, dense.config["layer"]["config"], {"activation": "linear", "use_bias": True})


def _options(path: Path, layer: str, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ModelError(f"{path}: {layer}: {name} {config[name]!r} is not supported; expected {value!r}")


def _gru(name: str, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Kernel (features, 3·units), recurrent kernel and bias (2, 3·units), gates in the order update, reset, new."""
    kernel, recurrent, bias = arrays

    def reordered(values: np.ndarray) -> np.ndarray:
        update, reset, new = np.split(values, 3)
        return np.concatenate([reset, update, new])

    return {
        f"{name}.input.weight": reordered(kernel.T),
        f"{name}.input.bias": reordered(bias[0]),
        f"{name}.recurrent_weight": reordered(recurrent.T),
        f"{name}.recurrent_bias": reordered(bias[1]),
    }


# -- tokenizers -------------------------------------------------------------------------------------------------------


class _Inert:
    """What stands for an object of any class in a pickle: it keeps its state and does nothing."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Items of a dictionary's subclass are dropped."""


class _PlainData(pickle.Unpickler):
    """Reads a pickle without importing or calling anything it names."""

    def find_class(self, module: str, name: str) -> Any:
        """Every class is inert."""
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        """Refused."""
        raise pickle.UnpicklingError(f"unexpected reference {pid!r}")


def _vocabulary(folder: Path, config: rnn.RNNConfig) -> tuple[dict[str, Any] | None, int]:
    """The vocabulary, and the length that sources are padded to, of a pickle of two character tokenizers."""
    for path in sorted(folder.glob("*.pkl")):
        try:
            with path.open("rb") as file:
                found = _PlainData(file).load()
            states = [value.state for value in found.values() if isinstance(value, _Inert)]
            source, target = (state["index_word"] for state in states if state.get("char_level"))
            length = next(value for value in found.values() if isinstance(value, int))
        except (OSError, AttributeError, KeyError, StopIteration, TypeError, ValueError, pickle.UnpicklingError):
            continue  # not such a pickle
        source_tokens = [str(source.get(index, "")) for index in range(config.source_vocab)]
        target_tokens = [str(target.get(index, "")) for index in range(config.target_vocab)]
        return {
            "source": {"tokens": source_tokens, "lowercase": True, "unknown": None, "length": length},
            "target": {"tokens": target_tokens, "separator": ""},
        }, length
    return None, 0
