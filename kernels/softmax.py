"""Softmax and its logarithm over the channels of each position. With p the probabilities and g the gradient at z

    z = p: dx = p (g - sum g p)        z = log p: dx = g - p sum g

The backward pass reads z and not x. A program has a tile of positions and goes over their channels in tiles, two or
three times: first for the largest and the sum of exponentials, or for the sum, then for the result. Only the first
reads memory, the others the cache, since a network has one such layer, on a handful of classes.

Bytes: x and z forward, z, dz and dx backward, once each; about 10 operations an element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import Number
from .launch import launch, size
from .numbers import (
    add,
    advance,
    divide,
    expand,
    exponential,
    load,
    logarithm,
    multiply,
    put,
    select,
    shift,
    store,
    subtract,
    total,
    zeros_like,
)


@triton.jit
def exponentials(x, row, mask, channels, CHANNELS: tl.constexpr):
    """Of rows of channels that begin at ``row`` ([..., 1]): the largest, and the sum of exp(x - largest).

    Rows that the mask leaves out count as zeros.
    """
    dtype: tl.constexpr = x[0].dtype.element_ty
    axis: tl.constexpr = len(row.shape) - 1
    top = tl.full(row.shape, -float("inf"), dtype)
    for first in range(0, channels, CHANNELS):
        k = first + tl.arange(0, CHANNELS)
        here = tl.load(x[0] + row + k, mask & (k < channels), 0.0).to(dtype)
        top = tl.maximum(top, tl.max(tl.where(k < channels, here, -float("inf")), axis, keep_dims=True))
    zero, sums = (tl.zeros([], dtype),), zeros_like(x, row.shape, dtype)
    for first in range(0, channels, CHANNELS):
        k = first + tl.arange(0, CHANNELS)
        e = exponential(shift(load(x, row + k, mask & (k < channels), dtype), -top))
        e = total(select(k < channels, e, zero), axis)
        sums = add(sums, expand(e, axis))
    return top, sums


@triton.jit
def _rows(rows, channels, ROWS: tl.constexpr):
    """Of a program: where its first row begins, rows counted from there, and which of these there are."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    return start * channels, row * channels, row < rows - start


@triton.jit
def _forward(x, z, rows, channels, LOGARITHM: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    start, row, mask = _rows(rows, channels, ROWS)
    x, z = advance(x, start), advance(z, start)
    top, sums = exponentials(x, row, mask, channels, CHANNELS)
    for first in range(0, channels, CHANNELS):
        k = first + tl.arange(0, CHANNELS)
        here = mask & (k < channels)
        lower = shift(load(x, row + k, here, x[0].dtype.element_ty), -top)
        if LOGARITHM:
            store(z, row + k, subtract(lower, logarithm(sums)), here)
        else:
            store(z, row + k, divide(exponential(lower), sums), here)


@triton.jit
def _backward(
    z, dz, dx, rows, channels, LOGARITHM: tl.constexpr, ACCUMULATE: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = z[0].dtype.element_ty
    start, row, mask = _rows(rows, channels, ROWS)
    z, dz, dx = advance(z, start), advance(dz, start), advance(dx, start)
    sums = zeros_like(dz, [ROWS, 1], dtype)
    if not LOGARITHM:
        sums = add(sums, zeros_like(z, [ROWS, 1], dtype))
    for first in range(0, channels, CHANNELS):
        k = first + tl.arange(0, CHANNELS)
        g = load(dz, row + k, mask & (k < channels), dtype)
        if not LOGARITHM:
            g = multiply(g, load(z, row + k, mask & (k < channels), dtype))
        sums = add(sums, expand(total(g, 1), 1))
    for first in range(0, channels, CHANNELS):
        k = first + tl.arange(0, CHANNELS)
        here = mask & (k < channels)
        g, p = load(dz, row + k, here, dtype), load(z, row + k, here, dtype)
        if LOGARITHM:
            result = subtract(g, multiply(exponential(p), sums))
        else:
            result = multiply(p, subtract(g, sums))
        put(dx, row + k, result, here, ACCUMULATE)


def tile(channels: int, itemsize: int) -> tuple[int, int]:
    """Rows and channels: 4 float32 elements a thread."""
    c = min(triton.next_power_of_2(channels), 1024 // itemsize)
    return 2048 // itemsize // c, c


def _launch(kernel, numbers: tuple, logarithm: bool, **constants):
    z = numbers[-1]
    channels = z[0].shape[-1]
    rows = z[0].numel() // channels
    r, c = tile(channels, z[0].element_size())
    launch(
        kernel, triton.cdiv(rows, r), *numbers, rows, channels, LOGARITHM=logarithm, ROWS=r, CHANNELS=c, **constants,
        flops=10 * rows * channels * len(z), moved=size(numbers),
    )  # fmt: skip


def forward(logarithm: bool, x: Number, z: Number):
    """Channels are the last axis, whatever the others are."""
    _launch(_forward, (x, z), logarithm)


def backward(logarithm: bool, z: Number, dz: Number, dx: Number, accumulate: bool):
    _launch(_backward, (z, dz, dx), logarithm, ACCUMULATE=accumulate)
