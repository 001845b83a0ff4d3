"""CUDA templates without a GPU: kernels run on the emulated device against the float64 reference, and pass nvcc."""

import random
from pathlib import Path

import pytest
from gpu import needs_nvcc
from operators import ROWS

from attntune.measure.worker import IsolatedProcess
from attntune.target import PRESETS
from attntune.templates import GENERIC, REGISTRY, template_for
from attntune.templates.lowering import build_with_resources

HERE = Path(__file__).parent
TARGET = PRESETS["sm_80"]
CUDA_OPS = sorted({template.op for template in REGISTRY if template.kind == "cuda"})
GENERIC_OPS = sorted(op for op, row in ROWS.items() if GENERIC["cuda"].supports(row.workloads[0], TARGET))
ROW_OPS = ["embedding_norm", "layer_norm", "rms_norm", "softmax"]


@pytest.fixture(scope="module")
def emulator():
    """A process whose CUDA device is this CPU."""
    process = IsolatedProcess(
        threads=1,
        plugin_paths=[str(HERE / "emulation"), str(HERE.parent / "contract")],
        preload=[("emulation:install",)],
    )
    with process:
        yield process


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
        for number, workload in enumerate(ROWS[op].workloads[::2]):
            workload = workload.replace(dtype=("float32", "bfloat16", "float16")[number % 3])
            template = template_for(workload, TARGET)
            space = template.space(workload, TARGET)
            for seed, config in enumerate(sampled(space, template.default(workload, TARGET), 1, workload.key())):
                emulate(emulator, template, workload, config, seed=seed)

    def test_it_compiles_without_spills(self, op):
        size = (
            {"positions": 64, "seq": 16, "features": 1024} if op == "embedding_norm" else {"rows": 64, "features": 1024}
        )
        for dtype, name in (("float32", "sm_86"), ("bfloat16", "sm_90a")):
            workload = ROWS[op].workloads[0].replace(dtype=dtype, **size)
            template = template_for(workload, PRESETS[name])
            module = template.schedule(workload, PRESETS[name], template.default(workload, PRESETS[name]))
            _, resources = build_with_resources(module, PRESETS[name])
            (kernel,) = resources.values()
            assert kernel["registers"] <= 64
            assert kernel["blocks_per_sm"] * kernel["threads"] >= 1024


@needs_nvcc
@pytest.mark.parametrize("op", GENERIC_OPS)
def test_the_generic_schedule_matches_the_reference(emulator, op):
    template = GENERIC["cuda"]
    workload = ROWS[op].workloads[0]
    rng = random.Random(op)
    for config in (template.default(workload, TARGET), template.space(workload, TARGET).sample(rng)):
        emulate(emulator, template, workload, config, seed=rng.randrange(100))
