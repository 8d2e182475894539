"""Which engine computes a call, how it runs the tasks, and why: decided once for each kind of input."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import losses
from .ops import library
from .per_task import TaskMap
from .reference import Problem, hvp
from .stateless import Layout, stateless

BACKENDS = ("auto", "compiled", "torch")
NO_COMPILED_ENGINE = (
    "no compiled engine for whole networks in this version: csrc/ holds the update maml_ext.sgd_update only"
)
# vmap turns convolutions with weights of their own for each task into grouped ones, which on a CPU cost more than
# the overhead they save from about this many multiply-adds a task (measured: 4 blocks, 16 to 64 filters, 28 x 28).
LARGE_CONVOLUTIONS = 10_000_000
REMEMBERED = 64  # plans a module keeps: a loss written as a lambda inside a loop would fill the memory


@dataclass(frozen=True)
class Plan:
    """
    Args:
        engine: what computes the network: "torch", the reference engine.
        vmapped: whether all tasks run at once under ``torch.vmap``, or one after another.
        random: whether the network draws random numbers (dropout).
        twice: whether it has a second derivative; without one only "first_order" can run.
        prediction: shape of the prediction of one task; None where it is not a tensor.
        reasons: for every choice that is not the fastest path, why.
    """

    engine: str
    vmapped: bool
    random: bool
    twice: bool
    prediction: torch.Size | None
    reasons: tuple[str, ...]

    def task_map(self, module: nn.Module) -> TaskMap:
        seed = int(torch.randint(2**40, ())) if self.random else None
        return TaskMap(module, self.vmapped, seed)


_plans: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def plan(
    module: nn.Module,
    layout: Layout,
    theta: Tensor,
    x,
    y=(),
    loss: str | Callable | None = None,
    backend: str = "auto",
    names: tuple[str, str] = ("x", "y"),
) -> Plan:
    """The plan for ``module`` and ``loss`` (None: predictions only) on the data of all tasks.

    ``names`` are what ``x`` and ``y`` are called in errors. Raises ValueError or TypeError where the module
    or the loss cannot be applied to a task of this shape.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "compiled":
        raise ValueError(f"backend: 'compiled' was asked for, but there is {NO_COMPILED_ENGINE}")
    if backend == "auto":
        library.warn_if_absent()
    leaves, spec = pytree.tree_flatten((x, y))
    kinds = tuple((leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves)
    structure = tuple((type(m), m.training) for m in module.modules())
    key = (structure, tuple(layout.parameters), theta.dtype, loss, str(spec), kinds, backend)
    known = _plans.setdefault(module, {})
    if key not in known:
        if len(known) >= REMEMBERED:
            known.clear()
        known[key] = _examine(module, layout, theta, leaves, spec, loss, backend, names)
    if loss is not None:
        losses.check_target(loss, names[1], y, known[key].prediction, theta.dtype)
    return known[key]


def _examine(module, layout, theta, leaves, spec, loss, backend, names) -> Plan:
    """Run two tasks to see what works. Leaves the module and the random generators as they were."""
    _check_statistics(module)
    theta = (theta if theta.dim() == 1 else theta[0]).detach()
    two = [leaf[:2].detach() for leaf in leaves]
    # Without a loss any scalar of the predictions shows whether they can be differentiated.
    scalar = losses.resolve(loss) if loss is not None else lambda prediction, _: prediction.square().sum()
    reasons = [NO_COMPILED_ENGINE] if backend == "auto" else ["backend='torch' was asked for"]

    def problem(vmapped: bool) -> Problem:
        return Problem(layout, TaskMap(module, vmapped, seed=0), spec, scalar)

    with stateless(module), torch.random.fork_rng(devices=[theta.device] if theta.is_cuda else []):
        with _Operators() as seen, torch.enable_grad():
            prediction = _try_one_task(problem(vmapped=False), theta, two, spec, loss, names)

    batching = [True, False]
    own_filters = any(len(shape) > 2 for shape in layout.shapes)
    if theta.device.type == "cpu" and own_filters and seen.convolved > LARGE_CONVOLUTIONS:
        batching = [False]
        reasons.append(
            f"tasks run one after another: {seen.convolved:,} multiply-adds of convolutions a task, with filters of "
            f"their own, are slower all at once on a CPU (vmap makes grouped convolutions of them)"
        )
    attempts = [(order, vmapped) for order in (_second_derivative, _first_derivative) for vmapped in batching]
    for derivative, vmapped in attempts:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            try:
                derivative(problem(vmapped), theta, two)
            except Exception as error:  # whatever a user's module raises under a transform
                way = "all tasks at once (torch.vmap)" if vmapped else "task by task"
                reasons.append(f"no {derivative.__doc__} {way}: {type(error).__name__}: {_first_line(error)}")
                continue
        reasons += [_first_line(w.message) for w in caught if "performance drop" in str(w.message)]
        return Plan(
            engine="torch",
            vmapped=vmapped,
            random=seen.random,
            twice=derivative is _second_derivative,
            prediction=prediction,
            reasons=tuple(reasons),
        )
    raise ValueError("module: cannot be differentiated:\n  " + "\n  ".join(reasons))


def _try_one_task(problem: Problem, theta, two, spec, loss, names) -> torch.Size | None:
    """The shape of one task's prediction; raises a ValueError that names the argument at fault."""
    one = [leaf[0] for leaf in two]
    x, y = pytree.tree_unflatten(one, spec)
    try:
        prediction = problem.predict(theta, *one)
    except Exception as error:
        raise ValueError(
            f"{names[0]}: the module failed on one task, {_shapes(x)}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    shape = prediction.shape if isinstance(prediction, Tensor) else None
    if loss is None:
        if shape is None:
            raise TypeError(f"module: expected to return a tensor, got {type(prediction).__name__}")
        value = prediction
    else:
        losses.check_target(loss, names[1], pytree.tree_unflatten(two, spec)[1], shape, theta.dtype)
        try:
            value = problem.loss(prediction, y)
        except Exception as error:
            raise ValueError(
                f"{names[1]}: the loss failed on one task, prediction {_shapes(prediction)} and target {_shapes(y)}: "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error
        if not isinstance(value, Tensor) or value.dim():
            raise ValueError(f"loss: expected a scalar tensor for one task, got {_shapes(value)}")
    if value.requires_grad:
        raise ValueError(
            "loss: the network or the loss uses a tensor that requires grad and is neither a parameter nor an "
            "argument: it would get no gradient. Pass it with the inputs or targets, or detach it"
        )
    return shape


def _second_derivative(problem: Problem, theta: Tensor, data: list[Tensor]) -> None:
    """second derivative"""
    hvp(problem, theta, theta, data)


def _first_derivative(problem: Problem, theta: Tensor, data: list[Tensor]) -> None:
    """derivative"""
    problem.tasks(partial(problem.gradient, theta), [0] * len(data), data)


def _check_statistics(module: nn.Module) -> None:
    for name, m in module.named_modules():
        if isinstance(m, _NormBase) and not m.training and m.num_batches_tracked is not None:
            if m.track_running_stats and not m.num_batches_tracked:
                raise ValueError(
                    f"module: {name or type(m).__name__} is in eval mode, but its running statistics were never "
                    f"updated: it would normalise by mean 0 and variance 1. Call train() (statistics of the batch, "
                    f"as in the papers), or load a network whose statistics were trained"
                )


class _Operators(TorchDispatchMode):
    """Notes whether what runs under it draws random numbers, and counts multiply-adds of convolutions."""

    random = False
    convolved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        if func is torch.ops.aten.convolution.default:
            self.convolved += result.numel() * args[1][0].numel()
        return result


def _first_line(error) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _shapes(value) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_shapes, value))})"
    return type(value).__name__
