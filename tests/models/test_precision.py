"""all-MiniLM-L6-v2 at lower precisions, against its own float32; and what happens where the CPU lacks instructions."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import oracle
import pytest

import attntune
from attntune.database.record import Status, TuningRecord
from attntune.errors import ModelError, PrecisionWarning, TuningError
from attntune.measure.runner import Runner
from attntune.models.bert import BertConfig, random_model
from attntune.models.precision import at_precision, fitting, retyped, supported
from attntune.runtime.tuned_model import TunedModel
from attntune.target import PRESETS, native
from attntune.tuner import tune

SHAPES = [{"batch": 1, "seq": 32}, {"batch": 4, "seq": 64}]
TINY = BertConfig(50, 32, 2, 2, 64, 16, 2, "gelu", 1e-12)
COSINE = {"bfloat16": 0.999, "int8": 0.99, "int8_float32": 0.99, "int4": 0.97, "w4a8": 0.97}


class Refusing(Runner):
    """Runs nothing: every trial fails to build."""

    def measure(self, trials):
        for trial in trials:
            yield TuningRecord(
                trial.workload.key(), trial.target.key(), trial.template, trial.config, Status.BUILD_ERROR
            )

    def race(self, trials, rounds):
        return list(self.measure(trials))


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
    stored_as = {"bfloat16": "bfloat16", "int8": "uint8", "int8_float32": "uint8", "int4": "int32", "w4a8": "int32"}
    assert kinds == {stored_as[precision]}
    assert stored[next(name for name in stored if name.startswith("embeddings.word"))] == (
        "bfloat16" if precision in ("bfloat16", "int8") else "float32"
    )


def test_weights_take_less_room(lower, minilm):
    precision, model = lower
    floats = sum(values.nbytes for values in minilm.weights.values())
    size = (model.folder / "weights.bin").stat().st_size
    share = {"bfloat16": 0.51, "int8": 0.45, "int8_float32": 0.65, "int4": 0.63, "w4a8": 0.63}
    assert size < share[precision] * floats


def test_a_cpu_without_the_instructions_compiles_float32_and_is_told():
    lines = []
    artifact = attntune.compile(
        tiny_bert(), shapes=[(1, 8)], target="x86-64-v3", precision="bfloat16", on_progress=lines.append
    )
    assert artifact.manifest["precision"] == "float32"
    assert lines[0] == "x86-64-v3 lacks avx512bf16: float32 instead of bfloat16"


def test_activations_stay_as_they_are_where_a_cpu_has_no_instructions_for_8_bits():
    reason = "aarch64-neon lacks avx2: int4 instead of w4a8"
    assert supported("w4a8", PRESETS["aarch64-neon"]) == ("int4", reason)
    assert all(supported("w4a8", PRESETS[name]) == ("w4a8", "") for name in ("x86-64-v3", "x86-64-v4", "znver4"))
    lines = []
    assert fitting("w4a8", PRESETS["aarch64-neon"], lines.append, tiny_bert()) == "int4"
    assert lines == [reason]


def test_int8_is_float32_elsewhere_where_a_cpu_does_not_multiply_bfloat16():
    assert supported("int8", PRESETS["znver4"]) == ("int8", "")
    for name in ("x86-64-v3", "x86-64-v4"):
        reason = f"{name} lacks avx512bf16, avx512vnni: int8_float32 instead of int8"
        assert supported("int8", PRESETS[name]) == ("int8_float32", reason)
    assert supported("int8", PRESETS["aarch64-neon"])[0] == "float32"
    reason = "aarch64-neon lacks avx2: float32 instead of int8_float32"
    assert supported("int8_float32", PRESETS["aarch64-neon"]) == ("float32", reason)


def test_linear_layers_alone_quantise_what_they_read():
    lower = at_precision(tiny_bert(), "w4a8")
    calls = [call for entry in lower.entries for call in lower.calls(entry)]
    assert {call.attrs.get("x_dtype") for call in calls if call.op == "linear"} == {"int8"}
    assert {call.attrs.get("x_dtype") for call in calls if call.op != "linear"} == {None}


def test_without_progress_it_is_a_warning():
    with pytest.warns(PrecisionWarning, match="x86-64-v3 lacks avx512bf16: float32 instead of bfloat16"):
        attntune.compile(tiny_bert(), shapes=[(1, 8)], target="x86-64-v3", precision="bfloat16")


def test_a_model_without_the_kernels_compiles_float32_but_for_weights_and_is_told():
    from attntune.models.rnn import RNNConfig, random_model

    model = random_model(RNNConfig(11, 13, 6, 7, 5, 9, attention=True))
    for precision, found in (("bfloat16", "float32"), ("int8", "int8_float32"), ("int4", "int4")):
        lines = []
        artifact = attntune.compile(
            model, shapes=[(1, 4, 4)], entries=["decode"], target="znver4", precision=precision,
            on_progress=lines.append,
        )  # fmt: skip
        assert artifact.manifest["precision"] == found
        told = f"rnn: additive_attention, gru_sequence compute float32 only: {found} instead of {precision}"
        assert (told in lines) == (found != precision)


def test_run_says_so_every_time(capsys, monkeypatch, tmp_path):
    from checkpoints import GPT2, gpt2_tensors, write

    from attntune.cli.open_model import open_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "attntune.models.precision.supported",
        lambda precision, target: ("float32", "" if precision == "float32" else "this CPU lacks it"),
    )
    folder = write(tmp_path / "gpt2", GPT2, gpt2_tensors(GPT2))
    for compiled in (1, 0):
        tuned, _ = open_model(folder, "bfloat16", entries=["forward"], shapes=[{"batch": 1, "seq": 4}])
        assert tuned.manifest["precision"] == "float32"
        said = capsys.readouterr().err
        assert said.count("this CPU lacks it") == 1
        assert said.count("compiling") == compiled


@pytest.mark.parametrize("told", [True, False])
def test_tuning_for_a_cpu_without_the_instructions_is_for_another_precision_and_says_so(tmp_path, told):
    reason = "x86-64-v3 lacks avx512bf16, avx512vnni: int8_float32 instead of int8"
    lines: list[str] = []
    with contextlib.nullcontext() if told else pytest.warns(PrecisionWarning, match=reason):
        summary = tune(
            tiny_bert(), target="x86-64-v3", trials=1, precision="int8", shapes=[(1, 8)], runner=Refusing(),
            database=tmp_path / "tuning.jsonl", on_progress=lines.append if told else None,
        )  # fmt: skip
    assert lines == ([reason] if told else [])
    expected = at_precision(tiny_bert(), "int8_float32").workloads([{"batch": 1, "seq": 8}], "forward")
    assert {result.workload for result in summary.results} == set(expected)


def test_tuning_a_workload_takes_no_precision():
    from attntune.ops import Softmax

    with pytest.raises(TuningError, match="expected a precision only with a model"):
        tune(Softmax(2, 8), trials=1, precision="bfloat16")


def test_only_known_precisions():
    known = r"\('float32', 'bfloat16', 'float16', 'int8', 'int8_float32', 'int4', 'w4a8'\)"
    with pytest.raises(ModelError, match=f"unknown precision 'float8'; expected one of {known}"):
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


def test_int8_float32_changes_linear_layers_alone():
    model = tiny_bert()
    lower = at_precision(model, "int8_float32")
    for before, after in zip(model.calls(), lower.calls(), strict=True):
        assert after.result_dtypes == before.result_dtypes
        if before.op != "linear":
            assert after == before
            continue
        assert after.args == (*before.args[:2], f"{before.args[1]}:scale", *before.args[2:])
        assert lower.weights[after.args[1]].dtype == np.int8


def test_every_call_but_the_last_hands_on_bfloat16():
    model = at_precision(tiny_bert(), "int8")
    calls = model.calls()
    assert {call.result_dtype for call in calls[:-1]} == {"bfloat16"}
    assert calls[-1].result_dtype == "float32"
    linear = [call for call in calls if call.op == "linear"]
    assert linear
    assert all(call.arg_dtypes[1:3] == ("int8", "float32") for call in linear)
    assert all(model.weights[call.args[1]].dtype == np.int8 for call in linear)


def tiny_llama():
    from attntune.models import decoder, llama

    config = dataclasses.replace(
        llama.PRESETS["smollm2-135m"], vocab_size=40, hidden_size=32, num_layers=1, heads=2, kv_heads=1, head_dim=16,
        inner=48, positions=64,
    )  # fmt: skip
    return decoder.build(config, decoder.random_weights(config), "tiny", family="llama")


def test_eight_bits_where_rounding_costs_most_and_four_elsewhere():
    model = tiny_llama()
    lower = at_precision(model, "int4")
    assert lower.entries == model.entries
    for entry in ("prefill", "decode", "forward"):
        calls = lower.calls(entry)
        kinds = {c.args[1]: c.attrs["weight_dtype"] for c in calls if c.op in ("linear", "embedding")}
        assert kinds == {
            "embedding.table": "uint8", "layers.0.attention.qkv.weight": "uint8", "head.weight": "uint8",
            "layers.0.attention.output.weight": "uint4", "layers.0.feed_forward.up.weight": "uint4",
            "layers.0.feed_forward.down.weight": "uint4",
        }  # fmt: skip
        assert all(lower.weights[name].max() == 15 for name, kind in kinds.items() if kind == "uint4")
        assert all(lower.weights[name].max() > 15 for name, kind in kinds.items() if kind == "uint8")
    assert {call.result_dtype for call in lower.calls("decode")} <= {"float32", "int64"}


def test_a_files_own_bits_come_first():
    model = tiny_llama()
    model.bits = {"head.weight": 4, "layers.0.feed_forward.up.weight": 8, "layers.0.attention.qkv.weight": 4}
    lower = at_precision(model, "int4")
    assert lower.bits == {
        "embedding.table": 8, "head.weight": 4, "layers.0.attention.qkv.weight": 4,
        "layers.0.attention.output.weight": 4, "layers.0.feed_forward.up.weight": 8,
        "layers.0.feed_forward.down.weight": 4,
    }  # fmt: skip


def test_a_tied_vocabulary_is_stored_once():
    model = tiny_llama()

    def stored():
        shape = {"batch": 1, "seq": 4, "context": 8}
        artifact = attntune.compile(model, shapes=[shape], entries=["decode"], precision="int4")
        return sum(name.startswith(("embedding.table:", "head.weight:")) for name in artifact.manifest["weights"])

    assert stored() == 3
    model.weights["head.weight"] = model.weights["head.weight"].copy()
    assert stored() == 6


def test_four_bits_compute_what_the_rounded_weights_do():
    """The same model with the values that are stored, in float32."""
    from attntune.ops.grouped import ungrouped

    model = tiny_llama()
    lower = at_precision(model, "int4")
    rounded = dataclasses.replace(model, weights=dict(model.weights))
    for name in lower.bits:
        parts = (lower.weights[f"{name}{part}"] for part in ("", ":scale", ":minimum"))
        rounded.weights[name] = ungrouped(*parts).astype(np.float32)
    ids = np.arange(9).reshape(1, 9) * 4
    found, expected, exact = (
        TunedModel(attntune.compile(m, shapes=[(1, 9)], entries=["forward"], precision=p))(input_ids=ids)
        for m, p in ((model, "int4"), (rounded, "float32"), (model, "float32"))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(found - exact).max() > 1e-2


def test_layers_that_make_an_output_in_one_entry_and_not_in_another():
    """Keys and values of a cross-attention: made by ``encode``, read by an attention in ``forward``."""
    from attntune.models import transformer

    config = dataclasses.replace(
        transformer.PRESETS["transformer-base"], vocab_size=40, source_vocab_size=40, hidden_size=32, heads=2,
        encoder_layers=1, decoder_layers=1, inner=48, source_positions=16, positions=16,
    )  # fmt: skip
    model = transformer.random_model(config, "tiny")
    lower = at_precision(model, "int4")
    for entry in lower.entries:
        kinds = {c.args[1]: c.attrs.get("weight_dtype") for c in lower.calls(entry) if c.op in ("linear", "embedding")}
        assert kinds == {name: f"uint{lower.bits[name]}" for name in kinds}
    assert set(lower.bits.values()) == {4, 8}


def test_weights_that_no_group_can_hold_are_named():
    model = tiny_llama()
    model.weights["layers.0.feed_forward.down.weight"] = np.full((32, 48), 1e5, np.float32)
    with pytest.raises(
        ModelError, match=r"int4: weight 'layers.0.feed_forward.down.weight': expected finite values of"
    ):
        at_precision(model, "int4")


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q5_0", 8), ("Q5_1", 8), ("Q8_0", 8)])
def test_what_a_gguf_type_holds_is_found_again(kind, bits):
    from attntune.ops.grouped import quantize_groups, ungrouped

    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[kind]
    weight = np.random.default_rng(bits).standard_normal((24, 96)).astype(np.float32)
    weight[3] = 0.0
    stored = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    np.testing.assert_allclose(ungrouped(*quantize_groups(stored, bits)), stored, rtol=0, atol=1e-6)


def test_the_search_rounds_better_than_from_the_least_to_the_greatest_value():
    from attntune.ops.grouped import quantize_groups, ungrouped

    weight = np.random.default_rng(5).standard_normal((64, 32)).astype(np.float32)
    least, greatest = weight.min(1, keepdims=True), weight.max(1, keepdims=True)
    step = (greatest - least) / 15
    plain = np.rint((weight - least) / step) * step + least
    found = ungrouped(*quantize_groups(weight, 4))
    errors = [((rounded - weight) ** 2).sum(1) for rounded in (found, plain)]
    assert errors[0].sum() < 0.85 * errors[1].sum()
    assert (errors[0] <= errors[1] * 1.001).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_values_on_a_grid_are_found_again(bits):
    """As of a GGUF file: float16 scale and minimum, each group with its least and its greatest value."""
    from attntune.ops.grouped import quantize_groups, ungrouped

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
    from attntune.ops.grouped import quantize_groups, ungrouped

    weight = np.array([[0.5] * 40, [0.0] * 40, [*range(-20, 20)]], np.float32)
    for bits in (4, 8):
        quantized, scale, minimum = quantize_groups(weight, bits)
        assert quantized.shape == (3, 40)
        assert scale.shape == minimum.shape == (3, 2)
        error = np.abs(ungrouped(quantized, scale, minimum) - weight).max(axis=1)
        assert error[1] == 0.0
        assert (error <= np.abs(weight).max(axis=1) * {4: 0.06, 8: 0.006}[bits]).all()
