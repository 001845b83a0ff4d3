"""Llama-like models against plain PyTorch; caches against full recomputation; what a config may not ask for."""

import json

import numpy as np
import pytest
import torch
from cached import assert_cache_equals_recomputation
from checkpoints import LLAMA, llama_tensors, write
from decoder_oracle import llama3_scaling, llama_logits, yarn_scaling

from attntune.compiler import compile
from attntune.errors import ModelError
from attntune.models import from_pretrained
from attntune.runtime.tuned_model import TunedModel

SHAPE = {"batch": 2, "seq": 8, "context": 24}
IDS = np.random.default_rng(7).integers(0, LLAMA["vocab_size"], (2, 14))
#: Of the four frequencies of a head one stays, one is between, two are long.
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
#: One frequency stays, one is between, two are long.
YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0, "beta_slow": 1.0}
VARIANTS: dict = {
    "llama": {},
    "llama 3": {"rope_scaling": LLAMA3},
    "linearly scaled": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "yarn": {"rope_scaling": {"type": "yarn", **YARN}},
    "yarn of a given magnitude": {"rope_scaling": {"rope_type": "yarn", **YARN, "attention_factor": 0.8}},
    "tied qwen2": {
        "model_type": "qwen2", "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20.0},
    },
    "mistral with a window": {"model_type": "mistral", "sliding_window": 5},
    "phi3": {"model_type": "phi3", "sliding_window": 3, "rope_scaling": None},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rms_norm_eps": 1e-3},
}  # fmt: skip


def oracle(config, tensors, ids):
    theta = config.get("rope_parameters", config)["rope_theta"]
    scaling = config.get("rope_scaling") or {}
    scaled = {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "llama3":
        scaled = {"scaled": llama3_scaling(**scaling)}
    elif kind == "linear":
        scaled = {"scaled": lambda frequency: frequency / scaling["factor"]}
    elif kind == "yarn":
        half = config["hidden_size"] // config["num_attention_heads"] // 2
        magnitude = scaling.get("attention_factor", 1 + 0.1 * np.log(4.0))
        scaled = {"scaled": yarn_scaling(theta, half, 4.0, 32, 4.0, 1.0), "magnitude": magnitude}
    return llama_logits(
        {name: torch.from_numpy(value.astype(np.float32)) for name, value in tensors.items()},
        torch.from_numpy(ids),
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        eps=config["rms_norm_eps"],
        theta=theta,
        window=config.get("sliding_window", 0),
        **scaled,
    ).numpy()


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def loaded(request, tmp_path_factory):
    config = {**LLAMA, **VARIANTS[request.param]}
    tensors = llama_tensors(config)
    model = from_pretrained(write(tmp_path_factory.mktemp("model"), config, tensors))
    tuned = TunedModel(compile(model, shapes=[SHAPE], entries=["forward", "prefill", "decode"]))
    return config, tensors, tuned


def test_logits_match_pytorch(loaded):
    config, tensors, tuned = loaded
    expected = oracle(config, tensors, IDS[:, :8])
    np.testing.assert_allclose(tuned(input_ids=IDS[:, :8]), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_caches_give_what_recomputation_gives(loaded):
    config, tensors, tuned = loaded
    assert_cache_equals_recomputation(tuned, IDS, oracle(config, tensors, IDS), SHAPE["seq"])


def test_a_checkpoint_in_bfloat16_is_widened(tmp_path):
    import ml_dtypes

    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in llama_tensors(LLAMA).items()}
    model = from_pretrained(write(tmp_path, LLAMA, tensors))
    assert {value.dtype for value in model.weights.values()} == {np.dtype(np.float32)}
    assert model.generation.stop == (3, 5)


def test_the_config_of_generation_says_where_a_text_ends(tmp_path):
    write(tmp_path, LLAMA, llama_tensors(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert from_pretrained(tmp_path).generation.stop == (9,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling of a llama3 model lacks \['low_freq"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling .*dynamic.* is not supported; expected .*linear",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": -1}}, "rope_scaling .* expected .*positive numbers for factor"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "x"}},
            "rope_scaling .* expected .*positive numbers for .*beta_fast",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": "x"}},
            "rope_scaling .* expected .*positive numbers for attention_factor",
        ),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "rope_scaling .* expected .*low_freq_factor below"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling .* is not supported; expected 'positive"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu' is not supported; expected one of"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4 is not supported; expected 'a divisor of"),
        ({"rms_norm_eps": None}, r"lacks \['rms_norm_eps'\]"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window -1 is not supported; expected 'a positive"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window True is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, fields, message):
    write(tmp_path, {**LLAMA, **fields}, llama_tensors(LLAMA))
    with pytest.raises(ModelError, match=message):
        from_pretrained(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = llama_tensors(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(8, np.float32)
    write(tmp_path, LLAMA, tensors)
    with pytest.raises(ModelError) as error:
        from_pretrained(tmp_path)
    for part in (
        "model.layers.1.mlp.up_proj.weight is missing",
        r"model.norm.weight has shape (3,), expected (48,)",
        "model.layers.0.self_attn.q_norm.weight is not known",
    ):
        assert part in str(error.value)
