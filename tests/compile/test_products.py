"""Products of bytes: exact with every instruction there is for them, at the ends of their ranges too."""

import dataclasses

import numpy as np
import pytest

from attntune.host import host_features
from attntune.measure.buffers import GuardedArray, as_tensor
from attntune.ops import Linear
from attntune.target import PRESETS, Target, native
from attntune.templates.cpu.linear import LinearCPU
from attntune.templates.lowering import build

#: vpdpbusd of 256 bits, as CPUs without AVX-512 have it.
VNNI_256 = Target.parse("llvm -mtriple=x86_64-unknown-linux-gnu -mcpu=alderlake")
TARGETS = {"native": native(), "v3": PRESETS["x86-64-v3"], "v4": PRESETS["x86-64-v4"], "vnni-256": VNNI_256}


def packed(layer, target, operands):
    """Operands as the template wants them, aligned."""
    packings = LinearCPU().pack(layer, target)
    return [
        GuardedArray.holding(packings[spec.name].apply(value) if spec.name in packings else value)
        for spec, value in zip(layer.inputs(), operands, strict=True)
    ]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", ["uint4", "uint8"])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_largest_products_are_exact(name, dtype, rows):
    target = dataclasses.replace(TARGETS[name], cores=2, logical_cores=2)
    if missing := set(target.features) - set(host_features()):
        pytest.skip(f"this CPU lacks {sorted(missing)}")
    layer = Linear(rows, 96, 40, bias=False, weight_dtype=dtype, x_dtype="int8")
    x, weight, scale, minimum = layer.example_inputs()
    # 127 or -127 wherever it matters, and weights of all bits: the largest sums, and those that cancel out.
    x[:] = np.where(np.arange(96) % 2, -1.0, 1.0)
    x[0, :32] = 1.0
    x[-1, 32:64] = -1.0
    weight[:] = 15 if dtype == "uint4" else 255
    weight[::2, 1::2] = 0
    scale[:], minimum[:] = 1.0, -3.0
    template = LinearCPU()
    kernel = build(template.schedule(layer, target, template.default(layer, target)), target)
    y = GuardedArray((rows, 40), np.dtype("float32"))
    kernel["main"](*(as_tensor(array.array) for array in (*packed(layer, target, (x, weight, scale, minimum)), y)))
    np.testing.assert_allclose(y.array, layer.reference(x, weight, scale, minimum)[0], rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_largest_products_of_int8_weights_are_exact(name, rows):
    target = dataclasses.replace(TARGETS[name], cores=2, logical_cores=2)
    if missing := set(target.features) - set(host_features()):
        pytest.skip(f"this CPU lacks {sorted(missing)}")
    layer = Linear(rows, 100, 40, bias=False, weight_dtype="int8")
    x, weight, scale = layer.example_inputs()
    x[:] = np.where(np.arange(100) % 2, -1.0, 1.0)
    x[0, :64] = 1.0
    weight[:] = 127
    weight[::2, 1::2], weight[::3] = -127, 0
    scale[:] = 1.0
    template = LinearCPU()
    kernel = build(template.schedule(layer, target, template.default(layer, target)), target)
    y = GuardedArray((rows, 40), np.dtype("float32"))
    kernel["main"](*(as_tensor(array.array) for array in (*packed(layer, target, (x, weight, scale)), y)))
    np.testing.assert_allclose(y.array, layer.reference(x, weight, scale)[0], rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("weight", [{"weight_dtype": "uint4", "x_dtype": "int8"}, {"weight_dtype": "int8"}])
def test_instructions_are_those_of_the_target(weight):
    layer = Linear(1, 64, 32, **weight)
    template = LinearCPU()
    signed = "vpsignb" if weight["weight_dtype"] == "int8" else "vpmaddubsw"
    expected = {"v3": signed, "v4": "vpmaddubsw", "vnni-256": "vpdpbusd"}
    for name, instruction in expected.items():
        target = TARGETS[name]
        module = template.schedule(layer, target, template.default(layer, target))
        assembly = build(module, target).mod.inspect_source("asm")
        assert instruction in assembly
        assert ("zmm" in assembly) == (name == "v4")
