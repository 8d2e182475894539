"""Layers whose elements know nothing of each other: activations, a x + b y, a x + b, x y, and new shapes.

Everything is read once and written once, which is all that these kernels cost: a program keeps 1024 elements in
registers. An activation behind a contraction or a norm is theirs; what comes here is what stands alone. Sizes are those
of the tensors, whatever their shape, since there are no parameters and so no tasks.

A new shape keeps PyTorch's order of a sample's elements, (channels, height, width), which is not that of memory: it is
a permutation, and its backward pass the inverse one. Reads are scattered where it does not leave channels alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .activation import activate, through
from .geometry import Activation, Number
from .launch import launch, size
from .numbers import add, advance, load, multiply, put, scale, shift, store

_BLOCK = 1024


@dataclass(frozen=True)
class Combine:
    """a x + b y; without y, a x + b; or x y."""

    a: float = 1.0
    b: float = 0.0
    product: bool = False


@triton.jit
def _activate(x, z, count, A: tl.constexpr, B: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    mask = at < count - start
    dtype: tl.constexpr = x[0].dtype.element_ty
    store(advance(z, start), at, activate(load(advance(x, start), at, mask, dtype), A, B, KIND), mask)


@triton.jit
def _activate_backward(
    x, dz, dx, count, A: tl.constexpr, B: tl.constexpr, KIND: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    mask = at < count - start
    dtype: tl.constexpr = x[0].dtype.element_ty
    g = through(load(advance(dz, start), at, mask, dtype), load(advance(x, start), at, mask, dtype), A, B, KIND)
    put(advance(dx, start), at, g, mask, ACCUMULATE)


@triton.jit
def _combine(x, y, z, count, A: tl.constexpr, B: tl.constexpr, PRODUCT: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    mask = at < count - start
    dtype: tl.constexpr = x[0].dtype.element_ty
    first = load(advance(x, start), at, mask, dtype)
    if y is None:
        result = shift(scale(first, A), B)
    elif PRODUCT:
        result = multiply(first, load(advance(y, start), at, mask, dtype))
    else:
        result = add(scale(first, A), scale(load(advance(y, start), at, mask, dtype), B))
    store(advance(z, start), at, result, mask)


@triton.jit
def _side(g, other, to, start, at, mask, FACTOR: tl.constexpr, PRODUCT: tl.constexpr, ACCUMULATE: tl.constexpr):
    """The gradient at one of two arguments."""
    if to is not None:
        if PRODUCT:
            g = multiply(g, load(advance(other, start), at, mask, g[0].dtype))
        else:
            g = scale(g, FACTOR)
        put(advance(to, start), at, g, mask, ACCUMULATE)


@triton.jit
def _combine_backward(
    x, y, dz, dx, dy, count, A: tl.constexpr, B: tl.constexpr, PRODUCT: tl.constexpr,
    ACCUMULATE_X: tl.constexpr, ACCUMULATE_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    mask = at < count - start
    g = load(advance(dz, start), at, mask, dz[0].dtype.element_ty)
    _side(g, x, dy, start, at, mask, B, PRODUCT, ACCUMULATE_Y)
    _side(g, y, dx, start, at, mask, A, PRODUCT, ACCUMULATE_X)


@triton.jit
def _reshape(
    x, z, count, channels, positions, new_channels, new_positions, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr
):
    features = channels * positions
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # Counted from the first sample of the block.
    sample = start // features
    at = (start % features).to(tl.int32) + tl.arange(0, BLOCK)
    rest = at % features
    order = rest % new_channels * new_positions + rest // new_channels
    source = at - rest + order % positions * channels + order // positions
    mask = at < count - sample * features
    result = load(advance(x, sample * features), source, mask, x[0].dtype.element_ty)
    put(advance(z, sample * features), at, result, mask, ACCUMULATE)


def _launch(kernel, count: int, operands: tuple, results: tuple, *arguments, flops: int, **constants):
    launch(
        kernel, triton.cdiv(count, _BLOCK), *operands, *results, count, *arguments, BLOCK=_BLOCK, **constants,
        flops=flops * count * len(results[0] or results[1]), moved=size(operands, results),
    )  # fmt: skip


def activation_forward(activation: Activation, x: Number, z: Number):
    constants = dict(A=activation.a, B=activation.b, KIND=activation.kind)
    _launch(_activate, x[0].numel(), (x,), (z,), flops=10, **constants)


def activation_backward(activation: Activation, x: Number, dz: Number, dx: Number, accumulate: bool):
    constants = dict(A=activation.a, B=activation.b, KIND=activation.kind, ACCUMULATE=accumulate)
    _launch(_activate_backward, x[0].numel(), (x, dz), (dx,), flops=10, **constants)


def combine_forward(combine: Combine, x: Number, y: Number | None, z: Number):
    constants = dict(A=combine.a, B=combine.b, PRODUCT=combine.product)
    _launch(_combine, x[0].numel(), (x, y), (z,), flops=3, **constants)


def combine_backward(
    combine: Combine,
    x: Number | None,
    y: Number | None,
    dz: Number,
    dx: Number | None,
    dy: Number | None,
    accumulate_x: bool,
    accumulate_y: bool,
):
    """x and y are read for products only. dy is stored first: where both are one, dx has to accumulate."""
    if combine.product:
        x, y = x if dy else None, y if dx else None
    else:
        x = y = None
    constants = dict(A=combine.a, B=combine.b, PRODUCT=combine.product)
    constants |= dict(ACCUMULATE_X=accumulate_x, ACCUMULATE_Y=accumulate_y)
    _launch(_combine_backward, dz[0].numel(), (x, y, dz), (dx, dy), flops=3, **constants)


def reshape(shape: tuple[int, int, int], new_shape: tuple[int, int, int], x: Number, z: Number, accumulate: bool):
    """Samples (channels, height, width) in a new shape. For gradients with the two shapes exchanged."""
    (c, h, w), (new_c, new_h, new_w) = shape, new_shape
    sizes = c, h * w, new_c, new_h * new_w
    _launch(_reshape, x[0].numel(), (x,), (z,), *sizes, flops=int(accumulate), ACCUMULATE=accumulate)
