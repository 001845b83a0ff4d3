"""CUDA templates without a GPU: kernels run on the emulated device against the float64 reference, and pass nvcc."""

import math
import random
from pathlib import Path

import pytest
from corners import ATTENTIONS, LINEARS
from gpu import compiled, instructions, needs_nvcc
from operators import ROWS

from attntune.ops import Attention, Linear
from attntune.search.space import Config
from attntune.target import PRESETS
from attntune.templates import GENERIC, REGISTRY, template_for
from attntune.templates.cuda.attention import AttentionCUDA
from attntune.templates.cuda.linear import LinearCUDA

HERE = Path(__file__).parent
TARGET = PRESETS["sm_80"]
CUDA_OPS = sorted({template.op for template in REGISTRY if template.kind == "cuda"})
GENERIC_OPS = sorted(op for op, row in ROWS.items() if GENERIC["cuda"].supports(row.workloads[0], TARGET))
ROW_OPS = ["embedding_norm", "layer_norm", "rms_norm", "softmax"]


def emulate(emulator, template, workload, config, target=TARGET, late=True, seed=0):
    arguments = (template.reference_name(), workload, target, config, late, seed)
    assert emulator.call("emulation:check", *arguments, timeout_secs=120) == ""


def sampled(space, default, count, seed):
    rng = random.Random(seed)
    return dict.fromkeys([default, *(space.sample(rng) for _ in range(count))])


@needs_nvcc
@pytest.mark.parametrize("op", ROW_OPS)
class TestRows:
    def test_sampled_configs_match_the_reference(self, emulator, op):
        for number, workload in enumerate(ROWS[op].workloads[::3]):
            workload = workload.replace(dtype=("float32", "bfloat16", "float16")[number % 3])
            template = template_for(workload, TARGET)
            space = template.space(workload, TARGET)
            for seed, config in enumerate(sampled(space, template.default(workload, TARGET), 1, workload.key())):
                emulate(emulator, template, workload, config, seed=seed)

    def test_it_compiles_without_spills(self, monkeypatch, op):
        size = {"positions": 64, "seq": 16} if op == "embedding_norm" else {"rows": 64}
        for dtype, name in (("float32", "sm_86"), ("bfloat16", "sm_90a")):
            workload = ROWS[op].workloads[0].replace(dtype=dtype, features=1024, **size)
            template = template_for(workload, PRESETS[name])
            config = template.default(workload, PRESETS[name])
            kernel, _ = compiled(monkeypatch, template, workload, PRESETS[name], config)
            assert kernel["registers"] <= 64
            assert kernel["blocks_per_sm"] * kernel["threads"] >= 1024


@needs_nvcc
@pytest.mark.parametrize("op", GENERIC_OPS)
def test_the_generic_schedule_matches_the_reference(emulator, op):
    template = GENERIC["cuda"]
    workload = ROWS[op].workloads[0]
    emulate(emulator, template, workload, template.space(workload, TARGET).sample(random.Random(op)), seed=1)


@needs_nvcc
class TestLinear:
    template = LinearCUDA()

    @pytest.mark.parametrize("workload", LINEARS, ids=str)
    def test_sampled_configs_match_the_reference(self, emulator, workload):
        assert template_for(workload, TARGET).reference_name() == self.template.reference_name()
        space = self.template.space(workload, TARGET)
        default = self.template.default(workload, TARGET)
        # A large tile unrolls an activation into much code, which the host's compiler takes long to compile.
        small = [c for c in space if c.integer("block_m") * c.integer("block_n") <= 4096 and c["stages"] != 4]
        for config in (default, random.Random(workload.key()).choice(small)):
            for late in (True, False):
                emulate(emulator, self.template, workload, config, late=late, seed=3)

    @pytest.mark.parametrize(
        ("workload", "name", "knobs"),
        [
            (Linear(4096, 4096, 4096, dtype="bfloat16"), "sm_80", None),
            (Linear(4096, 384, 1536, dtype="float16", activation="gelu"), "sm_90a", (128, 64, 32, 4, 2, 2, 8)),
            (
                Linear(512, 576, 1536, dtype="bfloat16", gated=True, activation="silu"),
                "sm_86",
                (64, 64, 64, 4, 1, 2, 8),
            ),
            (Linear(17, 1024, 1025, dtype="float16", residual=True), "sm_100", (16, 32, 32, 2, 1, 2, 1)),
        ],
    )
    def test_it_compiles_to_tensor_core_instructions_without_spills(self, monkeypatch, tmp_path, workload, name, knobs):
        target = PRESETS[name]
        names = ("block_m", "block_n", "block_k", "stages", "warps_m", "warps_n", "group")
        config = Config.of(**dict(zip(names, knobs, strict=True))) if knobs else self.template.default(workload, target)
        kernel, cubin = compiled(monkeypatch, self.template, workload, target, config)
        tile = config.integer("block_m") * config.integer("block_n") * config.integer("block_k")
        products = (2 if workload.gated else 1) * tile // (kernel["threads"] // 32) // (16 * 8 * 16)
        suffix = r"\.BF16" if workload.dtype == "bfloat16" else ""
        assert instructions(cubin, tmp_path, rf"HMMA\.16816\.F32{suffix}\b") >= products
        assert instructions(cubin, tmp_path, "LDSM") > 0
        assert instructions(cubin, tmp_path, "LDGSTS") > 0

    def test_a_kernel_beyond_the_targets_shared_memory_is_rejected(self):
        space = self.template.space(LINEARS[0].replace(rows=4096, out_features=4096), PRESETS["sm_86"])
        large = self.template.space(LINEARS[0].replace(rows=4096, out_features=4096), PRESETS["sm_90a"])
        assert len(space) < len(large)


@needs_nvcc
class TestAttention:
    template = AttentionCUDA()

    @pytest.mark.parametrize("workload", ATTENTIONS, ids=str)
    def test_sampled_configs_match_the_reference(self, emulator, workload):
        assert template_for(workload, TARGET).reference_name() == self.template.reference_name()
        space, default = self.template.space(workload, TARGET), self.template.default(workload, TARGET)
        emulate(emulator, self.template, workload, default, late=True, seed=1)
        small = [c for c in space if c.integer("key_block") <= 64]
        emulate(emulator, self.template, workload, random.Random(workload.key()).choice(small), late=False, seed=2)

    @pytest.mark.parametrize(
        ("workload", "name"),
        [
            (Attention(4, 16, 4096, 4096, 128, layout="bhsd", dtype="bfloat16", causal=True), "sm_80"),
            (Attention(4, 16, 4096, 4096, 64, layout="bhsd", dtype="float16"), "sm_90a"),
            (Attention(8, 12, 128, 128, 32, packed=True, mask=True, dtype="bfloat16"), "sm_86"),
        ],
    )
    def test_the_default_compiles_to_tensor_core_instructions_without_spills(
        self, monkeypatch, tmp_path, workload, name
    ):
        target = PRESETS[name]
        config = self.template.default(workload, target)
        _, cubin = compiled(monkeypatch, self.template, workload, target, config)
        products = 2 * config.integer("warp_tiles") * config.integer("key_block") * workload.head_dim // (8 * 16)
        suffix = r"\.BF16" if workload.dtype == "bfloat16" else ""
        assert instructions(cubin, tmp_path, rf"HMMA\.16816\.F32{suffix}\b") >= products
        assert instructions(cubin, tmp_path, r"LDSM\.16\.MT88") > 0
        assert instructions(cubin, tmp_path, "LDGSTS") > 0
        assert instructions(cubin, tmp_path, r"MUFU\.EX2") > 0

    def test_other_variants_are_left_to_the_generic_template(self):
        for change in ({"dtype": "float32"}, {"head_dim": 40}, {"weights": True}, {"ragged": True}):
            assert template_for(ATTENTIONS[0].replace(**change), TARGET) is GENERIC["cuda"]


#: For templates that do not take the first of the contract tests' workloads, which is float32.
OWN_WORKLOADS = {"linear": LINEARS[0], "attention": ATTENTIONS[0]}


@pytest.mark.parametrize("op", CUDA_OPS)
class TestEveryTemplate:
    """What needs no compiler."""

    def test_space_and_default_depend_on_limits_alone(self, op):
        workload = OWN_WORKLOADS.get(op) or ROWS[op].workloads[0]
        for target in (target for target in PRESETS.values() if target.kind == "cuda"):
            template = template_for(workload, target)
            space = template.space(workload, target)
            assert template.op == op
            assert space.configs == template.space(workload, target).configs
            assert template.default(workload, target) in space

    def test_features_have_the_same_finite_values_for_the_same_config(self, op):
        workload = OWN_WORKLOADS.get(op) or ROWS[op].workloads[0]
        for template in (template_for(workload, TARGET), GENERIC["cuda"]):
            rows = [template.features(workload, TARGET, c) for c in template.space(workload, TARGET).configs[:50]]
            assert all(row.keys() == rows[0].keys() for row in rows)
            assert all(math.isfinite(value) for row in rows for value in row.values())
            assert any(row != rows[0] for row in rows)
