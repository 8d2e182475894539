"""The SGD update theta - lr * grad as an operator, differentiable to any order in all three arguments.

Two operators are closed under differentiation. With E the expansion of a rate over its parameters and E^T
its transpose (a sum),

    S(theta, grad, lr) = theta - E(lr) * grad              sgd_update
    B(c, grad, lr)     = -E(lr) * c, -E^T(c * grad)        sgd_update_backward

    dS, given c:       theta gets c; grad and lr get B(c, grad, lr)
    dB, given (u, w):  c gets S(S(0, u, lr), grad, w); grad and lr get B(c, u, w)

B is linear in c and in (grad, lr), and reads c once for both of its results. Where lr's is not wanted the
other is S(0, c, lr); where grad's is not wanted B leaves it out.

Both take lists of tensors: a flat ``[T, P]`` is a list of one. ``lr[i]`` is a scalar, has the shape of the
trailing dimensions of ``grad[i]`` (and is shared by the leading ones), or has one rate for each of ``sizes``,
the tensors that lie along the last dimension of ``grad[i]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..rates import expand_rate
from . import library

KERNEL_DTYPES = (torch.float32, torch.float64)


def sgd_update(
    theta: Tensor | Sequence[Tensor],
    grad: Tensor | Sequence[Tensor],
    lr: float | Tensor | Sequence[Tensor],
    *,
    sizes: Sequence[int] | None = None,
    step: int | None = None,
) -> Tensor | list[Tensor]:
    """``theta - lr * grad`` in one pass, differentiable to any order in theta, grad and lr.

    Args:
        theta, grad: flat parameters ``[P]`` or ``[T, P]``, or lists of n tensors of any shapes.
        lr: a float or a scalar tensor; per tensor ``[n]`` (flat parameters need ``sizes`` for it); per
            parameter ``[P]``; for lists also a list of n tensors, each a scalar or of its parameter's shape
            (less leading dimensions, which then share the rates).
        sizes: number of elements of each of the n tensors along ``P``.
        step: ``lr`` has a leading dimension of steps, and this row of it is taken: ``[steps]``,
            ``[steps, n]`` or ``[steps, P]``.

    Returns:
        What theta is, a tensor or a list, new memory.

    Raises:
        TypeError, ValueError: where arguments disagree in length, shape, dtype or device.
    """
    flat = isinstance(theta, Tensor)
    if isinstance(grad, Tensor) != flat:
        raise TypeError(f"grad: expected a tensor if theta is one, else a list, got {type(grad).__name__}")
    thetas, grads = _tensors("theta", theta), _tensors("grad", grad)
    if flat and theta.dim() == 0:
        raise ValueError("theta: expected [P], [T, P] or a list of tensors, got a scalar tensor")
    if not thetas and not grads:
        return []
    sizes = [] if sizes is None else list(sizes)
    rates = _rates(lr, len(thetas), (thetas + grads)[0], flat, step)
    _check(thetas, grads, rates, sizes)
    library.warn_if_absent()
    result = _update(thetas, grads, rates, sizes)
    return result[0] if flat else result


def _tensors(name: str, value: Tensor | Iterable[Tensor]) -> list[Tensor]:
    tensors = list(value) if isinstance(value, Iterable) and not isinstance(value, Tensor) else [value]
    if not all(isinstance(t, Tensor) for t in tensors):
        types = [type(t).__name__ for t in tensors]
        raise TypeError(f"{name}: expected a tensor or a list of tensors, got {types}")
    return tensors


def _rates(lr, n: int, like: Tensor, flat: bool, step: int | None) -> list[Tensor]:
    """``lr`` as one tensor for each of n tensors, or of the one that holds them ``flat``."""
    if isinstance(lr, (int, float)) and not isinstance(lr, bool):
        if step is not None:
            raise ValueError("step: expected None with an lr that is a number")
        if not math.isfinite(lr):
            raise ValueError(f"lr: expected a finite rate, got {lr}")
        return [torch.full((), lr, dtype=like.dtype, device=like.device)] * n
    rates = _tensors("lr", lr)
    if step is not None:
        for r in rates:
            if not isinstance(step, int) or r.dim() == 0 or not 0 <= step < r.shape[0]:
                raise ValueError(f"step: expected a row of lr, whose shape is {list(r.shape)}, got {step}")
        rates = [r[step] for r in rates]
    rates = [r.reshape(()) if r.numel() == 1 else r for r in rates]
    if isinstance(lr, Tensor) and flat and rates[0].dim() > 1:
        raise ValueError(f"lr: expected a rate, one a tensor or one a parameter, got {list(rates[0].shape)}")
    if isinstance(lr, Tensor) and not flat:
        if rates[0].dim() > 0 and rates[0].shape != (n,):
            raise ValueError(f"lr: expected a scalar or [{n}], one a tensor, got {list(rates[0].shape)}")
        rates = list(rates[0].expand(n).unbind())
    return rates


def _check(first: list[Tensor], grad: list[Tensor], lr: list[Tensor], sizes: list[int], name="theta") -> None:
    """Raise where the operands of an operator do not fit each other."""
    n = len(first)
    if n == 0 or len(grad) != n:
        raise ValueError(f"grad: expected 1 or more tensors, as many as in {name}, got {len(grad)} and {n}")
    if len(lr) != n:
        raise ValueError(f"lr: expected {n} tensors like {name}, got {len(lr)}")
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"sizes: expected integers, 0 or more, got {sizes}")
    for i, (x, g, r) in enumerate(zip(first, grad, lr)):
        shape, rates = list(x.shape), list(r.shape)
        if list(g.shape) != shape:
            raise ValueError(f"grad: expected shape {shape} like {name} at {i}, got {list(g.shape)}")
        if sizes and shape[-1:] != [sum(sizes)]:
            raise ValueError(f"sizes: expected a sum of the last dimension of {shape} at {i}, got {sizes}")
        if not _per_tensor(r, g, sizes) and rates != shape[max(0, len(shape) - len(rates)) :]:
            per_tensor = f", [{len(sizes)}] (per tensor)" if sizes else ""
            expected = f"a scalar{per_tensor} or the last of {shape} (per parameter)"
            raise ValueError(f"lr: expected {expected} at {i}, got {rates}")
        for argument, t in ((name, x), ("grad", g), ("lr", r)):
            if not t.is_floating_point() or t.dtype != first[0].dtype:
                raise TypeError(f"{argument}: expected {name}'s dtype, a real one, got {t.dtype} at {i}")
            if t.device != first[0].device:
                raise ValueError(f"{argument}: expected one device, {first[0].device}, got {t.device} at {i}")


def _check_raw(*operands) -> None:
    try:
        _check(*operands)
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from None  # as the kernels do


# The formulas, which are also the kernels of every device without its own.


def _per_tensor(lr: Tensor, grad: Tensor, sizes: Sequence[int]) -> bool:
    """Whether ``lr`` has a rate for each of ``sizes``, rather than for each parameter."""
    return len(sizes) > 0 and lr.shape == (len(sizes),) and lr.shape != grad.shape[-1:]


def _update_formula(theta, grad, lr, sizes):
    _check_raw(theta or grad, grad, lr, sizes)
    rates = [expand_rate(r, sizes) if _per_tensor(r, g, sizes) else r for r, g in zip(lr, grad)]
    steps = [r * g for r, g in zip(rates, grad)]
    return [x.contiguous() for x in ([t - s for t, s in zip(theta, steps)] if theta else [-s for s in steps])]


def _backward_formula(cotangent, grad, lr, sizes, to_grad):
    _check_raw(cotangent, grad, lr, sizes, "cotangent")
    products = [-(c * g) for c, g in zip(cotangent, grad)]
    to_rates = [
        torch.stack([piece.sum() for piece in p.split(list(sizes), -1)])
        if _per_tensor(r, p, sizes)
        else p.sum_to_size(r.shape).contiguous()
        for p, r in zip(products, lr)
    ]
    return (_update_formula([], cotangent, lr, sizes) if to_grad else []) + to_rates


def _update_fake(theta, grad, lr, sizes):
    _check_raw(theta or grad, grad, lr, sizes)
    return [g.new_empty(g.shape) for g in grad]


def _backward_fake(cotangent, grad, lr, sizes, to_grad):
    _check_raw(cotangent, grad, lr, sizes, "cotangent")
    return [x.new_empty(x.shape) for x in (*(grad if to_grad else []), *lr)]


# The batching rules, in terms of `operator`: the operator itself, as it is to be called one level below.


def _slices(operator: Callable, info, in_dims, first, grad, lr, *constants):
    """B sums over leading dimensions, so that a batch must not be one; but it can be a longer list."""
    slices = [
        [t if d is None else t.select(d, b) for t, d in zip(tensors, dims) for b in range(info.batch_size)]
        for tensors, dims in zip((first, grad, lr), in_dims)
    ]
    outputs = operator(*slices, *constants)
    batches = range(0, len(outputs), info.batch_size)
    return [torch.stack(outputs[i : i + info.batch_size]) for i in batches], [0] * len(batches)


def _slices_or_leading(operator: Callable, info, in_dims, theta, grad, lr, sizes):
    """S: where rates are shared, the batch is one more leading dimension."""
    if any(d is not None for d in in_dims[2]):
        return _slices(operator, info, in_dims, theta, grad, lr, sizes)
    leading = [
        [t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims)]
        for tensors, dims in zip((theta, grad), in_dims)
    ]
    return operator(*leading, lr, sizes), [0] * len(grad)


# The operators with their derivatives.


def _update(theta: Sequence[Tensor], grad: Sequence[Tensor], lr: Sequence[Tensor], sizes) -> list[Tensor]:
    """S: ``theta[i] - lr[i] * grad[i]``; an empty ``theta`` is zeros."""
    if grad[0].dtype not in KERNEL_DTYPES:
        return _update_formula(theta, grad, lr, sizes)
    if torch.compiler.is_compiling():  # which traces no Function that has a forward-mode rule
        return torch.ops.maml_ext.sgd_update(theta, grad, lr, sizes)
    return _Update.on_lists(theta, grad, lr, sizes)


def _backward(cotangent, grad, lr, sizes, to_grad: bool) -> list[Tensor]:
    """B: ``-lr[i] * cotangent[i]``, if wanted; then ``-(cotangent[i] * grad[i])`` summed to the shapes of lr[i]."""
    return _Backward.on_lists(cotangent, grad, lr, sizes, to_grad)


def _wanted(cotangent, grad, lr, sizes, to_grad: bool, to_lr: bool) -> tuple[list, list]:
    """What B gives for grad and for lr, or a list of None, by the operator that computes no more."""
    none = [None] * len(cotangent)
    if not to_lr:
        return _update([], cotangent, lr, sizes) if to_grad else none, none
    results = _backward(cotangent, grad, lr, sizes, to_grad)
    return results[: -len(lr)] or none, results[-len(lr) :]


def _lists(lengths: Sequence[int], concatenated: Sequence) -> tuple[list, list, list]:
    m, n, _ = lengths
    return list(concatenated[:m]), list(concatenated[m : m + n]), list(concatenated[m + n :])


def _or_zeros(tangents: list, like: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, like)]


class _ListFunction(torch.autograd.Function):
    """An operator on lists as a Function of their concatenation: ``apply(lengths, constants, *tensors)``."""

    operator: str
    batch: Callable

    @classmethod
    def on_lists(cls, first, grad, lr, *constants) -> list[Tensor]:
        return list(cls.apply((len(first), len(grad), len(lr)), constants, *first, *grad, *lr))

    @classmethod
    def forward(cls, lengths, constants, *tensors):
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(getattr(torch.ops.maml_ext, cls.operator)(*_lists(lengths, tensors), *constants))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.lengths, ctx.constants, *tensors = inputs
        ctx.n = ctx.lengths[1]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @classmethod
    def vmap(cls, info, in_dims, lengths, constants, *tensors):
        in_dims = _lists(lengths, in_dims[2:])
        outputs, out_dims = cls.batch(cls.on_lists, info, in_dims, *_lists(lengths, tensors), *constants)
        return tuple(outputs), tuple(out_dims)


class _Update(_ListFunction):
    operator = "sgd_update"
    batch = staticmethod(_slices_or_leading)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        lengths, constants, *tensors = inputs  # theta may be freed, or changed in place: no derivative needs it
        _ListFunction.setup_context(ctx, (lengths, constants, *tensors[lengths[0] :]), outputs)

    @staticmethod
    def backward(ctx, *cotangents):
        grad, lr = ctx.saved_tensors[: ctx.n], ctx.saved_tensors[ctx.n :]
        theta_needs, grad_needs, lr_needs = _lists(ctx.lengths, ctx.needs_input_grad[2:])
        to_theta = cotangents[: len(theta_needs)]  # none where theta is empty
        to_grad, to_lr = _wanted(cotangents, grad, lr, *ctx.constants, any(grad_needs), any(lr_needs))
        return None, None, *to_theta, *to_grad, *to_lr

    @staticmethod
    def jvp(ctx, _lengths, _sizes, *tangents):
        grad, lr = ctx.saved_tensors[: ctx.n], ctx.saved_tensors[ctx.n :]
        dtheta, dgrad, dlr = _lists(ctx.lengths, tangents)
        by_lr = _update(_or_zeros(dtheta, grad), grad, _or_zeros(dlr, lr), *ctx.constants)
        return tuple(_update(by_lr, _or_zeros(dgrad, grad), lr, *ctx.constants))


class _Backward(_ListFunction):
    operator = "sgd_update_backward"
    batch = staticmethod(_slices)

    @staticmethod
    def backward(ctx, *cotangents):
        cotangent, grad, lr = _lists(ctx.lengths, ctx.saved_tensors)
        by_grad, by_lr = list(cotangents[: -ctx.n]), list(cotangents[-ctx.n :])
        sizes, to_grad = ctx.constants
        cotangent_needs, grad_needs, lr_needs = map(any, _lists(ctx.lengths, ctx.needs_input_grad[2:]))
        to_cotangent = [None] * ctx.n
        if cotangent_needs:
            to_cotangent = _update(_update([], by_grad, lr, sizes) if to_grad else [], grad, by_lr, sizes)
        others = _wanted(cotangent, by_grad, by_lr, sizes, grad_needs, to_grad and lr_needs)
        return None, None, *to_cotangent, *others[0], *others[1]

    @staticmethod
    def jvp(ctx, _lengths, _constants, *tangents):
        cotangent, grad, lr = _lists(ctx.lengths, ctx.saved_tensors)
        dcotangent, dgrad, dlr = _lists(ctx.lengths, tangents)
        first = _backward(_or_zeros(dcotangent, cotangent), grad, lr, *ctx.constants)
        second = _backward(cotangent, _or_zeros(dgrad, grad), _or_zeros(dlr, lr), *ctx.constants)
        return tuple(a + b for a, b in zip(first, second))


library.define(
    "sgd_update(Tensor[] theta, Tensor[] grad, Tensor[] lr, int[] sizes) -> Tensor[]",
    formula=_update_formula,
    fake=_update_fake,
    autograd=_Update.on_lists,
    vmap=lambda *args: _slices_or_leading(torch.ops.maml_ext.sgd_update, *args),
)
library.define(
    "sgd_update_backward(Tensor[] cotangent, Tensor[] grad, Tensor[] lr, int[] sizes, bool to_grad) -> Tensor[]",
    formula=_backward_formula,
    fake=_backward_fake,
    autograd=_Backward.on_lists,
    vmap=lambda *args: _slices(torch.ops.maml_ext.sgd_update_backward, *args),
)


# On CUDA devices, where the binary has no kernels for them: kernels/sgd.py.


def _by_triton(name: str, first: str, formula: Callable) -> Callable:
    def kernel(tensors, grad, lr, sizes, *options):
        _check_raw(tensors or grad, grad, lr, sizes, first)
        # A launch copies what it has to know from pinned memory; a graph would again, when that is something else.
        if grad[0].dtype not in KERNEL_DTYPES or torch.cuda.is_current_stream_capturing():
            return formula(tensors, grad, lr, sizes, *options)
        from maml_ext.kernels import sgd

        with torch.cuda.device(grad[0].device):
            return getattr(sgd, name)(tensors, grad, lr, sizes, *options)

    return kernel


if library.cuda_absent() and not library.triton_absent():
    library.implement("sgd_update", _by_triton("update", "theta", _update_formula), "CUDA")
    library.implement("sgd_update_backward", _by_triton("backward", "cotangent", _backward_formula), "CUDA")
