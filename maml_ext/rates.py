"""Learning rates of every shape over a flat parameter vector: scalar, per tensor, per parameter, per step.

A rate is ``[]`` (or one element), ``[n]`` (one for each of the n parameter tensors) or ``[P]`` (one for each
parameter, as in Meta-SGD, Li et al. 2017); with a leading dimension ``[steps, 1 | n | P]`` it is one such row
a step (as in MAML++, Antoniou et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .losses import readable


def check_rate(lr: Tensor, sizes: Sequence[int], steps: int, dtype: torch.dtype) -> None:
    """Raise where ``lr`` does not fit the parameters or the number of steps."""
    if not lr.is_floating_point():
        raise TypeError(f"lr: expected a real floating dtype, got {lr.dtype}")
    n, p = len(sizes), sum(sizes)
    fits = lr.dim() < 2 and lr.numel() == 1 or lr.dim() in (1, 2) and lr.shape[-1] in (1, n, p)
    if not fits:
        raise ValueError(
            f"lr: expected shape [], [{n}] (per tensor), [{p}] (per parameter), or such a row for each step "
            f"([steps, 1], [steps, {n}], [steps, {p}]), got {list(lr.shape)}"
        )
    if lr.dim() == 2 and lr.shape[0] < steps:
        raise ValueError(f"lr: expected a row for each of {steps} steps, got {lr.shape[0]} rows")
    if readable(lr) and not torch.isfinite(lr).all():
        raise ValueError("lr: expected finite rates, got NaN or infinity")
    if lr.dtype != dtype:
        raise TypeError(f"lr: expected {dtype} like the parameters, got {lr.dtype}")


def rate_of_step(lr: Tensor, step: int) -> Tensor:
    """The row of ``lr`` for this step: ``[]``, ``[n]`` or ``[P]``."""
    row = lr[step] if lr.dim() == 2 else lr
    return row.reshape(()) if row.numel() == 1 else row


def expand_rate(row: Tensor, sizes: Sequence[int]) -> Tensor:
    """A row as what multiplies ``[..., P]``: ``[]`` or ``[P]``."""
    if row.dim() == 0 or row.numel() == sum(sizes):
        return row
    return torch.cat([r.expand(size) for r, size in zip(row.unbind(), sizes)])


def as_rows(lr: Tensor, sizes: Sequence[int]) -> Tensor:
    """A rate of any shape as ``[1 or steps, 1 or P]``, differentiably."""
    rows = lr if lr.dim() == 2 else lr.reshape(1, -1)
    if rows.shape[1] in (1, sum(sizes)):
        return rows
    return torch.cat([column.expand(-1, size) for column, size in zip(rows.split(1, 1), sizes)], 1)


def from_rows(rows: Tensor) -> Tensor:
    """One row for all steps is no row a step."""
    return rows[0] if rows.shape[0] == 1 else rows


def reduce_rate(product: Tensor, row: Tensor, sizes: Sequence[int]) -> Tensor:
    """The transpose of ``expand_rate``: ``[..., P]`` summed to the shape of ``row``."""
    if row.dim() == 0:
        return product.sum()
    product = product.reshape(-1, product.shape[-1]).sum(0)
    if row.numel() == product.numel():
        return product
    return torch.stack([piece.sum() for piece in product.split(list(sizes))])
