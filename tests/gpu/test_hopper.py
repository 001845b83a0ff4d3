"""Hopper's templates without a GPU: emulated against the float64 reference, broken on purpose, compiled by nvcc."""

import dataclasses
import re
from pathlib import Path

import pytest
from corners import HOPPER_ATTENTIONS, HOPPER_LINEARS
from gpu import compiled, instructions, needs_nvcc

from attntune.ops import Attention, Linear
from attntune.search.space import Config
from attntune.target import PRESETS
from attntune.templates import nvcc, template_for
from attntune.templates.cuda import hopper
from attntune.templates.cuda.attention import AttentionCUDA
from attntune.templates.cuda.attention_hopper import AttentionHopper
from attntune.templates.cuda.linear import LinearCUDA
from attntune.templates.cuda.linear_hopper import LinearHopper

HERE = Path(__file__).parent
TARGET = PRESETS["sm_90a"]
#: So few that a block has several tiles.
FEW_SMS = dataclasses.replace(TARGET, sm_count=3)
LINEAR, ATTENTION = LinearHopper(), AttentionHopper()


def linear_config(block_m, block_n, stages, consumers, persistent, group, producer_registers=None):
    split = producer_registers if producer_registers is not None else 24 * (consumers > 1)
    return Config.of(
        block_m=block_m, block_n=block_n, stages=stages, consumers=consumers, persistent=persistent, group=group,
        producer_registers=split,
    )  # fmt: skip


def attention_config(
    consumers, key_block, stages, overlap, pingpong, persistent=False, tma_store=False, producer_registers=None
):  # fmt: skip
    split = producer_registers if producer_registers is not None else 24 * (consumers > 1)
    return Config.of(
        consumers=consumers, key_block=key_block, stages=stages, overlap=overlap, pingpong=pingpong,
        persistent=persistent, tma_store=tma_store, producer_registers=split,
    )  # fmt: skip


#: One of each workload of the corners, in their order; between them every value of the knobs that change the kernel.
LINEAR_CONFIGS = (
    linear_config(64, 64, 4, 1, False, 1),
    linear_config(128, 32, 3, 1, True, 4),
    linear_config(192, 96, 2, 3, True, 8),
    linear_config(256, 32, 3, 2, True, 1, 40),
    linear_config(128, 128, 4, 2, True, 4, 0),
)
ATTENTION_CONFIGS = (
    attention_config(1, 32, 2, False, False, True),
    attention_config(2, 64, 2, True, True),
    attention_config(2, 32, 3, True, True, True, True),
    attention_config(1, 32, 4, True, False, False, True),
    attention_config(1, 32, 2, True, False, True, True),
    attention_config(1, 96, 2, False, False),
    attention_config(3, 32, 2, False, False, True, True),
    attention_config(1, 32, 3, True, False),
    attention_config(1, 32, 2, True, False, True),
    attention_config(1, 64, 2, True, False, True, True),
)
#: As many blocks of queries as leave one of the few SMs more than others, in turns; every way of splitting registers.
MORE = (
    (Attention(3, 2, 70, 200, 64, kv_heads=1, lengths="kv", dtype="bfloat16"),
     attention_config(2, 32, 2, True, True, True, False, 40)),
    (Attention(2, 2, 200, 200, 64, layout="bhsd", causal=True, dtype="float16"),
     attention_config(2, 32, 2, True, True, True, True, 0)),
)  # fmt: skip
LATE, EARLY = (True, 3), (False, 4)  # asynchronous work, as late or as early as allowed; a seed
CASES = [
    (template, workload, config, (EARLY if number % 2 else LATE))
    for template, workloads, configs in (
        (LINEAR, HOPPER_LINEARS, LINEAR_CONFIGS), (ATTENTION, HOPPER_ATTENTIONS, ATTENTION_CONFIGS),
        (ATTENTION, *zip(*MORE, strict=True)),
    )
    for number, (workload, config) in enumerate(zip(workloads, configs, strict=True))
]  # fmt: skip


def named(value):
    return value.op if isinstance(value, LinearHopper | AttentionHopper) else str(value)


@needs_nvcc
@pytest.mark.parametrize(("template", "workload", "config", "mode"), CASES, ids=named)
def test_every_variant_matches_the_reference(emulator, template, workload, config, mode):
    assert template_for(workload, TARGET).reference_name() == template.reference_name()
    arguments = (template.reference_name(), workload, FEW_SMS, config, *mode)
    assert emulator.call("emulation:check", *arguments, timeout_secs=120) == ""


WAIT = "attntune_mbarrier_wait(unsigned barrier, unsigned parity) {"
#: What is done to a kernel, whether late, and what shows.
FAULTS = [
    ({"change": ("1ull << 62", "2ull << 62")}, True, "expected|wgmma reads outside"),
    ({"change": ("(1024 >> 4)", "(512 >> 4)")}, True, "expected"),
    ({"change": ("+ 1023u) & ~1023u", "+ 127u) & ~127u")}, True, "where its swizzle's pattern does not begin"),
    ({"patch": ("_SWIZZLE_128B", 0)}, True, "expected"),
    ({"patch": ("_SWIZZLE_128B", 2)}, True, "SWIZZLE_64B"),
    # The producer's thread does not wait for consumers, or consumers not for it.
    ({"change": (WAIT, WAIT + " if (threadIdx.x == 0) return;")}, False, "expected|deadlock"),
    ({"change": (WAIT, WAIT + " if (threadIdx.x != 0) return;")}, True, "expected|more arrivals"),
    ({"change": ("mbarrier.arrive.shared::cta.b64 _, [%0];", "")}, True, "deadlock"),
    ({"change": (':: "r"(barrier), "r"(bytes)', ':: "r"(barrier), "r"(bytes + 128)')}, True, "deadlock"),
    ({"change": ("fence.mbarrier_init.release.cluster;", "")}, True, "before a fence after its initialisation"),
    ({"change": ("wgmma.fence.sync.aligned;", "")}, True, r"without wgmma\.fence"),
    ({"change": ("wgmma.wait_group.sync.aligned 1;", "")}, True, "expected"),
    ({"change": ("wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 2;")}, True, "expected"),
    ({"change": ("wgmma.wait_group.sync.aligned 0;", "")}, True, "ended before its wgmmas"),
]
#: The same for attention alone.
ATTENTION_FAULTS = [
    ({"change": ("1, 1, 1; }", "1, 1, 0; }")}, True, "expected|wgmma reads outside"),
    ({"change": ("(leading >> 4)", "(16 >> 4)")}, True, "expected"),
    ({"change": ("bar.arrive %0, %1;", "")}, True, "deadlock"),
]
#: Of attention whose blocks stay, and store tiles of results.
STORE_FAULTS = [
    ({"change": ("fence.proxy.async.shared::cta;", "")}, True, "before a fence after it was written"),
    ({"change": ("cp.async.bulk.wait_group.read 0;", "")}, True, "before the tiles that it stores were read"),
    ({"change": ("^ 7) * 16", "^ 6) * 16")}, True, "expected"),
    # The next queries are brought over results that are still to be stored, or read.
    ({"change": (WAIT, WAIT + " if (threadIdx.x == 0 && parity) return;")}, False, "expected|deadlock|more arrivals"),
]


@needs_nvcc
class TestFaults:
    """A kernel that is broken in one place is found out."""

    linear = (
        LINEAR.reference_name(), Linear(140, 328, 64, dtype="bfloat16", bias=False), FEW_SMS,
        linear_config(128, 32, 2, 2, True, 1),
    )  # fmt: skip
    attention = (
        ATTENTION.reference_name(), Attention(1, 1, 130, 200, 128, dtype="bfloat16", layout="bhsd"), FEW_SMS,
        attention_config(2, 32, 2, True, True),
    )  # fmt: skip

    stored = (
        ATTENTION.reference_name(), Attention(2, 2, 100, 70, 64, dtype="bfloat16", layout="bhsd"), FEW_SMS,
        attention_config(1, 32, 2, False, False, True, True),
    )  # fmt: skip

    def test_none_where_nothing_is_broken(self, emulator):
        for case in (self.linear, self.attention, self.stored):
            for late in (True, False):
                assert emulator.call("emulation:check", *case, late, 5) == ""

    @pytest.mark.parametrize(("fault", "late", "message"), FAULTS, ids=str)
    def test_in_linear(self, emulator, fault, late, message):
        self.shows(emulator, self.linear, fault, late, message)

    @pytest.mark.parametrize(("fault", "late", "message"), [FAULTS[5], *ATTENTION_FAULTS], ids=str)
    def test_in_attention(self, emulator, fault, late, message):
        self.shows(emulator, self.attention, fault, late, message)

    @pytest.mark.parametrize(("fault", "late", "message"), STORE_FAULTS, ids=str)
    def test_in_stores(self, emulator, fault, late, message):
        self.shows(emulator, self.stored, fault, late, message)

    def shows(self, emulator, case, fault, late, message):
        found = emulator.call("emulation:fault", *case, late, 5, timeout_secs=60, **fault)
        assert re.search(message, found), found


LARGE = Linear(4096, 4096, 4096, dtype="bfloat16")
LONG = Attention(4, 16, 4096, 4096, 128, layout="bhsd", dtype="bfloat16", causal=True)
COMPILED = [
    (LINEAR, LARGE.replace(dtype="float16"), None),
    (ATTENTION, LONG, None),
    (ATTENTION, LONG.replace(head_dim=64, dtype="float16", causal=False), attention_config(3, 96, 2, True, False)),
    (ATTENTION, LONG, attention_config(2, 128, 2, True, True, True, True)),
    (ATTENTION, LONG.replace(dtype="float16", head_dim=64), attention_config(2, 128, 2, True, True, True, True, 40)),
]


def kept_logs(monkeypatch):
    """What the assembler says from here on."""
    logs = []
    run = nvcc._run
    monkeypatch.setattr(nvcc, "_run", lambda command: logs.append(run(command)) or logs[-1])
    return logs


@needs_nvcc
class TestCompiled:
    @pytest.mark.parametrize(("template", "workload", "config"), COMPILED, ids=named)
    def test_to_wgmma_and_tile_copies_without_spills(self, monkeypatch, tmp_path, template, workload, config):
        logs = kept_logs(monkeypatch)
        config = config or template.default(workload, TARGET)
        kernel, cubin = compiled(monkeypatch, template, workload, TARGET, config)  # refuses spills
        consumers = config.integer("consumers")
        assert kernel["threads"] == 128 * (1 + consumers)
        # The assembler gives up asynchrony, or the split of registers, with no more than a word in its log.
        assert not [line for line in logs[0].splitlines() if "serialized" in line or "setmaxnreg" in line]
        producer = config.integer("producer_registers")
        if producer:
            consumer = hopper.consumer_registers(consumers, producer)
            held = -(-kernel["registers"] // 8) * 8 * (1 + consumers)
            assert producer + consumers * consumer <= held, "consumers would wait for registers for ever"
        shape, copies = self.instructions_of(template, workload, config)
        assert instructions(cubin, tmp_path, rf"HGMMA\.{shape}") >= 4
        assert instructions(cubin, tmp_path, r"UTMALDG\.\dD") >= copies
        assert (instructions(cubin, tmp_path, "USETMAXREG") == 2) == bool(producer)
        assert (instructions(cubin, tmp_path, "UTMASTG") > 0) == bool(dict(config.items()).get("tma_store"))

    def instructions_of(self, template, workload, config):
        """A wgmma's shape as the disassembler writes it, and how many copies there are at least."""
        suffix = r"\.F32\.BF16" if workload.dtype == "bfloat16" else r"\.F32"
        if template is LINEAR:
            return rf"64x{config['block_n']}x16{suffix}\b", 3 if workload.gated else 2
        return rf"64x{config['key_block']}x16{suffix}\b", 3 * workload.head_dim // 64

    def test_a_serialized_wgmma_would_be_in_the_log(self, monkeypatch):
        """That the assembler says so: sums are read before they are waited for."""
        logs = kept_logs(monkeypatch)
        source = """
__global__ void __launch_bounds__(128) k(float* y, unsigned long long a, unsigned long long b) {
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = y[i];
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  for (int k = 0; k < 2; ++k) {
    asm volatile("{ wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0; }"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    d[0] += 1;
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) y[i] = d[i];
}
"""
        nvcc.compile_source(source, TARGET)
        assert "serialized" in logs[0]


class TestSupport:
    def test_what_wgmma_cannot_do_is_left_to_mma_sync(self):
        for change in ({"rows": 16}, {"out_features": 81}):
            workload = HOPPER_LINEARS[1].replace(**change)
            assert isinstance(template_for(workload, TARGET), LinearCUDA)
        for change in ({"head_dim": 96}, {"q_len": 16}):
            workload = HOPPER_ATTENTIONS[0].replace(**change)
            assert isinstance(template_for(workload, TARGET), AttentionCUDA)
        for name in ("sm_80", "sm_89", "sm_100"):
            assert isinstance(template_for(LARGE, PRESETS[name]), LinearCUDA)
            assert isinstance(template_for(LONG, PRESETS[name]), AttentionCUDA)

    @pytest.mark.parametrize(("template", "workload"), [(LINEAR, LARGE), (ATTENTION, LONG)], ids=named)
    def test_configs_fit_the_target(self, template, workload):
        space = template.space(workload, TARGET)
        assert template.default(workload, TARGET) in space
        small = dataclasses.replace(TARGET, shared_memory_bytes=100 * 1024)
        assert 0 < len(template.space(workload, small)) < len(space)
        rows = [template.features(workload, TARGET, config) for config in space.configs[::7]]
        assert all(row.keys() == rows[0].keys() for row in rows)
        assert len({tuple(row.values()) for row in rows}) == len(rows)
