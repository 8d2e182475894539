"""Statistics of the batch: mean and squared deviations of each channel, over the samples of a task that have weight.

The rows of a task (samples x positions) are cut into at most 32 ranges. Whoever has a range in registers, a convolution
that has just computed it or ``measure``, stores its count, its mean and its sum of squared distances to that mean;
who needs the whole merges them (Chan, Golub, LeVeque 1983, eq. 2.1). Unlike a sum of squares that loses its digits to
the mean, and on numbers with a tangent the derivative comes along.
"""

import triton
import triton.language as tl

from .geometry import Number, Statistics
from .launch import launch, size
from .numbers import add, expand, load, multiply, scale, select, store, subtract, total, zeros_like

RANGES = 32
_RANGES = tl.constexpr(RANGES)
ROWS = 64  # a range is a multiple of it, and so of any tile of 16, 32 or 64 rows


def rows_of_range(rows: int) -> int:
    return triton.cdiv(triton.cdiv(rows, RANGES), ROWS) * ROWS


def ranges(rows: int) -> int:
    return triton.cdiv(rows, rows_of_range(rows))


@triton.jit
def moments(x, mask):
    """Of a tile [rows, channels], of which some rows count: how many they are, their mean and squared distances."""
    mask = tl.expand_dims(mask, 1)
    zero = (tl.zeros_like(x[0]),)
    count = tl.sum(tl.sum(mask.to(x[0].dtype), 0), 0)
    mean = scale(total(select(mask, x, zero), 0), 1.0 / tl.maximum(count, 1.0))
    distance = select(mask, subtract(x, expand(mean, 0)), zero)
    return count, mean, total(multiply(distance, distance), 0)


@triton.jit
def merge(count, mean, m2, other_count, other_mean, other_m2):
    both = count + other_count
    share = other_count / tl.maximum(both, 1.0)
    distance = subtract(other_mean, mean)
    between = scale(multiply(distance, distance), count * share)
    return both, add(mean, scale(distance, share)), add(add(m2, other_m2), between)


@triton.jit
def collect(counts, means, m2s, task, channel, mask, chunks, channels, dtype: tl.constexpr):
    """Over all ranges of a task: how many rows count, mean and sum of squared distances of some channels.

    All ranges are loaded at once: one after the other, each would wait for the memory.
    """
    task = task.to(tl.int64)
    chunk = tl.arange(0, _RANGES)
    count = tl.load(counts + task * chunks + chunk, chunk < chunks, 0.0).to(dtype)
    both = tl.sum(count, 0)
    at = (task * chunks + tl.expand_dims(chunk, 1)) * channels + tl.expand_dims(channel, 0)
    there = tl.expand_dims(chunk < chunks, 1) & tl.expand_dims(mask, 0)
    mean, m2 = load(means, at, there, dtype), load(m2s, at, there, dtype)
    count = tl.expand_dims(count, 1)
    whole = scale(total(scale(mean, count), 0), 1.0 / tl.maximum(both, 1.0))
    distance = subtract(mean, expand(whole, 0))
    return both, whole, total(add(m2, scale(multiply(distance, distance), count)), 0)


@triton.jit
def _measure(
    x, weight, counts, means, m2s, rows, positions, chunk_rows, chunks, channels,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x[0].dtype.element_ty
    tiles = tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0)
    task, chunk, tile = (pid // tiles // chunks).to(tl.int64), pid // tiles % chunks, pid % tiles
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    none = zeros_like(x, [CHANNELS], dtype)
    count, mean, m2 = tl.zeros([], dtype), none, none
    for at in range(chunk * chunk_rows, (chunk + 1) * chunk_rows, ROWS):
        row = at + tl.arange(0, ROWS)
        counted = row < rows
        if WEIGHTED:
            counted = counted & (tl.load(weight + task * (rows // positions) + row // positions, counted, 0.0) != 0)
        offset = (task * rows + tl.expand_dims(row, 1)) * channels + tl.expand_dims(channel, 0)
        tile_x = load(x, offset, tl.expand_dims(row < rows, 1) & tl.expand_dims(inside, 0), dtype)
        more, more_mean, more_m2 = moments(tile_x, counted)
        count, mean, m2 = merge(count, mean, m2, more, more_mean, more_m2)
    keep(counts, means, m2s, task, chunk, chunks, tile == 0, channel, inside, channels, count, mean, m2)


@triton.jit
def keep(counts, means, m2s, task, chunk, chunks, first, channel, inside, channels, count, mean, m2):
    """Store the moments of one range; ``first``: who of those that share it stores the count."""
    tl.store(counts + task * chunks + chunk, count, first)
    at = (task * chunks + chunk) * channels + channel
    store(means, at, mean, inside)
    store(m2s, at, m2, inside)


def measure(x: Number, statistics: Statistics, sample_weight, tasks: int, samples: int, positions: int, channels: int):
    """The statistics of values [T, N, positions, C]: one pass over them."""
    rows = samples * positions
    tile = min(64, triton.next_power_of_2(channels))
    chunks = statistics.count.shape[1]
    launch(
        _measure, tasks * chunks * triton.cdiv(channels, tile), x, sample_weight, statistics.count, statistics.mean,
        statistics.m2, rows, positions, rows_of_range(rows), chunks, channels, WEIGHTED=sample_weight is not None,
        ROWS=ROWS, CHANNELS=tile, flops=4 * tasks * rows * channels * len(x),
        moved=size(x, sample_weight, statistics.count, statistics.mean, statistics.m2),
    )  # fmt: skip
