"""GPT-2 against plain PyTorch; caches against full recomputation; attention maps; what a config may not ask for."""

import json

import numpy as np
import pytest
import torch
from cached import assert_cache_equals_recomputation
from checkpoints import GPT2, gpt2_tensors, write
from decoder_oracle import gpt2_logits

from attntune import cli
from attntune.compiler import compile
from attntune.errors import InputError, ModelError
from attntune.interop import export_onnx, verify_onnx
from attntune.models import from_pretrained
from attntune.runtime.tuned_model import TunedModel

SHAPE = {"batch": 2, "seq": 8, "context": 24}
IDS = np.random.default_rng(7).integers(0, GPT2["vocab_size"], (2, 14))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gpt2"), GPT2, gpt2_tensors(GPT2))


@pytest.fixture(scope="module")
def tuned(folder):
    model = from_pretrained(folder)
    return TunedModel(compile(model, shapes=[SHAPE], entries=list(model.entries)))


@pytest.fixture(scope="module")
def expected():
    tensors = {name: torch.from_numpy(value) for name, value in gpt2_tensors(GPT2).items()}
    logits, maps = gpt2_logits(tensors, torch.from_numpy(IDS), layers=2, heads=4, eps=1e-5)
    return logits.numpy(), [weights.numpy() for weights in maps]


def test_logits_match_pytorch(tuned, expected):
    logits = expected[0][:, :8]
    np.testing.assert_allclose(tuned(input_ids=IDS[:, :8]), logits, rtol=1e-3, atol=1e-4 * np.abs(logits).max())


def test_caches_give_what_recomputation_gives(tuned, expected):
    assert_cache_equals_recomputation(tuned, IDS, expected[0], SHAPE["seq"])


def test_attention_maps_match_pytorch(tuned, expected):
    logits, *maps = tuned.run("attend", input_ids=IDS[:, :8])
    np.testing.assert_allclose(logits, expected[0][:, :8], rtol=1e-3, atol=1e-4 * np.abs(expected[0]).max())
    for found, wanted in zip(maps, expected[1], strict=True):
        np.testing.assert_allclose(found, wanted[:, :, :8, :8], atol=1e-5)
        np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize("entry", ["forward", "prefill", "decode", "attend"])
def test_the_onnx_twin_of_every_entry_matches(folder, entry, tmp_path):
    model = from_pretrained(folder)
    path = export_onnx(model, tmp_path / "m.onnx", entry=entry)
    parity = verify_onnx(path, model, entry=entry, shapes=({"batch": 2, "seq": 3, "context": 12},))
    assert parity.ok, (entry, parity.max_abs_error)


def test_prompts_of_different_lengths_are_one_by_one_and_50_tokens_are_pytorchs(tmp_path):
    """A vocabulary without an end: whatever is likeliest follows."""
    config = {**GPT2, "n_positions": 64}
    tensors = gpt2_tensors(config)
    model = from_pretrained(write(tmp_path, config, tensors))
    tuned = TunedModel(compile(model, shapes=[{"batch": 2, "seq": 8, "context": 64}]))
    prompts = [IDS[0, :5].tolist(), IDS[1, :11].tolist()]
    together = tuned.generate(prompts, max_new_tokens=50, stop=[]).tokens
    torches = {name: torch.from_numpy(value) for name, value in tensors.items()}
    for prompt, tokens in zip(prompts, together, strict=True):
        assert tuned.generate([prompt], max_new_tokens=50, stop=[]).tokens == [tokens]
        logits, _ = gpt2_logits(torches, torch.tensor([[*prompt, *tokens]]), layers=2, heads=4, eps=1e-5)
        assert tokens == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    with pytest.raises(InputError, match=r"within 64, got 11 \+ 54"):
        tuned.generate(prompts, max_new_tokens=54)


def test_command_line_draws_what_its_tokens_attend_to(capsys, folder, tmp_path):
    np.savez(tmp_path / "ids.npz", input_ids=IDS[:, :6])
    words = ["run", str(folder), "--inputs", str(tmp_path / "ids.npz"), "--attention", str(tmp_path / "m.html")]
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == [[str(i) for i in row] for row in IDS[:, :6]]


def test_it_ends_at_its_token_and_its_positions(folder):
    model = from_pretrained(folder)
    assert model.generation.stop == (88,)
    assert model.generation.max_length == GPT2["n_positions"]
    assert model.default_dims == {"context": GPT2["n_positions"]}


def test_names_without_their_prefix_and_buffers_of_masks_are_understood(tmp_path):
    tensors = {name.removeprefix("transformer."): value for name, value in gpt2_tensors(GPT2).items()}
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 40, 40), np.float32))
    assert from_pretrained(write(tmp_path, GPT2, tensors)).weights["layers.1.feed_forward.up.weight"].shape == (192, 48)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_checkpoint_of_pytorch_is_the_same_model(folder, tmp_path, shards):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    tensors = {name: torch.from_numpy(value) for name, value in gpt2_tensors(GPT2).items()}
    if shards == 1:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        places = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(tensors)}
        for file in set(places.values()):
            torch.save({name: tensors[name] for name, at in places.items() if at == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    found, expected = from_pretrained(tmp_path).weights, from_pretrained(folder).weights
    assert list(found) == list(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "tanh"}, "activation_function 'tanh' is not supported; expected one of"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
        ({"n_head": 5}, "n_head 5 is not supported; expected 'a divisor of n_embd 48'"),
        ({"n_layer": None}, r"lacks \['n_layer'\]"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, fields, message):
    write(tmp_path, {**GPT2, **fields}, gpt2_tensors(GPT2))
    with pytest.raises(ModelError, match=message):
        from_pretrained(tmp_path)
