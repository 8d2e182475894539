"""Losses of one task by name, and what their targets must look like.

A target may be ``(y, w)``, with a weight for each sample: ``w`` is ``[T, N]`` for all tasks, ``[N]`` for one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

NAMES = ("mse", "huber", "cross_entropy", "bce_with_logits")


class _Same:
    """A tensor that is equal to itself alone."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __eq__(self, other) -> bool:
        return isinstance(other, _Same) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss that the engines know: (prediction, target) of one task -> scalar, the mean over what is in it.

    Weights ``[N]`` make it a weighted mean: of the samples' own means, sum_n w_n l_n / sum_n w_n; for labels every
    position counts w_n times, in the sum and in what divides it, on top of its class weight.

    Args:
        kind: one of ``NAMES``.
        delta: of Huber's loss.
        smoothing, ignore_index, class_weight: of cross entropy, as for ``F.cross_entropy``.
    """

    kind: str
    delta: float = 1.0
    smoothing: float = 0.0
    ignore_index: int = -100
    class_weight: Tensor | None = None

    def __call__(self, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        labels = self.kind == "cross_entropy" and not target.is_floating_point()
        # Torch's mean of smoothed, class-weighted terms selects by a mask, which vmap cannot batch.
        if weight is None and not (labels and self.smoothing and self.class_weight is not None):
            return self._terms(prediction, target, "mean")
        terms = self._terms(prediction, target, "none")
        weight = terms.new_ones(1) if weight is None else weight
        weight = weight.reshape(-1, *[1] * (terms.dim() - 1))
        total = (weight * terms).sum()
        if not labels:
            return total / (weight.sum() * terms[0].numel())
        counted = (target != self.ignore_index).to(weight.dtype)
        if self.class_weight is not None:
            counted = counted * self.class_weight[torch.where(target == self.ignore_index, 0, target)]
        return total / (weight * counted).sum()

    def _terms(self, prediction: Tensor, target: Tensor, reduction: str) -> Tensor:
        if self.kind == "cross_entropy":
            options = {"ignore_index": self.ignore_index, "label_smoothing": self.smoothing}
            return F.cross_entropy(prediction, target, self.class_weight, reduction=reduction, **options)
        if self.kind == "bce_with_logits":
            return F.binary_cross_entropy_with_logits(prediction, target, reduction=reduction)
        # Spelled out: F.mse_loss and F.huber_loss have no batched forward derivative.
        if self.kind == "mse":
            terms = (prediction - target).square()
        else:
            difference = prediction - target  # the square of its absolute value would have no curvature at 0
            distance = difference.abs()
            outside = self.delta * (distance - 0.5 * self.delta)
            terms = torch.where(distance < self.delta, 0.5 * difference.square(), outside)
        return terms.mean() if reduction == "mean" else terms

    @property
    def settings(self) -> tuple:
        """What tells it from others; class weights are held, so that no other tensor takes their place."""
        held = None if self.class_weight is None else _Same(self.class_weight)
        return self.kind, self.delta, self.smoothing, self.ignore_index, held


LOSSES = {name: Loss(name) for name in NAMES}
_FUNCTIONS = {
    F.mse_loss: "mse",
    F.huber_loss: "huber",
    F.cross_entropy: "cross_entropy",
    F.binary_cross_entropy_with_logits: "bce_with_logits",
}
_MODULES = {
    nn.MSELoss: "mse",
    nn.HuberLoss: "huber",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.BCEWithLogitsLoss: "bce_with_logits",
}
# torch's name of an option: ours
_OPTIONS = {
    "huber": {"delta": "delta"},
    "cross_entropy": {"label_smoothing": "smoothing", "ignore_index": "ignore_index", "weight": "class_weight"},
}


def recognise(loss: str | Callable) -> Loss | None:
    """The loss that a name, a loss module of torch or a function of ``torch.nn.functional`` stands for.

    Modules of exactly torch's types and functions, also in ``functools.partial``, with reduction "mean" and no
    options beside those of ``Loss``. None for anything else: the user's own callable.
    """
    if isinstance(loss, str):
        return LOSSES.get(loss)
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, nn.Module):
        if type(loss) not in _MODULES or "forward" in loss.__dict__ or loss._forward_hooks or loss._forward_pre_hooks:
            return None
        if loss._backward_hooks or loss._backward_pre_hooks or module_hooks._has_any_global_hook():
            return None
        if loss._parameters or loss._modules:  # weights that learn, say
            return None
        kind = _MODULES[type(loss)]
        options = {k: v for k, v in vars(loss).items() if not k.startswith("_") and k != "training"}
        options.update(loss._buffers)
    else:
        options = {}
        if isinstance(loss, functools.partial):
            if loss.args:
                return None
            loss, options = loss.func, dict(loss.keywords)
        try:
            kind = _FUNCTIONS.get(loss)
        except TypeError:  # an unhashable callable
            return None
        if kind is None:
            return None
    if options.pop("reduction", "mean") != "mean":
        return None
    known = _OPTIONS.get(kind, {})
    if any(v is not None and k not in known for k, v in options.items()):
        return None
    found = Loss(kind, **{known[k]: v for k, v in options.items() if k in known})
    if not all(isinstance(v, (int, float)) for v in (found.delta, found.smoothing, found.ignore_index)):
        return None
    if not isinstance(found.class_weight, (Tensor, type(None))):
        return None
    if not (found.delta > 0 and 0 <= found.smoothing <= 1):  # torch says what is wrong
        return None
    if found.class_weight is not None and (found.class_weight.requires_grad or found.class_weight.dim() != 1):
        return None
    return found


def resolve(loss: str | Callable) -> Callable:
    """The ``Loss`` that is meant, with its settings of now, or the user's own callable."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(map(repr, LOSSES))} or a callable, got {loss!r}")
        return LOSSES[loss]
    if not callable(loss):
        got = type(loss).__name__
        raise TypeError(f"loss: expected a name or a callable (prediction, target) -> scalar, got {got}")
    return recognise(loss) or loss


def split(loss: Callable | None, target) -> tuple:
    """(y, weights or None): a tuple is a target of its own for a callable that the engines do not know."""
    return target if isinstance(loss, Loss) and isinstance(target, tuple) else (target, None)


def join(target: Tensor, weight: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """The inverse of ``split``."""
    return target if weight is None else (target, weight)


def check_target(loss: str | Callable, name: str, target, prediction: torch.Size, dtype: torch.dtype) -> None:
    """Raise where ``target`` ([T, N, ...]) does not fit a recognised loss and predictions ``[N, ...]`` of one task.

    Broadcasting a ``[N]`` target against ``[N, 1]`` predictions would be silently wrong, so shapes are equal.
    """
    found = recognise(loss)
    if found is not None:
        target, weight = split(found, target)
        check_fit(found, name, target, prediction, dtype)
        check_labels(found, name, target, prediction)
        if weight is not None:
            check_weights(name, weight)


def check_pair(loss: Loss, name: str, target, expected: tuple[int, int], dtype: torch.dtype) -> None:
    """Raise where the target is a tuple and not (y, weights ``[T, N]``)."""
    if not isinstance(target, tuple):
        return
    if len(target) != 2 or not all(isinstance(t, Tensor) for t in target) or target[1].dim() != 2:
        raise TypeError(
            f"{name}: expected a tensor for loss {loss.kind!r}, got tuple, which may only be (target, weights "
            f"{list(expected)})"
        )
    weight = target[1]
    if weight.dtype != dtype:
        raise TypeError(f"{name}: expected weights in {dtype} like the parameters, got {weight.dtype}")
    if weight.shape != expected:
        raise ValueError(f"{name}: expected weights {list(expected)}, one a sample, got {list(weight.shape)}")


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: not inside a transform over it, nor while it is traced; and not where a look
    would wait for a device at every call (what is wrong there comes out as NaN)."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return tensor.device.type == "cpu" and not (wrapped or torch.compiler.is_compiling())


def check_weights(name: str, weight: Tensor) -> None:
    """Raise where weights divide by 0 or worse; where their values cannot be read, by nobody."""
    if not readable(weight):
        return
    weight = weight.detach()
    low, high, least = torch.stack([*torch.aminmax(weight), weight.sum(1).amin()]).tolist()
    if not (low >= 0 and high < math.inf):
        raise ValueError(f"{name}: expected finite weights of 0 or more, got {high if low >= 0 else low}")
    if least == 0:
        raise ValueError(f"{name}: expected a weight above 0 in every task, got a task with none")


def check_fit(loss: Loss, name: str, target, prediction: torch.Size, dtype: torch.dtype) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: expected a tensor for loss {loss.kind!r}, got {type(target).__name__}")
    shape = target.shape[1:]
    if loss.class_weight is not None:
        found = loss.class_weight
        if len(prediction) > 1 and len(found) != prediction[1]:
            raise ValueError(f"loss: expected class weights [{prediction[1]}], got {list(found.shape)}")
        if found.device != target.device:
            raise ValueError(f"loss: expected class weights on {target.device} like the targets, got {found.device}")
        if found.dtype != dtype:
            raise TypeError(f"loss: expected class weights in {dtype} like the parameters, got {found.dtype}")
    if loss.kind == "cross_entropy" and not target.is_floating_point():
        if target.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64 labels (or soft labels in {dtype}), got {target.dtype}")
        if len(prediction) < 2:
            got = f"{list(prediction)} a task"
            raise ValueError(f"loss: 'cross_entropy' needs predictions [N, classes, ...], got {got}")
        expected = prediction[:1] + prediction[2:]
        if shape != expected:
            raise ValueError(f"{name}: expected labels {['T', *expected]}, got {list(target.shape)}")
        return
    if target.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} like the parameters, got {target.dtype}")
    if shape != prediction:
        raise ValueError(
            f"{name}: expected shape {['T', *prediction]} like the predictions, got {list(target.shape)}"
        )


def check_labels(loss: Loss, name: str, target: Tensor, prediction: torch.Size) -> None:
    """Raise where a label is no class: apart from the rest, because it reads the data."""
    if loss.kind != "cross_entropy" or target.is_floating_point() or not readable(target):
        return
    ignored = loss.ignore_index
    low, high = torch.stack(torch.aminmax(torch.where(target == ignored, 0, target))).tolist()
    if low < 0 or high >= prediction[1]:
        raise ValueError(
            f"{name}: expected labels in 0..{prediction[1] - 1} (or {ignored}, which is left out) for "
            f"{prediction[1]} classes, got {low if low < 0 else high}"
        )
