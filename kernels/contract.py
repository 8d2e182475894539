"""Linear layers and convolutions of many tasks: implicit matrix products, with what stands before and behind them.

Every task has its own weights, so a layer is a batch of small products, and no patch matrix is ever in memory: a tile
of it is read from the values themselves. The flat index of a contraction is k = (tap, input), so that a layer of one
or three inputs fills its tiles; where a tile of k lies within one tap (``ALIGNED``) the tap is a scalar, and what
remains of the addressing is done once a row.

    forward   y[row, o]  = sum over (tap, input) of x[row at tap, input] W[tap, input, o] + b[o]; z = activation(y)
    backward  dx[row, i] = sum over (tap, output) of dy[row that reads it by tap, output] W[tap, i, output]
              dW[k, o]   = sum over rows of x[row at tap, input] dy[row, o]; db[o] = sum over rows of dy[row, o]

One rule for values and tangents: on numbers with a tangent, y' = [x' x] [W; W'] is added up in the same pass over the
tiles that makes y, so that each tile is read once for both, and what has no tangent costs no product.

forward: the bias, the activation, and for a norm of the batch the statistics of y (a program then has a whole range
of rows, see ``statistics.py``) come from the registers in which y was added up. backward is one launch: some programs
have tiles of dx, the others tiles of dW and db over a part of the rows, which go to Partials. What is kept in
registers is the accumulators; the operands pass through shared memory.

Floating-point operations: 2 a multiplied pair, once for the product of values and once for each product with a
tangent; taps that lie in the padding are not counted. Bytes: operands and results once each, and the Partials.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl

from . import activation as activations
from .geometry import Activation, Number, Partials, Slice, Statistics, Window
from .launch import launch, size
from .numbers import add, advance, load, store, total, zeros_like
from .statistics import keep, merge, moments, rows_of_range

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _flip(x):
    if len(x) == 1:
        return (tl.trans(x[0]),)
    else:
        return (tl.trans(x[0]), tl.trans(x[1]))


@triton.jit
def _bfloat16(x):
    """In the interpreter, which takes the bits of bfloat16 for integers, float32 of the same value."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _float16(x, SMALL: tl.constexpr):
    """x / unit and the unit: for what may be too small for the format the power of two at its largest magnitude."""
    if SMALL:
        largest = tl.max(tl.max(tl.abs(x), 1), 0)
        largest = tl.minimum(tl.maximum(largest, 8.0e-31), 1.2e30)  # so that neither the unit nor 1 / unit overflows
        exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
        unit = exponent.to(tl.float32, bitcast=True)
        return (x * (0x7F000000 - exponent).to(tl.float32, bitcast=True)).to(tl.float16), unit
    else:
        return x.to(tl.float16), 1.0


@triton.jit
def _product(a, b, c, PRECISION: tl.constexpr, A_SMALL: tl.constexpr, B_SMALL: tl.constexpr):
    """c + a b, on plain tiles; which of them may be far below 1 matters to float16 only."""
    if PRECISION == "fp16":
        a, unit_a = _float16(a, A_SMALL)
        b, unit_b = _float16(b, B_SMALL)
        return c + tl.dot(a, b) * (unit_a * unit_b)
    elif PRECISION == "bf16":
        return tl.dot(_bfloat16(a), _bfloat16(b), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c, input_precision=PRECISION, out_dtype=c.dtype)


@triton.jit
def _contract(a, b, c, PRECISION: tl.constexpr, A_SMALL: tl.constexpr, B_SMALL: tl.constexpr):
    """c + a b, on numbers. Gradients are small, tangents (which follow the gradient of the query loss) always."""
    value = _product(a[0], b[0], c[0], PRECISION, A_SMALL, B_SMALL)
    if len(c) == 1:
        return (value,)
    else:
        along = c[1]
        if len(a) == 2:
            along = _product(a[1], b[0], along, PRECISION, True, B_SMALL)
        if len(b) == 2:
            along = _product(a[0], b[1], along, PRECISION, A_SMALL, True)
        return (value, along)


@triton.jit
def _tap(k, COUNT: tl.constexpr, channels, ALIGNED: tl.constexpr):
    """Of COUNT contraction indices (tap, channel) from k on, as a row: tap, channel, and the flat index."""
    flat = k + tl.expand_dims(tl.arange(0, COUNT), 0)
    if ALIGNED:
        first = tl.multiple_of(k % channels, COUNT)  # which the compiler does not see, and reads single elements
        return k // channels, first + tl.expand_dims(tl.arange(0, COUNT), 0), flat
    else:
        return flat // channels, flat % channels, flat


@triton.jit
def _read_x(x, row, tap, channel, mask, window, dtype: tl.constexpr):
    """What the rows of y, a column, see by a tap: a tile of the patch matrix."""
    in_h, in_w, in_c, out_h, out_w, out_c, kh, kw, sh, sw, top, left, dh, dw, groups = window
    sample, position = row // (out_h * out_w), row % (out_h * out_w)
    h = position // out_w * sh - top + tap // kw * dh
    w = position % out_w * sw - left + tap % kw * dw
    mask = mask & (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
    return load(x, ((sample * in_h + h) * in_w + w) * in_c + channel, mask, dtype)


@triton.jit
def _read_dy(dy, row, tap, channel, mask, window, dtype: tl.constexpr):
    """The gradients of those rows of y that saw rows of x, a column, by a tap."""
    in_h, in_w, in_c, out_h, out_w, out_c, kh, kw, sh, sw, top, left, dh, dw, groups = window
    sample, position = row // (in_h * in_w), row % (in_h * in_w)
    h = position // in_w + top - tap // kw * dh
    w = position % in_w + left - tap % kw * dw
    mask = mask & (h >= 0) & (h < out_h * sh) & (h % sh == 0) & (w >= 0) & (w < out_w * sw) & (w % sw == 0)
    return load(dy, ((sample * out_h + h // sh) * out_w + w // sw) * out_c + channel, mask, dtype)


@triton.jit(do_not_specialize=["samples", "span", "chunks"])  # which would be kernels of their own for nothing
def _forward(
    x, weight, bias, y, z, sample_weight, counts, means, m2s, window, weight_stride, weight_offset, bias_stride,
    bias_offset, samples, span, chunks, a: tl.constexpr, b: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: ``span`` rows of y, by tiles of ROWS, in WIDTH channels of a group."""
    in_h, in_w, in_c, out_h, out_w, out_c, kh, kw, sh, sw, top, left, dh, dw, groups = window
    dtype: tl.constexpr = y[0].dtype.element_ty
    inputs, outputs, rows = in_c // groups, out_c // groups, samples * out_h * out_w
    tiles = tl.cdiv(outputs, WIDTH)
    pid = tl.program_id(0)
    tile, group, chunk = pid % tiles, pid // tiles % groups, pid // tiles // groups % chunks
    task = (pid // tiles // groups // chunks).to(tl.int64)
    x = advance(x, task * (samples * in_h * in_w * in_c) + group * inputs)
    weight = advance(weight, task * weight_stride + weight_offset + group * outputs)
    y = advance(y, task * (rows * out_c) + group * outputs)
    output = tile * WIDTH + tl.arange(0, WIDTH)
    inside = output < outputs
    across = tl.expand_dims(output, 0)
    within = tl.expand_dims(inside, 0)
    length = kh * kw * inputs

    none = zeros_like(y, [WIDTH], dtype)
    count, mean, m2 = tl.zeros([], dtype), none, none
    for first in range(chunk * span, tl.minimum((chunk + 1) * span, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        down = tl.expand_dims(row, 1)
        there = down < rows
        result = zeros_like(y, [ROWS, WIDTH], dtype)
        for k in range(0, length, DEPTH):
            tap, channel, flat = _tap(k, DEPTH, inputs, ALIGNED)
            tile_x = _read_x(x, down, tap, channel, there & (flat < length), window, dtype)
            index = tl.expand_dims(k + tl.arange(0, DEPTH), 1)
            tile_w = load(weight, index * out_c + across, (index < length) & within, dtype)
            result = _contract(tile_x, tile_w, result, PRECISION, False, False)
        if bias is not None:
            at = advance(bias, task * bias_stride + bias_offset + group * outputs)
            result = add(result, load(at, across, within, dtype))
        store(y, down * out_c + across, result, there & within)
        if z is not None:
            at = advance(z, task * (rows * out_c) + group * outputs)
            store(at, down * out_c + across, activations.activate(result, a, b, KIND), there & within)
        if counts is not None:
            counted = row < rows
            if sample_weight is not None:
                sample = task * samples + row // (out_h * out_w)
                counted = counted & (tl.load(sample_weight + sample, counted, 0.0) != 0)
            more, more_mean, more_m2 = moments(result, counted)
            count, mean, m2 = merge(count, mean, m2, more, more_mean, more_m2)
    if counts is not None:
        only = (tile == 0) & (group == 0)
        keep(counts, means, m2s, task, chunk, chunks, only, group * outputs + output, inside, out_c, count, mean, m2)


@triton.jit
def _to_input(
    pid, dy, weight, dx, before, window, weight_stride, weight_offset, samples, a: tl.constexpr, b: tl.constexpr,
    KIND: tl.constexpr, ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows of dx in WIDTH channels of a group."""
    in_h, in_w, in_c, out_h, out_w, out_c, kh, kw, sh, sw, top, left, dh, dw, groups = window
    dtype: tl.constexpr = dx[0].dtype.element_ty
    inputs, outputs, rows = in_c // groups, out_c // groups, samples * in_h * in_w
    tiles, chunks = tl.cdiv(inputs, WIDTH), tl.cdiv(rows, ROWS)
    tile, group, chunk = pid % tiles, pid // tiles % groups, pid // tiles // groups % chunks
    task = (pid // tiles // groups // chunks).to(tl.int64)
    dy = advance(dy, task * (samples * out_h * out_w * out_c) + group * outputs)
    weight = advance(weight, task * weight_stride + weight_offset + group * outputs)
    here = task * (rows * in_c) + group * inputs
    row = tl.expand_dims(chunk * ROWS + tl.arange(0, ROWS), 1)
    input = tile * WIDTH + tl.arange(0, WIDTH)
    filter, some = tl.expand_dims(input, 1), tl.expand_dims(input < inputs, 1)
    length = kh * kw * outputs

    result = zeros_like(dx, [ROWS, WIDTH], dtype)
    for k in range(0, length, DEPTH):
        tap, channel, flat = _tap(k, DEPTH, outputs, ALIGNED)
        tile_dy = _read_dy(dy, row, tap, channel, (row < rows) & (flat < length), window, dtype)
        tile_w = load(weight, (tap * inputs + filter) * out_c + channel, (flat < length) & some, dtype)
        result = _contract(tile_dy, _flip(tile_w), result, PRECISION, True, False)

    offset = row * in_c + tl.expand_dims(input, 0)
    mask = (row < rows) & tl.expand_dims(input < inputs, 0)
    if before is not None:
        result = activations.through(result, load(advance(before, here), offset, mask, dtype), a, b, KIND)
    dx = advance(dx, here)
    if ACCUMULATE:
        result = add(result, load(dx, offset, mask, dtype))
    store(dx, offset, result, mask)


@triton.jit
def _to_parameters(
    pid, x, dy, to_weight, to_bias, weight_at, bias_at, window, tasks, samples, part, splits,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: DEPTH taps and inputs x WIDTH outputs of dW, or WIDTH outputs of db, from ``part`` rows of y."""
    in_h, in_w, in_c, out_h, out_w, out_c, kh, kw, sh, sw, top, left, dh, dw, groups = window
    dtype: tl.constexpr = dy[0].dtype.element_ty
    inputs, outputs, rows = in_c // groups, out_c // groups, samples * out_h * out_w
    length = kh * kw * inputs
    tiles, blocks = tl.cdiv(outputs, WIDTH), 0
    if to_weight is not None:
        blocks += tl.cdiv(length, DEPTH)
    each = tiles * (blocks + (1 if to_bias is not None else 0))
    tile, block, group = pid % tiles, pid % each // tiles, pid // each % groups
    split, task = pid // each // groups % splits, (pid // each // groups // splits).to(tl.int64)
    x = advance(x, task * (samples * in_h * in_w * in_c) + group * inputs)
    dy = advance(dy, task * (rows * out_c) + group * outputs)
    output = tl.expand_dims(tile * WIDTH + tl.arange(0, WIDTH), 0)
    begin, end = split * part, tl.minimum((split + 1) * part, rows)
    place = split * tasks + task

    if to_weight is not None:
        if block < blocks:
            tap, channel, flat = _tap(block * DEPTH, DEPTH, inputs, ALIGNED)
            result = zeros_like(to_weight, [DEPTH, WIDTH], dtype)
            for first in range(begin, end, ROWS):
                row = tl.expand_dims(first + tl.arange(0, ROWS), 1)
                tile_x = _read_x(x, row, tap, channel, (row < end) & (flat < length), window, dtype)
                tile_dy = load(dy, row * out_c + output, (row < end) & (output < outputs), dtype)
                result = _contract(_flip(tile_x), tile_dy, result, PRECISION, False, True)
            index = block * DEPTH + tl.expand_dims(tl.arange(0, DEPTH), 1)
            at = advance(to_weight, weight_at + place * (length * out_c) + group * outputs)
            store(at, index * out_c + output, result, (index < length) & (output < outputs))
    if to_bias is not None:
        if block == blocks:
            sums = zeros_like(to_bias, [ROWS, WIDTH], dtype)
            for first in range(begin, end, ROWS):
                row = tl.expand_dims(first + tl.arange(0, ROWS), 1)
                sums = add(sums, load(dy, row * out_c + output, (row < end) & (output < outputs), dtype))
            channel = tile * WIDTH + tl.arange(0, WIDTH)
            at = advance(to_bias, bias_at + place * out_c + group * outputs)
            store(at, channel, total(sums, 0), channel < outputs)


@triton.jit(do_not_specialize=["tasks", "samples", "part", "splits", "first"])
def _backward(
    x, weight, dy, dx, before, to_weight, to_bias, window, weight_stride, weight_offset, weight_at, bias_at, tasks,
    samples, part, splits, first, a: tl.constexpr, b: tl.constexpr, KIND: tl.constexpr, ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr, PART_ROWS: tl.constexpr,
    PART_WIDTH: tl.constexpr, PART_DEPTH: tl.constexpr, PART_ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The ``first`` programs, whose loops are the longest, have gradients of parameters, the others those of x."""
    pid = tl.program_id(0)
    if to_weight is not None or to_bias is not None:
        if pid < first:
            _to_parameters(
                pid, x, dy, to_weight, to_bias, weight_at, bias_at, window, tasks, samples, part, splits,
                PART_ROWS, PART_WIDTH, PART_DEPTH, PART_ALIGNED, PRECISION,
            )  # fmt: skip
    if dx is not None:
        if pid >= first:
            _to_input(
                pid - first, dy, weight, dx, before, window, weight_stride, weight_offset, samples, a, b, KIND,
                ACCUMULATE, ROWS, WIDTH, DEPTH, ALIGNED, PRECISION,
            )  # fmt: skip


def _flat(window: Window) -> Window:
    """A window of the whole image is a linear layer: channels last, both have the same layout."""
    w = window
    whole = Window(w.in_h, w.in_w, w.in_c, 1, 1, w.out_c, w.in_h, w.in_w, w.sh, w.sw)
    return Window(1, 1, w.in_h * w.in_w * w.in_c, 1, 1, w.out_c) if w == whole else w


def _shape(window: Window) -> tuple[int, ...]:
    """The integers that kernels are told, in this order."""
    w = window
    return (
        w.in_h, w.in_w, w.in_c, w.out_h, w.out_w, w.out_c, w.kh, w.kw, w.sh, w.sw, w.top, w.left, w.dh, w.dw, w.groups
    )  # fmt: skip


@cache
def _pairs(window: Window) -> int:
    """Multiplied pairs of a sample: of all positions and taps those that lie inside."""

    def axis(inside, out, taps, stride, before, dilation):
        return sum(0 <= o * stride - before + t * dilation < inside for o in range(out) for t in range(taps))

    w = window
    positions = axis(w.in_h, w.out_h, w.kh, w.sh, w.top, w.dh) * axis(w.in_w, w.out_w, w.kw, w.sw, w.left, w.dw)
    return positions * (w.in_c // w.groups) * w.out_c


def _parameter_bytes(parameter: Slice | None, elements: int, tasks: int) -> int:
    if parameter is None:
        return 0
    numbers = parameter.numbers
    return len(numbers) * elements * numbers[0].element_size() * (tasks if parameter.stride else 1)


PROCESSORS = 132  # of the devices that shapes of launches are chosen for, about
STAGES = 3  # steps that are loaded ahead

_MOST = {"float64": (32, 32, 16), "ieee": (64, 64, 8), "tensor cores": (64, 64, 16)}  # rows, width, depth


def _tile(batch: int, rows: int, width: int, depth: int, dtype: torch.dtype, precision: str, halved: bool = False):
    """Rows and width of a result's tile, the depth of a step, and warps: what fits into registers, with tangents too.

    The tile of the table; smaller for small results, or where so few programs would leave processors idle. ``halved``:
    on tensor cores of half the rows.
    """
    kind = "float64" if dtype == torch.float64 else "ieee" if precision == "ieee" else "tensor cores"
    high, wide, deep = _MOST[kind]
    if halved and kind == "tensor cores":
        high //= 2
    high, wide = (min(m, max(16, triton.next_power_of_2(n))) for m, n in ((high, rows), (wide, width)))
    while high * wide > 512 and batch * triton.cdiv(rows, high) * triton.cdiv(width, wide) < PROCESSORS:
        high, wide = (high // 2, wide) if high >= wide else (high, wide // 2)
    deep = 16 if high * wide <= 256 else deep
    return high, wide, min(deep, max(16, triton.next_power_of_2(depth))), 8 if high * wide > 1024 else 4


def splits(window: Window, tasks: int, samples: int) -> int:
    """How many parts the rows are cut into for the gradients of weight and bias.

    Enough for four programs on each processor, as if tiles were 32 x 64, yet of no less than 128 rows.
    As there are several only where programs are few, Partials stay below 10 MB.
    """
    w = _flat(window)
    outputs = w.out_c // w.groups
    programs = tasks * w.groups * math.ceil(w.kh * w.kw * (w.in_c // w.groups) / 32) * math.ceil(outputs / 64)
    return max(1, min(32, 4 * PROCESSORS // max(programs, 1), samples * w.out_h * w.out_w // 128))


def forward(
    window: Window, x: Number, weight: Slice, bias: Slice | None, y: Number, z: Number | None,
    activation: Activation | None, statistics: Statistics | None, sample_weight, tasks: int, samples: int,
    precision: str,
):  # fmt: skip
    """y and, where there is room for it, z = activation(y); ``statistics``: of y, without samples of weight 0."""
    w = _flat(window)
    inputs, outputs, rows = w.in_c // w.groups, w.out_c // w.groups, samples * w.out_h * w.out_w
    length = w.kh * w.kw * inputs
    # 64 x 64 values with tangents are too many: in bfloat16 168 bytes a thread were spilled on sm_80.
    dual = len(y) == 2
    high, wide, deep, warps = _tile(tasks * w.groups, rows, outputs, length, y[0].dtype, precision, halved=dual)
    span = rows_of_range(rows) if statistics else high
    chunks = triton.cdiv(rows, span)
    kept = (statistics.count, statistics.mean, statistics.m2) if statistics else (None, None, None)
    act = activation or Activation(activations.IDENTITY)
    products = len(x) + len(weight.numbers) - 1
    launch(
        _forward, tasks * chunks * w.groups * triton.cdiv(outputs, wide), x, weight.numbers, bias and bias.numbers, y,
        z, sample_weight if statistics else None, *kept, _shape(w), weight.stride, weight.offset,
        bias.stride if bias else 0, bias.offset if bias else 0, samples, span, chunks, a=act.a, b=act.b, KIND=act.kind,
        ROWS=high, WIDTH=wide, DEPTH=deep, ALIGNED=inputs % deep == 0, PRECISION=precision,
        flops=2 * tasks * samples * _pairs(w) * products, warps=warps, stages=STAGES,
        moved=size(x, y, z, *kept) + _parameter_bytes(weight, length * w.out_c, tasks)
        + _parameter_bytes(bias, w.out_c, tasks),
    )  # fmt: skip


def backward(
    window: Window, x: Number, weight: Slice, dy: Number, dx: Number | None, accumulate: bool,
    through: tuple[Number, Activation] | None, to_weight: Partials | None, to_bias: Partials | None, tasks: int,
    samples: int, precision: str,
):  # fmt: skip
    """The gradients at x (``through``: at y_before, where x = activation(y_before)), at weight and at bias."""
    w = _flat(window)
    inputs, outputs, rows = w.in_c // w.groups, w.out_c // w.groups, samples * w.out_h * w.out_w
    length, dtype = w.kh * w.kw * inputs, dy[0].dtype
    before, act = through or (None, Activation(activations.IDENTITY))

    seen = samples * w.in_h * w.in_w
    parts = (to_weight or to_bias).splits if to_weight or to_bias else 1
    high, wide, deep, warps = _tile(tasks * w.groups, seen, inputs, w.kh * w.kw * outputs, dtype, precision)
    part_deep, part_wide, part_high, part_warps = _tile(
        tasks * w.groups * parts, length, outputs, rows, dtype, precision
    )
    part = triton.cdiv(triton.cdiv(rows, parts), part_high) * part_high
    blocks = (triton.cdiv(length, part_deep) if to_weight else 0) + (1 if to_bias else 0)
    first = tasks * parts * w.groups * blocks * triton.cdiv(outputs, part_wide)
    rest = tasks * w.groups * triton.cdiv(inputs, wide) * triton.cdiv(seen, high) if dx else 0

    parts_at = [p.offset if p else 0 for p in (to_weight, to_bias)]
    products = (len(dy) + len(weight.numbers) - 1 if dx else 0) + (len(dy) + len(x) - 1 if to_weight else 0)
    element = dy[0].element_size() * tasks
    moved = size(dy, dx, before) + (size(dx) if dx and accumulate else 0)
    moved += _parameter_bytes(weight, length * w.out_c, tasks) if dx else 0
    moved += size(x) + len(to_weight.numbers) * parts * length * w.out_c * element if to_weight else 0
    moved += len(to_bias.numbers) * parts * w.out_c * element if to_bias else 0
    launch(
        _backward, first + rest, x, weight.numbers, dy, dx, before, to_weight and to_weight.numbers,
        to_bias and to_bias.numbers, _shape(w), weight.stride, weight.offset, *parts_at, tasks, samples, part, parts,
        first, a=act.a, b=act.b, KIND=act.kind, ACCUMULATE=accumulate, ROWS=high, WIDTH=wide, DEPTH=deep,
        ALIGNED=outputs % deep == 0, PART_ROWS=part_high, PART_WIDTH=part_wide, PART_DEPTH=part_deep,
        PART_ALIGNED=inputs % part_deep == 0, PRECISION=precision,
        flops=2 * tasks * samples * _pairs(w) * products, moved=moved, warps=max(warps if dx else 0, part_warps),
        stages=STAGES,
    )  # fmt: skip
