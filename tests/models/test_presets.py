"""``transformer-base`` and ``transformer-big`` at the paper's sizes, seeded weights, against ``torch.nn``'s layers."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from attntune import cli
from attntune.cli import open_model
from attntune.compiler import compile
from attntune.errors import ModelError
from attntune.interop import export_onnx, verify_onnx
from attntune.models import from_pretrained, preset
from attntune.models.transformer import PRESETS
from attntune.runtime.tuned_model import TunedModel

#: Parameters in millions, table 3 of the paper.
MILLIONS = {"transformer-base": 65, "transformer-big": 213}
SOURCE = np.array([[5, 9, 36999, 17, 4, 2], [8, 3, 2, 0, 0, 0]])
LENGTHS = np.array([6, 3], np.int32)
TARGET = np.array([[1, 44, 310, 7], [1, 20000, 6, 5]])


class Oracle:
    """PyTorch's encoder and decoder with a model's weights; nothing is cached, sources are masked."""

    def __init__(self, model):
        c = model.config
        self.weights = {name: torch.from_numpy(value) for name, value in model.weights.items()}
        self.scale = c["embedding_scale"]
        sizes = (c["hidden_size"], c["heads"], c["inner"])
        options = {"dropout": 0.0, "activation": "relu", "batch_first": True, "layer_norm_eps": c["eps"]}
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(*sizes, **options) for _ in range(c["encoder_layers"]))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(*sizes, **options) for _ in range(c["decoder_layers"]))
        for side, layers in (("encoder", self.encoder), ("decoder", self.decoder)):
            for index, layer in enumerate(layers):
                layer.load_state_dict(dict(self._state(f"{side}.layers.{index}.", side)))
                layer.eval()

    def _state(self, at, side):
        norms = ("attention_norm", "output_norm")
        if side == "decoder":
            norms = ("attention_norm", "cross_attention_norm", "feed_forward_norm")
        names = {f"norm{i + 1}": norm for i, norm in enumerate(norms)}
        names |= {
            "self_attn.out_proj": "attention.output",
            "linear1": "feed_forward.up",
            "linear2": "feed_forward.down",
        }
        if side == "decoder":
            names["multihead_attn.out_proj"] = "cross_attention.output"
        for end in ("weight", "bias"):
            yield from ((f"{theirs}.{end}", self.weights[f"{at}{ours}.{end}"]) for theirs, ours in names.items())
            yield f"self_attn.in_proj_{end}", self.weights[f"{at}attention.qkv.{end}"]
            if side == "decoder":
                parts = [self.weights[f"{at}cross_attention.{part}.{end}"] for part in ("query", "key", "value")]
                yield f"multihead_attn.in_proj_{end}", torch.cat(parts)

    def _embedded(self, ids, side):
        positions = self.weights[f"{side}.position"][: ids.shape[1]]
        return self.weights[f"{side}.table"][torch.from_numpy(ids)] * self.scale + positions

    @torch.inference_mode()
    def __call__(self, source, lengths, target):
        """Logits (batch, seq, vocab)."""
        padding = torch.arange(source.shape[1]) >= torch.from_numpy(lengths)[:, None]
        memory = self._embedded(source, "encoder")
        for layer in self.encoder:
            memory = layer(memory, src_key_padding_mask=padding)
        future = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        x = self._embedded(target, "decoder")
        for layer in self.decoder:
            x = layer(x, memory, tgt_mask=future, memory_key_padding_mask=padding)
        return (x @ self.weights["head.weight"].T).numpy()


@pytest.fixture(scope="module", params=sorted(PRESETS))
def model(request):
    return from_pretrained(f"preset:{request.param}")


#: Of the larger preset only what every entry has in common: it is the same graph.
ENTRIES = {"transformer-base": ("encode", "prefill", "decode", "forward"), "transformer-big": ("forward",)}


@pytest.fixture(scope="module")
def tuned(model):
    return TunedModel(compile(model, shapes=[(4, 8, 8)], entries=ENTRIES[model.name]))


@pytest.fixture
def writing(tuned):
    if "decode" not in tuned.entries:
        pytest.skip("the larger preset has the same graph")
    return tuned


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model)


@pytest.mark.parametrize("beams", [1, 3])
def test_command_line_writes_token_ids(capsys, monkeypatch, writing, tmp_path, beams):
    """A preset has no tokenizer: ids go in and come out."""
    monkeypatch.setattr(open_model, "open_model", lambda path, precision=None: (writing, writing.folder))
    source = {"input_ids": SOURCE[:1], "source_lengths": LENGTHS[:1]}
    np.savez(tmp_path / "ids.npz", **source)
    words = ["--inputs", f"{tmp_path}/ids.npz", "--max-new-tokens", "7", "--beams", str(beams), "--json"]
    assert cli.main(["run", f"preset:{writing.manifest['name']}", *words]) == 0
    expected = writing.generate([[]], source=source, max_new_tokens=7, beams=beams)
    assert json.loads(capsys.readouterr().out)["tokens"] == expected.tokens


def test_a_preset_that_there_is_not_is_named():
    with pytest.raises(ModelError, match=r"unknown preset 'transformer-huge'; expected one of .*'transformer-base'"):
        from_pretrained("preset:transformer-huge")
    assert preset("minilm-l6").family == "bert"


def test_it_has_the_papers_size(model):
    learned = {id(v): v.size for name, v in model.weights.items() if not name.endswith("position")}
    assert sum(learned.values()) / 1e6 == pytest.approx(MILLIONS[model.name], rel=0.03)
    angle = 7 / 10000 ** (2 / model.config["hidden_size"])
    np.testing.assert_allclose(model.weights["encoder.position"][7, 2:4], [np.sin(angle), np.cos(angle)], rtol=1e-6)


def test_logits_match_pytorchs_layers(tuned, oracle):
    got = tuned(input_ids=SOURCE, source_lengths=LENGTHS, decoder_input_ids=TARGET)
    expected = oracle(SOURCE, LENGTHS, TARGET)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_greedy_is_pytorchs_and_a_batch_is_one_by_one(writing, oracle):
    source = {"input_ids": SOURCE, "source_lengths": LENGTHS}
    together = writing.generate([[], []], source=source, max_new_tokens=7).tokens
    for row, tokens in enumerate(together):
        length = int(LENGTHS[row])
        own = {"input_ids": SOURCE[row : row + 1, :length], "source_lengths": LENGTHS[row : row + 1]}
        assert writing.generate([[]], source=own, max_new_tokens=7).tokens == [tokens]
        written = [1]
        while len(written) < 8:
            written.append(int(oracle(own["input_ids"], own["source_lengths"], np.array([written]))[0, -1].argmax()))
        assert tokens == (written[1 : written.index(2)] if 2 in written else written[1:])
    assert writing.generate([[]], source=own, max_new_tokens=7, beams=3).scores[0] < 0.0


@pytest.mark.parametrize("entry", ["encode", "prefill", "decode", "forward"])
def test_the_onnx_twin_of_every_entry_matches(model, entry, tmp_path):
    if model.name != "transformer-base":
        pytest.skip("the larger preset has the same graph")
    path = export_onnx(model, tmp_path / "m.onnx", entry=entry)
    shape = {"batch": 2, "source": 5, "seq": 3, "context": 6}
    parity = verify_onnx(path, model, entry=entry, shapes=(shape,), masks=("ragged",))
    assert parity.ok, (entry, parity.max_abs_error)
