"""What is done to whole vectors of parameters ``[T, P]``: the step of the inner loop and that of its adjoint recursion.

Each pass is one launch. It reads the ``Partials`` that the backward passes of all layers have left, adds them up in
registers (split after split: the order never changes) and uses the sum there, so that a gradient is only in memory
where somebody wants it (``gather``). A program has at most 1024 parameters of one tensor and one task. Few FLOPs;
each vector is read or written once, and of the partials ``splits`` times what a gradient has.

With ``H_k`` the Hessian of the support loss at theta_k, ``g_k`` its gradient, ``a_k`` the rates of step k and ``c_k``
the cotangent of theta_k itself,

    theta_{k+1} = theta_k - a_k g_k                                     ``step``
    lambda_K = the gradient of the query loss, d_{K-1} = a_{K-1} lambda_K       ``gather``
    lambda_k = lambda_{k+1} - H_k d_k + c_k, d_{k-1} = a_{k-1} lambda_k         ``adjoint``
    the gradient of a_k = -lambda_{k+1} g_k, a sum where the rate is one        ``adjoint``

where a backward pass along the direction d_k leaves partials with the value g_k and the tangent H_k d_k.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import Number
from .launch import launch, size
from .numbers import add, load, scale, store, subtract, zeros_like

BLOCK = 1024
_BLOCK = tl.constexpr(BLOCK)


class Slot(NamedTuple):
    """A parameter tensor: where it is in a task's parameters, and the ``Partials`` of its gradient."""

    offset: int
    size: int
    partials: int  # offset
    splits: int  # 0 where nobody leaves a gradient, which is 0 then


@dataclass(frozen=True)
class Table:
    """All parameters in blocks. A row: offset and count of a block, where its partials begin, size and splits of the
    slot."""

    rows: Tensor  # [blocks, 5], int64
    parameters: int
    partials: int  # numbers of a task

    @classmethod
    def of(cls, slots: Iterable[Slot], device: torch.device | str) -> Table:
        slots, rows, end = sorted(slots), [], 0
        for slot in slots:
            if slot.offset != end:
                raise ValueError(f"slots: expected one that begins at {end}, got {slot}")
            end += slot.size
            for at in range(0, slot.size, BLOCK):
                count = min(BLOCK, slot.size - at)
                rows.append((slot.offset + at, count, slot.partials + at, slot.size, slot.splits))
        table = torch.tensor(rows, dtype=torch.int64, device=device).reshape(len(rows), 5)
        return cls(table, end, sum(slot.size * slot.splits for slot in slots))

    @property
    def blocks(self) -> int:
        return len(self.rows)


@triton.jit
def _locate(table, blocks):
    """This program's task, block, and in its task's parameters the elements, and which of them there are."""
    pid = tl.program_id(0)
    block = pid % blocks
    row = table + block.to(tl.int64) * 5
    element = tl.arange(0, _BLOCK)
    return (pid // blocks).to(tl.int64), block, row, tl.load(row) + element, element < tl.load(row + 1)


@triton.jit
def _gradient(partials, row, task, tasks, mask):
    """Of a block: its partials added up."""
    dtype: tl.constexpr = partials[0].dtype.element_ty
    size = tl.load(row + 3)
    at = tl.load(row + 2) + task * size + tl.arange(0, _BLOCK)
    total = zeros_like(partials, [_BLOCK], dtype)
    for split in tl.range(0, tl.load(row + 4), loop_unroll_factor=4):
        total = add(total, load(partials, at + split * tasks * size, mask, dtype))
    return total


@triton.jit
def _rate(rates, element, mask, PER_PARAMETER: tl.constexpr):
    if PER_PARAMETER:
        return tl.load(rates + element, mask, 0.0)
    else:
        return tl.load(rates)


# Nothing is gained by kernels of their own for these.
_specialised = triton.jit(
    do_not_specialize=["blocks", "tasks", "parameters", "theta_stride", "to_rates_stride"],
    do_not_specialize_on_alignment=["rates", "to_rates"],
)


@_specialised
def _gather(table, partials, blocks, tasks, parameters, out, rates, direction, PER_PARAMETER: tl.constexpr):
    task, block, row, element, mask = _locate(table, blocks)
    gradient = _gradient(partials, row, task, tasks, mask)
    store(out, task * parameters + element, gradient, mask)
    if direction is not None:
        rate = _rate(rates, element, mask, PER_PARAMETER)
        tl.store(direction + task * parameters + element, rate * gradient[0], mask)


@_specialised
def _step(
    table, partials, blocks, tasks, parameters, theta, theta_stride, rates, following, PER_PARAMETER: tl.constexpr
):  # fmt: skip
    task, block, row, element, mask = _locate(table, blocks)
    change = scale(_gradient(partials, row, task, tasks, mask), _rate(rates, element, mask, PER_PARAMETER))
    before = load(theta, task * theta_stride + element, mask, change[0].dtype)
    store(following, task * parameters + element, subtract(before, change), mask)


@_specialised
def _adjoint(
    table, partials, blocks, tasks, parameters, incoming, outgoing, cotangent, rates, direction, to_rates,
    to_rates_stride, PER_PARAMETER: tl.constexpr, SECOND_ORDER: tl.constexpr, EACH: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    task, block, row, element, mask = _locate(table, blocks)
    gradient = _gradient(partials, row, task, tasks, mask)
    at = task * parameters + element
    before = tl.load(incoming + at, mask, 0.0)
    after = before
    if SECOND_ORDER:
        after -= gradient[len(gradient) - 1]
    if cotangent is not None:
        after += tl.load(cotangent + at, mask, 0.0)
    tl.store(outgoing + at, after, mask)
    if direction is not None:
        tl.store(direction + at, _rate(rates, element, mask, PER_PARAMETER) * after, mask)
    if to_rates is not None:
        change = -before * gradient[0]
        if EACH:
            _put(to_rates + task * to_rates_stride + element, change, mask, ACCUMULATE)
        else:
            _put(to_rates + task * to_rates_stride + block, tl.sum(change, 0), None, ACCUMULATE)


@triton.jit
def _put(to, x, mask, ACCUMULATE: tl.constexpr):
    if ACCUMULATE:
        x += tl.load(to, mask)
    tl.store(to, x, mask)


def _run(kernel, table: Table, partials: Number, tasks: int, *arguments, rates, operations: int, **constants) -> None:
    """``operations``: a parameter's, beside the sum of its partials."""
    added = tasks * table.partials * len(partials)
    vectors = (a for a in arguments if not isinstance(a, int))
    launch(
        kernel, tasks * table.blocks, table.rows, partials, table.blocks, tasks, table.parameters, *arguments,
        PER_PARAMETER=rates is not None and rates.numel() > 1, **constants,
        flops=added + operations * tasks * table.parameters, moved=added * partials[0].element_size() + size(*vectors),
    )  # fmt: skip


def gather(
    table: Table, partials: Number, out: Number, *, rates: Tensor | None = None, direction: Tensor | None = None
) -> None:
    """``out`` [T, P] is the gradient; ``direction`` [T, P], rates [1 or P] times its value, is the first d."""
    _run(
        _gather, table, partials, len(out[0]), out, rates, direction,
        rates=rates, operations=int(direction is not None),
    )  # fmt: skip


def step(table: Table, partials: Number, theta: Number, rates: Tensor, following: Number) -> None:
    """``following`` [T, P] = theta - rates * gradient. Theta is [T, P], or [P] where tasks share it; rates [1 or P]."""
    stride = table.parameters if theta[0].dim() == 2 else 0
    _run(
        _step, table, partials, len(following[0]), theta, stride, rates, following,
        rates=rates, operations=2 * len(partials),
    )  # fmt: skip


def adjoint(
    table: Table, partials: Number, incoming: Tensor, outgoing: Tensor, *, cotangent: Tensor | None = None,
    rates: Tensor | None = None, direction: Tensor | None = None,
    to_rates: Tensor | None = None, accumulate: bool = False,
) -> None:  # fmt: skip
    """From lambda_{k+1}, ``incoming``, to lambda_k, ``outgoing``; vectors are [T, P].

    Args:
        partials: g_k and H_k d_k. Without a tangent H_k counts as 0: to first order.
        outgoing: may be ``incoming``.
        cotangent: c_k, where the meta-loss depends on theta_k itself.
        rates, direction: the rates [1 or P] of step k - 1 make d_{k-1}.
        to_rates: for the gradient of the rates of step k. [T, P]: of each; [T, blocks of the table]: of one for all, to
            be summed. Tasks may be apart.
        accumulate: add to what is in ``to_rates``.
    """
    second_order = len(partials) == 2
    stride = 0 if to_rates is None else to_rates.stride(0)
    needed = partials if to_rates is not None else partials[-1:]
    _run(
        _adjoint, table, needed, len(incoming), incoming, outgoing, cotangent, rates, direction, to_rates, stride,
        rates=rates, operations=sum((second_order, cotangent is not None, direction is not None, 2 * (stride > 0))),
        SECOND_ORDER=second_order, EACH=to_rates is not None and to_rates.shape[1] == table.parameters,
        ACCUMULATE=accumulate,
    )  # fmt: skip
