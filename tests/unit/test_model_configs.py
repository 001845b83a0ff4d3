"""What a checkpoint's configuration asks for and is not supported is named, with what is, by every loader."""

import numpy as np
import pytest

from attntune.errors import ModelError
from attntune.models import bert, gguf, gpt2, llama, vit, whisper

BERT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 16, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "intermediate_size": 80, "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5,
}  # fmt: skip
GPT2 = {
    "vocab_size": 89, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 40, "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}  # fmt: skip
VIT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 8,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "patch_size": 2, "num_channels": 1, "num_labels": 10,
}  # fmt: skip
WHISPER = {
    "d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 6, "vocab_size": 51864,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536, "num_mel_bins": 80,
    "max_source_positions": 1500, "max_target_positions": 448, "activation_function": "gelu",
}  # fmt: skip
GGUF = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 64, "llama.embedding_length": 48,
    "llama.feed_forward_length": 80, "llama.attention.head_count": 6, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.tokens": ["a", "b"],
}  # fmt: skip
READERS = {
    "bert": (BERT, bert.BertConfig.from_json),
    "llama": (LLAMA, llama.config_from_json),
    "gpt2": (GPT2, gpt2.config_from_json),
    "vit": (VIT, vit.VitConfig.from_json),
    "whisper": (WHISPER, whisper.config_from_json),
    "gguf": (GGUF, lambda fields: gguf.config_from_metadata(fields, "m.gguf")),
}


@pytest.mark.parametrize("family", READERS)
def test_what_is_supported_is_read(family):
    fields, read = READERS[family]
    assert read(fields).vocab_size == read(fields).vocab_size if family != "vit" else read(fields).patches == 16


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("bert", {"is_decoder": True}, "is_decoder True is not supported; expected False"),
        ("bert", {"position_embedding_type": "relative_key"}, "'relative_key' is not supported; expected 'absolute'"),
        ("bert", {"hidden_act": None}, r"lacks \['hidden_act'\]"),
        ("bert", {"hidden_act": ["gelu"]}, r"hidden_act \['gelu'\] is not supported; expected one of .*'gelu'"),
        ("bert", {"hidden_size": "32"}, "hidden_size '32' is not supported; expected a positive integer"),
        ("bert", {"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers 0 is not supported; expected a positive integer"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window True is not supported; expected False"),
        ("llama", {"layer_types": ["full_attention", "chunked"]}, r"layer_types \['chunked'\] is not supported"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ("gpt2", {"n_inner": 1.5}, "n_inner 1.5 is not supported; expected a positive integer"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported; expected False"),
        ("gpt2", {"n_layer": True}, "n_layer True is not supported; expected a positive integer"),
        ("vit", {"hidden_size": 6.4}, "hidden_size 6.4 is not supported; expected one integer"),
        ("whisper", {"encoder_layers": "four"}, "encoder_layers 'four' is not supported; expected a positive integer"),
        ("whisper", {"scale_embedding": True}, "scale_embedding True is not supported; expected False"),
        ("gguf", {"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window 4096 is not supported"),
        ("gguf", {"llama.rope.scale_linear": 4.0}, "llama.rope.scale_linear 4.0 is not supported; expected 1.0"),
        ("gguf", {"llama.expert_count": 8}, "llama.expert_count 8 is not supported; expected 0"),
        ("gguf", {"llama.block_count": -1}, "llama.block_count -1 is not supported; expected a positive integer"),
        ("gguf", {"tokenizer.ggml.tokens": None}, r"m\.gguf of a GGUF model lacks \['tokenizer.ggml.tokens'\]"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(family, change, message):
    fields, read = READERS[family]
    with pytest.raises(ModelError, match=message):
        read({**fields, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder/pre_norm": 0}, "decoder/pre_norm 0 is not supported; expected 1"),
        ({"encoder/scale_embeddings": 1}, "encoder/scale_embeddings 1 is not supported; expected 0"),
        ({"decoder/rotary_dim": 64}, "decoder/rotary_dim 64 is not supported; expected 'learned positions'"),
        ({"decoder/num_heads": 3}, "decoder/num_heads 3 is not supported; expected 'that of encoder/num_heads'"),
        ({"decoder/activation": 9}, r"decoder/activation 9 is not supported; expected one of \[0, 1, 2, 3\]"),
        ({}, "'decoder/embeddings/weight' is missing"),
    ],
)
def test_numbers_of_a_ctranslate2_file(change, message):
    numbers = {"decoder/activation": 3, "decoder/num_heads": 6, "encoder/num_heads": 6, "decoder/pre_norm": 1, **change}
    with pytest.raises(ModelError, match=r"model\.bin: " + message):
        whisper._from_ctranslate2({}, numbers)


def bert_tensors():
    h, inner = BERT["hidden_size"], BERT["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (50, h), "embeddings.position_embeddings.weight": (16, h),
        "embeddings.token_type_embeddings.weight": (2, h), "embeddings.LayerNorm.weight": (h,),
        "embeddings.LayerNorm.bias": (h,), "pooler.dense.weight": (h, h), "cls.predictions.bias": (50,),
    }  # fmt: skip
    at = "encoder.layer.0."
    for name, rows, columns in (
        ("attention.self.query", h, h), ("attention.self.key", h, h), ("attention.self.value", h, h),
        ("attention.output.dense", h, h), ("intermediate.dense", inner, h), ("output.dense", h, inner),
    ):  # fmt: skip
        shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        shapes |= {f"{at}{name}.weight": (h,), f"{at}{name}.bias": (h,)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def test_tensors_of_bert_that_do_not_fit_are_named():
    config, tensors = bert.BertConfig.from_json(BERT), bert_tensors()
    assert len(bert.rename(config, tensors)) == 5 + 12
    tensors["classifier.weight"] = np.zeros((2, 32), np.float32)
    tensors["encoder.layer.1.output.dense.bias"] = np.zeros(32, np.float32)
    tensors["embeddings.LayerNorm.bias"] = np.zeros(3, np.float32)
    del tensors["encoder.layer.0.attention.self.key.bias"]
    with pytest.raises(ModelError) as error:
        bert.rename(config, tensors)
    for part in (
        "classifier.weight is not known", "encoder.layer.1.output.dense.bias is not known",
        "embeddings.LayerNorm.bias has shape (3,), expected (32,)",
        "encoder.layer.0.attention.self.key.bias is missing",
    ):  # fmt: skip
        assert part in str(error.value)
