"""Numbers that may carry a tangent: what every kernel computes with.

A number is a tuple of one or two tiles, ``(value,)`` or ``(value, tangent)``. A rule written with the functions below
gives values and gradients on numbers of one part, and on those of two their derivatives along a direction in the same
pass, which is the Hessian-vector product. The two kinds mix: what does not depend on the direction (inputs, constants)
has no tangent, and no work is done for it. How many parts an argument has is part of its type, so that each
combination is a kernel of its own. A number in memory is a tuple of pointers to tensors of the same layout.
"""

import triton
import triton.language as tl


@triton.jit
def load(pointers, offsets, mask, dtype: tl.constexpr):
    """Zeros where the mask is off."""
    if len(pointers) == 1:
        return (tl.load(pointers[0] + offsets, mask, 0.0).to(dtype),)
    else:
        return (
            tl.load(pointers[0] + offsets, mask, 0.0).to(dtype),
            tl.load(pointers[1] + offsets, mask, 0.0).to(dtype),
        )


@triton.jit
def advance(pointers, by):
    """Pointers to what lies further on, so that offsets from there are small; nothing (None) stays."""
    if pointers is None:
        return None
    elif len(pointers) == 1:
        return (pointers[0] + by,)
    else:
        return (pointers[0] + by, pointers[1] + by)


@triton.jit
def store(pointers, offsets, x, mask):
    """Where x has no tangent and there is room for one, it is 0."""
    tl.store(pointers[0] + offsets, x[0], mask)
    if len(pointers) == 2:
        tl.store(pointers[1] + offsets, tangent(x), mask)


@triton.jit
def put(pointers, offsets, x, mask, ACCUMULATE: tl.constexpr):
    """Store, or add to what is there."""
    if ACCUMULATE:
        x = add(load(pointers, offsets, mask, x[0].dtype), x)
    store(pointers, offsets, x, mask)


@triton.jit
def tangent(x):
    if len(x) == 1:
        return tl.zeros_like(x[0])
    else:
        return x[1]


@triton.jit
def zeros_like(x, shape: tl.constexpr, dtype: tl.constexpr):
    """A number of zeros with as many parts as x has."""
    return zeros(len(x), shape, dtype)


@triton.jit
def zeros(parts: tl.constexpr, shape: tl.constexpr, dtype: tl.constexpr):
    if parts == 1:
        return (tl.zeros(shape, dtype),)
    else:
        return (tl.zeros(shape, dtype), tl.zeros(shape, dtype))


@triton.jit
def add(a, b):
    if len(a) == 1 and len(b) == 1:
        return (a[0] + b[0],)
    elif len(a) == 1:
        return (a[0] + b[0], b[1])
    elif len(b) == 1:
        return (a[0] + b[0], a[1])
    else:
        return (a[0] + b[0], a[1] + b[1])


@triton.jit
def subtract(a, b):
    return add(a, scale(b, -1.0))


@triton.jit
def scale(a, by):
    """By a plain tile or scalar."""
    if len(a) == 1:
        return (a[0] * by,)
    else:
        return (a[0] * by, a[1] * by)


@triton.jit
def shift(a, by):
    """Add a plain tile or scalar."""
    if len(a) == 1:
        return (a[0] + by,)
    else:
        return (a[0] + by, a[1])


@triton.jit
def multiply(a, b):
    if len(a) == 1 and len(b) == 1:
        return (a[0] * b[0],)
    elif len(a) == 1:
        return (a[0] * b[0], a[0] * b[1])
    elif len(b) == 1:
        return (a[0] * b[0], a[1] * b[0])
    else:
        return (a[0] * b[0], a[1] * b[0] + a[0] * b[1])


@triton.jit
def chain(x, value, slope):
    """f(x), of which the value and the derivative at x are given as plain tiles."""
    if len(x) == 1:
        return (value,)
    else:
        return (value, slope * x[1])


@triton.jit
def divide(a, b):
    quotient = a[0] / b[0]
    if len(a) == 1 and len(b) == 1:
        return (quotient,)
    elif len(a) == 1:
        return (quotient, -quotient * b[1] / b[0])
    elif len(b) == 1:
        return (quotient, a[1] / b[0])
    else:
        return (quotient, (a[1] - quotient * b[1]) / b[0])


@triton.jit
def exponential(x):
    e = tl.exp(x[0])
    return chain(x, e, e)


@triton.jit
def logarithm(x):
    return chain(x, tl.log(x[0]), 1.0 / x[0])


@triton.jit
def inverse_root(x):
    root = 1.0 / tl.sqrt(x[0])
    return chain(x, root, -0.5 * root / x[0])


@triton.jit
def total(x, axis: tl.constexpr):
    if len(x) == 1:
        return (tl.sum(x[0], axis),)
    else:
        return (tl.sum(x[0], axis), tl.sum(x[1], axis))


@triton.jit
def select(condition, a, b):
    if len(a) == 1 and len(b) == 1:
        return (tl.where(condition, a[0], b[0]),)
    else:
        return (tl.where(condition, a[0], b[0]), tl.where(condition, tangent(a), tangent(b)))


@triton.jit
def expand(x, axis: tl.constexpr):
    """With an axis of one element more."""
    if len(x) == 1:
        return (tl.expand_dims(x[0], axis),)
    else:
        return (tl.expand_dims(x[0], axis), tl.expand_dims(x[1], axis))
