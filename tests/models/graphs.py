"""Small models written by hand: a random BERT, and a zoo that holds every operator in every variant."""

import numpy as np

from attntune.engines.graph import ModelGraph
from attntune.models.model import Entry, InputSpec, OpCall

HIDDEN, HEADS, DIM = 32, 4, 8
VOCAB, POSITIONS, TYPES, FFN = 50, 64, 2, 48


class Writer:
    """Collects calls whose argument shapes are looked up by name."""

    def __init__(self, inputs, seed=0):
        self.inputs = inputs
        self.shapes = {spec.name: spec.dims for spec in inputs}
        self.dtypes = {spec.name: spec.dtype for spec in inputs}
        self.weights = {}
        self.calls = []
        self.rng = np.random.default_rng(seed)

    def weight(self, name, *shape):
        if name not in self.weights:
            scale = 1.0 / np.sqrt(shape[-1]) if len(shape) > 1 else 1.0
            self.weights[name] = (self.rng.standard_normal(shape) * scale).astype(np.float32)
            self.shapes[name], self.dtypes[name] = shape, "float32"
        return name

    def call(self, op, attrs, args, shape, result=None):
        result = result or f"v{len(self.calls)}"
        arg_shapes = tuple(tuple(self.shapes[a]) for a in args)
        dtypes = tuple(self.dtypes[a] for a in args)
        self.calls.append(OpCall(op, attrs, tuple(args), arg_shapes, dtypes, (result,), (tuple(shape),), ("float32",)))
        self.shapes[result], self.dtypes[result] = tuple(shape), "float32"
        return result

    def linear(self, x, out, name, activation="", residual=None, bias=True):
        features = self.shapes[x][-1]
        args = [x, self.weight(f"{name}.weight", out, features)]
        args += [self.weight(f"{name}.bias", out)] if bias else []
        args += [residual] if residual else []
        attrs = {"bias": bias, "activation": activation, "residual": residual is not None}
        return self.call("linear", attrs, args, (*self.shapes[x][:-1], out))

    def attention(self, *operands, kv_heads=HEADS, packed=True, causal=False, mask=None, bias=None, scale=None):
        attrs = {
            "heads": HEADS, "kv_heads": kv_heads, "head_dim": DIM, "packed": packed, "causal": causal,
            "mask": mask is not None, "bias": bias is not None, "scale": scale,
        }  # fmt: skip
        args = [*operands, *(name for name in (mask, bias) if name)]
        return self.call("attention", attrs, args, ("batch", self.shapes[operands[0]][1], HEADS * DIM))

    def layer_norm(self, x, name, residual=None, result=None):
        args = [x, *([residual] if residual else [])]
        args += [self.weight(f"{name}.weight", HIDDEN), self.weight(f"{name}.bias", HIDDEN)]
        attrs = {"eps": 1e-5, "residual": residual is not None}
        return self.call("layer_norm", attrs, args, self.shapes[x], result)

    def graph(self, name, outputs, entry="forward"):
        specs = tuple(InputSpec(o, self.shapes[o], "float32") for o in outputs)
        return ModelGraph(name, {"layers": 2}, self.weights, {entry: Entry(self.inputs, specs)}, {entry: self.calls})


def _ids():
    return (
        InputSpec("input_ids", ("batch", "seq"), "int64", upper=VOCAB),
        InputSpec("attention_mask", ("batch", "seq"), "int64"),
        InputSpec("token_type_ids", ("batch", "seq"), "int64", upper=TYPES),
    )


def _embeddings(w):
    tables = [w.weight("word", VOCAB, HIDDEN), w.weight("position", POSITIONS, HIDDEN), w.weight("type", TYPES, HIDDEN)]
    norm = [w.weight("norm.weight", HIDDEN), w.weight("norm.bias", HIDDEN)]
    args = ["input_ids", "token_type_ids", *tables, *norm]
    return w.call("embedding_norm", {"eps": 1e-12}, args, ("batch", "seq", HIDDEN))


def tiny_bert(layers=2):
    """Entries `forward` and `embed`, as a BERT encoder with sentence-transformers pooling has them."""
    w = Writer(_ids())
    x = _embeddings(w)
    for i in range(layers):
        qkv = w.linear(x, 3 * HIDDEN, f"layers.{i}.qkv")
        context = w.attention(qkv, mask="attention_mask")
        x = w.layer_norm(w.linear(context, HIDDEN, f"layers.{i}.out", residual=x), f"layers.{i}.norm1")
        up = w.linear(x, FFN, f"layers.{i}.up", activation="gelu")
        down = w.linear(up, HIDDEN, f"layers.{i}.down")
        result = "last_hidden_state" if i == layers - 1 else None
        x = w.layer_norm(down, f"layers.{i}.norm2", residual=x, result=result)
    forward = w.graph("tiny-bert", ["last_hidden_state"])
    w.call(
        "mean_pool", {"eps": 1e-9, "normalize": True}, [x, "attention_mask"], ("batch", HIDDEN), "sentence_embedding"
    )
    embed = w.graph("tiny-bert", ["sentence_embedding"], "embed")
    calls = {"forward": tuple(w.calls[:-1]), "embed": tuple(w.calls)}
    return ModelGraph("tiny-bert", {"layers": layers}, w.weights, {**forward.entries, **embed.entries}, calls)


def zoo():
    """Every operator and variant of the contract in one graph; several outputs."""
    bias_inputs = (
        InputSpec("shared_bias", (1, 1, "seq", "seq"), "float32"),
        InputSpec("full_bias", ("batch", HEADS, "seq", "seq"), "float32"),
        InputSpec("memory", ("batch", "kv", HIDDEN), "float32"),
        InputSpec("memory_mask", ("batch", "kv"), "int64"),
    )
    w = Writer((*_ids(), *bias_inputs))
    x = _embeddings(w)
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        x = w.layer_norm(w.linear(x, HIDDEN, activation, activation=activation, residual=x), f"norm.{activation}")
    outputs = []
    qkv = w.linear(x, 3 * HIDDEN, "qkv", bias=False)
    variants = (
        {},
        {"causal": True},
        {"mask": "attention_mask"},
        {"mask": "attention_mask", "causal": True},
        {"bias": "shared_bias"},
        {"bias": "full_bias", "mask": "attention_mask", "causal": True, "scale": 0.25},
    )
    outputs += [w.attention(qkv, **variant) for variant in variants]
    grouped = w.linear(x, (HEADS + 2 * 2) * DIM, "grouped")
    outputs += [w.attention(grouped, kv_heads=2, causal=True, mask="attention_mask")]
    query, key, value = w.linear(x, HIDDEN, "q"), w.linear("memory", 8, "k"), w.linear("memory", 8, "v")
    outputs += [w.attention(query, key, value, kv_heads=1, packed=False, mask="memory_mask")]
    outputs += [w.attention(query, key, value, kv_heads=1, packed=False, causal=True)]
    key, value = w.linear("memory", HIDDEN, "k4"), w.linear("memory", HIDDEN, "v4")
    outputs += [w.attention(query, key, value, packed=False, causal=True, mask="memory_mask")]
    outputs += [w.call("softmax", {}, [x], w.shapes[x])]
    args = [x, "attention_mask"]
    outputs += [w.call("mean_pool", {"eps": 1e-9, "normalize": False}, args, ("batch", HIDDEN))]
    outputs += [w.call("mean_pool", {"eps": 1e-9, "normalize": True}, args, ("batch", HIDDEN))]
    return w.graph("zoo", outputs)
