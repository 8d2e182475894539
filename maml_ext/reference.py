"""The reference engine: MAML's inner loop and its exact meta-gradient in pure PyTorch.

Everything here is about one task; ``per_task`` runs it for all. With L the support loss of a task,

    theta_{k+1} = theta_k - alpha_k * g_k             g_k = dL/dtheta at theta_k           k = 0 .. K-1

and lambda_k the derivative of the meta-loss by theta_k, the chain rule read backwards (the adjoint
recursion) is

    lambda_k      = lambda_{k+1} - H_k (alpha_k * lambda_{k+1})         H_k = d2L/dtheta2 at theta_k
    d/d alpha_k   = - lambda_{k+1} * g_k
    d/d (support) = - sum_k  d2L/(d support d theta) (alpha_k * lambda_{k+1})

(Finn et al. 2017, eq. 1, differentiated). Only theta_1 .. theta_K are kept; each step of the recursion
recomputes its g_k and pulls alpha_k * lambda_{k+1} back through it. That pull-back is the Hessian-vector
product, reverse over reverse: forward over reverse was neither faster nor leaner on the workloads sin5,
mlp_omni and omni_conv of ``benchmarks/`` (run eagerly, dual numbers double the number of operator calls).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import losses
from .per_task import Rule, TaskMap, per_task
from .rates import expand_rate, rate_of_step, reduce_rate
from .stateless import Layout, PlainNorms


@dataclass
class Problem:
    """A network and its loss as functions of one task: of flat parameters ``[P]`` and data ``[N, ...]``.

    ``data`` are the tensors of ``(x, y)`` in a row, ``spec`` how to put them together again.
    """

    layout: Layout
    tasks: TaskMap
    spec: pytree.TreeSpec
    loss: Callable | None = None

    def predict(self, theta: Tensor, *data: Tensor) -> Tensor:
        self.tasks.reseed(0)
        return self._call(theta, *pytree.tree_unflatten(data, self.spec))

    def value(self, theta: Tensor, *data: Tensor, step: int = 0) -> Tensor:
        self.tasks.reseed(step)
        x, y = pytree.tree_unflatten(data, self.spec)
        return self.score(self._call(theta, x, y), y)

    def score(self, prediction: Tensor, y) -> Tensor:
        y, weight = losses.split(self.loss, y)
        return self.loss(prediction, y) if weight is None else self.loss(prediction, y, weight)

    def _call(self, theta: Tensor, x, y) -> Tensor:
        """The prediction; a sample of weight 0 has no part in what other samples are normalised by."""
        _, weight = losses.split(self.loss, y)
        with PlainNorms(weight):
            return self.layout.call(theta, x)

    def gradient(self, theta: Tensor, *data: Tensor, step: int = 0) -> Tensor:
        value, pullback = self.tasks.vjp(lambda theta: self.value(theta, *data, step=step), theta)
        return pullback(torch.ones_like(value))[0]

    def gradient_vjp(self, theta: Tensor, data: Sequence[Tensor], inputs: Sequence[int], step: int) -> tuple:
        """``gradient`` and its pullback to theta and the numbered tensors of ``data``."""

        def gradient(theta, *chosen):
            full = list(data)
            for i, tensor in zip(inputs, chosen):
                full[i] = tensor
            return self.gradient(theta, *full, step=step)

        return self.tasks.vjp(gradient, theta, *(data[i] for i in inputs))


@dataclass
class InnerLoop:
    """K steps of gradient descent on the support loss of one task, and their backward rule."""

    problem: Problem
    steps: int
    exact: bool

    def adapt(self, theta: Tensor, lr: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """theta_1 .. theta_K."""
        thetas = []
        for k in range(self.steps):
            g = self.problem.gradient(theta, *data, step=k)
            rate = expand_rate(rate_of_step(lr, k), self.problem.layout.sizes)
            theta = theta - rate * (g if self.exact else g.detach())
            thetas.append(theta)
        return tuple(thetas)

    def adjoint(self, needed: Sequence[int], present: Sequence[int]) -> Callable:
        """The adjoint recursion: lambda_0 and the gradients of the learning rates and the support set.

        ``needed`` numbers the arguments of ``adapt`` whose gradient is wanted, ``present`` the results on
        which the meta-loss depends directly.
        """
        problem, sizes = self.problem, self.problem.layout.sizes
        support = [i - 2 for i in needed if i >= 2]

        def gradients(*args):
            direct = dict(zip(present, args))  # derivative of the meta-loss by theta_{k+1} itself
            theta, lr, *rest = args[len(present) :]
            data, thetas = rest[: -self.steps], [theta, *rest[-self.steps :]]
            lam, lr_rows, support_totals = torch.zeros_like(theta), {}, [0] * len(support)

            for k in reversed(range(max(present) + 1)):
                lam = lam + direct[k] if k in direct else lam
                row = rate_of_step(lr, k)
                if self.exact:
                    g, pullback = problem.gradient_vjp(thetas[k], data, support, k)
                elif 1 in needed:
                    g = problem.gradient(thetas[k], *data, step=k).detach()
                if 1 in needed:
                    lr_rows[k] = -reduce_rate(lam * g, row, sizes)
                if self.exact:
                    hessian_lam, *mixed = pullback(expand_rate(row, sizes) * lam)
                    lam = lam - hessian_lam
                    support_totals = [total - m for total, m in zip(support_totals, mixed)]

            result = [lam] if 0 in needed else []
            result += [_lr_gradient(lr, lr_rows)] if 1 in needed else []
            return tuple(result + support_totals)

        return gradients


def _lr_gradient(lr: Tensor, rows: dict[int, Tensor]) -> Tensor:
    if lr.dim() < 2:
        return sum(rows.values()).reshape(lr.shape)
    unused = torch.zeros_like(lr[0])
    return torch.stack([rows.get(k, unused).reshape(unused.shape) for k in range(lr.shape[0])])


def inner_loop(
    problem: Problem, theta: Tensor, lr: Tensor, data: Sequence[Tensor], steps: int, exact: bool
) -> tuple[Tensor, ...]:
    """theta_0 .. theta_K, each ``[T, P]``."""
    tasks = data[0].shape[0]
    start = theta.expand(tasks, -1) if theta.dim() == 1 else theta
    if steps == 0:
        return (start,)
    if not exact:
        # The first-order rule holds every g_k constant, so the support set has no gradient at all.
        data = [d.detach() for d in data]
    loop = InnerLoop(problem, steps, exact)
    in_dims = (_dim(theta), None, *[0] * len(data))
    return start, *per_task(Rule(loop.adapt, in_dims, problem.tasks, loop.adjoint), theta, lr, *data)


def network(problem: Problem, theta: Tensor, data: Sequence[Tensor]) -> Tensor:
    """Predictions ``[T, N, ...]``."""
    (prediction,) = per_task(Rule(problem.predict, (_dim(theta), *[0] * len(data)), problem.tasks), theta, *data)
    return prediction


def task_loss(problem: Problem, theta: Tensor, data: Sequence[Tensor]) -> Tensor:
    """Losses ``[T]``; the gradients are computed along with them where they will be needed."""
    arguments = (theta, *data)
    wanted = tuple(i for i, a in enumerate(arguments) if a.requires_grad) if torch.is_grad_enabled() else ()
    rule = Rule(problem.value, (_dim(theta), *[0] * len(data)), problem.tasks, prepaid=wanted)
    (loss,) = per_task(rule, *arguments)
    return loss


def hvp(problem: Problem, theta: Tensor, vector: Tensor, data: Sequence[Tensor]) -> Tensor:
    """Hessian-vector products ``[T, P]``."""

    def product(theta, vector, *data):
        return problem.gradient_vjp(theta, data, (), 0)[1](vector)[0]

    rule = Rule(product, (_dim(theta), _dim(vector), *[0] * len(data)), problem.tasks)
    (result,) = per_task(rule, theta, vector, *data)
    return result


def _dim(vector: Tensor) -> int | None:
    """``[P]`` is shared by all tasks, ``[T, P]`` is one a task."""
    return 0 if vector.dim() == 2 else None
