"""Norm over the batch, activation and pooling without overlap, each of them optional, in one pass over the data.

    y = gamma (x - mean) r + beta, r = 1 / sqrt(variance + eps)        z = pool(activation(y))

Nothing between x and z is kept: the backward pass reads x again and computes y anew. What it reads instead are two
numbers a channel, mean and r. A program has a range of rows of one task and a tile of channels; it merges the partial
statistics of its channels first (no more than it has of x, see ``forward``), then goes over its rows tile by tile, in
registers, and of a window one position after the other. With dy the gradient at y, x^ = (x - mean) r and m the number
of rows that count,

    dgamma = sum dy x^,  dbeta = sum dy        dx = gamma r (dy - (sum dy + x^ sum dy x^) / m)

the sums being over all rows, and the subtracted term being there only in rows that count. So the backward pass with
statistics of the batch is two launches: one that sums ranges of rows (these partial sums are at once those of the
gradients of beta and gamma), and one that adds them up and writes dx. Fixed statistics have no such term: one launch.

Rows of the backward pass are cells: a window with what lies between it and the next. They cover x once, so that what
no window reads is written, too.

Bytes: forward x and z once each; backward x and dz once, with statistics of the batch twice, and dx once. About 6
floating-point operations an element of x forward and 12 backward, and the activation: memory is what they wait for.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, jet, through
from .geometry import Activation, Number, Partials, Slice, Statistics
from .launch import launch, size
from .numbers import (
    add,
    advance,
    expand,
    inverse_root,
    load,
    multiply,
    scale,
    select,
    shift,
    store,
    subtract,
    total,
    zeros,
    zeros_like,
)
from .statistics import RANGES, collect

PROGRAMS = 528  # of a launch, where there is enough to do: four for each processor of an H100
_RANGES = tl.constexpr(RANGES)


@dataclass(frozen=True)
class Block:
    """Of a sample [h, w, c]; without pooling windows and strides are 1 and out is in. ``divisor``: of averages."""

    h: int
    w: int
    c: int
    norm: str | None  # "batch", "fixed"
    eps: float
    activation: Activation
    pool: str | None  # "max", "average"
    kh: int
    kw: int
    sh: int
    sw: int
    out_h: int
    out_w: int
    divisor: int


@triton.jit
def parameter(slice, task, at, mask, dtype: tl.constexpr):
    """Some elements of a Slice; None where there is none."""
    if slice is None:
        return None
    else:
        pointers, stride, offset = slice
        return load(advance(pointers, task * stride + offset), at, mask, dtype)


@triton.jit
def fixed(moments, task, channel, inside, EPS: tl.constexpr, dtype: tl.constexpr):
    """Mean and 1 / deviation, from constants."""
    channel, inside = tl.expand_dims(channel, 0), tl.expand_dims(inside, 0)
    variance = parameter(moments[1], task, channel, inside, dtype)
    return parameter(moments[0], task, channel, inside, dtype), inverse_root(shift(variance, EPS))


@triton.jit
def normalise(x, mean, root, weight, bias):
    """x^ and y; without a norm both are x. Weight and bias may be None."""
    if mean is None:
        return x, x
    else:
        normal = multiply(subtract(x, mean), root)
        y = normal
        if weight is not None:
            y = multiply(y, weight)
        if bias is not None:
            y = add(y, bias)
        return normal, y


@triton.jit
def _place(rows, part_rows, channels, CHANNELS: tl.constexpr):
    """What this program does: of which task, which part of the rows, which channels; are there so many."""
    tiles, parts = tl.cdiv(channels, CHANNELS), tl.cdiv(rows, part_rows)
    pid = tl.program_id(0)
    channel = pid % tiles * CHANNELS + tl.arange(0, CHANNELS)
    return (pid // tiles // parts).to(tl.int64), pid // tiles % parts, channel, channel < channels


@triton.jit(do_not_specialize=["samples", "h", "w", "out_h", "out_w", "part_rows"])  # no kernels of their own
def _forward(
    x, moments, weight, bias, z, saved, samples, h, w, channels, out_h, out_w, part_rows,
    NORM: tl.constexpr, EPS: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, POOL: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DIVISOR: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x[0].dtype.element_ty
    rows = samples * out_h * out_w
    task, part, channel, inside = _place(rows, part_rows, channels, CHANNELS)
    mean, root = None, None
    if NORM == "batch":
        counts, means, m2s, chunks = moments
        count, mean, m2 = collect(counts, means, m2s, task, channel, inside, chunks, channels, dtype)
        root = inverse_root(shift(scale(m2, 1.0 / count), EPS))
        if saved is not None:
            at = task * 2 * channels + channel
            store(saved, at, mean, inside & (part == 0))
            store(saved, at + channels, root, inside & (part == 0))
        mean, root = expand(mean, 0), expand(root, 0)
    if NORM == "fixed":
        mean, root = fixed(moments, task, channel, inside, EPS, dtype)
    gamma = parameter(weight, task, tl.expand_dims(channel, 0), tl.expand_dims(inside, 0), dtype)
    beta = parameter(bias, task, tl.expand_dims(channel, 0), tl.expand_dims(inside, 0), dtype)

    x, z = advance(x, task * samples * h * w * channels), advance(z, task * rows * channels)
    end = tl.minimum((part + 1) * part_rows, rows)
    for first_row in range(part * part_rows, end, ROWS):
        row = first_row + tl.arange(0, ROWS)
        mask = tl.expand_dims(row < end, 1) & tl.expand_dims(inside, 0)
        corner = ((row // (out_h * out_w) * h + row // out_w % out_h * SH) * w + row % out_w * SW) * channels
        corner = tl.expand_dims(corner, 1) + tl.expand_dims(channel, 0)
        pooled = zeros(PARTS, [ROWS, CHANNELS], dtype)
        for e in tl.range(0, KH * KW, loop_unroll_factor=2):  # more loads under way at once
            here = load(x, corner + (e // KW * w + e % KW) * channels, mask, dtype)
            normal, y = normalise(here, mean, root, gamma, beta)
            value = activate(y, A, B, KIND)
            if POOL == "max":  # as PyTorch: the first of equals, and NaN before all
                pooled = select((e == 0) | (value[0] > pooled[0]) | (value[0] != value[0]), value, pooled)
            else:
                pooled = add(pooled, value)
        if POOL == "average":
            pooled = scale(pooled, 1.0 / DIVISOR)
        store(z, tl.expand_dims(row, 1) * channels + tl.expand_dims(channel, 0), pooled, mask)


@triton.jit
def store_sums(partials, line, channels, channel, inside, x):
    """Of a tile over its rows, in a line of the partial sums [splits x T, C], if they are wanted."""
    if partials is not None:
        pointers, offset = partials
        store(advance(pointers, line * channels + offset), channel, expand(total(x, 0), 0), inside)


@triton.jit
def sums_of(partials, splits, tasks, task, channel, inside, channels, dtype: tl.constexpr):
    """Partial sums [splits, T, C], added up, as a row."""
    split = tl.expand_dims(tl.arange(0, _RANGES), 1)
    at = (split * tasks + task) * channels + tl.expand_dims(channel, 0)
    pointers, offset = partials
    found = load(advance(pointers, offset), at, (split < splits) & tl.expand_dims(inside, 0), dtype)
    return expand(total(found, 0), 0)


@triton.jit(do_not_specialize=["splits", "tasks", "samples", "h", "w", "out_h", "out_w", "part_rows"])
def _backward(
    x, dz, moments, weight, bias, dx, to_weight, to_bias, splits, sample_weight,
    tasks, samples, h, w, channels, out_h, out_w, part_rows,
    NORM: tl.constexpr, EPS: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, POOL: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DIVISOR: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, SAMPLES: tl.constexpr,
    SUM: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """SUM: whether sums over rows are written (to_weight, to_bias) or, with statistics of the batch, read."""
    dtype: tl.constexpr = x[0].dtype.element_ty
    cells_h, cells_w = tl.cdiv(h, SH), tl.cdiv(w, SW)
    rows = samples * cells_h * cells_w
    task, part, channel, inside = _place(rows, part_rows, channels, CHANNELS)
    mean, root = None, None
    if NORM == "batch":
        at = task * 2 * channels + channel
        mean, root = expand(load(moments, at, inside, dtype), 0), expand(load(moments, at + channels, inside, dtype), 0)
    if NORM == "fixed":
        mean, root = fixed(moments, task, channel, inside, EPS, dtype)
    gamma = parameter(weight, task, tl.expand_dims(channel, 0), tl.expand_dims(inside, 0), dtype)
    beta = parameter(bias, task, tl.expand_dims(channel, 0), tl.expand_dims(inside, 0), dtype)
    if NORM is not None and dx is not None:
        slope = root
        if gamma is not None:
            slope = multiply(root, gamma)
    if NORM == "batch" and not SUM:
        share = tl.full([], 1.0, dtype) / (h * w)
        if sample_weight is None:
            share = share / samples
        else:
            sample = tl.arange(0, SAMPLES)
            counted = tl.load(sample_weight + task * samples + sample, sample < samples, 0.0) != 0
            share = share / tl.sum(counted.to(dtype), 0)
        mean_dy = scale(sums_of(to_bias, splits, tasks, task, channel, inside, channels, dtype), share)
        mean_slope = scale(sums_of(to_weight, splits, tasks, task, channel, inside, channels, dtype), share)

    zero = (tl.zeros([ROWS, CHANNELS], dtype),)
    sum_dy, sum_slope = zeros(PARTS, [ROWS, CHANNELS], dtype), zeros(PARTS, [ROWS, CHANNELS], dtype)
    x, dz = advance(x, task * samples * h * w * channels), advance(dz, task * samples * out_h * out_w * channels)
    if dx is not None:
        dx = advance(dx, task * samples * h * w * channels)
    end = tl.minimum((part + 1) * part_rows, rows)
    for first_row in range(part * part_rows, end, ROWS):
        row = tl.expand_dims(first_row + tl.arange(0, ROWS), 1)
        mask = (row < end) & tl.expand_dims(inside, 0)
        n, cell_y, cell_x = row // (cells_h * cells_w), row // cells_w % cells_h, row % cells_w
        read = mask & (cell_y < out_h) & (cell_x < out_w)  # by a window
        out = ((n * out_h + cell_y) * out_w + cell_x) * channels + tl.expand_dims(channel, 0)
        corner = ((n * h + cell_y * SH) * w + cell_x * SW) * channels + tl.expand_dims(channel, 0)
        g = load(dz, out, read, dtype)
        if POOL == "average":
            g = scale(g, 1.0 / DIVISOR)
        if POOL == "max":
            best, winner, won = zero[0], tl.zeros([ROWS, CHANNELS], tl.int32), zeros_like(x, [ROWS, CHANNELS], dtype)
            for e in range(KH * KW):
                here = load(x, corner + (e // KW * w + e % KW) * channels, read, dtype)
                normal, y = normalise(here, mean, root, gamma, beta)
                value, first, second = jet(y[0], A, B, KIND)
                wins = (e == 0) | (value > best) | (value != value)
                best, winner = tl.where(wins, value, best), tl.where(wins, e, winner)
                won = select(wins, here, won)
            normal, y = normalise(won, mean, root, gamma, beta)
            won_dy = select(read, through(g, y, A, B, KIND), zero)
            if SUM:
                sum_dy, sum_slope = add(sum_dy, won_dy), add(sum_slope, multiply(won_dy, normal))
        if POOL != "max" or dx is not None:
            for e in range(SH * SW):
                i, j = e // SW, e % SW
                offset = corner + (i * w + j) * channels
                there = mask & (cell_y * SH + i < h) & (cell_x * SW + j < w)
                window = (i < KH) & (j < KW)
                normal, y = normalise(load(x, offset, there, dtype), mean, root, gamma, beta)
                if POOL == "max":
                    dy = select(window & (winner == i * KW + j), won_dy, zero)
                else:
                    dy = select(window & read, through(g, y, A, B, KIND), zero)
                    if SUM:
                        sum_dy, sum_slope = add(sum_dy, dy), add(sum_slope, multiply(dy, normal))
                if dx is not None:
                    if NORM == "batch":
                        shared = add(mean_dy, multiply(normal, mean_slope))
                        if sample_weight is not None:
                            counts = tl.load(sample_weight + task * samples + n, row < end, 0.0) != 0
                            shared = select(counts, shared, zero)
                        dy = subtract(dy, shared)
                    if NORM is not None:
                        dy = multiply(slope, dy)
                    if ACCUMULATE:
                        dy = add(dy, load(dx, offset, there, dtype))
                    store(dx, offset, dy, there)
    if SUM:
        channel, inside = tl.expand_dims(channel, 0), tl.expand_dims(inside, 0)
        store_sums(to_bias, part * tasks + task, channels, channel, inside, sum_dy)
        store_sums(to_weight, part * tasks + task, channels, channel, inside, sum_slope)


def tile_of(channels: int, itemsize: int = 4) -> tuple[int, int]:
    """Rows and channels: 4 KiB a tile of values. Twice as much has too few registers where there are tangents."""
    width = min(32, triton.next_power_of_2(channels))
    return 4096 // itemsize // width, width


def rows_of_part(rows: int, tasks: int, channels: int, most: int) -> int:
    """Whole tiles, in at most so many parts, and no more than fill the processor."""
    tile_rows, width = tile_of(channels)
    wanted = min(most, triton.cdiv(PROGRAMS, tasks * triton.cdiv(channels, width)))
    return triton.cdiv(triton.cdiv(rows, wanted), tile_rows) * tile_rows


def _cells(block: Block, samples: int) -> int:
    return samples * triton.cdiv(block.h, block.sh) * triton.cdiv(block.w, block.sw)


def splits(block: Block, tasks: int, samples: int) -> int:
    """Of the sums over rows: of both gradients, and of the workspace."""
    cells = _cells(block, samples)
    return triton.cdiv(cells, rows_of_part(cells, tasks, block.c, RANGES))


def argument_of(slice: Slice | None):
    return slice and (slice.numbers, slice.stride, slice.offset)


def parts_of(*numbers: Number | None) -> int:
    return max(len(n) for n in numbers if n is not None)


def _constants(block: Block, parts: int, itemsize: int) -> dict:
    rows, width = tile_of(block.c, itemsize)
    return dict(
        NORM=block.norm, EPS=block.eps, KIND=block.activation.kind, A=block.activation.a, B=block.activation.b,
        POOL=block.pool, KH=block.kh, KW=block.kw, SH=block.sh, SW=block.sw, DIVISOR=block.divisor, PARTS=parts,
        ROWS=rows, CHANNELS=width,
    )  # fmt: skip


def forward(
    block: Block, x: Number, statistics: Statistics | tuple[Slice, Slice] | None, weight: Slice | None,
    bias: Slice | None, z: Number, saved: Number | None, sample_weight: Tensor | None, tasks: int, samples: int,
) -> None:  # fmt: skip
    """Statistics are partial ones of the batch, fixed mean and variance, or none; the first go to ``saved``.

    ``sample_weight`` is in the statistics already.
    """
    rows = samples * block.out_h * block.out_w
    moments, read, most = None, (), rows
    if isinstance(statistics, Statistics):
        read = (statistics.count, statistics.mean, statistics.m2)
        moments = (*read, statistics.count.shape[1])
        # What a program merges is no more than what it normalises.
        most = max(1, samples * block.h * block.w // (2 * statistics.count.shape[1]))
    elif statistics:
        moments = tuple(argument_of(s) for s in statistics)
        read = tuple(s.numbers for s in statistics)
    affine = [s and s.numbers for s in (weight, bias)]
    part_rows = rows_of_part(rows, tasks, block.c, most)
    constants = _constants(block, parts_of(x, *read[-2:], *affine), x[0].element_size())
    launch(
        _forward, tasks * triton.cdiv(rows, part_rows) * triton.cdiv(block.c, constants["CHANNELS"]), x, moments,
        argument_of(weight), argument_of(bias), z, saved, samples, block.h, block.w, block.c, block.out_h, block.out_w,
        part_rows, **constants, flops=6 * x[0].numel() * constants["PARTS"], moved=size(x, read, z, saved),
    )  # fmt: skip


def backward(
    block: Block, x: Number, saved: Number | tuple[Slice, Slice] | None, weight: Slice | None, bias: Slice | None,
    dz: Number, dx: Number | None, accumulate: bool, to_weight: Partials | None, to_bias: Partials | None,
    workspace: Number | None, sample_weight: Tensor | None, tasks: int, samples: int,
) -> None:  # fmt: skip
    """The gradients. ``saved`` is what forward wrote, or fixed mean and variance, or None.

    ``workspace`` [2, splits, T, C] has the sums of statistics of the batch, where weight or bias are no parameters.
    """
    batch, cells, parts = block.norm == "batch", _cells(block, samples), splits(block, tasks, samples)
    moments, read = saved, (saved,)
    if block.norm == "fixed":
        moments, read = tuple(argument_of(s) for s in saved), tuple(s.numbers for s in saved)
    sums = [p and (p.numbers, p.offset) for p in (to_weight, to_bias)]
    if batch:
        sums = [s or (workspace, i * parts * tasks * block.c) for i, s in enumerate(sums)]
    affine = [s and s.numbers for s in (weight, bias)]
    constants = _constants(block, parts_of(x, dz, *read, *affine), x[0].element_size())
    constants |= {"SAMPLES": triton.next_power_of_2(samples)}
    elements = x[0].numel() * constants["PARTS"]
    partial = 2 * parts * tasks * block.c * constants["PARTS"] * x[0].element_size()
    summing = batch or sums != [None, None]

    def start(sum: bool, dx: Number | None, most: int):
        part_rows = rows_of_part(cells, tasks, block.c, most)
        launch(
            _backward, tasks * triton.cdiv(cells, part_rows) * triton.cdiv(block.c, constants["CHANNELS"]), x, dz,
            moments, argument_of(weight), argument_of(bias), dx, *sums, parts, sample_weight, tasks, samples, block.h,
            block.w, block.c, block.out_h, block.out_w, part_rows, **constants, SUM=sum, ACCUMULATE=accumulate,
            flops=12 * elements, moved=size(x, dz, read, dx, dx if accumulate else None) + partial * summing,
        )  # fmt: skip

    if batch:
        start(True, None, RANGES)
        if dx is not None:  # again, it adds up no more than it normalises
            start(False, dx, max(1, samples * block.h * block.w // (2 * parts)))
    elif summing:
        start(True, dx, RANGES)
    elif dx is not None:
        start(False, dx, cells)
