"""The functional layer: the pieces of MAML for people who write their own algorithms.

``theta`` is the flat vector of a module's trainable parameters: ``[P]`` where all tasks share it, ``[T, P]``
where each task has its own. Data carry the task dimension first, ``[T, N, ...]``; ``x`` may be a tuple of
tensors (the module is then called as ``module(*x)``). The target may be ``(y, w)`` with weights ``[T, N]`` of the
samples; for a loss that is a callable of your own it may be any nested tuple of tensors. Everything is
differentiable to any order with respect to theta, learning rates and floating-point data; parameters of ``module``
itself get gradients through ``flatten``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import compiled, losses, reference
from .plan import Plan, check_statistics, plan
from .rates import as_rows, check_rate, from_rows
from .reference import Problem
from .stateless import Layout

META_GRADIENTS = ("exact", "first_order")
SUPPORT, QUERY = ("support_x", "support_y"), ("query_x", "query_y")


def flatten(module: nn.Module) -> Tensor:
    """The trainable parameters of ``module`` as one vector ``[P]``, in the order of ``named_parameters``.

    Frozen parameters are left out, shared ones are in it once. Differentiable: gradients of the result reach
    the parameters. Raises ValueError where nothing is trainable, TypeError where dtypes or devices differ.
    """
    return Layout(check_module(module)).flatten()


def unflatten(module: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    """``theta`` (``[..., P]``) as a dict from parameter name to ``[..., *shape]``: views where possible."""
    layout = Layout(check_module(module))
    _check_vector("theta", theta, layout)
    return layout.unflatten(theta)


def inner_loop(
    module: nn.Module,
    theta: Tensor,
    support_x: Tensor | tuple,
    support_y,
    *,
    lr: float | Tensor,
    steps: int,
    loss: str | Callable = "mse",
    meta_gradient: str = "exact",
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Adapt every task by ``steps`` steps of gradient descent on its support loss (Finn et al. 2017, eq. 1).

    Args:
        theta: initial parameters, ``[P]`` or ``[T, P]``.
        support_x, support_y: ``[T, N, ...]``. ``support_y`` may be ``(y, w)``, with weights ``[T, N]`` of the samples
            in the loss; those of weight 0 are left out of batch norm's statistics too, so that tasks padded to one
            size give what each would alone.
        lr: inner learning rate: scalar, ``[n]`` per tensor, ``[P]`` per parameter, or with a leading step
            dimension ``[steps, 1 | n | P]``.
        steps: K >= 0.
        loss: "mse", "huber", "cross_entropy", "bce_with_logits", or a callable (prediction, target) of one
            task -> scalar. Torch's own loss modules and functions (reduction "mean") are recognised: they run
            compiled, take weights, and do not broadcast targets.
        meta_gradient: "exact", or "first_order": the backward pass holds every inner gradient constant (the
            learning rates still get theirs, support data have none).

    Returns:
        theta_0 .. theta_K, each ``[T, P]``, so that a loss on any step differentiates.

    Raises:
        ValueError, TypeError: naming the argument, before any work is done.
    """
    layout = Layout(check_module(module))
    loss = losses.resolve(loss)
    check_steps(steps)
    check_choice("meta_gradient", meta_gradient, META_GRADIENTS)
    exact = meta_gradient == "exact"
    if not exact:  # every inner gradient is held constant: the support set has no gradient at all
        support_x, support_y = detached((support_x, support_y))
    tasks, engine = choose(module, layout, theta, support_x, support_y, loss, backend, SUPPORT)
    lr = as_rate(lr, theta)
    check_rate(lr, layout.sizes, steps, theta.dtype)
    if isinstance(engine, compiled.Compiled):
        start = theta.expand(tasks, -1) if theta.dim() == 1 else theta
        if steps == 0:
            check_labels(engine, "support_y", support_x, support_y)
            return (start,)

        def again(theta, rows, x, y, weight):
            options = dict(loss=loss, meta_gradient=meta_gradient, steps=steps, backend="torch")
            return inner_loop(module, theta, x, losses.join(y, weight), lr=from_rows(rows), **options)[1:]

        arguments = again, steps, exact, theta, as_rows(lr, layout.sizes)
        return start, *_compiled(compiled.Adapt, engine, "support_y", support_x, support_y, *arguments)
    problem, chosen, theta, data = prepare(module, layout, theta, support_x, support_y, loss, SUPPORT)
    if exact and steps and not chosen.twice and torch.is_grad_enabled():
        raise ValueError(
            "meta_gradient: 'exact' needs second derivatives, and the network or the loss has none; use "
            "'first_order'. What was tried:\n  " + "\n  ".join(chosen.reasons)
        )
    return reference.inner_loop(problem, theta, lr, data, steps, exact)


def network(
    module: nn.Module,
    theta: Tensor,
    x: Tensor | tuple,
    *,
    backend: str = "auto",
    names: tuple[str, str] = ("x", "y"),
) -> Tensor:
    """Predictions ``[T, N, ...]`` of every task's network: ``module`` with parameters ``theta[t]`` on ``x[t]``."""
    layout = Layout(check_module(module))
    _, engine = choose(module, layout, theta, x, (), None, backend, names)
    if isinstance(engine, compiled.Compiled):
        return compiled.Predict.apply(engine, partial(network, module, backend="torch"), theta, x)
    problem, _, theta, data = prepare(module, layout, theta, x, (), None, names)
    return reference.network(problem, theta, data)


def task_loss(
    module: nn.Module,
    theta: Tensor,
    x: Tensor | tuple,
    y,
    *,
    loss: str | Callable = "mse",
    backend: str = "auto",
    names: tuple[str, str] = ("x", "y"),
) -> Tensor:
    """The loss of every task, ``[T]``: ``loss(module with theta[t] on x[t], y[t])``.

    Where a gradient will be wanted it is computed in the same pass; differentiating the backward pass
    recomputes it differentiably. ``names`` are what x and y are called in errors.
    """
    layout = Layout(check_module(module))
    loss = losses.resolve(loss)
    _, engine = choose(module, layout, theta, x, y, loss, backend, names)
    if isinstance(engine, compiled.Compiled):

        def again(theta, x, y, weight):
            return task_loss(module, theta, x, losses.join(y, weight), loss=loss, backend="torch")

        return _compiled(compiled.Score, engine, names[1], x, y, again, theta)
    problem, _, theta, data = prepare(module, layout, theta, x, y, loss, names)
    return reference.task_loss(problem, theta, data)


def hvp(
    module: nn.Module,
    theta: Tensor,
    x: Tensor | tuple,
    y,
    vector: Tensor,
    *,
    loss: str | Callable = "mse",
    backend: str = "auto",
) -> Tensor:
    """Hessian-vector products ``[T, P]``: (d2 task_loss / d theta2) ``vector``, with vector ``[P]`` or ``[T, P]``."""
    layout = Layout(check_module(module))
    loss = losses.resolve(loss)
    tasks, engine = choose(module, layout, theta, x, y, loss, backend, ("x", "y"))
    _check_vector("vector", vector, layout, theta.dtype)
    _check_tasks("vector", vector, layout, tasks)
    if isinstance(engine, compiled.Compiled):

        def again(theta, vector, x, y, weight):
            return hvp(module, theta, x, losses.join(y, weight), vector, loss=loss, backend="torch")

        return _compiled(compiled.Hvp, engine, "y", x, y, again, theta, vector)
    problem, _, theta, data = prepare(module, layout, theta, x, y, loss, ("x", "y"))
    return reference.hvp(problem, theta, vector, data)


def detached(data):
    return pytree.tree_map_only(Tensor, Tensor.detach, data)


def as_rate(lr: float | Tensor, theta: Tensor) -> Tensor:
    """``lr`` as a tensor beside ``theta``."""
    if isinstance(lr, Tensor):
        if lr.device != theta.device:
            raise ValueError(f"lr: expected a tensor on {theta.device} like the parameters, got {lr.device}")
        return lr
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise TypeError(f"lr: expected a float or a tensor, got {type(lr).__name__}")
    if not math.isfinite(lr):
        raise ValueError(f"lr: expected a finite rate, got {lr}")
    return torch.full((), lr, dtype=theta.dtype, device=theta.device)


def choose(
    module: nn.Module, layout: Layout, theta: Tensor, x, y, loss, backend: str, names: tuple[str, str]
) -> tuple[int, compiled.Compiled | str]:
    """Check everything but what only running the module shows; the number of tasks, and the compiled form of the
    call or the reason why it has none. ``names`` are what x and y are called in errors. Labels of a compiled call
    are left to the engine, which looks at them anyway: see ``_compiled``."""
    check_choice("backend", backend, compiled.BACKENDS)
    _check_vector("theta", theta, layout)
    found = losses.recognise(loss) if loss is not None else None
    tasks = check_data(names, x, y, theta, named_loss=found is not None)
    if found is not None:
        losses.check_pair(found, names[1], y, tuple(pytree.tree_leaves(x)[0].shape[:2]), theta.dtype)
    _check_tasks("theta", theta, layout, tasks)
    engine = compiled.choose(module, layout, theta, x, y, loss, backend)
    if isinstance(engine, compiled.Compiled):
        check_statistics(module)
        if engine.loss is not None:
            prediction = torch.Size((x.shape[1], *engine.network.prediction))
            y, weight = losses.split(engine.loss, y)
            losses.check_fit(engine.loss, names[1], y, prediction, theta.dtype)
            if weight is not None:
                losses.check_weights(names[1], weight)
    elif backend == "compiled":
        raise ValueError(f"backend: 'compiled' was asked for, but {engine}")
    return tasks, engine


def check_labels(engine: compiled.Compiled, name: str, x: Tensor, y) -> None:
    """Raise where labels are no classes of the network's."""
    y, _ = losses.split(engine.loss, y)
    losses.check_labels(engine.loss, name, y, torch.Size((x.shape[1], *engine.network.prediction)))


def _compiled(function, engine: compiled.Compiled, name: str, x: Tensor, y, *arguments):
    """Apply one of the Functions of ``compiled``; labels that it refuses are an error of argument ``name``."""
    inputs = [*arguments, x, *losses.split(engine.loss, y)]
    if not torch.is_grad_enabled():  # a Function would be told that gradients are wanted all the same
        inputs = detached(inputs)
    try:
        return function.apply(engine, *inputs)
    except RuntimeError:
        check_labels(engine, name, x, y)
        raise


def prepare(
    module: nn.Module, layout: Layout, theta: Tensor, x, y, loss, names: tuple[str, str]
) -> tuple[Problem, Plan, Tensor, list[Tensor]]:
    """Set up a call, already checked, for the reference engine."""
    chosen = plan(module, layout, theta, x, y, loss, names)
    data, spec = pytree.tree_flatten((x, y))
    scalar = losses.resolve(loss) if loss is not None else None
    if not chosen.shared and theta.dim() == 1:
        theta = theta.expand(data[0].shape[0], -1)
    return Problem(layout, chosen.task_map(module), spec, scalar), chosen, theta, data


def check_module(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    return module


def check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"steps: expected 0 or more, got {steps}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_vector(name: str, vector, layout: Layout, dtype: torch.dtype | None = None) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(vector).__name__}")
    if not vector.is_floating_point() or dtype not in (None, vector.dtype):
        raise TypeError(f"{name}: expected {dtype or 'a real floating dtype'}, got {vector.dtype}")
    if vector.device != layout.device:
        raise ValueError(f"{name}: expected a tensor on {layout.device} like the module, got {vector.device}")
    if vector.dim() == 0 or vector.shape[-1] != layout.size:
        raise ValueError(
            f"{name}: expected [..., {layout.size}], one value for each trainable parameter, got {list(vector.shape)}"
        )


def _check_tasks(name: str, vector: Tensor, layout: Layout, tasks: int) -> None:
    if vector.shape[:-1] not in ((), (tasks,)):
        raise ValueError(
            f"{name}: expected [{layout.size}] or [{tasks}, {layout.size}] for {tasks} tasks, got {list(vector.shape)}"
        )


def check_data(names: tuple[str, str], x, y, theta: Tensor, named_loss: bool) -> int:
    """Raise where data of all tasks do not fit together or the parameters; return the number of tasks."""
    inputs = pytree.tree_leaves(x)
    tensors = [(names[0], leaf) for leaf in inputs] + [(names[1], leaf) for leaf in pytree.tree_leaves(y)]
    if not inputs:
        raise ValueError(f"{names[0]}: expected a tensor or a tuple of tensors, got none")
    for name, leaf in tensors:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}: expected a tensor or a tuple of tensors, got {type(leaf).__name__}")
    first = inputs[0]
    if first.dim() < 2:
        raise ValueError(f"{names[0]}: expected [tasks, samples, ...], got {list(first.shape)}")
    for name, leaf in tensors:
        if leaf.dim() == 0 or leaf.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name}: expected {first.shape[0]} tasks like {names[0]}, got "
                f"{leaf.shape[0] if leaf.dim() else 'a scalar'}"
            )
        if leaf.shape[0] == 0 or leaf.dim() > 1 and leaf.shape[1] == 0:
            raise ValueError(f"{name}: expected at least one task and one sample, got {list(leaf.shape)}")
        if leaf.device != theta.device:
            raise ValueError(f"{name}: expected a tensor on {theta.device} like the parameters, got {leaf.device}")
        autocast = torch.is_autocast_enabled(theta.device.type)
        if leaf.is_floating_point() and leaf.dtype != theta.dtype and not autocast:
            raise TypeError(f"{name}: expected {theta.dtype} like the parameters, got {leaf.dtype}")
    target = y[0] if isinstance(y, tuple) and y else y
    if named_loss and isinstance(target, Tensor) and (target.dim() < 2 or target.shape[1] != first.shape[1]):
        raise ValueError(
            f"{names[1]}: expected {first.shape[1]} samples a task like {names[0]}, got {list(target.shape)}"
        )
    return first.shape[0]
