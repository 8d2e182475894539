"""``MAML``: a network that adapts to batches of tasks, and the adapted tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import compiled, functional, losses, single_pass
from .functional import QUERY, SUPPORT
from .plan import plan
from .rates import check_rate
from .stateless import Layout

REDUCTIONS = ("none", "mean")


# How tasks run, and their Hessian-vector products, by each compiled engine.
_HOW = {
    "cpu": ("shared out over threads", "tangents of values and gradients, layer by layer"),
    "cuda": ("a thread block each, the whole inner loop in one launch", "values and tangents in one pass"),
    "triton": ("all at once, layer by layer", "values and tangents in one pass"),
}


class MAML(nn.Module):
    """Model-agnostic meta-learning (Finn, Abbeel, Levine 2017) of the parameters of ``module``.

    Calling it adapts a copy of the parameters to every task by ``steps`` steps of gradient descent on the
    support loss and returns the query losses; their backward pass gives ``module``'s parameters the exact
    meta-gradient.

    Args:
        module: any ``nn.Module``; its trainable parameters are the meta-parameters. Frozen ones
            (``requires_grad=False``) are neither adapted nor given gradients. Buffers are the same for every
            task and left as they are. In training mode batch norm uses the statistics of the batch and leaves
            the running ones alone, and dropout draws masks anew for every task and step; in eval mode both do
            what they do anywhere.
        lr: inner learning rate alpha: a float or a tensor, scalar, ``[n]`` (one a parameter tensor), ``[P]``
            (one a parameter), or with a leading dimension of steps. A tensor that requires grad receives its
            gradient; an ``nn.Parameter`` becomes a parameter of this module, any other tensor a buffer.
        steps: number K of inner steps, 0 or more.
        loss: "mse", "huber", "cross_entropy", "bce_with_logits", or a callable (prediction, target) of one task
            -> scalar; torch's own loss modules and functions run compiled.
        meta_gradient: "exact", or "first_order": the backward pass holds every inner gradient constant, and
            nothing else changes (learning rates still get their gradient).
        reduction: "none": losses ``[T]``; "mean": their mean.
        backend: "auto" picks the fastest engine, "torch" the reference; "compiled" raises where no compiled
            engine can run.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float | Tensor = 0.01,
        steps: int = 1,
        loss: str | Callable = "mse",
        meta_gradient: str = "exact",
        reduction: str = "none",
        backend: str = "auto",
    ):
        super().__init__()
        layout = Layout(functional.check_module(module))
        functional.check_steps(steps)
        losses.resolve(loss)
        functional.check_choice("meta_gradient", meta_gradient, functional.META_GRADIENTS)
        functional.check_choice("reduction", reduction, REDUCTIONS)
        functional.check_choice("backend", backend, compiled.BACKENDS)
        parameter = next(iter(layout.parameters.values()))
        check_rate(functional.as_rate(lr, parameter), layout.sizes, steps, parameter.dtype)
        if isinstance(lr, Tensor) and not lr.is_leaf:
            raise ValueError(
                "lr: expected a leaf tensor, got the result of a computation, which could be differentiated once "
                "only; use maml_ext.inner_loop with a rate computed anew in every iteration"
            )
        self.module = module
        if isinstance(lr, Tensor) and not isinstance(lr, nn.Parameter):
            self.register_buffer("lr", lr)
        else:
            self.lr = lr
        self.steps = steps
        self.loss = loss
        self.meta_gradient = meta_gradient
        self.reduction = reduction
        self.backend = backend

    def adapt(self, support_x: Tensor | tuple, support_y, *, steps: int | None = None) -> AdaptedTasks:
        """Adapt to every task: ``support_x``, ``support_y`` are ``[T, N, ...]``; differentiable.

        ``steps`` takes another number of steps for this call (training with 1 and testing with 10, say).
        Under ``torch.no_grad()`` it adapts all the same, and records nothing.
        """
        thetas = functional.inner_loop(
            self.module,
            functional.flatten(self.module),
            support_x,
            support_y,
            lr=self.lr,
            steps=self.steps if steps is None else steps,
            loss=self.loss,
            meta_gradient=self.meta_gradient,
            backend=self.backend,
        )
        return AdaptedTasks(self, thetas)

    def forward(self, support_x, support_y, query_x, query_y, *, steps: int | None = None) -> Tensor:
        """Adapt to the support sets, return the losses on the query sets: ``[T]``, or their mean.

        Where the compiled engine runs and gradients are enabled, the meta-gradient is computed along with the
        losses, which is faster than ``adapt(...).loss(...)`` and keeps nothing of the inner loop.
        """
        data = (support_x, support_y, query_x, query_y)
        result = single_pass.meta_losses(self, data, self.steps if steps is None else steps)
        if result is not None:
            return result
        return self.adapt(support_x, support_y, steps=steps).loss(query_x, query_y)

    def explain(self, support_x, support_y) -> Explanation:
        """What runs for such a support set, and why: ``.engine``, ``.reasons``, and a report as ``str()``.

        The engine is "cpu", "cuda" (the CUDA kernels), "triton", or "torch", the reference.
        """
        layout = Layout(self.module)
        theta = layout.flatten().detach()
        if self.meta_gradient == "first_order":
            support_x, support_y = functional.detached((support_x, support_y))
        tasks, engine = functional.choose(
            self.module, layout, theta, support_x, support_y, self.loss, self.backend, SUPPORT
        )
        kept = self.steps * tasks * layout.size * theta.element_size()
        if isinstance(engine, compiled.Compiled):
            name, reasons = engine.engine, compiled.caveats(engine, theta.device)
            how, way = _HOW[name]
            program = [f"layer {line}" for line in compiled.describe(engine)]
        else:
            chosen = plan(self.module, layout, theta, support_x, support_y, self.loss, SUPPORT)
            name, reasons, program = "torch", [engine, *chosen.reasons], []
            how = "all at once (torch.vmap)" if chosen.vmapped else "one after another"
            way = "reverse over reverse"
        held = f"theta_1 .. theta_{self.steps}, {kept / 2**20:.1f} MiB" if self.steps else "nothing"
        lines = [
            f"engine         {name}",
            f"tasks          {tasks}, {how}",
            f"inner loop     {self.steps} steps on {layout.size:,} parameters ({len(layout.sizes)} tensors)",
            f"meta-gradient  {self.meta_gradient}: {self._meta_gradient_cost(way)}",
            f"kept           {held}",
            *(f"because        {reason}" for reason in reasons),
            *program,
        ]
        return Explanation(name, reasons, "\n".join(lines))

    def _meta_gradient_cost(self, way: str) -> str:
        if self.meta_gradient == "exact":
            return f"{self.steps} Hessian-vector products a task, {way}"
        return "no second derivatives"

    def _apply(self, fn, recurse=True):
        # In place, as for a parameter: a rate that requires grad stays the tensor its optimiser knows.
        if isinstance(self.lr, Tensor) and self.lr.requires_grad:
            self.lr.data = fn(self.lr.data)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        lr = f"tensor {list(self.lr.shape)}" if isinstance(self.lr, Tensor) else self.lr
        loss = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", type(self.loss).__name__)
        return f"lr={lr}, steps={self.steps}, loss={loss}, meta_gradient={self.meta_gradient}, backend={self.backend}"


class AdaptedTasks:
    """The networks of a batch of tasks after adaptation, differentiable in everything that adapted them."""

    def __init__(self, maml: MAML, thetas: tuple[Tensor, ...]):
        self._maml = maml
        self._thetas = thetas

    def __len__(self) -> int:
        return self._thetas[-1].shape[0]

    @property
    def steps(self) -> int:
        """How many inner steps these tasks have taken."""
        return len(self._thetas) - 1

    def after(self, steps: int) -> AdaptedTasks:
        """The same tasks as they were after fewer steps (0: before adaptation)."""
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= self.steps:
            raise ValueError(f"steps: expected 0 to {self.steps}, the steps that were taken, got {steps!r}")
        return AdaptedTasks(self._maml, self._thetas[: steps + 1])

    def parameters(self) -> dict[str, Tensor]:
        """The adapted parameters by name, each ``[T, *shape]``."""
        return functional.unflatten(self._maml.module, self._thetas[-1])

    def __call__(self, query_x: Tensor | tuple) -> Tensor:
        """Predictions of every task's own network on its own queries: ``[T, Q, ...]`` -> ``[T, Q, ...]``."""
        self._check_tasks(query_x)
        return functional.network(
            self._maml.module, self._thetas[-1], query_x, backend=self._maml.backend, names=QUERY
        )

    def loss(self, query_x: Tensor | tuple, query_y) -> Tensor:
        """Query losses ``[T]``, or their mean where the MAML has ``reduction="mean"``."""
        self._check_tasks(query_x)
        result = functional.task_loss(
            self._maml.module,
            self._thetas[-1],
            query_x,
            query_y,
            loss=self._maml.loss,
            backend=self._maml.backend,
            names=QUERY,
        )
        return result.mean() if self._maml.reduction == "mean" else result

    def _check_tasks(self, query_x) -> None:
        for x in pytree.tree_leaves(query_x):
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] not in (0, len(self)):
                raise ValueError(f"query_x: expected {len(self)} tasks, as many as were adapted, got {x.shape[0]}")


@dataclass(frozen=True)
class Explanation:
    """What ``MAML.explain`` says: the engine's name, the reasons for every slower choice, the report."""

    engine: str
    reasons: list[str]
    report: str

    def __str__(self) -> str:
        return self.report
