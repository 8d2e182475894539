"""Adapting and scoring in one call of the engine: the meta-gradient is computed while a task is in cache.

What a call needs beyond its tensors is put together once for each kind of call and module, and a look at whether
all is as it was is what a further call costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

from . import compiled, functional, losses
from .rates import as_rows, check_rate, from_rows
from .stateless import Layout


@dataclass(eq=False)
class _Ready:
    call: compiled.Compiled
    sizes: list[int]
    parameters: list[Tensor]
    rate: float | None = None
    rows: Tensor | None = None


REMEMBERED = 64
_kind = attrgetter("shape", "dtype", "device")


def meta_losses(maml, data: tuple, steps: int) -> Tensor | None:
    """The losses of ``maml`` on (support_x, support_y, query_x, query_y); None where it takes two passes."""
    if not torch.is_grad_enabled() or maml.backend == "torch":
        return None
    loss = losses.recognise(maml.loss)
    tensors = _tensors(data)
    if loss is None or tensors is None or compiled.transformed(tensors[0]):
        return None
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        return None
    module = maml.module
    ready = compiled.known(module).calls
    kinds = [t is not None and _kind(t) for t in tensors]
    key = (steps, loss.settings, compiled.precision(tensors[0]), *kinds)
    found = ready.get(key)
    if found is None:
        found = _prepare(maml, loss, data)
        if found is None:
            return None
        if len(ready) >= REMEMBERED:
            ready.clear()
        ready[key] = found
    mean, first_order = maml.reduction == "mean", maml.meta_gradient == "first_order"
    lr = maml.lr
    if not isinstance(lr, Tensor):
        if found.rate != lr:
            found.rate, found.rows = lr, as_rows(functional.as_rate(lr, found.parameters[0]), found.sizes)
        rows = found.rows
    elif lr.requires_grad and not mean:
        return None  # the gradient of what all tasks share needs the cotangents of their losses
    else:
        check_rate(lr, found.sizes, steps, found.parameters[0].dtype)
        rows = as_rows(lr, found.sizes)
    if first_order:
        tensors[:3] = functional.detached(tensors[:3])
    for name, weight in (("support_y", tensors[2]), ("query_y", tensors[5])):
        if weight is not None:
            losses.check_weights(name, weight)
            if compiled.needs_reference(found.call.network, weight):
                return None
    again = _again(module, loss, steps, maml.meta_gradient, mean)
    inputs = rows, *tensors, *found.parameters
    try:
        return compiled.Meta.apply(found.call, again, (steps, first_order, mean), *inputs)
    except RuntimeError:
        functional.check_labels(found.call, "support_y", *tensors[:2])
        functional.check_labels(found.call, "query_y", *tensors[3:5])
        raise


def _tensors(data: tuple) -> list[Tensor | None] | None:
    """x, y and weights (or None) of the support set, then of the query set; None for anything else."""
    found = []
    for x, y in (data[:2], data[2:]):
        weight = None
        if isinstance(y, tuple) and len(y) == 2 and isinstance(y[1], Tensor):
            y, weight = y
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return None
        found += x, y, weight
    return found


def _prepare(maml, loss: losses.Loss, data: tuple) -> _Ready | None:
    """None where anything is wrong: two passes raise what there is to raise."""
    layout = Layout(maml.module)
    theta = layout.flatten().detach()
    data = functional.detached(data)  # what gradients of weights need is looked at in each call
    support_x, query_x = data[0], data[2]
    if support_x.shape[2:] != query_x.shape[2:] or support_x.shape[:1] != query_x.shape[:1]:
        return None
    try:
        calls = [
            functional.choose(maml.module, layout, theta, x, y, loss, maml.backend, names)[1]
            for names, x, y in ((functional.SUPPORT, *data[:2]), (functional.QUERY, *data[2:]))
        ]
    except (TypeError, ValueError):
        return None
    if not all(isinstance(call, compiled.Compiled) for call in calls) or calls[0].program != calls[1].program:
        return None
    return _Ready(calls[0], layout.sizes, list(layout.parameters.values()))


def _again(module: nn.Module, loss: losses.Loss, steps: int, meta_gradient: str, mean: bool) -> Callable:
    """The same losses by the reference, differentiable to any order, with the settings of the forward pass."""

    def again(rows, support_x, support_y, support_weight, query_x, query_y, query_weight, *parameters):
        theta = torch.cat([p.reshape(-1) for p in parameters])
        thetas = functional.inner_loop(
            module,
            theta,
            support_x,
            losses.join(support_y, support_weight),
            lr=from_rows(rows),
            steps=steps,
            loss=loss,
            meta_gradient=meta_gradient,
            backend="torch",
        )
        query_y = losses.join(query_y, query_weight)
        result = functional.task_loss(
            module, thetas[-1], query_x, query_y, loss=loss, backend="torch", names=functional.QUERY
        )
        return result.mean() if mean else result

    return again
