"""Contract of every schedule template: legal defaults, correct kernels for any config and shape, any CPU."""

import random
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators import ROWS, WORKLOADS

from attntune.errors import ScheduleError, TargetError
from attntune.host import host_features
from attntune.measure.buffers import GuardedArray, as_tensor, numpy_dtype
from attntune.ops import TensorSpec, Workload
from attntune.ops.grouped import GROUPED
from attntune.target import PRESETS, native
from attntune.templates import GENERIC, REGISTRY, load_template, template_for
from attntune.templates.lowering import build

TARGET = native().with_cores(2)
CPU_OPS = sorted({template.op for template in REGISTRY if template.kind == "cpu"})
FIRST = [ROWS[op].workloads[0] for op in CPU_OPS]
#: Of each operator the first workload, and variants that have kernels of their own.
VARIANTS = [*FIRST, *(w for op in ("embedding", "linear") for w in ROWS[op].workloads if w.weight_dtype in GROUPED)]
CROSS = ("x86-64-v3", "aarch64-neon")
SAMPLED = 2


def check(template, workload, config, target=TARGET):
    """Build, run between guard bands, compare with the float64 reference."""
    assert template.space(workload, target).check(config) == config
    kernel = build(template.schedule(workload, target, config), target)
    inputs = workload.example_inputs(seed=1)
    packings = template.pack(workload, target)
    packed = []
    for spec, value in zip(workload.inputs(), inputs, strict=True):
        if spec.name in packings:
            value = packings[spec.name].apply(value)
            assert (value.shape, str(value.dtype)) == (packings[spec.name].spec.shape, packings[spec.name].spec.dtype)
        packed.append(GuardedArray.holding(np.ascontiguousarray(value)))
    fresh = [GuardedArray(spec.shape, numpy_dtype(spec.dtype)) for spec in workload.fresh()]
    names = [spec.name for spec in workload.inputs()]
    outputs = [*fresh, *(packed[names.index(name)] for name in workload.updated)]
    kernel["main"](*(as_tensor(operand.array) for operand in (*packed, *fresh)))
    assert all(operand.guards_intact() for operand in (*packed, *outputs)), f"{workload} {config}: out of bounds"
    for name, operand in zip(names, packed, strict=True):
        assert name in workload.updated or operand.is_unchanged(), f"{workload} {config}: input {name} was changed"
    rtol, atol = workload.tolerance()
    for output, expected in zip(outputs, workload.reference(*inputs), strict=True):
        np.testing.assert_allclose(
            output.array.astype(np.float64), expected, rtol, atol, equal_nan=True, err_msg=f"{workload} {config}"
        )


def corners(space):
    """Legal configs furthest along each knob, in both directions."""
    chosen = {}
    for knob in space.knobs:
        for pick in (min, max):
            config = pick(space, key=lambda c, knob=knob: (knob.values.index(c[knob.name]), c.key()))
            chosen[config.key()] = config
    return list(chosen.values())


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
class TestEveryWorkload:
    def test_default_and_sampled_configs_match_the_reference(self, workload):
        template = template_for(workload, TARGET)
        default = template.default(workload, TARGET)
        space = template.space(workload, TARGET)
        rng = random.Random(workload.key())
        configs = {config.key(): config for config in (default, *(space.sample(rng) for _ in range(SAMPLED)))}
        for config in configs.values():
            check(template, workload, config)

    def test_the_generic_schedule_matches_the_reference(self, workload):
        if workload.updated:
            pytest.skip("the generic schedule updates nothing in place")
        template = GENERIC["cpu"]
        for parallel in (False, True):
            check(template, workload, template.default(workload, TARGET).replace(parallel=parallel))


@pytest.mark.parametrize("workload", VARIANTS, ids=str)
class TestEveryTemplate:
    def test_corner_configs_match_the_reference(self, workload):
        template = template_for(workload, TARGET)
        for config in corners(template.space(workload, TARGET)):
            check(template, workload, config)

    def test_features_have_the_same_finite_values_for_the_same_config(self, workload):
        for template in (template_for(workload, TARGET), GENERIC["cpu"]):
            space = template.space(workload, TARGET)
            rows = [template.features(workload, TARGET, config) for config in space.configs[:50]]
            assert all(row.keys() == rows[0].keys() for row in rows)
            assert all(np.isfinite(list(row.values())).all() for row in rows)
            assert rows == [template.features(workload, TARGET, config) for config in space.configs[:50]]
            assert len(rows) == 1 or any(row != rows[0] for row in rows)

    def test_space_and_default_depend_on_limits_alone(self, workload):
        for name in ("x86-64-v3", "x86-64-v4", "znver4", "sapphirerapids", "aarch64-neon"):
            target = PRESETS[name]
            template = template_for(workload, target)
            space = template.space(workload, target)
            assert space.configs == template.space(workload, target).configs
            assert template.default(workload, target) == template.default(workload, target)
            assert template.default(workload, target) in space
            assert template.default(workload, target.with_cores(1)) in template.space(workload, target.with_cores(1))

    def test_packing_is_the_same_for_every_config_and_shares_weights_between_row_counts(self, workload):
        template = template_for(workload, TARGET)
        constants = {spec.name for spec in workload.inputs() if spec.constant}
        assert set(template.pack(workload, TARGET)) <= constants

    @pytest.mark.parametrize("name", CROSS)
    def test_it_compiles_for_other_machines_with_their_vectors(self, workload, name):
        target = PRESETS[name]
        for template in (template_for(workload, target), GENERIC["cpu"]):
            module = template.schedule(workload, target, template.default(workload, target))
            assembly = build(module, target).mod.inspect_source("asm")
            register = {"x86-64-v3": r"%ymm\d+", "aarch64-neon": r"\b(v\d+\.4s|q\d+)\b"}[name]
            assert re.search(register, assembly)
            assert "%zmm" not in assembly

    @pytest.mark.skipif(not {"avx2", "fma"} <= set(host_features()), reason="this CPU lacks AVX2")
    def test_the_default_for_256_bit_vectors_is_correct(self, workload):
        target = PRESETS["x86-64-v3"].with_cores(2)
        template = template_for(workload, target)
        check(template, workload, template.default(workload, target), target)

    def test_it_is_found_again_by_name(self, workload):
        template = template_for(workload, TARGET)
        assert type(load_template(template.reference_name())) is type(template)
        assert template in REGISTRY

    def test_another_operators_workload_is_refused(self, workload):
        other = next(w for w in FIRST if w.op != workload.op)
        template = template_for(workload, TARGET)
        config = template.default(workload, TARGET)
        with pytest.raises((AssertionError, ScheduleError)):
            template.schedule(other, TARGET, config)


@pytest.mark.parametrize("op", CPU_OPS)
def test_any_shape_matches_the_reference(op):
    @settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(ROWS[op].drawn, st.randoms(use_true_random=False))
    def property_(workload, rng):
        template = template_for(workload, TARGET)
        space = template.space(workload, TARGET)
        check(template, workload, space.configs[rng.randrange(len(space))])

    property_()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["layer_norm", "softmax", "embedding_norm", "mean_pool"])
def test_narrow_operands_are_computed_in_float32(op, dtype):
    workload = ROWS[op].workloads[0].replace(dtype=dtype)
    template = template_for(workload, TARGET)
    check(template, workload, template.default(workload, TARGET))


@dataclass(frozen=True)
class Triangle(Workload):
    """Sums over the lower triangle, along rows and along columns: conditions on indices, two outputs."""

    op: ClassVar[str] = "triangle"
    size: int

    def inputs(self):
        return (TensorSpec("x", (self.size, self.size), "float32"),)

    def outputs(self):
        return (TensorSpec("rows", (self.size,), "float32"), TensorSpec("columns", (self.size,), "float32"))

    def compute(self):
        from tvm import te, tirx

        zero = tirx.const(0.0, "float32")
        x = te.placeholder((self.size, self.size), "float32", "x")
        j, i = te.reduce_axis((0, self.size), "j"), te.reduce_axis((0, self.size), "i")
        rows = te.compute((self.size,), lambda r: te.sum(tirx.Select(j <= r, x[r, j], zero), axis=j), name="rows")
        columns = te.compute((self.size,), lambda c: te.sum(tirx.Select(c <= i, x[i, c], zero), axis=i), name="columns")
        return [x, rows, columns]

    def reference(self, *inputs):
        lower = np.tril(inputs[0].astype(np.float64))
        return lower.sum(axis=1), lower.sum(axis=0)

    def flops(self):
        return self.size * (self.size + 1)

    @classmethod
    def from_call(cls, attrs, args):
        return cls(args[0].shape[0])


@pytest.mark.parametrize("size", [1, 2, 16, 17, 33, 100, 131])
def test_the_generic_schedule_handles_conditions_on_indices_and_several_results(size):
    workload = Triangle(size)
    template = template_for(workload, TARGET)
    assert template is GENERIC["cpu"]
    for config in template.space(workload, TARGET):
        check(template, workload, config)


def test_an_operator_without_a_template_gets_the_generic_one(monkeypatch):
    others = tuple(template for template in REGISTRY if template.op != "softmax")
    monkeypatch.setattr("attntune.templates.REGISTRY", others)
    assert template_for(ROWS["softmax"].workloads[0], TARGET) is GENERIC["cpu"]


@pytest.mark.parametrize("op", ["gru_sequence", "lstm_sequence"])
def test_an_operator_that_a_kind_of_target_cannot_schedule_is_refused(op, monkeypatch):
    others = tuple(template for template in REGISTRY if (template.op, template.kind) != (op, "cuda"))
    monkeypatch.setattr("attntune.templates.REGISTRY", others)
    with pytest.raises(TargetError, match=f"no template schedules '{op}' for a target of kind 'cuda'"):
        template_for(ROWS[op].workloads[0], PRESETS["sm_80"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attntune.templates", "expected a template as 'module:Class'"),
        ("attntune.nowhere:Template", "cannot find template"),
        ("attntune.templates.common:Nothing", "cannot find template"),
        ("attntune.templates.common:LaneReduction", "expected .* to be a ScheduleTemplate"),
    ],
)
def test_a_bad_template_name_is_refused(name, message):
    with pytest.raises(ScheduleError, match=message):
        load_template(name)
