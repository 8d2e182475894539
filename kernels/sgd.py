"""The operators of the SGD update (``maml_ext/ops/sgd.py``) where the binary has no CUDA kernels: theta - lr * grad for
lists of tensors in one launch, and its derivative by grad and lr in another.

A tensor is cut into segments, each of ``rows`` runs of ``size`` consecutive elements that are ``pitch`` apart, with one
rate or with ``size`` of them, which the rows share (``csrc/segment.h``). What a launch has to know of its segments
comes as one small tensor of integers. A program finds its segment there and has 1024 columns of it: of one row in the
update, of a range of rows in the derivative. There sums are in registers, in float64 as everywhere in these operators;
what ranges and columns leave is added up by one more launch, in fixed order. Two FLOPs an element, four in the
derivative; each element is read or written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate, chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from maml_ext.ops.sgd import _per_tensor

from .launch import launch, size

BLOCK = 1024
SEGMENTS = 64  # of a launch
ROWS, RANGES = 16, 64  # of a range at least, of a segment at most
FIELDS = 12  # those of a segment, its ranges and sums, and where these begin
_BLOCK, _SEGMENTS, _FIELDS = tl.constexpr(BLOCK), tl.constexpr(SEGMENTS), tl.constexpr(FIELDS)


@dataclass(frozen=True)
class Segment:
    first: int  # addresses; 0 where there is nothing
    grad: int
    lr: int
    out: int
    to_lr: int
    rows: int
    size: int
    pitch: int
    per_parameter: bool

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.size, BLOCK)

    @property
    def ranges(self) -> int:
        return min(triton.cdiv(self.rows, ROWS), RANGES)

    @property
    def sums(self) -> int:
        """What is left to be added up: nothing where one range has all of a rate."""
        if self.per_parameter:
            return 0 if self.ranges == 1 else self.ranges * self.size
        return self.ranges * self.tiles

    @property
    def finishing(self) -> int:
        """Programs that do it; they also write the zeros of rates of no elements."""
        if self.per_parameter:
            return 0 if self.ranges == 1 else self.tiles
        return 1


@triton.jit
def _locate(table, segments):
    """The fields of this program's segment, and which of its programs it is."""
    i = tl.arange(0, _SEGMENTS)
    begins = tl.load(table + i, i < segments, 1 << 62)
    pid = tl.program_id(0).to(tl.int64)
    segment = tl.sum((begins <= pid).to(tl.int32), 0) - 1  # of those that begin here the last: the others are empty
    return table + segments + segment * _FIELDS, pid - tl.load(table + segment)


@triton.jit
def _tile(fields, index):
    """Which row, or range of rows; its columns, and which of them there are."""
    size = tl.load(fields + 6)
    tiles = tl.cdiv(size, _BLOCK)
    column = index % tiles * _BLOCK + tl.arange(0, _BLOCK)
    return index // tiles, column, column < size


@triton.jit
def _load(fields, i: tl.constexpr, at, mask, dtype: tl.constexpr):
    return tl.load(tl.load(fields + i).to(tl.pointer_type(dtype)) + at, mask, 0.0)


@triton.jit
def _store(fields, i: tl.constexpr, at, x, mask, dtype: tl.constexpr):
    tl.store(tl.load(fields + i).to(tl.pointer_type(dtype)) + at, x.to(dtype), mask)


@triton.jit(do_not_specialize=["segments"])
def _update(table, segments, THETA: tl.constexpr, dtype: tl.constexpr):
    fields, index = _locate(table, segments)
    row, column, mask = _tile(fields, index)
    at = row * tl.load(fields + 7) + column
    rate = _load(fields, 2, column * tl.load(fields + 8), mask, dtype)
    out = -rate * _load(fields, 1, at, mask, dtype)
    if THETA:
        out += _load(fields, 0, at, mask, dtype)
    _store(fields, 3, at, out, mask, dtype)


@triton.jit(do_not_specialize=["segments"])
def _backward(table, segments, workspace, TO_GRAD: tl.constexpr, dtype: tl.constexpr):
    fields, index = _locate(table, segments)
    part, column, mask = _tile(fields, index)
    rows, pitch = tl.load(fields + 5), tl.load(fields + 7)
    per_parameter, ranges = tl.load(fields + 8), tl.load(fields + 9)
    rate = _load(fields, 2, column * per_parameter, mask, dtype)
    total = tl.zeros([_BLOCK], tl.float64)
    for row in range(rows * part // ranges, rows * (part + 1) // ranges):
        at = row * pitch + column
        cotangent = _load(fields, 0, at, mask, dtype)
        if TO_GRAD:
            _store(fields, 3, at, -rate * cotangent, mask, dtype)
        total += cotangent.to(tl.float64) * _load(fields, 1, at, mask, dtype).to(tl.float64)
    sums = workspace + tl.load(fields + 11)
    if per_parameter == 0:
        tl.store(sums + index, tl.sum(total, 0))
    elif ranges == 1:
        _store(fields, 4, column, -total, mask, dtype)
    else:
        tl.store(sums + part * tl.load(fields + 6) + column, total, mask)


@triton.jit(do_not_specialize=["segments"])
def _finish(table, segments, workspace, dtype: tl.constexpr):
    """Of rates of columns a tile, over ranges; of a single rate all that programs have left, a block at a time."""
    fields, index = _locate(table, segments)
    per_parameter, count = tl.load(fields + 8), tl.load(fields + 10)
    sums = workspace + tl.load(fields + 11)
    column = index * _BLOCK + tl.arange(0, _BLOCK)
    width = tl.where(per_parameter == 0, _BLOCK, tl.load(fields + 6))
    total = tl.zeros([_BLOCK], tl.float64)
    for begin in range(0, count, width):
        total += tl.load(sums + begin + column, (begin + column < count) & (column < width), 0.0)
    if per_parameter == 0:
        _store(fields, 4, 0, -tl.sum(total, 0), None, dtype)
    else:
        _store(fields, 4, column, -total, column < width, dtype)


def _segments(first: Sequence[Tensor], grad, lr, out, to_lr, sizes: Sequence[int]) -> Iterator[Segment]:
    """Of contiguous tensors; what there is none of is an empty list."""

    def address(tensors, i, at=0):
        return tensors[i].data_ptr() + at * tensors[i].element_size() if tensors else 0

    for i, (g, r) in enumerate(zip(grad, lr)):
        if _per_tensor(r, g, sizes):
            rows = g[..., 0].numel()
            for j, (n, end) in enumerate(zip(sizes, accumulate(sizes))):
                places = (first, end - n), (grad, end - n), (lr, j), (out, end - n), (to_lr, j)
                yield Segment(*(address(tensors, i, at) for tensors, at in places), rows, n, g.shape[-1], False)
        else:
            n = r.numel() if r.dim() else g.numel()
            addresses = (address(tensors, i) for tensors in (first, grad, lr, out, to_lr))
            yield Segment(*addresses, g.numel() // n if n else 0, n, n, r.dim() > 0)


def _run(kernel, programs: Callable[[Segment], int], segments: list[Segment], *arguments, like: Tensor, flops, moved):
    starts = list(accumulate((s.sums for s in segments), initial=0))
    for i in range(0, len(segments), SEGMENTS):
        batch = segments[i : i + SEGMENTS]
        *begins, total = accumulate(map(programs, batch), initial=0)
        fields = ((*astuple(s), s.ranges, s.sums, start) for s, start in zip(batch, starts[i:]))
        numbers = torch.tensor([*begins, *chain(*fields)], dtype=torch.int64, pin_memory=like.is_cuda)
        table = numbers.to(like.device, non_blocking=True)
        launch(
            kernel, total, table, len(batch), *arguments,
            dtype=tl.float32 if like.dtype == torch.float32 else tl.float64,
            flops=flops if i == 0 else 0, moved=moved if i == 0 else 0,  # of all, said of the first
        )  # fmt: skip


def update(theta: Sequence[Tensor], grad: Sequence[Tensor], lr: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """``theta[i] - lr[i] * grad[i]``; an empty ``theta`` is zeros."""
    theta, grad, lr = ([t.contiguous() for t in tensors] for tensors in (theta, grad, lr))
    out = [torch.empty_like(g) for g in grad]
    _run(
        _update, lambda s: s.rows * s.tiles, list(_segments(theta, grad, lr, out, [], sizes)), bool(theta),
        like=grad[0], flops=2 * sum(g.numel() for g in grad), moved=size(theta, grad, lr, out),
    )  # fmt: skip
    return out


def backward(cotangent: Sequence[Tensor], grad, lr, sizes: Sequence[int], to_grad: bool) -> list[Tensor]:
    """``-lr[i] * cotangent[i]`` for each i, if wanted, then ``-(cotangent[i] * grad[i])`` summed to lr[i]'s shape."""
    cotangent, grad, lr = ([t.contiguous() for t in tensors] for tensors in (cotangent, grad, lr))
    out, to_lr = [torch.empty_like(g) for g in grad if to_grad], [torch.empty_like(r) for r in lr]
    segments = list(_segments(cotangent, grad, lr, out, to_lr, sizes))
    sums = sum(s.sums for s in segments)
    workspace = grad[0].new_empty(sums, dtype=torch.float64)
    _run(
        _backward, lambda s: s.ranges * s.tiles, segments, workspace, to_grad, like=grad[0],
        flops=(3 if to_grad else 2) * sum(g.numel() for g in grad), moved=size(cotangent, grad, lr, out, workspace),
    )  # fmt: skip
    _run(
        _finish, lambda s: s.finishing, segments, workspace, like=grad[0],
        flops=sums, moved=size(workspace, to_lr),
    )  # fmt: skip
    return out + to_lr
