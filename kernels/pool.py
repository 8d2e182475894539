"""Pooling with overlap, padding or dilation, and adaptive average pooling: what a block of ``block.py`` cannot take in.

Linear once the largest elements are known, so that tangents go the way of values. Both passes gather, and nothing is
kept between them: forward each output goes over its window; backward each input goes over the windows that read it, so
that no sum needs atomics. For maxima it looks for the largest of the window again: as PyTorch the first of equals, and
NaN before all. A program has a tile of positions, of whichever images, and channels, in registers. Where windows
overlap elements are loaded several times, but for once from the cache; with maxima, k^4 / s^2 times backward.

Bytes: forward x and z once each; backward x (of maxima), dz and dx. An operation for each element of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .geometry import Number
from .launch import launch, size
from .numbers import add, advance, load, put, scale, select, store, zeros_like

_WARPS = 8
_TILE = 32 * _WARPS  # elements of a tile: one a thread, since indices and masks of windows take registers, too


@dataclass(frozen=True)
class Axis:
    """How windows lie along height or width. Adaptive: output i averages in * i // out to ceil(in * (i + 1) / out)."""

    input: int
    output: int
    size: int = 1
    stride: int = 1
    padding: int = 0  # before the input; what is behind it follows from the output's size
    dilation: int = 1


@dataclass(frozen=True)
class Pool:
    """Of a sample [h.input, w.input, c]."""

    c: int
    h: Axis
    w: Axis
    average: bool = False
    adaptive: bool = False
    count_padding: bool = False
    divisor: int = 0  # of averages; 0: as many as are counted


@triton.jit
def _window(i, AXIS: tl.constexpr, ADAPTIVE: tl.constexpr, COUNT_PADDING: tl.constexpr):
    """Of outputs i: where the window begins, maybe before the input, and ends, and how many elements are counted."""
    extent, outputs, size, stride, padding, dilation, windows = AXIS
    if ADAPTIVE:
        begin, end = i * extent // outputs, ((i + 1) * extent + outputs - 1) // outputs
        return begin, end, end - begin
    else:
        begin = i * stride - padding
        end = begin + (size - 1) * dilation + 1
        if COUNT_PADDING:
            return begin, end, tl.cdiv(tl.minimum(end, extent + padding) - begin, dilation)
        else:
            before = tl.cdiv(tl.maximum(-begin, 0), dilation)
            return begin, end, tl.maximum(tl.cdiv(tl.minimum(end, extent) - begin, dilation) - before, 0)


@triton.jit
def _first_window(i, AXIS: tl.constexpr, ADAPTIVE: tl.constexpr):
    """Of inputs i: the first output whose window reaches so far."""
    extent, outputs, size, stride, padding, dilation, windows = AXIS
    if ADAPTIVE:
        return i * outputs // extent
    else:
        return (tl.maximum(i + padding - (size - 1) * dilation, 0) + stride - 1) // stride


@triton.jit
def _divisor(counted_h, counted_w, DIVISOR: tl.constexpr, dtype: tl.constexpr):
    if DIVISOR > 0:
        return tl.full([], DIVISOR, dtype)
    else:
        return tl.maximum(counted_h * counted_w, 1).to(dtype)


@triton.jit
def _over_window(
    x, image, channel, channels, mask, top, bottom, left, right, HIGH: tl.constexpr, WIDE: tl.constexpr,
    AVERAGE: tl.constexpr,
):  # fmt: skip
    """The sum of each window; or its largest element, and where in the image that is."""
    dtype: tl.constexpr = x[0].dtype.element_ty
    result, which = zeros_like(x, mask.shape, dtype), tl.full(mask.shape, -1, tl.int32)
    for u in range(0, HIGH[2]):
        for v in range(0, WIDE[2]):
            row, column = top + u * HIGH[5], left + v * WIDE[5]
            here = mask & (row >= 0) & (row < tl.minimum(bottom, HIGH[0]))
            here = here & (column >= 0) & (column < tl.minimum(right, WIDE[0]))
            at = row * WIDE[0] + column
            value = load(x, (image * HIGH[0] * WIDE[0] + at) * channels + channel, here, dtype)
            if AVERAGE:
                result = add(result, value)
            else:
                wins = here & ((which < 0) | (value[0] > result[0]) | (value[0] != value[0]))
                result, which = select(wins, value, result), tl.where(wins, at, which)
    return result, which


@triton.jit
def _tile(images, positions, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a program: the first image, positions counted from its first one, channels, and which of these there are."""
    tiles = tl.cdiv(channels, CHANNELS)
    start = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    image = start // positions
    position = (start % positions).to(tl.int32) + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return image, position, channel, (position < (images - image) * positions) & (channel < channels)


@triton.jit
def _forward(
    x, z, images, channels, HIGH: tl.constexpr, WIDE: tl.constexpr, AVERAGE: tl.constexpr, ADAPTIVE: tl.constexpr,
    COUNT_PADDING: tl.constexpr, DIVISOR: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    first, position, channel, mask = _tile(images, HIGH[1] * WIDE[1], channels, ROWS, CHANNELS)
    x = advance(x, first * HIGH[0] * WIDE[0] * channels)
    top, bottom, counted_h = _window(position // WIDE[1] % HIGH[1], HIGH, ADAPTIVE, COUNT_PADDING)
    left, right, counted_w = _window(position % WIDE[1], WIDE, ADAPTIVE, COUNT_PADDING)
    image = position // (HIGH[1] * WIDE[1])
    result, which = _over_window(x, image, channel, channels, mask, top, bottom, left, right, HIGH, WIDE, AVERAGE)
    if AVERAGE:
        result = scale(result, 1.0 / _divisor(counted_h, counted_w, DIVISOR, result[0].dtype))
    store(advance(z, first * HIGH[1] * WIDE[1] * channels), position * channels + channel, result, mask)


@triton.jit
def _backward(
    x, dz, dx, images, channels, HIGH: tl.constexpr, WIDE: tl.constexpr, AVERAGE: tl.constexpr, ADAPTIVE: tl.constexpr,
    COUNT_PADDING: tl.constexpr, DIVISOR: tl.constexpr, ACCUMULATE: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = dz[0].dtype.element_ty
    first, position, channel, mask = _tile(images, HIGH[0] * WIDE[0], channels, ROWS, CHANNELS)
    x, dz = advance(x, first * HIGH[0] * WIDE[0] * channels), advance(dz, first * HIGH[1] * WIDE[1] * channels)
    image, row, column = position // (HIGH[0] * WIDE[0]), position // WIDE[0] % HIGH[0], position % WIDE[0]
    g = zeros_like(dz, [ROWS, CHANNELS], dtype)
    for u in range(0, HIGH[6]):
        i = _first_window(row, HIGH, ADAPTIVE) + u
        top, bottom, counted_h = _window(i, HIGH, ADAPTIVE, COUNT_PADDING)
        across = mask & (i < HIGH[1]) & (row >= top) & (row < bottom) & ((row - top) % HIGH[5] == 0)
        for v in range(0, WIDE[6]):
            j = _first_window(column, WIDE, ADAPTIVE) + v
            left, right, counted_w = _window(j, WIDE, ADAPTIVE, COUNT_PADDING)
            reads = across & (j < WIDE[1]) & (column >= left) & (column < right) & ((column - left) % WIDE[5] == 0)
            if not AVERAGE:
                # No maximum is adaptive, so that a window ends with its last tap, or with the image.
                largest, which = _over_window(
                    x, image, channel, channels, reads, top, HIGH[0], left, WIDE[0], HIGH, WIDE, AVERAGE
                )
                reads = reads & (which == row * WIDE[0] + column)
            part = load(dz, ((image * HIGH[1] + i) * WIDE[1] + j) * channels + channel, reads, dtype)
            if AVERAGE:
                part = scale(part, 1.0 / _divisor(counted_h, counted_w, DIVISOR, dtype))
            g = add(g, part)
    put(advance(dx, first * HIGH[0] * WIDE[0] * channels), position * channels + channel, g, mask, ACCUMULATE)


def _most(cells: int, others: int) -> int:
    """Cells that one of the others meets, at most, where both cut the same length into equal parts."""
    return triton.cdiv(cells, others) + bool(cells % others and others % cells)


def _axis(axis: Axis, adaptive: bool) -> tuple[int, ...]:
    """For the kernels: with the most elements of a window, and the most windows that read an element."""
    if adaptive:
        return axis.input, axis.output, _most(axis.input, axis.output), 1, 0, 1, _most(axis.output, axis.input)
    windows = (axis.size - 1) * axis.dilation // axis.stride + 1
    return axis.input, axis.output, axis.size, axis.stride, axis.padding, axis.dilation, windows


def _launch(kernel, pool: Pool, numbers: tuple, positions: int, images: int, read: tuple, **constants):
    channels = min(64, triton.next_power_of_2(pool.c))
    rows = _TILE // channels
    high, wide = _axis(pool.h, pool.adaptive), _axis(pool.w, pool.adaptive)
    outputs = images * pool.h.output * pool.w.output * pool.c
    launch(
        kernel, triton.cdiv(images * positions, rows) * triton.cdiv(pool.c, channels), *numbers, images, pool.c,
        HIGH=high, WIDE=wide, AVERAGE=pool.average or pool.adaptive, ADAPTIVE=pool.adaptive,
        COUNT_PADDING=pool.count_padding, DIVISOR=pool.divisor, ROWS=rows, CHANNELS=channels, warps=_WARPS,
        maxnreg=128,  # without it ptxas is content with 48, and spills
        **constants, flops=outputs * high[2] * wide[2] * len(numbers[-1]), moved=size(*read),
    )  # fmt: skip


def forward(pool: Pool, x: Number, z: Number, tasks: int, samples: int):
    _launch(_forward, pool, (x, z), pool.h.output * pool.w.output, tasks * samples, (x, z))


def backward(pool: Pool, x: Number, dz: Number, dx: Number, accumulate: bool, tasks: int, samples: int):
    """Of x only the values are read, and only for the largest of them."""
    read = (dz, dx) if pool.average or pool.adaptive else (x[0], dz, dx)
    positions = pool.h.input * pool.w.input
    _launch(_backward, pool, (x[:1], dz, dx), positions, tasks * samples, read, ACCUMULATE=accumulate)
