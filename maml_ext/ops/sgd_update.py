"""The SGD update theta - lr * grad as an operator, differentiable to any order in all three arguments.

Two operators are closed under differentiation. With E the expansion of a rate over its parameters and E^T
its transpose (a sum),

    S(theta, grad, lr) = theta - E(lr) * grad          sgd_update
    R(cotangent, grad) = -E^T(cotangent * grad)        sgd_rate_gradient

    dS: theta gets c, grad gets S(0, c, lr), lr gets R(c, grad)
    dR: cotangent gets S(0, grad, w), grad gets S(0, cotangent, w)

Both take lists of tensors: a flat ``[T, P]`` is a list of one. ``lr[i]`` is a scalar, has the shape of the
trailing dimensions of ``grad[i]`` (and is shared by the leading ones), or, where ``sizes`` is given, has one
rate for each of the ``len(sizes)`` tensors that lie along the last dimension of ``grad[i]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..rates import expand_rate, reduce_rate
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
            parameter ``[P]``; for lists also a list of n tensors, each a scalar or of its parameter's shape.
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
        raise TypeError(f"grad: expected {'a tensor' if flat else 'a list'} like theta, got {type(grad).__name__}")
    thetas, grads = ([theta], [grad]) if flat else (list(theta), list(grad))
    _check_pairs(thetas, grads)
    sizes = _check_sizes(sizes, thetas) if flat else []
    rates = _rates(lr, thetas, flat, sizes, step)
    if not thetas:
        return []
    library.warn_if_absent()
    result = _update(thetas, grads, rates, sizes)
    return result[0] if flat else result


def _check_pairs(thetas: list[Tensor], grads: list[Tensor]) -> None:
    if len(grads) != len(thetas):
        raise ValueError(f"grad: expected {len(thetas)} tensors like theta, got {len(grads)}")
    for i, (t, g) in enumerate(zip(thetas, grads)):
        if not isinstance(t, Tensor) or not isinstance(g, Tensor):
            raise TypeError(f"theta, grad: expected tensors, got {type(t).__name__} and {type(g).__name__} at {i}")
        if not t.is_floating_point() or t.dtype != thetas[0].dtype:
            raise TypeError(f"theta: expected tensors of one real dtype, got {t.dtype} at {i}")
        if t.shape != g.shape:
            raise ValueError(f"grad: expected shape {list(t.shape)} like theta at {i}, got {list(g.shape)}")
        if t.dtype != g.dtype:
            raise TypeError(f"grad: expected {t.dtype} like theta at {i}, got {g.dtype}")
        if not t.device == g.device == thetas[0].device:
            raise ValueError(f"grad: expected every tensor on {thetas[0].device}, got {t.device} and {g.device} at {i}")


def _check_sizes(sizes: Sequence[int] | None, thetas: list[Tensor]) -> list[int]:
    sizes = [int(size) for size in sizes or ()]
    if thetas[0].dim() == 0:
        raise ValueError("theta: expected [P], [T, P] or a list of tensors, got a scalar tensor")
    if sizes and (min(sizes) < 0 or sum(sizes) != thetas[0].shape[-1]):
        raise ValueError(f"sizes: expected sizes that sum to {thetas[0].shape[-1]}, got {sizes}")
    return sizes


def _rates(lr, thetas: list[Tensor], flat: bool, sizes: list[int], step: int | None) -> list[Tensor]:
    """``lr`` as one tensor for each of ``thetas``."""
    if isinstance(lr, (int, float)) and not isinstance(lr, bool):
        if step is not None:
            raise ValueError("step: expected None with an lr that is a number")
        if not math.isfinite(lr):
            raise ValueError(f"lr: expected a finite rate, got {lr}")
        return [thetas[0].new_full((), lr)] * len(thetas) if thetas else []
    rates = [lr] if isinstance(lr, Tensor) else list(lr) if isinstance(lr, (list, tuple)) else None
    if rates is None or not all(isinstance(r, Tensor) for r in rates):
        raise TypeError(f"lr: expected a float, a tensor or a list of tensors, got {type(lr).__name__}")
    if step is not None:
        for r in rates:
            if r.dim() == 0 or not 0 <= step < r.shape[0]:
                raise ValueError(f"step: expected a row of lr, whose shape is {list(r.shape)}, got {step}")
        rates = [r[step] for r in rates]
    if not flat and isinstance(lr, Tensor):
        row = rates[0]
        if row.numel() != 1 and row.shape != (len(thetas),):
            raise ValueError(f"lr: expected a scalar or [{len(thetas)}], one a tensor, got {list(row.shape)}")
        rates = [row.reshape(())] * len(thetas) if row.numel() == 1 else list(row.unbind())
    if len(rates) != len(thetas):
        raise ValueError(f"lr: expected {len(thetas)} tensors like theta, got {len(rates)}")
    for i, (r, t) in enumerate(zip(rates, thetas)):
        if r.dtype != t.dtype:
            raise TypeError(f"lr: expected {t.dtype} like theta, got {r.dtype}")
        if r.device != t.device:
            raise ValueError(f"lr: expected a tensor on {t.device} like theta, got {r.device}")
        trailing = t.shape[-1:] if flat else t.shape
        if r.numel() != 1 and r.shape != trailing and not (sizes and r.shape == (len(sizes),)):
            per_tensor = f", [{len(sizes)}] (per tensor)" if sizes else ""
            raise ValueError(
                f"lr: expected a scalar{per_tensor} or {list(trailing)} (per parameter) at {i}, got {list(r.shape)}"
            )
    return [r.reshape(()) if r.numel() == 1 else r for r in rates]


# The operators. A rate is a scalar, one for each of `sizes`, or of the shape of the trailing dimensions.


def _expand(lr: Tensor, grad: Tensor, sizes: Sequence[int]) -> Tensor:
    return expand_rate(lr, sizes) if _per_tensor(lr, grad, sizes) else lr


def _reduce(product: Tensor, lr: Tensor, sizes: Sequence[int]) -> Tensor:
    if lr.dim() == 0 or _per_tensor(lr, product, sizes):
        return reduce_rate(product, lr, sizes)
    return product.reshape(-1, *lr.shape).sum(0)


def _per_tensor(lr: Tensor, grad: Tensor, sizes: Sequence[int]) -> bool:
    return lr.shape == (len(sizes),) and lr.shape[0] != grad.shape[-1]


def _check_operands(theta, grad, lr, sizes) -> None:
    """What the kernels check too: the raw operators raise RuntimeError with or without a binary."""
    n = len(grad)
    if n == 0 or len(lr) != n or len(theta) not in (0, n):
        raise RuntimeError(f"expected lists of one length, 1 or more, got {len(theta)}, {n} and {len(lr)}")
    for i in range(n):
        others = [lr[i]] + ([theta[i]] if theta else [])
        if any(t.dtype != grad[0].dtype or t.device != grad[0].device for t in [grad[i], *others]):
            raise RuntimeError(f"expected one dtype and one device, which those of tensors {i} are not")
        if theta and theta[i].shape != grad[i].shape:
            raise RuntimeError(f"expected equal shapes, got {list(theta[i].shape)} and {list(grad[i].shape)} at {i}")
        if _per_tensor(lr[i], grad[i], sizes):
            if min(sizes) < 0 or grad[i].dim() == 0 or sum(sizes) != grad[i].shape[-1]:
                raise RuntimeError(f"sizes: expected a sum of the last dimension of {list(grad[i].shape)}, got {sizes}")
        elif lr[i].shape != grad[i].shape[grad[i].dim() - lr[i].dim() :] or lr[i].dim() > grad[i].dim():
            raise RuntimeError(
                f"lr: expected a scalar, [{len(sizes)}] or trailing dimensions of {list(grad[i].shape)}, "
                f"got {list(lr[i].shape)} at {i}"
            )


def _update_formula(theta, grad, lr, sizes):
    _check_operands(theta, grad, lr, sizes)
    steps = [_expand(r, g, sizes) * g for r, g in zip(lr, grad)]
    return [t - s for t, s in zip(theta, steps)] if theta else [-s for s in steps]


def _update_fake(theta, grad, lr, sizes):
    _check_operands(theta, grad, lr, sizes)
    return [g.new_empty(g.shape) for g in grad]


def _rate_gradient_formula(cotangent, grad, lr, sizes):
    _check_operands(cotangent, grad, lr, sizes)
    return [-_reduce(c * g, r, sizes) for c, g, r in zip(cotangent, grad, lr)]


def _rate_gradient_fake(cotangent, grad, lr, sizes):
    _check_operands(cotangent, grad, lr, sizes)
    return [r.new_empty(r.shape) for r in lr]


def _update(theta: Sequence[Tensor], grad: Sequence[Tensor], lr: Sequence[Tensor], sizes) -> list[Tensor]:
    """S: ``theta[i] - lr[i] * grad[i]``; an empty ``theta`` is zeros."""
    if grad[0].dtype not in KERNEL_DTYPES:
        return _update_formula(theta, grad, lr, sizes)
    if torch.compiler.is_compiling():  # which traces no Function that has a forward-mode rule
        return torch.ops.maml_ext.sgd_update(theta, grad, lr, sizes)
    return _Update.on_lists(theta, grad, lr, sizes)


def _rate_gradient(cotangent, grad, lr, sizes) -> list[Tensor]:
    """R: ``-(cotangent[i] * grad[i])`` summed to the shape of ``lr[i]``, whose values play no part."""
    return _RateGradient.on_lists(cotangent, grad, lr, sizes)


def _split(n: int, tensors: Sequence) -> list[list]:
    return [list(tensors[i : i + n]) for i in range(0, len(tensors), n)]


def _or_zeros(tangents: list, like: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, like)]


class _ListFunction(torch.autograd.Function):
    """An operator on lists as a Function on their concatenation: ``apply(n, sizes, *tensors)``."""

    @classmethod
    def on_lists(cls, first, grad, lr, sizes) -> list[Tensor]:
        return list(cls.apply(len(grad), tuple(sizes), *first, *grad, *lr))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.n, ctx.sizes, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @classmethod
    def run(cls, operator, n, sizes, tensors):
        *first, grad, lr = _split(n, tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(operator(first[0] if first else [], grad, lr, sizes))

    @classmethod
    def vmap(cls, info, in_dims, n, sizes, *tensors):
        """One slice after another: a rate gradient sums over leading dimensions, a batch must not be one."""
        slices = []
        for b in range(info.batch_size):
            rows = [t if d is None else t.select(d, b) for t, d in zip(tensors, in_dims[2:])]
            slices.append(cls.apply(n, sizes, *rows))
        return tuple(torch.stack(column) for column in zip(*slices)), (0,) * n


class _Update(_ListFunction):
    @staticmethod
    def forward(n, sizes, *tensors):
        return _ListFunction.run(torch.ops.maml_ext.sgd_update, n, sizes, tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        *theta, grad, lr = _split(ctx.n, ctx.saved_tensors)
        needs = [any(x) for x in _split(ctx.n, ctx.needs_input_grad[2:])]
        to_theta = list(cotangents) if theta else []
        to_grad = _update([], cotangents, lr, ctx.sizes) if needs[-2] else [None] * ctx.n
        to_lr = _rate_gradient(cotangents, grad, lr, ctx.sizes) if needs[-1] else [None] * ctx.n
        return None, None, *to_theta, *to_grad, *to_lr

    @staticmethod
    def jvp(ctx, _n, _sizes, *tangents):
        *theta, grad, lr = _split(ctx.n, ctx.saved_tensors)
        *dtheta, dgrad, dlr = _split(ctx.n, tangents)
        dtheta = [_or_zeros(d, t) for d, t in zip(dtheta, theta)]
        by_lr = _update(dtheta[0] if dtheta else [], grad, _or_zeros(dlr, lr), ctx.sizes)
        return tuple(_update(by_lr, _or_zeros(dgrad, grad), lr, ctx.sizes))

    @classmethod
    def vmap(cls, info, in_dims, n, sizes, *tensors):
        if any(d is not None for d in _split(n, in_dims[2:])[-1]):
            return super().vmap(info, in_dims, n, sizes, *tensors)
        # Rates are shared: the batch is one more leading dimension.
        stacked = [
            t if d is None else t.movedim(d, 0)
            for t, d in zip(tensors[:-n], in_dims[2:])
        ]
        stacked = [t.expand(info.batch_size, *t.shape) if d is None else t for t, d in zip(stacked, in_dims[2:])]
        return cls.apply(n, sizes, *stacked, *tensors[-n:]), (0,) * n


class _RateGradient(_ListFunction):
    @staticmethod
    def forward(n, sizes, *tensors):
        return _ListFunction.run(torch.ops.maml_ext.sgd_rate_gradient, n, sizes, tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        cotangent, grad, _ = _split(ctx.n, ctx.saved_tensors)
        to_cotangent = _update([], grad, cotangents, ctx.sizes)
        to_grad = _update([], cotangent, cotangents, ctx.sizes)
        return None, None, *to_cotangent, *to_grad, *[None] * ctx.n

    @staticmethod
    def jvp(ctx, _n, _sizes, *tangents):
        cotangent, grad, lr = _split(ctx.n, ctx.saved_tensors)
        dcotangent, dgrad, _ = _split(ctx.n, tangents)
        first = _rate_gradient(_or_zeros(dcotangent, cotangent), grad, lr, ctx.sizes)
        second = _rate_gradient(cotangent, _or_zeros(dgrad, grad), lr, ctx.sizes)
        return tuple(a + b for a, b in zip(first, second))


def _raw_vmap(function: type[_ListFunction]):
    def rule(info, in_dims, first, grad, lr, sizes):
        dims = (None, None, *(d for dims in in_dims[:3] for d in dims))
        outputs, out_dims = function.vmap(info, dims, len(grad), tuple(sizes), *first, *grad, *lr)
        return list(outputs), list(out_dims)

    return rule


library.define(
    "sgd_update(Tensor[] theta, Tensor[] grad, Tensor[] lr, int[] sizes) -> Tensor[]",
    formula=_update_formula,
    fake=_update_fake,
    autograd=_Update.on_lists,
    vmap=_raw_vmap(_Update),
)
library.define(
    "sgd_rate_gradient(Tensor[] cotangent, Tensor[] grad, Tensor[] lr, int[] sizes) -> Tensor[]",
    formula=_rate_gradient_formula,
    fake=_rate_gradient_fake,
    autograd=_RateGradient.on_lists,
    vmap=_raw_vmap(_RateGradient),
)
