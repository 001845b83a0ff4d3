"""GGUF files: small ones, written here."""

import json

import numpy as np
import pytest
import torch
from cached import assert_cache_equals_recomputation
from checkpoints import LLAMA, llama_tensors
from decoder_oracle import llama3_scaling, llama_logits, yarn_scaling

from attntune import cli
from attntune.compiler import compile
from attntune.errors import ModelError
from attntune.models import from_pretrained
from attntune.runtime.tuned_model import TunedModel

gguf = pytest.importorskip("gguf")

PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
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
        writer.add_rope_scaling_factor(fields.pop("rope_factor", 2.5))
        writer.add_rope_scaling_orig_ctx_len(32)
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
    "yarn": (
        {"rope_scaling": "yarn"},
        {"scaled": yarn_scaling(500.0, 4, 2.5, 32, 32.0, 1.0), "magnitude": 1 + 0.1 * np.log(2.5)},
    ),
    "qwen2": ({"architecture": "qwen2"}, {}),
    "qwen3": ({"architecture": "qwen3"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_computes_what_the_checkpoint_it_was_made_from_computes(tmp_path, variant):
    fields, scaled = VARIANTS[variant]
    tensors = llama_tensors({**LLAMA, "model_type": fields.get("architecture", "llama")})
    model = from_pretrained(write_gguf(tmp_path / "tiny.gguf", tensors, **fields))
    assert model.config["rope"] == ("half" if "qwen" in variant else "interleaved")
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
        (
            {"architecture": "mamba"},
            r"general.architecture 'mamba' is not supported; expected \['llama', 'qwen2', 'qwen3'\]",
        ),
        ({"tokenizer": "rwkv"}, r"tokenizer.ggml.model 'rwkv' is not supported; expected \['gpt2', 'llama'\]"),
        ({"rope_factors": np.ones(3, np.float32)}, "expected rope_freqs.weight of 4 values, got"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not supported; expected .*smollm"),
        ({"rope_scaling": "yarn", "rope_factor": 0.0}, "llama.rope.scaling.factor 0.0 is not supported; .*positive"),
        ({"rope_scaling": "longrope"}, "llama.rope.scaling.type 'longrope' is not supported"),
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
