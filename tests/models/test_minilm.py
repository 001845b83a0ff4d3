"""all-MiniLM-L6-v2, compiled with default schedules, against PyTorch; and what its artifact promises."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import oracle
import pytest
import torch

from attntune.errors import ArtifactError, InputError, ModelError
from attntune.runtime import load

SHAPES = [(1, 128), (8, 128), (1, 512), (3, 77), (1, 1), (5, 200)]


@pytest.mark.parametrize(("batch", "seq"), SHAPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_hidden_state_matches_pytorch(tuned_minilm, minilm_dir, minilm, batch, seq, ragged):
    ids, mask = oracle.tokens(batch, seq, minilm.config["vocab_size"], ragged=ragged, seed=batch * seq)
    hidden = tuned_minilm(input_ids=ids, attention_mask=mask)
    expected = oracle.bert(minilm_dir, ids, mask)
    assert hidden.shape == (batch, seq, 384)
    assert hidden.dtype == np.float32
    assert np.abs(hidden - expected).max() <= 1e-4


def test_token_types_and_left_out_inputs(tuned_minilm, minilm_dir, minilm):
    ids, mask = oracle.tokens(2, 33, minilm.config["vocab_size"], ragged=False)
    types = (np.arange(33) > 12).astype(np.int64)[None].repeat(2, 0)
    both = tuned_minilm(input_ids=ids, token_type_ids=types)
    assert np.abs(both - oracle.bert(minilm_dir, ids, mask, types)).max() <= 1e-4
    assert np.abs(tuned_minilm(input_ids=ids) - oracle.bert(minilm_dir, ids, mask)).max() <= 1e-4


def test_embeddings_have_unit_norm_and_ignore_padding(tuned_minilm, minilm):
    ids, _ = oracle.tokens(1, 40, minilm.config["vocab_size"], ragged=False)
    padded = np.zeros((1, 90), np.int64)
    padded[:, :40] = ids
    mask = (np.arange(90) < 40).astype(np.int64)[None]
    alone = tuned_minilm.run("embed", input_ids=ids)
    beside = tuned_minilm.run("embed", input_ids=padded, attention_mask=mask)
    assert np.linalg.norm(alone) == pytest.approx(1.0, abs=1e-5)
    assert np.abs(alone - beside).max() <= 1e-5


def test_paraphrases_are_closer_than_strangers(tuned_minilm, minilm_dir):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_dir / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(
        ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply today."]
    )
    embeddings = tuned_minilm.run(
        "embed",
        input_ids=np.array([e.ids for e in encoded]),
        attention_mask=np.array([e.attention_mask for e in encoded]),
    )
    similarity = embeddings @ embeddings.T
    assert similarity[0, 1] > 0.5
    assert similarity[0, 1] > similarity[0, 2] + 0.4


def test_torch_in_torch_out_shares_memory(tuned_minilm, minilm):
    ids, mask = oracle.tokens(1, 128, minilm.config["vocab_size"], ragged=False)
    from_numpy = tuned_minilm(input_ids=ids, attention_mask=mask)
    hidden = tuned_minilm(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).int())
    assert isinstance(hidden, torch.Tensor)
    assert np.array_equal(hidden.numpy(), from_numpy)
    view = hidden.numpy()
    hidden[0, 0, 0] = 7.0
    assert view[0, 0, 0] == 7.0


def test_inputs_are_read_in_place(tuned_minilm, minilm):
    from attntune.runtime.buckets import Bucket, Piece
    from attntune.runtime.inputs import Padded, aligned_zeros, fit

    spec = {"name": "input_ids", "dims": ["batch", "seq"], "dtype": "int64", "fill": 0}
    ids = aligned_zeros((8, 128), np.dtype("int64"))
    piece = Piece(0, 8, Bucket((("batch", 8), ("seq", 128)), "f", 1.0))
    buffer = Padded.zeros((8, 128), np.dtype("int64"))
    dims = {"batch": 8, "seq": 128}
    assert np.shares_memory(np.from_dlpack(fit(ids, spec, piece, dims, buffer)), ids)
    ids.flags.writeable = False
    assert np.shares_memory(np.from_dlpack(fit(ids, spec, piece, dims, buffer)), buffer.array)


def test_results_do_not_change_under_a_later_call(tuned_minilm, minilm):
    first_ids, _ = oracle.tokens(1, 128, minilm.config["vocab_size"], ragged=False, seed=1)
    second_ids, _ = oracle.tokens(1, 128, minilm.config["vocab_size"], ragged=False, seed=2)
    first = tuned_minilm(input_ids=first_ids)
    kept = first.copy()
    for _ in range(3):
        tuned_minilm(input_ids=second_ids)
    assert np.array_equal(first, kept)


def test_many_threads_give_the_same_bits(tuned_minilm, minilm):
    requests = [
        oracle.tokens(b, s, minilm.config["vocab_size"], ragged=True, seed=s)
        for b, s in ((1, 5), (2, 16), (1, 16), (3, 9))
    ]
    expected = [tuned_minilm(input_ids=ids, attention_mask=mask) for ids, mask in requests]
    wrong: Counter[int] = Counter()

    def work(number: int) -> None:
        for turn in range(60):
            which = (number + turn) % len(requests)
            ids, mask = requests[which]
            if not np.array_equal(tuned_minilm(input_ids=ids, attention_mask=mask), expected[which]):
                wrong[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_running_needs_no_compiler(minilm_artifact):
    program = """
import sys
class NoCompiler:
    def find_spec(self, name, path=None, target=None):
        if name == "tvm" or name.startswith("tvm."):
            raise ImportError("the compiler was imported: " + name)
sys.meta_path.insert(0, NoCompiler())
import importlib.util
real = importlib.util.find_spec
def find_spec(name, package=None):
    if name == "tvm":
        for finder in sys.meta_path[1:]:
            spec = finder.find_spec(name, None)
            if spec: return spec
    return real(name, package)
importlib.util.find_spec = find_spec
import numpy as np, attntune
hidden = attntune.load(sys.argv[1])(input_ids=np.arange(9)[None])
maps = open("/proc/self/maps").read()
assert "libtvm_runtime" in maps and "libtvm_compiler" not in maps, "the compiler library was loaded"
print(hidden.shape)
"""
    result = subprocess.run([sys.executable, "-c", program, str(minilm_artifact)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(1, 9, 384)"


def test_manifest_accounts_for_every_kernel(minilm_artifact, minilm):
    manifest = json.loads((minilm_artifact / "manifest.json").read_text())
    assert manifest["target"]["kind"] == "cpu"
    assert {bucket["entry"] for bucket in manifest["buckets"]} == {"forward", "embed"}
    assert all(kernel["source"] in ("exact", "transferred", "default") for kernel in manifest["kernels"])
    assert set(manifest["files"]) == {"kernels.so", "weights.bin", "tokenizer.json", "tokenizer_config.json"}
    # One copy of every weight, however many shapes there are.
    parameters = sum(w.size for w in minilm.weights.values())
    assert sum(int(np.prod(w["shape"])) for w in manifest["weights"].values()) == parameters


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"missing input 'input_ids'; expected int64 \(batch, seq\)"),
        ({"input_ids": np.zeros((1, 4), np.float32)}, r"'input_ids' has dtype float32; expected int64"),
        ({"input_ids": np.zeros(4, np.int64)}, r"has shape \(4,\); expected int64 \(batch, seq\)"),
        ({"input_ids": [[1, 2, 3, 4]], "attention_mask": np.ones((1, 5), np.int64)}, r"axis 1 \(seq\) to be 4"),
        ({"input_ids": np.zeros((1, 4), np.int64), "ids": np.zeros(3)}, r"unknown inputs \['ids'\]"),
        ({"input_ids": np.zeros((1, 513), np.int64)}, r"at most 512 tokens, got 513"),
        ({"input_ids": np.zeros((0, 4), np.int64)}, r"expected no empty axis"),
        ({"input_ids": np.full((1, 4), 30522)}, r"expected them in \[0, 30522\)"),
        ({"input_ids": np.full((1, 4), -1)}, r"expected them in \[0, 30522\)"),
        ({"input_ids": [[1, 2], [3]]}, r"ragged"),
        ({"input_ids": "hello"}, r"is a str; expected a NumPy array or a torch tensor"),
    ],
)  # fmt: skip
def test_bad_input_is_named(tuned_minilm, inputs, message):
    with pytest.raises(InputError, match=message):
        tuned_minilm(**inputs)


def test_unknown_entry(tuned_minilm):
    with pytest.raises(InputError, match="expected one of"):
        tuned_minilm.run("generate", input_ids=np.zeros((1, 4), np.int64))


@pytest.fixture
def broken(minilm_artifact, tmp_path):
    return shutil.copytree(minilm_artifact, tmp_path / "broken.attn")


def _edit(artifact, **fields):
    path = artifact / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_damaged_library(broken):
    data = bytearray((broken / "kernels.so").read_bytes())
    data[len(data) // 2] ^= 1
    (broken / "kernels.so").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"kernels\.so is damaged: expected sha256"):
        load(broken)


def test_truncated_weights(broken):
    data = (broken / "weights.bin").read_bytes()
    (broken / "weights.bin").write_bytes(data[:-100])
    with pytest.raises(ArtifactError, match=r"weights\.bin is damaged"):
        load(broken)


def test_missing_file(broken):
    (broken / "weights.bin").unlink()
    with pytest.raises(ArtifactError, match=r"incomplete: expected the file weights\.bin"):
        load(broken)


def test_torn_manifest(broken):
    text = (broken / "manifest.json").read_text()
    (broken / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        load(broken)


def test_newer_format(broken):
    _edit(broken, format=99)
    with pytest.raises(ArtifactError, match="format 99"):
        load(broken)


def test_foreign_isa(broken):
    target = json.loads((broken / "manifest.json").read_text())["target"]
    _edit(broken, target={**target, "name": "sapphirerapids", "features": ["of-tomorrow", *target["features"]]})
    with pytest.raises(ArtifactError, match=r"sapphirerapids, whose ISA features \['of-tomorrow'\] this CPU lacks"):
        load(broken)


def test_foreign_architecture(broken):
    target = json.loads((broken / "manifest.json").read_text())["target"]
    _edit(broken, target={**target, "triple": "riscv64-unknown-linux-gnu"})
    with pytest.raises(ArtifactError, match="compiled for riscv64"):
        load(broken)


def test_not_an_artifact(tmp_path):
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        load(tmp_path)


def test_saving_over_something_else(minilm_artifact, tmp_path):
    from attntune.runtime import open_artifact

    (tmp_path / "notes").mkdir()
    with pytest.raises(ArtifactError, match="is not an attntune artifact"):
        open_artifact(minilm_artifact).save(tmp_path / "notes")


def test_model_directory_errors(minilm_dir, tmp_path):
    from attntune.models import from_pretrained

    with pytest.raises(ModelError, match=r"config\.json, which does not exist"):
        from_pretrained(tmp_path)
    config = json.loads((minilm_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(ModelError, match="'mamba' is not supported; expected one of"):
        from_pretrained(tmp_path)
    shutil.copy(minilm_dir / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "position_embedding_type": "relative_key"}))
    with pytest.raises(ModelError, match="position_embedding_type 'relative_key' is not supported"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 1000}))
    with pytest.raises(
        ModelError, match=r"intermediate\.dense\.weight has shape \(1536, 384\), expected \(1000, 384\)"
    ):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not a valid safetensors file"):
        from_pretrained(tmp_path)
