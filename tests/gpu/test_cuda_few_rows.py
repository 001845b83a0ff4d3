"""CUDA templates for few rows and few queries, split between blocks, and for a key-value cache's append."""

import random

import pytest
from corners import CORNERS, DECODING, FEW_ROWS
from gpu import needs_nvcc

from attntune.ops import Attention, KVAppend, Linear
from attntune.target import PRESETS
from attntune.templates import template_for
from attntune.templates.cuda.attention_decode import AttentionDecodeCUDA
from attntune.templates.cuda.kv_append import KVAppendCUDA
from attntune.templates.cuda.linear_split import LinearSplitCUDA
from attntune.templates.lowering import build_with_resources

TARGET = PRESETS["sm_80"]
APPENDS = (*CORNERS["kv_append"], KVAppend(3, 6, 12, 2, 1, 64, style="half", positions=10, dtype="float16"))


def emulate(emulator, workloads, workload, template, **wanted):
    """Of every second workload the default config, of others one with knobs as ``wanted``; copies late, then early."""
    used = template_for(workload, TARGET)
    assert isinstance(used, template)
    config = used.default(workload, TARGET)
    if workloads.index(workload) % 2:
        space = [c for c in used.space(workload, TARGET) if all(c[name] in values for name, values in wanted.items())]
        config = random.Random(workload.key()).choice(space)
    for late in (True, False):
        arguments = (used.reference_name(), workload, TARGET, config, late, 7)
        assert emulator.call("emulation:check", *arguments, timeout_secs=120) == ""


@needs_nvcc
class TestOnTheEmulatedDevice:
    @pytest.mark.parametrize("workload", FEW_ROWS, ids=str)
    def test_linear(self, emulator, workload):
        emulate(emulator, FEW_ROWS, workload, LinearSplitCUDA, splits=(2, 4, 8), block_n=(32,), block_m=(16, 32))

    @pytest.mark.parametrize("workload", DECODING, ids=str)
    def test_attention(self, emulator, workload):
        emulate(emulator, DECODING, workload, AttentionDecodeCUDA, splits=(2, 4, 8), key_block=(16,))

    @pytest.mark.parametrize("workload", APPENDS, ids=str)
    def test_append(self, emulator, workload):
        emulate(emulator, APPENDS, workload, KVAppendCUDA, threads=(64, 256))


GATED = Linear(1, 4096, 14336, bias=False, gated=True, activation="silu", dtype="bfloat16")
RESIDUAL = Linear(64, 4096, 4096, bias=False, residual=True, dtype="float16")
DECODE = Attention(1, 32, 1, 8192, 128, kv_heads=8, lengths="kv", dtype="bfloat16")
FEW_QUERIES = Attention(8, 9, 4, 2048, 64, kv_heads=3, lengths="kv", causal=True, dtype="float16")
APPEND = KVAppend(1, 512, 8192, 32, 8, 128, style="half", positions=8192, dtype="bfloat16")


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "workload", "template"),
    [
        ("sm_100", GATED, LinearSplitCUDA),
        ("sm_89", RESIDUAL, LinearSplitCUDA),
        ("sm_80", DECODE, AttentionDecodeCUDA),
        ("sm_86", FEW_QUERIES, AttentionDecodeCUDA),
        ("sm_90a", APPEND, KVAppendCUDA),
    ],
)
def test_the_default_compiles_without_spills(name, workload, template):
    target = PRESETS[name]
    used = template_for(workload, target)
    assert type(used) is template
    config = used.default(workload, target)
    _, resources = build_with_resources(used.schedule(workload, target, config), target)
    assert len(resources) == (1 if template is KVAppendCUDA else 2)
    assert all(kernel["spill_bytes"] == kernel["stack_bytes"] == 0 for kernel in resources.values())
    if template is LinearSplitCUDA and workload.rows == 1:
        assert config["splits"] * -(-workload.out_features // config["block_n"]) >= target.sm_count


def test_what_is_not_worth_splitting_is_left_to_the_plain_templates():
    names = [template_for(w, TARGET).reference_name().rpartition(":")[2] for w in (
        FEW_ROWS[0].replace(rows=512), FEW_ROWS[0].replace(in_features=256), DECODING[0].replace(q_len=64),
        DECODING[0].replace(kv_len=64), DECODING[0].replace(lengths=""),
    )]  # fmt: skip
    assert names == ["LinearCUDA", "LinearCUDA", "AttentionCUDA", "AttentionCUDA", "AttentionDecodeCUDA"]
