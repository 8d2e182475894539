"""Run a function of one task for every task of a batch, differentiably to any order.

The derivative is always taken inside the loop over tasks, never through it: the derivative of
``per_task(f)`` is ``per_task(derivative of f)``, again a call of this file. So one rule serves every
order, no graph over all tasks is ever recorded, and a function whose batching rule is wrong under an
outer derivative (``F.batch_norm`` in torch 2.13) stays exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .stateless import stateless


def autograd_vjp(function: Callable, *primals: Tensor) -> tuple:
    """``torch.func.vjp`` on plain autograd: a fraction of its overhead where no vmap needs the other.

    The pullback records its own work exactly when gradients are enabled as it is called, so an outer
    ``autograd_vjp`` differentiates through an inner one.
    """
    with torch.enable_grad():
        # An alias of each, so that a primal computed from another is an independent variable here.
        primals = [p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in primals]
        output = function(*primals)

    def pullback(cotangent) -> tuple[Tensor, ...]:
        # An output that depends on no primal (the gradient of a linear loss) contributes nothing.
        pairs = [(o, c) for o, c in zip(_tuple(output), _tuple(cotangent)) if o.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(p) for p in primals)
        outputs, cotangents = zip(*pairs)
        return torch.autograd.grad(
            outputs, primals, cotangents, create_graph=torch.is_grad_enabled(), materialize_grads=True
        )

    return output, pullback


@dataclass
class TaskMap:
    """How a function of one task is run for all: at once under vmap, or one task after another.

    Args:
        module: put into its stateless mode while the function runs (see ``stateless``).
        vmapped: all tasks at once; else a loop.
        seed: of the random draws (dropout), or None where there are none. Draws are a function of
            (seed, step, task), so that the backward pass meets the masks of the forward pass.

    The autocast mode in which it was made is the one it runs in: backward passes recompute, and happen
    outside the user's ``with torch.autocast``.
    """

    module: nn.Module
    vmapped: bool
    seed: int | None = None

    def __post_init__(self):
        self._task = 0
        device = next(self.module.parameters()).device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self._autocast = torch.autocast(device, dtype, enabled, cache_enabled=False)

    def vjp(self, function: Callable, *primals: Tensor) -> tuple:
        transformed = self.vmapped or torch._C._are_functorch_transforms_active()  # by us, or by the caller
        return (torch.func.vjp if transformed else autograd_vjp)(function, *primals)

    def reseed(self, step: int) -> None:
        if self.seed is not None:
            torch.manual_seed(self.seed + 1_000_003 * self._task + step)

    def __call__(self, function: Callable, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> tuple:
        """``function`` returns a tensor or a tuple of tensors; the result is a tuple of ``[T, ...]``."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(stateless(self.module))
            stack.enter_context(self._autocast)
            if torch.is_inference_mode_enabled():  # in which nothing records, not even with gradients enabled
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                tensors = [t.clone() for t in tensors]
            if self.seed is not None:
                devices = {t.device for t in tensors if t.is_cuda}
                stack.enter_context(torch.random.fork_rng(devices=list(devices)))
            if self.vmapped:
                return _tuple(torch.vmap(function, tuple(in_dims), randomness="different")(*tensors))
            tasks = next(t.shape[0] for t, dim in zip(tensors, in_dims) if dim == 0)
            tensors = [t.detach() for t in tensors]
            results = []
            for self._task in range(tasks):
                row = [t if dim is None else t[self._task] for t, dim in zip(tensors, in_dims)]
                results.append(_tuple(function(*row)))
            return tuple(torch.stack(column) for column in zip(*results))


@dataclass(frozen=True)
class Rule:
    """A function of one task with what its batched, differentiable form needs.

    Args:
        function: ``(*tensors of one task) -> tensor or tuple of tensors``.
        in_dims: 0 for an argument ``[T, ...]``, None for one shared by all tasks.
        tasks: how to batch.
        adjoint: ``(needed, present) -> function of one task``, a backward rule better than recording
            ``function``: it maps (cotangents of the outputs numbered ``present``, arguments, outputs) to
            the gradients of the arguments numbered ``needed``.
        prepaid: numbers of the arguments whose gradient the forward pass computes along with a scalar
            result, so that a plain backward pass has only to scale it.
    """

    function: Callable
    in_dims: tuple[int | None, ...]
    tasks: TaskMap
    adjoint: Callable | None = None
    prepaid: tuple[int, ...] = ()

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        def value_and_gradients(*tensors):
            value, pullback = self._vjp(self.prepaid, None, tensors)
            return *value, *pullback(tuple(torch.ones_like(v) for v in value))

        return self.tasks(value_and_gradients if self.prepaid else self.function, self.in_dims, tensors)

    def backward(self, needed: Sequence[int], present: Sequence[int]) -> Rule:
        """The rule for (present cotangents, arguments[, outputs]) -> gradients of the needed arguments."""

        def gradients(*args):
            cotangents, tensors = args[: len(present)], args[len(present) :]
            return self._vjp(needed, present, tensors)[1](cotangents)

        function = self.adjoint(needed, present) if self.adjoint else gradients
        return Rule(function, (0,) * len(present) + self.in_dims, self.tasks)

    def tangent(self, given: Sequence[int], dims: Sequence[int | None]) -> Rule:
        """The rule for (given tangents, arguments) -> tangents of the outputs.

        By two reverse passes (the pullback is linear in its cotangent; its transpose is the derivative):
        no operator then needs a forward-mode rule, and none can have one that is silently zero.
        """

        def tangents(*args):
            directions, tensors = args[: len(given)], args[len(given) :]

            def pull(*cotangents):
                return tuple(self._vjp(given, None, tensors)[1](cotangents))

            zeros = [torch.zeros_like(o) for o in _tuple(self.function(*tensors))]
            return self.tasks.vjp(pull, *zeros)[1](tuple(directions))

        return Rule(tangents, tuple(dims) + self.in_dims, self.tasks)

    def _vjp(self, arguments: Sequence[int], outputs: Sequence[int] | None, tensors: Sequence[Tensor]) -> tuple:
        """Pull back through ``function`` from the numbered outputs (None: all) to the numbered arguments."""

        def function(*primals):
            full = list(tensors)
            for i, primal in zip(arguments, primals):
                full[i] = primal
            result = _tuple(self.function(*full))
            return result if outputs is None else tuple(result[i] for i in outputs)

        return self.tasks.vjp(function, *(tensors[i] for i in arguments))


def per_task(rule: Rule, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Apply ``rule`` to all tasks. Differentiable to any order, in reverse and forward mode."""
    outputs = _PerTask.apply(rule, *tensors)
    return outputs[:1] if rule.prepaid else outputs


class _PerTask(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rule: Rule, *tensors: Tensor):
        # autograd refuses an argument returned as it came (the pullback of an addition)
        return tuple(o.view_as(o) if any(o is t for t in tensors) else o for o in rule.forward(tensors))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.rule, *tensors = inputs
        ctx.set_materialize_grads(False)
        kept = outputs if ctx.rule.adjoint else ()
        if ctx.rule.prepaid:
            kept = outputs[1:]
            ctx.mark_non_differentiable(*kept)
        ctx.arguments = len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        rule, needs = ctx.rule, ctx.needs_input_grad[1:]
        needed = [i for i, need in enumerate(needs) if need]
        if rule.prepaid:
            cotangents = cotangents[:1]
        present = [i for i, c in enumerate(cotangents) if c is not None]
        result = [None] * ctx.arguments
        if not present or not needed:
            return None, *result
        # A gradient saved in the forward pass is a constant: only for a backward pass nobody differentiates.
        if rule.prepaid and not torch.is_grad_enabled() and set(needed) <= set(rule.prepaid):
            saved = dict(zip(rule.prepaid, ctx.saved_tensors[ctx.arguments :]))
            for i in needed:
                scale = cotangents[0].reshape(-1, *[1] * (saved[i].dim() - 1))
                result[i] = scale * saved[i]
        else:
            # The plain rule needs the arguments; an adjoint of its own also has the outputs.
            tensors = ctx.saved_tensors if rule.adjoint else ctx.saved_tensors[: ctx.arguments]
            backward = rule.backward(needed, present)
            outputs = len(tensors) - ctx.arguments
            backward = Rule(backward.function, backward.in_dims + (0,) * outputs, rule.tasks)
            gradients = per_task(backward, *(cotangents[i] for i in present), *tensors)
            for i, gradient in zip(needed, gradients):
                result[i] = gradient
        for i in needed:
            if rule.in_dims[i] is None:
                result[i] = result[i].sum(0)
        return None, *result

    @staticmethod
    def jvp(ctx, _, *tangents):
        given = [i for i, t in enumerate(tangents) if t is not None]
        tensors = ctx.saved_tensors[: ctx.arguments]
        rule = ctx.rule.tangent(given, [ctx.rule.in_dims[i] for i in given])
        outputs = per_task(rule, *(tangents[i] for i in given), *tensors)
        return *outputs, *[None] * len(ctx.rule.prepaid)


def _tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
