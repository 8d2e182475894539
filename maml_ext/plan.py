"""How the reference engine runs the tasks of a call, and why: decided once for each kind of input."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import losses
from .per_task import TaskMap
from .reference import Problem, hvp, task_loss
from .stateless import Layout, stateless
from .tracing import first_line, untraced

# vmap turns convolutions with weights of their own for each task into grouped ones, which on a CPU cost more than
# the overhead they save from about this many multiply-adds a task (measured: 4 blocks, 16 to 64 filters, 28 x 28).
LARGE_CONVOLUTIONS = 10_000_000
REMEMBERED = 64  # plans a module keeps: a loss written as a lambda inside a loop would fill the memory


@dataclass(frozen=True)
class Plan:
    """
    Args:
        vmapped: whether all tasks run at once under ``torch.vmap``, or one after another.
        shared: whether parameters that all tasks share may stay so, or each task needs its own copy (in-place
            operators of recurrent networks, under vmap).
        random: whether the network draws random numbers (dropout).
        twice: whether it has a second derivative; without one only "first_order" can run.
        prediction: shape of the prediction of one task; None where it is not a tensor.
        reasons: for every choice that is not the fastest path, why.
    """

    vmapped: bool
    shared: bool
    random: bool
    twice: bool
    prediction: torch.Size | None
    reasons: tuple[str, ...]

    def task_map(self, module: nn.Module) -> TaskMap:
        seed = int(torch.randint(2**40, ())) if self.random else None
        return TaskMap(module, self.vmapped, seed)


_plans: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


@untraced
def plan(
    module: nn.Module,
    layout: Layout,
    theta: Tensor,
    x,
    y=(),
    loss: str | Callable | None = None,
    names: tuple[str, str] = ("x", "y"),
) -> Plan:
    """The plan for ``module`` and ``loss`` (None: predictions only) on the data of all tasks.

    ``names`` are what ``x`` and ``y`` are called in errors. Raises ValueError or TypeError where the module
    or the loss cannot be applied to a task of this shape.
    """
    leaves, spec = pytree.tree_flatten((x, y))
    kinds = tuple((leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves)
    # What a network does changes with its modules, their mode, and with the rates of dropout (which torch's
    # modules call p, its recurrent networks and attention dropout).
    structure = tuple(
        (type(m), m.training, *(v for v in map(m.__dict__.get, ("p", "dropout")) if isinstance(v, (int, float))))
        for m in module.modules()
    )
    identity, reference = _identity(loss)
    key = (structure, tuple(layout.parameters), theta.dtype, identity, str(spec), kinds)
    known = _plans.setdefault(module, {})
    chosen, seen_for = known.get(key, (None, None))
    if chosen is None or seen_for() is not reference():
        with torch.inference_mode(False):
            chosen = _examine(module, layout, theta, x, y, loss, names)
        if len(known) >= REMEMBERED:
            known.clear()
        if not torch._C._are_functorch_transforms_active():  # inside of which not everything can be examined
            known[key] = chosen, reference
    if loss is not None:
        losses.check_target(loss, names[1], y, chosen.prediction, theta.dtype)
    return chosen


def _examine(module, layout, theta, x, y, loss, names) -> Plan:
    """Run two tasks to see what works. Leaves the module and the random generators as they were."""
    check_statistics(module)
    theta = (theta if theta.dim() == 1 else theta[0]).detach().clone()
    leaves, spec = pytree.tree_flatten((x, y))
    two = [leaf[:2].detach().clone() for leaf in leaves]
    # Without a loss any scalar of the predictions shows whether they can be differentiated.
    scalar = losses.resolve(loss) if loss is not None else lambda prediction, _: prediction.square().sum()
    reasons = []

    def problem(vmapped: bool) -> Problem:
        return Problem(layout, TaskMap(module, vmapped, seed=0), spec, scalar)

    with stateless(module), torch.random.fork_rng(devices=[theta.device] if theta.is_cuda else []):
        with _Operators() as seen, torch.enable_grad():
            one = [leaf[0] for leaf in two]
            prediction = _try_one_task(problem(vmapped=False), theta, one, loss, y, names)
        # Inside torch.func nothing can be recorded by hand: a refusal would come up in the backward pass.
        transformed = torch._C._are_functorch_transforms_active()
        # Two samples show as much as all, in a fraction of the time and memory, if the module takes so few.
        for samples in ([leaf[:2] if leaf.dim() else leaf for leaf in one], one):
            twice = "" if transformed else _try(_second_derivative_of_one, problem(vmapped=False), theta, samples)
            if not twice:
                break

    own = theta.expand(len(two[0]), -1)
    ways = [(True, True), (True, False), (False, True)]  # (vmapped, shared)
    own_filters = any(len(shape) > 2 for shape in layout.shapes)
    if theta.device.type == "cpu" and own_filters and seen.convolved > LARGE_CONVOLUTIONS:
        ways = [(False, True)]
        reasons.append(
            f"tasks run one after another: {seen.convolved:,} multiply-adds of convolutions a task, with filters of "
            f"their own, are slower all at once on a CPU (vmap makes grouped convolutions of them)"
        )
    derivative = _gradient if twice else _second_derivative
    reasons += [f"no second derivative, so that 'exact' cannot run: {twice}"] if twice else []
    for vmapped, shared in ways:
        if not (vmapped or twice or transformed):
            # One task after another, by the same means as the one above: nothing is left to try.
            return Plan(vmapped, shared, seen.random, True, prediction, tuple(reasons))
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            for parameters in (own, theta) if shared else (own,):
                # The value by itself too: some operators batch where they are recorded and not where they are not.
                failure = _try(_value, problem(vmapped), parameters, two) or _try(
                    derivative, problem(vmapped), parameters, two
                )
                if failure:
                    break
        if not failure:
            reasons += [first_line(w.message) for w in caught if "performance drop" in str(w.message)]
            return Plan(vmapped, shared, seen.random, not twice, prediction, tuple(reasons))
        if (vmapped, shared) == (True, False):
            reasons.append(f"tasks run one after another: torch.vmap cannot run them all at once: {failure}")
    raise ValueError(f"module: cannot be differentiated: {failure}")


def _identity(loss) -> tuple:
    """What tells a loss from others, and a weak reference to what must live for it to stay so.

    A recognised loss is its settings, which a module may change from call to call. A callable of the
    user's is itself, whatever it is equal to. The reference is weak because a loss may hold the module.
    """
    known = losses.recognise(loss) if loss is not None else None
    if loss is None or known is not None:
        return known and known.settings, lambda: None
    owner = getattr(loss, "__self__", loss)  # a method is a new object each time it is looked up
    identity = (id(owner), id(getattr(loss, "__func__", loss)) if owner is not loss else None)
    try:
        return identity, weakref.ref(owner)
    except TypeError:
        return identity, lambda: owner


def _try(function: Callable, *arguments) -> str:
    """What went wrong, or "": a user's module may raise anything under a transform."""
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _second_derivative_of_one(problem: Problem, theta: Tensor, one: list[Tensor]) -> None:
    """By ``backward()``: ``autograd.grad`` passes over nodes that refuse a derivative and returns zeros."""
    theta = theta.clone().requires_grad_()
    with torch.enable_grad():
        value = problem.value(theta, *one)
        (gradient,) = torch.autograd.grad(value, theta, create_graph=True, materialize_grads=True)
        if gradient.requires_grad:
            gradient.sum().backward()


def _second_derivative(problem: Problem, theta: Tensor, data: list[Tensor]) -> None:
    hvp(problem, theta, theta, data)


def _value(problem: Problem, theta: Tensor, data: list[Tensor]) -> None:
    task_loss(problem, theta, data)


def _gradient(problem: Problem, theta: Tensor, data: list[Tensor]) -> None:
    with torch.enable_grad():
        task_loss(problem, theta.detach().requires_grad_(), data)  # which computes it along with the value


def _try_one_task(problem: Problem, theta, one, loss, y, names) -> torch.Size | None:
    """The shape of one task's prediction; raises a ValueError that names the argument at fault."""
    x, target = pytree.tree_unflatten(one, problem.spec)
    try:
        prediction = problem.predict(theta, *one)
    except Exception as error:
        raise ValueError(
            f"{names[0]}: the module failed on one task, {_shapes(x)}: {type(error).__name__}: {first_line(error)}"
        ) from error
    shape = prediction.shape if isinstance(prediction, Tensor) else None
    if shape is None and (loss is None or losses.recognise(loss) is not None):
        raise TypeError(f"module: expected to return a tensor, got {type(prediction).__name__}")
    value = prediction
    if loss is not None:
        losses.check_target(loss, names[1], y, shape, theta.dtype)
        try:
            value = problem.score(prediction, target)
        except Exception as error:
            raise ValueError(
                f"{names[1]}: the loss failed on one task, prediction {_shapes(prediction)} and target "
                f"{_shapes(target)}: {type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(value, Tensor) or value.dim():
            raise ValueError(f"loss: expected a scalar tensor for one task, got {_shapes(value)}")
    if value.requires_grad:
        raise ValueError(
            "loss: the network or the loss uses a tensor that requires grad and is neither a parameter nor an "
            "argument: it would get no gradient. Pass it with the inputs or targets, or detach it"
        )
    return shape


def check_statistics(module: nn.Module) -> None:
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


def _shapes(value) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_shapes, value))})"
    return type(value).__name__
