"""Errors of the vectorised elementary functions over the whole float32 range, and the code they become."""

import math
import re

import numpy as np
import pytest

from attntune.ops import math as tmath
from attntune.target import PRESETS, native
from attntune.templates.common import vectorize_inner
from attntune.templates.lowering import build

N = 1 << 16
TINY = float(np.finfo(np.float32).tiny)
FUNCTIONS = ("exp2", "exp2_nonpositive", "exp", "erf", "tanh", "sigmoid", "relu", "gelu", "gelu_tanh", "silu")


def kernel(name, target, dtype="float32"):
    import tvm
    from tvm import te
    from tvm.s_tir import Schedule

    x = te.placeholder((N,), dtype, "x")
    y = te.compute((N,), lambda i: getattr(tmath, name)(x[i]), name="y")
    sch = Schedule(tvm.IRModule({"main": te.create_prim_func([x, y]).with_attr("global_symbol", "main")}))
    vectorize_inner(sch, sch.get_sblock("y"), target.lanes("float32"))
    return build(sch.mod, target)


@pytest.fixture(scope="module")
def evaluate():
    import tvm

    compiled = {}

    def run(name, x):
        if name not in compiled:
            compiled[name] = kernel(name, native())
        padded = np.concatenate([x, np.zeros(-len(x) % N, np.float32)])
        y = np.empty_like(padded)
        for start in range(0, len(padded), N):
            out = tvm.runtime.empty((N,), "float32")
            compiled[name]["main"](tvm.runtime.tensor(padded[start : start + N]), out)
            y[start : start + N] = out.numpy()
        return y[: len(x)]

    return run


@pytest.fixture(scope="module")
def samples():
    """Every exponent of both signs, dense where the functions bend, and the neighbours of the edges."""
    rng = np.random.default_rng(0)
    strided = np.arange(0, 2**32, 8191, dtype=np.uint64).astype(np.uint32).view(np.float32)
    edges = np.array(
        [0, 1, -1, 126, -126, -127, 127, 128, 88.72283, 88.722839, -87.33654, -87.33655, 4, -4, 3.93, 9.1, -9.1]
    )
    near = [np.float32(e) + np.arange(-8, 9) * np.spacing(np.float32(abs(e) + TINY)) for e in edges]
    dense = [rng.uniform(-s, s, 150_000) for s in (1, 12, 130)]
    x = np.concatenate([strided[np.isfinite(strided)], *near, *dense]).astype(np.float32)
    return x[np.abs(x) >= TINY]


def ulps(y, exact):
    rounded = exact.astype(np.float32)
    return np.abs(y.astype(np.float64) - exact) / np.spacing(rounded).astype(np.float64)


@pytest.mark.parametrize(
    ("name", "function", "bound"),
    [("exp2", np.exp2, 1.5), ("exp2_nonpositive", np.exp2, 2.0), ("exp", np.exp, 2.0)],
)
def test_exponentials_stay_within_their_stated_ulps(evaluate, samples, name, function, bound):
    x = samples[samples <= 0] if name == "exp2_nonpositive" else samples
    y = evaluate(name, x)
    with np.errstate(over="ignore", under="ignore"):
        exact = function(x.astype(np.float64))
        overflows = np.isinf(exact.astype(np.float32))
    underflows = exact < TINY
    finite = ~overflows & ~underflows
    if name == "exp2_nonpositive":
        finite &= x > -126
    assert ulps(y[finite], exact[finite]).max() <= bound
    assert np.all(y[overflows] == np.inf)
    assert np.all(y[underflows] == 0.0)
    assert not np.any((y > 0) & (y < TINY)), "a denormal result"


@pytest.mark.parametrize("name", ["exp2", "exp2_nonpositive", "exp"])
def test_exponentials_of_special_values(evaluate, name):
    x = np.array([-np.inf, np.nan, 0.0, -0.0], np.float32)
    y = evaluate(name, x)
    assert y[0] == 0.0
    assert np.isnan(y[1])
    assert y[2] == 1.0
    assert y[3] == 1.0
    if name != "exp2_nonpositive":
        assert evaluate(name, np.array([np.inf], np.float32))[0] == np.inf


def test_exp2_is_exact_at_integers(evaluate):
    n = np.arange(-126, 128).astype(np.float32)
    assert np.array_equal(evaluate("exp2", n), np.exp2(n.astype(np.float64)))


def reference(name, x):
    erf = np.frompyfunc(math.erf, 1, 1)
    sigmoid = 0.5 * (1.0 + np.tanh(0.5 * x))
    return {
        "erf": lambda: erf(x).astype(np.float64),
        "tanh": lambda: np.tanh(x),
        "sigmoid": lambda: sigmoid,
        "relu": lambda: np.maximum(x, 0),
        "gelu": lambda: 0.5 * x * (1 + erf(x * math.sqrt(0.5)).astype(np.float64)),
        "gelu_tanh": lambda: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "silu": lambda: x * sigmoid,
    }[name]()


@pytest.mark.parametrize(("name", "bound"), [("erf", 2e-7), ("tanh", 3e-7), ("sigmoid", 2e-7), ("relu", 0.0)])
def test_bounded_functions_stay_within_their_stated_error(evaluate, samples, name, bound):
    y = evaluate(name, samples)
    assert np.abs(y - reference(name, samples.astype(np.float64))).max() <= bound


@pytest.mark.parametrize(("name", "bound"), [("gelu", 2e-7), ("gelu_tanh", 3e-7), ("silu", 3e-7)])
def test_activations_stay_within_their_stated_error(evaluate, samples, name, bound):
    x = samples[np.abs(samples) < 1e12]
    error = np.abs(evaluate(name, x) - reference(name, x.astype(np.float64)))
    assert (error / np.maximum(1.0, np.abs(x))).max() <= bound


@pytest.mark.parametrize(("name", "from_"), [("erf", 4.0), ("tanh", 9.1)])
def test_saturation_is_exact(evaluate, samples, name, from_):
    x = np.concatenate([samples[np.abs(samples) >= from_], [np.inf, -np.inf]]).astype(np.float32)
    assert np.array_equal(evaluate(name, x), np.sign(x))
    assert np.isnan(evaluate(name, np.array([np.nan], np.float32))[0])
    assert np.abs(evaluate(name, samples)).max() == 1.0


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations_vanish_far_below_zero(evaluate, name):
    x = np.array([-1e3, -1e4, -1e30], np.float32)
    assert np.array_equal(evaluate(name, x), np.zeros(3, np.float32))


@pytest.mark.parametrize("target", ["native", "x86-64-v3", "aarch64-neon"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_libm_and_no_scalar_code_in_the_bulk(name, target):
    machine = native() if target == "native" else PRESETS[target]
    module = kernel(name, machine).mod
    source = module.inspect_source("ll")
    assembly = module.inspect_source("asm")
    libm = r"(exp|exp2|exp10|pow|log|log2|erf|tanh|floor|ceil|rint|fmax|fmin|copysign|ldexp|fabs)f?"
    assert not re.search(rf"call [^\n]*@{libm}\(", source)
    assert not re.search(r"@llvm\.(exp|exp2|pow|log|tanh)\.", source)
    assert not re.search(rf"\b(call|callq|jmp|bl|b)\s+\*?_?{libm}(@\w+)?\b", assembly)
    lanes = machine.lanes("float32")
    assert f"<{lanes} x float>" in source


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_are_computed_in_float32(dtype):
    import tvm

    from attntune.ops.workload import as_dtype

    values = as_dtype(np.linspace(-8, 8, N, dtype=np.float32), dtype)
    out = tvm.runtime.empty((N,), dtype)
    kernel("gelu", native(), dtype)["main"](tvm.runtime.tensor(values), out)
    exact = reference("gelu", values.astype(np.float64))
    eps = 2.0**-11 if dtype == "float16" else 2.0**-8
    assert np.all(np.abs(out.numpy().astype(np.float64) - exact) <= eps * np.abs(exact) + 4e-7)
