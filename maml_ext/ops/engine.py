"""The operators of the compiled engines: inner loops, losses with gradients, and their derivatives, in a call each.

Every operator takes a network program (``maml_ext.recognise`` says what its integers and numbers mean), the
constants it refers to, parameters ``theta`` (``[P]`` or ``[T, P]``) and data of all tasks (``[T, N, ...]``), and
returns a list of tensors: what is listed below in its order, without what is not ``wanted`` and what has no gradient
(labels, weights that are not given). Gradients for shared parameters come a task each, ``[T, P]``. With L the loss of a
task and f its prediction:

    predict        f
    pull           gradients of <cotangent, f> by theta and x
    pull_tangent   derivative of f, and of what pull gives, along (theta_t, x_t)
    score          L and its gradients by theta, x, y and weight
    score_tangent  derivative of those gradients along (theta_t, x_t, y_t, weight_t): Hessian-vector products
    adapt          theta_1 .. theta_K
    adjoint        the adjoint recursion from cotangents of the theta_{k+1} numbered by `at`
    meta           adapt, score and adjoint in one: losses; meta-gradients by theta, lr, support and query

``meta`` takes theta as a list: one tensor ``[P]`` or ``[T, P]``, or several (or one of another shape) whose elements
in their order are the P that all tasks share. With ``reduce``, which is for shared parameters, it returns the mean of
the losses over tasks, ``[]``, and gradients of that mean, theta's ``[P]``; of no tasks that is NaN, and zeros. Without,
losses and theta's gradient come a task each, and that of lr is of the losses' sum.

They are differentiable as far as the list reaches (of ``meta`` the losses, by theta and what is wanted) and raise
beyond; ``maml_ext.compiled`` goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from . import cuda, library

library.declare("vector_bytes() -> int")
library.declare("cuda_misfit(int[] program, float[] numbers, int element_size, int shared_memory) -> str")
library.declare("record(bool on) -> ()")
library.declare("recorded(Tensor like) -> Tensor")

_PROGRAM = "int[] program, float[] numbers, Tensor? constants"


def _needs(*tensors) -> list[int]:
    return [int(isinstance(t, Tensor) and t.requires_grad) for t in tensors]


def like_theta(gradient: Tensor, theta: Tensor) -> Tensor:
    """A gradient ``[T, P]`` for parameters that may be shared."""
    return gradient.sum(0) if theta.dim() == 1 else gradient


def existing(wanted: Sequence[int], y: Tensor, weight: Tensor | None) -> list[bool]:
    """Which gradients by x, y and weight are returned, where these are wanted."""
    to_x, to_y, to_weight = wanted
    return [bool(to_x), bool(to_y) and y.is_floating_point(), bool(to_weight) and weight is not None]


def placed(flags: Iterable, found: Iterable) -> list:
    """What an operator returned, each in its place; None for what it left out."""
    found = iter(found)
    return [next(found) if flag else None for flag in flags]


def scaled(scale: Tensor, gradient: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (gradient.dim() - 1)) * gradient


def _total(*terms: Tensor | None) -> Tensor | None:
    terms = [t for t in terms if t is not None]
    return sum(terms[1:], terms[0]) if terms else None


class _Rule(torch.autograd.Function):
    """An operator as a Function: ``apply(operator, rule, arguments)`` of which some are tensors that need gradients.

    ``rule(arguments, outputs, cotangents)`` returns a dict from number of the argument to its gradient, a list of them
    for a list.
    """

    @staticmethod
    def forward(ctx, operator, rule, spec, *leaves):
        arguments = torch.utils._pytree.tree_unflatten(leaves, spec)
        with torch._C._AutoDispatchBelowAutograd():
            outputs = operator(*arguments)
        ctx.rule, ctx.spec = rule, spec
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(leaf if isinstance(leaf, Tensor) else None for leaf in leaves), *outputs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *cotangents):
        n = len(ctx.others)
        saved = ctx.saved_tensors
        leaves = [s if o is None else o for s, o in zip(saved, ctx.others)]
        arguments = torch.utils._pytree.tree_unflatten(leaves, ctx.spec)
        gradients = ctx.rule(arguments, saved[n:], cotangents) if any(c is not None for c in cotangents) else {}
        places = torch.utils._pytree.tree_unflatten(list(range(n)), ctx.spec)
        result = [None] * n
        for i, gradient in gradients.items():
            several = isinstance(places[i], list)
            for place, one in zip(places[i], gradient) if several else [(places[i], gradient)]:
                if ctx.needs_input_grad[3 + place]:
                    result[place] = one
        return None, None, None, *result


def _autograd(name: str, rule: Callable) -> Callable:
    def kernel(*arguments):
        leaves, spec = torch.utils._pytree.tree_flatten(list(arguments))
        return list(_Rule.apply(getattr(torch.ops.maml_ext, name), rule, spec, *leaves))

    return kernel


def _refuse(name: str) -> Callable:
    def rule(arguments, outputs, cotangents):
        raise RuntimeError(
            f"maml_ext::{name} has no further derivative; maml_ext's functions, or backend='torch', differentiate "
            f"to any order"
        )

    return rule


def _loop(name: str) -> Callable:
    """The batching rule: tasks are the batch the engine knows, so another one is a loop."""

    def rule(info, in_dims, *arguments):
        def pick(argument, dim, b):
            if isinstance(argument, (list, tuple)) and isinstance(dim, (list, tuple)):
                return [pick(a, d, b) for a, d in zip(argument, dim)]
            return argument.select(dim, b) if isinstance(dim, int) else argument

        results = [
            getattr(torch.ops.maml_ext, name)(*(pick(a, d, b) for a, d in zip(arguments, in_dims)))
            for b in range(info.batch_size)
        ]
        return [torch.stack(column) for column in zip(*results)], [0] * len(results[0])

    return rule


def _define(name: str, arguments: str, shapes: Callable, rule: Callable, theta: str = "Tensor theta") -> None:
    def formula(*_):
        why = library.ABSENT or "all tensors must be on one such device"
        raise RuntimeError(f"maml_ext::{name} runs on CPU and CUDA tensors of the compiled package: {why}")

    def fake(*given):
        # Real tensors come here too where one of them is on the meta device: nobody would write their results.
        devices = {t.device for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"maml_ext::{name}: expected tensors on one device, got {sorted(map(str, devices))}")
        return shapes(*given)

    schema = f"({_PROGRAM}, {theta}, {arguments}) -> Tensor[]"
    library.define(
        f"{name}{schema}",
        formula=formula,
        fake=fake,
        autograd=_autograd(name, rule),
        vmap=_loop(name),
    )
    cuda.define(name, schema, fake)


def _fakes(flags: Iterable, like: Tensor, *shapes: Sequence) -> list[Tensor]:
    return [like.new_empty(shape) for flag, shape in zip(flags, shapes) if flag]


# predict, pull, pull_tangent


def _predict_fake(program, numbers, constants, theta, x, prediction):
    return [theta.new_empty((*x.shape[:2], *prediction))]


def _predict_rule(arguments, outputs, cotangents):
    program, numbers, constants, theta, x, _ = arguments
    wanted = _needs(theta, x)
    found = torch.ops.maml_ext.pull(program, numbers, constants, theta, x, cotangents[0], wanted)
    to_theta, to_x = placed(wanted, found)
    return {3: like_theta(to_theta, theta) if wanted[0] else None, 4: to_x}


def _pull_fake(program, numbers, constants, theta, x, cotangent, wanted):
    return _fakes(wanted, theta, (x.shape[0], theta.shape[-1]), x.shape)


def _pull_rule(arguments, outputs, cotangents):
    program, numbers, constants, theta, x, cotangent, wanted = arguments
    to_cotangent, to_theta, to_x = torch.ops.maml_ext.pull_tangent(
        program, numbers, constants, theta, x, cotangent, *placed(wanted, cotangents)
    )
    return {3: like_theta(to_theta, theta), 4: to_x, 5: to_cotangent}


def _pull_tangent_fake(program, numbers, constants, theta, x, cotangent, theta_t, x_t):
    return [cotangent.new_empty(cotangent.shape), theta.new_empty(x.shape[0], theta.shape[-1]), x.new_empty(x.shape)]


_define("predict", "Tensor x, int[] prediction", _predict_fake, _predict_rule)
_define("pull", "Tensor x, Tensor cotangent, int[] wanted", _pull_fake, _pull_rule)
_define(
    "pull_tangent",
    "Tensor x, Tensor cotangent, Tensor? theta_t, Tensor? x_t",
    _pull_tangent_fake,
    _refuse("pull_tangent"),
)

# score, score_tangent


def _data_fakes(wanted, theta, x, y, weight):
    return _fakes(existing(wanted, y, weight), theta, x.shape, y.shape, x.shape[:2])


def _score_fake(program, numbers, constants, theta, x, y, weight, wanted):
    tasks = x.shape[0]
    of_theta = _fakes([1, wanted[0]], theta, (tasks,), (tasks, theta.shape[-1]))
    return [*of_theta, *_data_fakes(wanted[1:], theta, x, y, weight)]


def _score_rule(arguments, outputs, cotangents):
    program, numbers, constants, theta, x, y, weight, wanted = arguments
    computed = [wanted[0], *existing(wanted[1:], y, weight)]
    scale, *directions = placed([1, *computed], cotangents)
    places = (3, 4, 5, 6)
    result = dict.fromkeys(places)
    needed = _needs(theta, x, y, weight)
    if scale is not None:
        first = outputs
        if torch.is_grad_enabled() or any(n and not c for n, c in zip(needed, computed)):
            first = torch.ops.maml_ext.score(program, numbers, constants, theta, x, y, weight, needed)
            computed = needed
        for i, gradient in zip(places, placed(computed, first[1:])):
            result[i] = None if gradient is None else scaled(scale, gradient)
    if any(d is not None for d in directions):
        second = torch.ops.maml_ext.score_tangent(
            program, numbers, constants, theta, x, y, weight, *directions, needed[1:]
        )
        for i, gradient in zip(places, placed([1, *needed[1:]], second)):
            result[i] = _total(result[i], gradient)
    if result[3] is not None:
        result[3] = like_theta(result[3], theta)
    return result


def _score_tangent_fake(program, numbers, constants, theta, x, y, weight, theta_t, x_t, y_t, weight_t, wanted):
    return [theta.new_empty(x.shape[0], theta.shape[-1]), *_data_fakes(wanted, theta, x, y, weight)]


def _score_tangent_rule(arguments, outputs, cotangents):
    *problem, theta_t, x_t, y_t, weight_t, wanted = arguments
    if any(_needs(*problem[3:])):
        _refuse("score_tangent")(arguments, outputs, cotangents)
    # Linear in its direction, and the Hessian is symmetric.
    directions = placed([1, *existing(wanted, *problem[5:])], cotangents)
    needed = _needs(x_t, y_t, weight_t)
    found = torch.ops.maml_ext.score_tangent(*problem, *directions, needed)
    result = dict(zip((7, 8, 9, 10), placed([1, *needed], found)))
    if theta_t is not None and theta_t.dim() == 1:
        result[7] = result[7].sum(0)
    return result


_define("score", "Tensor x, Tensor y, Tensor? weight, int[] wanted", _score_fake, _score_rule)
_define(
    "score_tangent",
    "Tensor x, Tensor y, Tensor? weight, Tensor? theta_t, Tensor? x_t, Tensor? y_t, Tensor? weight_t, int[] wanted",
    _score_tangent_fake,
    _score_tangent_rule,
)

# adapt, adjoint, meta


def _adapt_fake(program, numbers, constants, theta, lr, x, y, weight, steps):
    return [theta.new_empty(x.shape[0], theta.shape[-1]) for _ in range(steps)]


def _adapt_rule(arguments, outputs, cotangents):
    program, numbers, constants, theta, lr, x, y, weight, steps = arguments
    at = [k for k, c in enumerate(cotangents) if c is not None]
    if not at:
        return {}
    needed = _needs(lr, x, y, weight)
    to_theta, *found = torch.ops.maml_ext.adjoint(
        program, numbers, constants, theta, lr, x, y, weight, list(outputs[:-1]), [cotangents[k] for k in at], at,
        False, needed,
    )  # fmt: skip
    return {3: like_theta(to_theta, theta), **dict(zip((4, 5, 6, 7), placed(needed, found)))}


def _adjoint_fake(
    program, numbers, constants, theta, lr, x, y, weight, trajectory, cotangents, at, first_order, wanted
):
    shared = _fakes([1, wanted[0]], theta, (x.shape[0], theta.shape[-1]), lr.shape)
    return [*shared, *_data_fakes(wanted[1:], theta, x, y, weight)]


def _meta_fake(
    program, numbers, constants, theta, lr, support_x, support_y, support_weight, query_x, query_y, query_weight,
    steps, first_order, reduce, wanted,
):  # fmt: skip
    if not theta:
        raise RuntimeError("theta: expected a tensor at least")
    tasks = () if reduce else query_x.shape[:1]
    shared = _fakes([1, 1, wanted[0]], theta[0], tasks, (*tasks, program[1]), lr.shape)
    support = _data_fakes(wanted[1:4], theta[0], support_x, support_y, support_weight)
    return [*shared, *support, *_data_fakes(wanted[4:], theta[0], query_x, query_y, query_weight)]


def meta_results(
    lr, support_x, support_y, support_weight, query_x, query_y, query_weight, steps, first_order, reduce, wanted
) -> list:  # fmt: skip
    """Which of its nine results ``meta`` returns, by its arguments behind theta."""
    support = existing(wanted[1:4], support_y, support_weight)
    return [True, True, wanted[0], *support, *existing(wanted[4:], query_y, query_weight)]


def _meta_rule(arguments, outputs, cotangents):
    """Gradients were computed along with the losses: constants, fit for a backward pass nobody differentiates."""
    if torch.is_grad_enabled() or any(c is not None for c in cotangents[1:]):
        _refuse("meta")(arguments, outputs, cotangents)
    theta, reduce, scale = arguments[3], arguments[13], cotangents[0]
    computed = meta_results(*arguments[4:])
    if any(n and not c for n, c in zip(_needs(*arguments[4:11]), computed[2:], strict=True)):
        raise RuntimeError("maml_ext::meta: a gradient is needed that was not wanted in the call")
    _, to_theta, to_lr, *to_data = placed(computed, outputs)
    if to_lr is not None and not reduce and not (scale == scale[:1]).all():
        raise RuntimeError("maml_ext::meta: lr's gradient, a sum over tasks, needs the same cotangent for every loss")
    to_theta = scaled(scale, to_theta)
    if to_theta.dim() == 2 and to_theta.shape[1] == sum(t.numel() for t in theta):
        to_theta = to_theta.sum(0)
    result = {3: _unflatten_dense_tensors(to_theta.reshape(-1), theta)}
    if to_lr is not None:
        result[4] = (scale if reduce else scale[:1].sum()) * to_lr
    return result | {i: scaled(scale, g) for i, g in enumerate(to_data, 5) if g is not None}


_define("adapt", "Tensor lr, Tensor x, Tensor y, Tensor? weight, int steps", _adapt_fake, _adapt_rule)
_define(
    "adjoint",
    "Tensor lr, Tensor x, Tensor y, Tensor? weight, Tensor[] trajectory, Tensor[] cotangents, int[] at, "
    "bool first_order, int[] wanted",
    _adjoint_fake,
    _refuse("adjoint"),
)
_define(
    "meta",
    "Tensor lr, Tensor support_x, Tensor support_y, Tensor? support_weight, Tensor query_x, Tensor query_y, "
    "Tensor? query_weight, int steps, bool first_order, bool reduce, int[] wanted",
    _meta_fake,
    _meta_rule,
    theta="Tensor[] theta",
)


RULES = ("forward", "backward", "tangent forward", "tangent backward")
# As the engine numbers them: kinds of layers, and below 0 what it does beside them.
_WORK = {
    0: "linear, convolution", 1: "norm over a sample", 3: "overlapping pooling", 4: "adaptive pooling",
    5: "reshape", 6: "sum, product", 7: "softmax", 8: "norm + activation + pooling",
    -1: "transposed filters", -2: "updates of parameters", -3: "loss",
}  # fmt: skip


def profile(call: Callable[[], object]) -> list[tuple[str, str, float, float]]:
    """What ``call`` spends in the engine: (kind of work, rule, seconds, multiply-adds), a row each.

    Layers are those the engine runs: norm, activation and pooling may be one. Seconds are summed over threads;
    recording costs some 50 ns for each rule of each layer, and reordering data is not recorded. Multiply-adds are
    those that linear layers and convolutions need; what is computed twice counts twice, samples of weight 0
    count too. Calls on other Python threads at the same time would be mixed in. Raises NotImplementedError
    without the compiled engine.
    """
    torch.ops.maml_ext.record(True)
    try:
        call()
        entries = torch.ops.maml_ext.recorded(torch.zeros((), dtype=torch.float64))
    finally:
        torch.ops.maml_ext.record(False)
    totals: dict[tuple[str, str], list[float]] = {}
    for kind, rule, seconds, multiply_adds in entries.tolist():
        total = totals.setdefault((_WORK[int(kind)], RULES[int(rule)]), [0.0, 0.0])
        total[0] += seconds
        total[1] += multiply_adds
    return [(*key, *total) for key, total in totals.items()]
