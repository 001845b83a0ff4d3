"""exp, erf, tanh and the activations built on them, as branch-free tensor expressions that vectorise.

``tirx.exp`` and its relatives become one libm call per element; these become polynomials of vector multiply-adds. Every
function takes and returns a scalar expression of a tensor expression (``te.compute``) or of TVMScript. Polynomials are
evaluated in float32 whatever the argument's dtype; the result has the argument's dtype.

Stated errors are measured over every float32 exponent (``tests/compile/test_math.py``). Results that would be denormal
are exactly 0: denormals make the multiply-adds that read them twice as slow. NaN gives NaN. Coefficients are minimax
fits on the interval named beside them, rounded to float32 one by one with the rest refitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

_LOG2_E = math.log2(math.e)

# 2^f - 1 for f in [0, 1), highest power first; the constant term is exactly 1 so that exp2(integer) is exact.
_EXP2_DEGREE_6 = (2.15659718e-4, 1.24822895e-3, 9.67377517e-3, 5.54861836e-2, 2.40229085e-1, 6.93147063e-1, 1.0)
# 2^(f+1) for f in (-1, 0].
_EXP2_DEGREE_5 = (1.88989786e-3, 1.84118263e-2, 1.10594921e-1, 4.80360359e-1, 1.38628745, 2.0)
# e^r for r in [0, ln 2].
_EXP_DEGREE_6 = (1.91205053e-3, 7.86928833e-3, 4.18543667e-2, 1.66632101e-1, 5.00002265e-1, 1.0, 1.0)
# ln 2 in two parts: the first has 9 significant bits, so that its product with any exponent is exact.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4


#: Whether intermediate values are written out wherever they are used. TVM's emulation of bfloat16 copies expressions,
#: and then rejects the names bound in both copies.
_written_out: ContextVar[bool] = ContextVar("written_out", default=False)


def _in_float32(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``function``, defined on float32, for arguments of any dtype."""

    @wraps(function)
    def on_any(x: Any) -> Any:
        dtype = _dtype(x)
        if dtype == "float32":
            return function(x)
        with rounded_to(dtype):
            return function(x.astype("float32")).astype(dtype)

    return on_any


@contextmanager
def rounded_to(dtype: str) -> Iterator[None]:
    """While expressions are built whose float32 values are then cast to ``dtype``."""
    token = _written_out.set(dtype == "bfloat16")
    try:
        yield
    finally:
        _written_out.reset(token)


@_in_float32
def exp2(x: Any) -> Any:
    """2**x. At most 1.5 ulp; exact at integers; +inf from 128 up; exactly 0 below -126."""

    def power(t: Any, n: Any) -> Any:
        # floor, not round: the fraction's power is in [1, 2), so a product is either normal or, at n = -127, exactly 0.
        return _shared(t - n, lambda f: _power_of_two(n, 127) * _polynomial(f, _EXP2_DEGREE_6))

    clamped = _at_least(_at_most(x, 128.0), -127.0)
    return _shared(clamped, lambda t: _shared(_floor(t), lambda n: power(t, n)))


@_in_float32
def exp2_nonpositive(x: Any) -> Any:
    """2**x for x <= 0, the cheaper form for softmax. At most 2 ulp; exactly 1 at 0; exactly 0 from -126 down."""
    from tvm import tirx

    def power(t: Any, n: Any) -> Any:
        # ceil keeps the fraction small near 0, where softmax's largest weights are. The polynomial carries a factor of
        # 2 and the power one less, so that a product is either normal or, at n = -126, exactly 0.
        return _shared(t - n, lambda f: _power_of_two(n, 126) * _polynomial(f, _EXP2_DEGREE_5))

    clamped = _at_least(x, -126.0)
    return _shared(clamped, lambda t: _shared(tirx.ceil(t), lambda n: power(t, n)))


@_in_float32
def exp(x: Any) -> Any:
    """e**x. At most 2 ulp; +inf above 88.72283; exactly 0 below -87.33654 (where e**x would be denormal)."""
    from tvm import tirx

    def power(t: Any, n: Any) -> Any:
        # Two-part reduction: one product with ln 2 would be 40 ulp off at the ends of the range.
        r = (t - n * _f32(_LN2_HIGH)) - n * _f32(_LN2_LOW)
        return _shared(r, lambda r: _power_of_two(n, 127) * _polynomial(r, _EXP_DEGREE_6))

    def from_clamped(t: Any) -> Any:
        return _shared(_floor(t * _f32(_LOG2_E)), lambda n: power(t, n))

    flushed = _shared(_at_most(x, 89.0), lambda t: tirx.Select(t < _f32(-87.33654), _f32(-88.0), t))
    return _shared(flushed, from_clamped)


# -log2(erfc(x)) / x for x in [0, 4], weighted by erfc; from 3.94 up the power is below half an ulp of 1.
_LOG2_ERFC = (
    -1.00264304e-4, 4.61866905e-4, 2.30147387e-3, -2.94515546e-2, 1.48963063e-1, 9.18328822e-1, 1.62791371,
)  # fmt: skip
_ERF_SATURATES = 4.0


@_in_float32
def erf(x: Any) -> Any:
    """Error function. Absolute error at most 2e-7; exactly ±1 for |x| >= 4."""
    from tvm import tirx

    def signed(t: Any) -> Any:
        exponent = _shared(_at_most(tirx.abs(t), _ERF_SATURATES), lambda m: _polynomial(m, _LOG2_ERFC) * m)
        return _with_sign(_f32(1.0) - exp2_nonpositive(_f32(0.0) - exponent), t)

    return _shared(x, signed)


@_in_float32
def tanh(x: Any) -> Any:
    """Hyperbolic tangent. Absolute error at most 3e-7; exactly ±1 for |x| >= 9.1."""
    from tvm import tirx

    def signed(t: Any) -> Any:
        e = exp2_nonpositive(tirx.abs(t) * _f32(-2.0 * _LOG2_E))
        return _with_sign(_shared(e, lambda e: (_f32(1.0) - e) / (_f32(1.0) + e)), t)

    return _shared(x, signed)


@_in_float32
def sigmoid(x: Any) -> Any:
    """Logistic function, 1 / (1 + e**-x). Absolute error at most 2e-7; exactly 0 below -88.8, exactly 1 above 17.4."""
    return _f32(1.0) / (_f32(1.0) + exp2(x * _f32(-_LOG2_E)))


def relu(x: Any) -> Any:
    """Rectifier, max(x, 0)."""
    from tvm import tirx

    return tirx.max(tirx.const(0, _dtype(x)), x)


@_in_float32
def gelu(x: Any) -> Any:
    """GELU, x · Φ(x) by erf, as BERT and PyTorch's default define it. Absolute error at most 2e-7 · max(1, |x|)."""
    return _shared(x, lambda t: t * (_f32(0.5) * erf(t * _f32(math.sqrt(0.5))) + _f32(0.5)))


@_in_float32
def gelu_tanh(x: Any) -> Any:
    """GELU's tanh approximation (GPT-2, ``gelu_new``). Absolute error at most 3e-7 · max(1, |x|)."""
    slope, cubic = math.sqrt(2.0 / math.pi), 0.044715 * math.sqrt(2.0 / math.pi)

    def scaled(t: Any) -> Any:
        return t * (_f32(0.5) * tanh(t * (_f32(slope) + _f32(cubic) * t * t)) + _f32(0.5))

    return _shared(x, scaled)


@_in_float32
def silu(x: Any) -> Any:
    """SiLU or swish, x · sigmoid(x). Absolute error at most 3e-7 · max(1, |x|); -inf gives NaN, as in PyTorch."""
    return _shared(x, lambda t: t * sigmoid(t))


def _shared(value: Any, body: Callable[[Any], Any]) -> Any:
    """``body(value)`` with ``value`` computed once; written out, nested polynomials grow exponentially."""
    from tvm import tirx

    if _written_out.get():
        return body(value)
    name = tirx.Var("t", _dtype(value))
    return tirx.Let(name, value, body(name))


def _power_of_two(n: Any, bias: int) -> Any:
    """2**(n + bias - 127) for integral float32 n with n + bias in [0, 255], as exponent bits: 0 at 0, inf at 255."""
    from tvm import tirx

    return tirx.reinterpret("float32", (tirx.Cast("int32", n) + tirx.const(bias, "int32")) << tirx.const(23, "int32"))


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    value = _f32(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + _f32(coefficient)
    return value


def _with_sign(magnitude: Any, sign: Any) -> Any:
    from tvm import tirx

    bits = tirx.reinterpret("int32", sign) & tirx.const(-(2**31), "int32")
    return tirx.reinterpret("float32", tirx.reinterpret("int32", magnitude) | bits)


def _floor(x: Any) -> Any:
    from tvm import tirx

    return tirx.floor(x)


def _at_least(x: Any, low: float) -> Any:
    # The constant comes first: the machine's max then returns its second operand, x, when x is NaN.
    from tvm import tirx

    return tirx.max(_f32(low), x)


def _at_most(x: Any, high: float) -> Any:
    from tvm import tirx

    return tirx.min(_f32(high), x)


def _f32(value: float) -> Any:
    from tvm import tirx

    return tirx.const(value, "float32")


def _dtype(x: Any) -> str:
    return str(x.dtype if hasattr(x, "dtype") else x.ty.dtype)
