"""all-MiniLM-L6-v2 at lower precisions, against its own float32; and what happens where the CPU lacks instructions."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle
import pytest

import attntune
from attntune.errors import ModelError, TuningError
from attntune.models.bert import BertConfig, random_model
from attntune.models.precision import at_precision, retyped, supported
from attntune.target import PRESETS, native
from attntune.tuner import tune

SHAPES = [{"batch": 1, "seq": 32}, {"batch": 4, "seq": 64}]
TINY = BertConfig(50, 32, 2, 2, 64, 16, 2, "gelu", 1e-12)
COSINE = {"bfloat16": 0.999, "int8": 0.99, "int4": 0.97}


def tiny_bert():
    return random_model(TINY, "tiny")


@pytest.fixture(scope="module", params=sorted(COSINE))
def lower(request, minilm, tmp_path_factory):
    """A precision, and MiniLM compiled at it."""
    if reason := supported(request.param, native())[1]:
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("precision") / "model.attn"
    attntune.compile(minilm, shapes=SHAPES, precision=request.param).save(path)
    return request.param, attntune.load(path)


@pytest.mark.parametrize(("batch", "seq"), [(1, 32), (4, 57), (3, 1)])
def test_embeddings_point_the_same_way(lower, tuned_minilm, minilm, batch, seq):
    precision, model = lower
    ids, mask = oracle.tokens(batch, seq, minilm.config["vocab_size"], ragged=seq > 1, seed=seq)
    found, expected = (m.run("embed", input_ids=ids, attention_mask=mask) for m in (model, tuned_minilm))
    assert found.dtype == np.float32
    assert (found * expected).sum(-1).min() >= COSINE[precision]
    assert not np.array_equal(found, expected)


def test_the_manifest_says_so(lower, minilm):
    precision, model = lower
    assert model.manifest["precision"] == precision
    stored = {name: entry["dtype"] for name, entry in model.manifest["weights"].items()}
    kinds = {
        dtype
        for name, dtype in stored.items()
        if "feed_forward.up.weight:" in name and not {"scale", "minimum"} & set(name.split(":"))
    }
    assert kinds == {{"bfloat16": "bfloat16", "int8": "uint8", "int4": "int32"}[precision]}
    assert stored[next(name for name in stored if name.startswith("embeddings.word"))] == (
        "float32" if precision == "int4" else "bfloat16"
    )


def test_weights_take_less_room(lower, minilm):
    precision, model = lower
    floats = sum(values.nbytes for values in minilm.weights.values())
    size = (model.folder / "weights.bin").stat().st_size
    assert size < {"bfloat16": 0.51, "int8": 0.45, "int4": 0.63}[precision] * floats


def test_a_cpu_without_the_instructions_compiles_float32_and_is_told():
    lines = []
    artifact = attntune.compile(
        tiny_bert(), shapes=[(1, 8)], target="x86-64-v3", precision="bfloat16", on_progress=lines.append
    )
    assert artifact.manifest["precision"] == "float32"
    assert lines[0] == "x86-64-v3 lacks avx512bf16: float32 instead of bfloat16"


def test_tuning_for_a_cpu_without_the_instructions_is_refused():
    with pytest.raises(TuningError, match="cannot tune at int8: x86-64-v3 lacks avx512bf16, avx512vnni"):
        tune(tiny_bert(), target="x86-64-v3", trials=1, precision="int8")


def test_tuning_a_workload_takes_no_precision():
    from attntune.ops import Softmax

    with pytest.raises(TuningError, match="expected a precision only with a model"):
        tune(Softmax(2, 8), trials=1, precision="bfloat16")


def test_only_known_precisions():
    with pytest.raises(
        ModelError,
        match=r"unknown precision 'float8'; expected one of \('float32', 'bfloat16', 'float16', 'int8', 'int4'\)",
    ):
        supported("float8", PRESETS["znver4"])
    model = at_precision(tiny_bert(), "bfloat16")
    with pytest.raises(ModelError, match="expected a float32 model to convert to int8, got one at bfloat16"):
        at_precision(model, "int8")
    assert at_precision(model, "bfloat16") is model


def test_an_output_that_cannot_be_float32_is_named():
    model = at_precision(tiny_bert(), "bfloat16")
    call = next(call for call in tiny_bert().calls() if call.op == "attention")
    entry = model.entries["forward"]
    renamed = dataclasses.replace(entry, outputs=(dataclasses.replace(entry.outputs[0], name=call.result),))

    with pytest.raises(ModelError, match=r"to be made by one of .* got 'attention'"):
        retyped([call], "bfloat16", [renamed.outputs[0].name], model.weights)


def test_every_call_but_the_last_hands_on_bfloat16():
    model = at_precision(tiny_bert(), "int8")
    calls = model.calls()
    assert {call.result_dtype for call in calls[:-1]} == {"bfloat16"}
    assert calls[-1].result_dtype == "float32"
    linear = [call for call in calls if call.op == "linear"]
    assert linear
    assert all(call.arg_dtypes[1:3] == ("int8", "float32") for call in linear)
    assert all(model.weights[call.args[1]].dtype == np.int8 for call in linear)


def test_four_bits_for_layers_and_eight_for_what_makes_an_output():
    from attntune.models import decoder, llama

    config = dataclasses.replace(
        llama.PRESETS["smollm2-135m"], vocab_size=40, hidden_size=32, num_layers=1, heads=2, kv_heads=1, head_dim=16,
        inner=48, positions=64,
    )  # fmt: skip
    model = decoder.build(config, decoder.random_weights(config), "tiny", family="llama")
    lower = at_precision(model, "int4")
    assert lower.entries == model.entries
    for entry in ("prefill", "decode"):
        linear = [call for call in lower.calls(entry) if call.op == "linear"]
        assert [call.attrs["weight_dtype"] for call in linear] == ["uint4"] * 4 + ["uint8"]
        assert all(lower.weights[call.args[1]].max() > 15 for call in linear[-1:])
        assert all(lower.weights[call.args[1]].max() == 15 for call in linear[:-1])
    assert {call.result_dtype for call in lower.calls("decode")} <= {"float32", "int64"}


@pytest.mark.parametrize("bits", [4, 8])
def test_values_on_a_grid_are_found_again(bits):
    """As of a GGUF file: float16 scale and minimum, each group with its least and its greatest value."""
    from attntune.ops.linear import quantize_groups, ungrouped

    rng = np.random.default_rng(bits)
    groups = rng.integers(0, 1 << bits, (5, 3, 32)).astype(np.uint8)
    groups[..., 7], groups[..., 20] = (0, 15) if bits == 4 else (1, 200)
    if bits == 8:
        groups = np.maximum(groups, 1)
    quantized = groups.reshape(5, 96)
    scale = rng.uniform(0.001, 0.1, (5, 3)).astype(np.float16)
    minimum = (
        rng.uniform(-1, 0.1, (5, 3)).astype(np.float16)
        if bits == 4
        else (np.float32(-128) * scale.astype(np.float32)).astype(np.float16)
    )
    stored = ungrouped(quantized, scale, minimum).astype(np.float32)
    found = quantize_groups(stored, bits)
    assert np.array_equal(found[0], quantized)
    assert np.array_equal(found[1], scale)
    assert np.array_equal(found[2], minimum)


def test_groups_of_one_value_and_short_rows():
    from attntune.ops.linear import quantize_groups, ungrouped

    weight = np.array([[0.5] * 40, [0.0] * 40, [*range(-20, 20)]], np.float32)
    for bits in (4, 8):
        quantized, scale, minimum = quantize_groups(weight, bits)
        assert quantized.shape == (3, 40)
        assert scale.shape == minimum.shape == (3, 2)
        error = np.abs(ungrouped(quantized, scale, minimum) - weight).max(axis=1)
        assert error[1] == 0.0
        assert (error <= np.abs(weight).max(axis=1) * {4: 0.06, 8: 0.006}[bits]).all()
