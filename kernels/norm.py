"""Norms over each sample and an activation: layer norm (one group), group norm, instance norm (a group a channel).

    y = gamma x^ + beta, x^ = (x - mean) r, r = 1 / sqrt(variance + eps)        z = activation(y)

Mean and variance are those of a group of channels at all positions of one sample; gamma and beta are per channel or per
element. A program has some groups side by side (of one sample and the next: a tile is [elements, groups], so that
groups of a few channels are read in whole lines of memory), and goes over their elements twice, the second time from
the cache: first for their statistics, then for z. Backward likewise, with h = gamma dy and means over a group:

    dx = r (h - mean(h) - x^ mean(h x^))        dgamma = sum dy x^,  dbeta = sum dy

The gradients of gamma and beta run across groups: further programs of the same launch sum them over ranges of rows, in
the manner of ``block.py``. Mean and r are kept from the forward pass, all else is computed anew.

Bytes: forward x and z once; backward x and dz once for dx and once for the parameters. About 10 floating-point
operations an element forward and 20 backward, and the activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .activation import activate, through
from .block import argument_of, normalise, parameter, parts_of, rows_of_part, store_sums, tile_of
from .geometry import Activation, Number, Partials, Slice
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
from .statistics import RANGES, merge, moments


@dataclass(frozen=True)
class Norm:
    """Of a sample [h, w, c]. ``elementwise``: weight and bias are [h, w, c], else [c]."""

    h: int
    w: int
    c: int
    groups: int
    eps: float
    activation: Activation
    elementwise: bool


@triton.jit
def _places(first, column, extent, groups, WIDTH: tl.constexpr, ELEMENTWISE: tl.constexpr, ELEMENTS: tl.constexpr):
    """Of elements of groups, ``first`` and following: where they lie in the task's values and in weights; a mask."""
    element = tl.expand_dims(first + tl.arange(0, ELEMENTS), 1)
    column = tl.expand_dims(column, 0)
    channel = column % groups * WIDTH + element % WIDTH
    within = element // WIDTH * (groups * WIDTH) + channel
    at = column // groups * (extent * groups) + within
    if ELEMENTWISE:
        return at, within, element < extent
    else:
        return at, channel, element < extent


@triton.jit
def _forward(
    x, weight, bias, z, saved, samples, positions, groups,
    WIDTH: tl.constexpr, EPS: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ELEMENTWISE: tl.constexpr, ELEMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x[0].dtype.element_ty
    columns, extent = samples * groups, positions * WIDTH
    tiles = tl.cdiv(columns, COLUMNS)
    pid = tl.program_id(0)
    task, tile = (pid // tiles).to(tl.int64), pid % tiles
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    x, z = advance(x, task * columns * extent), advance(z, task * columns * extent)
    none = zeros_like(x, [COLUMNS], dtype)
    count, mean, m2 = tl.zeros([], dtype), none, none
    for first in range(0, extent, ELEMENTS):
        at, affine, mask = _places(first, column, extent, groups, WIDTH, ELEMENTWISE, ELEMENTS)
        here = load(x, at, mask & tl.expand_dims(inside, 0), dtype)
        more, more_mean, more_m2 = moments(here, first + tl.arange(0, ELEMENTS) < extent)
        count, mean, m2 = merge(count, mean, m2, more, more_mean, more_m2)
    root = inverse_root(shift(scale(m2, 1.0 / count), EPS))
    if saved is not None:
        store(saved, task * 2 * columns + column, mean, inside)
        store(saved, task * 2 * columns + columns + column, root, inside)
    mean, root = expand(mean, 0), expand(root, 0)
    for first in range(0, extent, ELEMENTS):
        at, affine, mask = _places(first, column, extent, groups, WIDTH, ELEMENTWISE, ELEMENTS)
        mask = mask & tl.expand_dims(inside, 0)
        gamma, beta = parameter(weight, task, affine, mask, dtype), parameter(bias, task, affine, mask, dtype)
        normal, y = normalise(load(x, at, mask, dtype), mean, root, gamma, beta)
        store(z, at, activate(y, A, B, KIND), mask)


@triton.jit
def _to_x(
    x, saved, weight, bias, dz, dx, task, tile, samples, positions, groups,
    WIDTH: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ELEMENTWISE: tl.constexpr,
    PARTS: tl.constexpr, ELEMENTS: tl.constexpr, COLUMNS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x[0].dtype.element_ty
    columns, extent = samples * groups, positions * WIDTH
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = tl.expand_dims(column < columns, 0)
    kept = task * 2 * columns + tl.expand_dims(column, 0)
    mean, root = load(saved, kept, inside, dtype), load(saved, kept + columns, inside, dtype)
    x, dz = advance(x, task * columns * extent), advance(dz, task * columns * extent)
    dx = advance(dx, task * columns * extent)
    zero = (tl.zeros([ELEMENTS, COLUMNS], dtype),)
    sum_h, sum_slope = zeros(PARTS, [ELEMENTS, COLUMNS], dtype), zeros(PARTS, [ELEMENTS, COLUMNS], dtype)
    for first in range(0, extent, ELEMENTS):
        at, affine, mask = _places(first, column, extent, groups, WIDTH, ELEMENTWISE, ELEMENTS)
        mask = mask & inside
        normal, h = _pulled(x, mean, root, weight, bias, dz, task, at, affine, mask, KIND, A, B, dtype)
        h = select(mask, h, zero)
        sum_h, sum_slope = add(sum_h, h), add(sum_slope, multiply(h, normal))
    share = tl.full([], 1.0, dtype) / extent
    mean_h, mean_slope = expand(scale(total(sum_h, 0), share), 0), expand(scale(total(sum_slope, 0), share), 0)
    for first in range(0, extent, ELEMENTS):
        at, affine, mask = _places(first, column, extent, groups, WIDTH, ELEMENTWISE, ELEMENTS)
        mask = mask & inside
        normal, h = _pulled(x, mean, root, weight, bias, dz, task, at, affine, mask, KIND, A, B, dtype)
        gradient = multiply(root, subtract(h, add(mean_h, multiply(normal, mean_slope))))
        if ACCUMULATE:
            gradient = add(gradient, load(dx, at, mask, dtype))
        store(dx, at, gradient, mask)


@triton.jit
def _pulled(
    x, mean, root, weight, bias, dz, task, at, affine, mask, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """x^ and gamma dy."""
    gamma, beta = parameter(weight, task, affine, mask, dtype), parameter(bias, task, affine, mask, dtype)
    normal, y = normalise(load(x, at, mask, dtype), mean, root, gamma, beta)
    h = through(load(dz, at, mask, dtype), y, A, B, KIND)
    if gamma is not None:
        h = multiply(h, gamma)
    return normal, h


@triton.jit
def _to_parameters(
    x, saved, weight, bias, dz, to_weight, to_bias, task, part, tile, tasks, samples, rows, positions, width, groups,
    part_rows, WIDTH: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Rows are [samples, positions] of channels, or with weights per element [samples] of them."""
    dtype: tl.constexpr = x[0].dtype.element_ty
    channel = tl.expand_dims(tile * CHANNELS + tl.arange(0, CHANNELS), 0)
    inside = channel < width
    group = channel % (groups * WIDTH) // WIDTH
    gamma, beta = parameter(weight, task, channel, inside, dtype), parameter(bias, task, channel, inside, dtype)
    x, dz = advance(x, task * rows * width), advance(dz, task * rows * width)
    saved = advance(saved, task * 2 * samples * groups)
    zero = (tl.zeros([ROWS, CHANNELS], dtype),)
    sum_dy, sum_slope = zeros(PARTS, [ROWS, CHANNELS], dtype), zeros(PARTS, [ROWS, CHANNELS], dtype)
    end = tl.minimum((part + 1) * part_rows, rows)
    for first in range(part * part_rows, end, ROWS):
        row = tl.expand_dims(first + tl.arange(0, ROWS), 1)
        mask = (row < end) & inside
        at = row // positions * groups + group
        mean, root = load(saved, at, mask, dtype), load(saved, at + samples * groups, mask, dtype)
        at = row * width + channel
        normal, y = normalise(load(x, at, mask, dtype), mean, root, gamma, beta)
        dy = select(mask, through(load(dz, at, mask, dtype), y, A, B, KIND), zero)
        sum_dy, sum_slope = add(sum_dy, dy), add(sum_slope, multiply(dy, normal))
    store_sums(to_bias, part * tasks + task, width, channel, inside, sum_dy)
    store_sums(to_weight, part * tasks + task, width, channel, inside, sum_slope)


@triton.jit
def _backward(
    x, saved, weight, bias, dz, dx, to_weight, to_bias, programs, tasks, samples, positions, groups,
    splits, part_rows,
    WIDTH: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ELEMENTWISE: tl.constexpr,
    PARTS: tl.constexpr, ELEMENTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """The first ``programs`` write dx, the others the parameters' sums."""
    pid = tl.program_id(0)
    if pid < programs:
        if dx is not None:
            tiles = tl.cdiv(samples * groups, COLUMNS)
            _to_x(
                x, saved, weight, bias, dz, dx, (pid // tiles).to(tl.int64), pid % tiles, samples, positions, groups,
                WIDTH, KIND, A, B, ELEMENTWISE, PARTS, ELEMENTS, COLUMNS, ACCUMULATE,
            )  # fmt: skip
    elif to_weight is not None or to_bias is not None:
        rows, per_row, width = samples * positions, positions, groups * WIDTH
        if ELEMENTWISE:
            rows, per_row, width = samples, 1, positions * groups * WIDTH
        pid -= programs
        tiles = tl.cdiv(width, CHANNELS)
        _to_parameters(
            x, saved, weight, bias, dz, to_weight, to_bias, (pid // tiles // splits).to(tl.int64),
            pid // tiles % splits, pid % tiles, tasks, samples, rows, per_row, width, groups, part_rows,
            WIDTH, KIND, A, B, PARTS, ROWS, CHANNELS,
        )  # fmt: skip


def _tile(norm: Norm, samples: int, itemsize: int) -> tuple[int, int]:
    """Elements and groups: 4 KiB, with at least 32 channels side by side where there are so many."""
    most, extent = 4096 // itemsize, norm.h * norm.w * norm.c // norm.groups
    columns = triton.next_power_of_2(samples * norm.groups)
    beside = min(columns, max(1, 32 // triton.next_power_of_2(norm.c // norm.groups)))
    elements = min(most // beside, triton.next_power_of_2(extent))
    return elements, min(most // elements, columns)


def _rows(norm: Norm, samples: int) -> tuple[int, int]:
    """Of the sums for weights: how many rows, and their width."""
    positions = norm.h * norm.w
    return (samples, positions * norm.c) if norm.elementwise else (samples * positions, norm.c)


def splits(norm: Norm, tasks: int, samples: int) -> int:
    rows, width = _rows(norm, samples)
    return triton.cdiv(rows, rows_of_part(rows, tasks, width, RANGES))


def _constants(norm: Norm, samples: int, itemsize: int) -> dict:
    elements, columns = _tile(norm, samples, itemsize)
    return dict(
        WIDTH=norm.c // norm.groups, KIND=norm.activation.kind, A=norm.activation.a, B=norm.activation.b,
        ELEMENTWISE=norm.elementwise, ELEMENTS=elements, COLUMNS=columns,
    )  # fmt: skip


def forward(
    norm: Norm, x: Number, weight: Slice | None, bias: Slice | None, z: Number, saved: Number | None,
    tasks: int, samples: int,
) -> None:  # fmt: skip
    """``saved`` [T, 2, samples x groups] gets mean and r."""
    constants = _constants(norm, samples, x[0].element_size())
    launch(
        _forward, tasks * triton.cdiv(samples * norm.groups, constants["COLUMNS"]), x, argument_of(weight),
        argument_of(bias), z, saved, samples, norm.h * norm.w, norm.groups, EPS=norm.eps, **constants,
        flops=10 * x[0].numel() * len(x), moved=size(x, z, saved),
    )  # fmt: skip


def backward(
    norm: Norm, x: Number, saved: Number, weight: Slice | None, bias: Slice | None, dz: Number, dx: Number | None,
    accumulate: bool, to_weight: Partials | None, to_bias: Partials | None, tasks: int, samples: int,
) -> None:  # fmt: skip
    sums = [p and (p.numbers, p.offset) for p in (to_weight, to_bias)]
    constants = _constants(norm, samples, x[0].element_size())
    rows, width = _rows(norm, samples)
    tile_rows, tile_width = tile_of(width, x[0].element_size())
    parts, programs, sum_programs = splits(norm, tasks, samples), 0, 0
    if dx is not None:
        programs = tasks * triton.cdiv(samples * norm.groups, constants["COLUMNS"])
    if sums != [None, None]:
        sum_programs = tasks * parts * triton.cdiv(width, tile_width)
    number_parts = parts_of(x, saved, dz, *[s and s.numbers for s in (weight, bias)])
    written = sum_programs and 2 * parts * tasks * width * number_parts * x[0].element_size()
    passes = (dx is not None) + (sum_programs > 0)
    launch(
        _backward, programs + sum_programs, x, saved, argument_of(weight), argument_of(bias), dz, dx, *sums, programs,
        tasks, samples, norm.h * norm.w, norm.groups, parts, rows_of_part(rows, tasks, width, RANGES),
        **constants, PARTS=number_parts, ROWS=tile_rows, CHANNELS=tile_width, ACCUMULATE=accumulate,
        flops=10 * x[0].numel() * number_parts * passes,
        moved=size(x, dz) * passes + size(saved, dx, dx if accumulate else None) + written,
    )  # fmt: skip
