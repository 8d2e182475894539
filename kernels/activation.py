"""Activations with two derivatives, on numbers: the argument's tangent makes that of the value and of the slope.

Kinds are those of ``maml_ext.program.Activation``, and ``IDENTITY``. ``a`` and ``b`` are the activation's parameters:
constants of the kernel, since as arguments Triton would make them float32.
"""

import triton
import triton.language as tl

from maml_ext.program import Activation

from .numbers import chain, multiply

IDENTITY = len(Activation)
RELU, LEAKY_RELU, ELU, GELU, GELU_TANH, SILU, SOFTPLUS, TANH, SIGMOID, SIN = (tl.constexpr(int(a)) for a in Activation)
_IDENTITY = tl.constexpr(IDENTITY)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """With its derivative: near 0 1 - exp(-2 x) would cancel (hence the odd series), far from it 1 - tanh(x)^2."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return tl.where(tl.abs(x) < 0.03, series, tl.where(x < 0, -far, far)), slope


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)), with exp(x) kept where 1 would swallow it."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0; near 0 by the series."""
    series = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7))))))
    return tl.where(x > -0.05, series, tl.exp(x) - 1.0)


@triton.jit
def jet(x, a: tl.constexpr, b: tl.constexpr, KIND: tl.constexpr):
    """The function and its first two derivatives at a plain tile."""
    zero = tl.zeros_like(x)
    if KIND == RELU:
        return tl.where(x < 0, zero, x), tl.where(x > 0, 1.0, zero), zero  # NaN stays NaN
    elif KIND == LEAKY_RELU:
        slope = tl.where(x > 0, 1.0, zero + a)
        return x * slope, slope, zero
    elif KIND == ELU:
        below = a * expm1(tl.minimum(x, 0.0))
        return tl.where(x > 0, x, below), tl.where(x > 0, 1.0, below + a), tl.where(x > 0, zero, below + a)
    elif KIND == GELU:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.70710678118654752440))
        density = 0.39894228040143267794 * tl.exp(-0.5 * x * x)
        return x * cdf, cdf + x * density, density * (2.0 - x * x)
    elif KIND == GELU_TANH:
        root, cubic = 0.79788456080286535588, 0.044715
        t, rest = tanh(root * (x + cubic * x * x * x))
        u = root * (1.0 + 3.0 * cubic * x * x)
        second = rest * (u + 0.5 * x * (6.0 * root * cubic * x - 2.0 * t * u * u))
        return 0.5 * x * (1.0 + t), 0.5 * ((1.0 + t) + x * rest * u), second
    elif KIND == SILU:
        s = sigmoid(x)
        slope = s * (1.0 - s)
        return x * s, s + x * slope, slope * (2.0 + x * (1.0 - 2.0 * s))
    elif KIND == SOFTPLUS:
        scaled = x * a
        s = sigmoid(scaled)
        linear = scaled > b
        return (
            tl.where(linear, x, log1p_exp(scaled) / a),
            tl.where(linear, 1.0, s),
            tl.where(linear, zero, a * s * (1.0 - s)),
        )
    elif KIND == TANH:
        t, first = tanh(x)
        return t, first, -2.0 * t * first
    elif KIND == SIGMOID:
        s = sigmoid(x)
        first = s * (1.0 - s)
        return s, first, first * (1.0 - 2.0 * s)
    elif KIND == SIN:
        s = tl.sin(x)
        return s, tl.cos(x), -s
    else:
        tl.static_assert(KIND == _IDENTITY)
        return x, zero + 1.0, zero


@triton.jit
def activate(x, a: tl.constexpr, b: tl.constexpr, KIND: tl.constexpr):
    value, first, second = jet(x[0], a, b, KIND)
    return chain(x, value, first)


@triton.jit
def through(gradient, x, a: tl.constexpr, b: tl.constexpr, KIND: tl.constexpr):
    """The gradient at the argument x from that at the value."""
    if KIND == _IDENTITY:
        return gradient
    else:
        value, first, second = jet(x[0], a, b, KIND)
        return multiply(gradient, chain(x, first, second))
