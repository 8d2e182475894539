"""Losses of one task by name, and what their targets must look like."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # the label F.cross_entropy leaves out


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    # Spelled out: F.mse_loss and F.huber_loss have no batched forward derivative.
    return (prediction - target).square().mean()


def huber(prediction: Tensor, target: Tensor) -> Tensor:
    distance = (prediction - target).abs()
    return torch.where(distance < 1, 0.5 * distance.square(), distance - 0.5).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "huber": huber,
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}


def resolve(loss: str | Callable) -> Callable:
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(map(repr, LOSSES))} or a callable, got {loss!r}")
        return LOSSES[loss]
    if not callable(loss):
        raise TypeError(f"loss: expected a name or a callable (prediction, target) -> scalar, got {type(loss).__name__}")
    return loss


def check_target(loss: str | Callable, name: str, target, prediction: torch.Size, dtype: torch.dtype) -> None:
    """Raise where ``target`` ([T, N, ...]) does not fit a named loss and predictions ``[N, ...]`` of one task.

    Broadcasting a ``[N]`` target against ``[N, 1]`` predictions would be silently wrong, so shapes are equal.
    """
    if not isinstance(loss, str):
        return
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: expected a tensor for loss {loss!r}, got {type(target).__name__}")
    shape = target.shape[1:]
    if loss == "cross_entropy" and not target.is_floating_point():
        if target.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64 labels (or soft labels in {dtype}), got {target.dtype}")
        if len(prediction) < 2:
            raise ValueError(f"loss: 'cross_entropy' needs predictions [N, classes, ...], got {list(prediction)} a task")
        expected = prediction[:1] + prediction[2:]
        if shape != expected:
            raise ValueError(f"{name}: expected labels {['T', *expected]}, got {list(target.shape)}")
        low, high = torch.stack(torch.aminmax(torch.where(target == IGNORE_INDEX, 0, target))).tolist()
        if low < 0 or high >= prediction[1]:
            raise ValueError(
                f"{name}: expected labels in 0..{prediction[1] - 1} (or {IGNORE_INDEX}, which is left out) for "
                f"{prediction[1]} classes, got {low if low < 0 else high}"
            )
        return
    if target.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} like the parameters, got {target.dtype}")
    if shape != prediction:
        raise ValueError(
            f"{name}: expected shape {['T', *prediction]} like the predictions, got {list(target.shape)}"
        )
