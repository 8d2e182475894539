"""Call a module as a function of its parameters, leaving no trace on it."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def stateless(module: nn.Module):
    """While it lasts, ``module`` has second derivatives and no state that a forward pass changes.

    - Batch and instance norm in training mode use batch statistics and leave the running ones alone
      (updating them in place is also what vmap refuses).
    - Attention runs on the MATH kernel, the only one with a second derivative on every device, and
      the fused inference path of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` is off.
    """
    tracking = [m for m in module.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        for m in tracking:
            m.track_running_stats = False
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for m in tracking:
            m.track_running_stats = True


class PlainNorms(TorchFunctionMode):
    """While it lasts, batch, instance and layer norm are written with plain operators.

    Torch's own have wrong third derivatives (2.13, on CPU), these are right at any order, and vmap batches them.
    With ``weight`` ``[N]`` batch norm takes its statistics from the samples whose weight is not 0, so that a task
    padded to the size of others gives what it would alone: samples lie in the first dimension of what is normalised.
    """

    def __init__(self, weight: Tensor | None = None):
        super().__init__()
        self.weight = weight

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._functional(*args, **kwargs)
        if func is torch.batch_norm:
            return self._operator(*args, **kwargs)
        if func is F.instance_norm:
            return self._instances(*args, **kwargs)
        if func is F.layer_norm:
            return self._layers(*args, **kwargs)
        return func(*args, **kwargs)

    def _functional(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        if training:
            return self._normalise(input, weight, bias, eps)
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)

    def _operator(
        self, input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled
    ):
        if training:
            return self._normalise(input, weight, bias, eps)
        return torch.batch_norm(
            input, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled
        )

    def _instances(
        self, input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
        momentum=0.1, eps=1e-5,
    ):  # fmt: skip
        if not use_input_stats or input.dim() < 3:
            return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        F._verify_spatial_size(input.shape)
        centered, variance = _moments(input, range(2, input.dim()))
        return _scaled(input, centered, variance, eps, weight, bias, (-1, *[1] * (input.dim() - 2)))

    def _layers(self, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        shape = tuple(normalized_shape)
        if not shape or input.shape[-len(shape) :] != shape:
            return F.layer_norm(input, normalized_shape, weight, bias, eps)  # which says what is wrong
        centered, variance = _moments(input, range(-len(shape), 0))
        return _scaled(input, centered, variance, eps, weight, bias, shape)

    def _normalise(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        F._verify_batch_size(input.shape)
        dims = (0, *range(2, input.dim()))
        centered, variance = _moments(input, dims) if self.weight is None else self._of_kept(input, dims)
        return _scaled(input, centered, variance, eps, weight, bias, (-1, *[1] * (input.dim() - 2)))

    def _of_kept(self, input: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        samples = self.weight.shape[0]
        if input.shape[0] != samples:
            raise ValueError(
                f"batch norm with weights of samples needs the {samples} samples in the first dimension, got "
                f"{list(input.shape)}"
            )
        wide = input.to(torch.promote_types(input.dtype, self.weight.dtype))
        kept = (self.weight != 0).reshape(-1, *[1] * (input.dim() - 1))
        count = kept.sum() * input.shape[2:].numel()
        mean = torch.where(kept, wide, 0).sum(dims, keepdim=True) / count
        centered = wide - mean
        return centered, torch.where(kept, centered.square(), 0).sum(dims, keepdim=True) / count


def _moments(input: Tensor, dims) -> tuple[Tensor, Tensor]:
    """What is left of the input without its mean, and the variance; in float32 at least, as torch's own."""
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    centered = wide - wide.mean(tuple(dims), keepdim=True)
    return centered, centered.square().mean(tuple(dims), keepdim=True)


def _scaled(input: Tensor, centered: Tensor, variance: Tensor, eps: float, weight, bias, shape: tuple) -> Tensor:
    result = centered * (variance + eps).rsqrt()
    result = result if weight is None else result * weight.reshape(shape)
    result = result if bias is None else result + bias.reshape(shape)
    return result.to(input.dtype)


class Layout:
    """A module as a function of one flat vector ``[P]``, and where each trainable parameter lies in it.

    A frozen parameter (``requires_grad=False``) is no part of it: it is neither adapted nor given a
    gradient. A parameter that two modules share is in it once.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        lazy = [name for name, p in trainable.items() if nn.parameter.is_lazy(p)]
        if lazy:
            raise ValueError(f"module: {lazy[0]} is uninitialized; call the module once on an input to give it a shape")
        if not trainable:
            raise ValueError(
                f"module: expected at least one parameter with requires_grad=True, "
                f"{type(module).__name__} has {sum(1 for _ in module.parameters())} parameters, none of them trainable"
            )
        kinds = {(p.dtype, p.device) for p in trainable.values()}
        if len(kinds) > 1 or not all(dtype.is_floating_point for dtype, _ in kinds):
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise TypeError(f"module: expected trainable parameters of one real dtype on one device, found {found}")
        self.parameters = trainable
        self.shapes = [p.shape for p in trainable.values()]
        self.sizes = [p.numel() for p in trainable.values()]
        self.size = sum(self.sizes)
        self.device = next(iter(trainable.values())).device
        first_name = {id(p): name for name, p in trainable.items()}
        self._aliases = [
            (name, first_name[id(p)])
            for name, p in module.named_parameters(remove_duplicate=False)
            if name not in trainable and p.requires_grad
        ]
        self._buffers = list(module.named_buffers(remove_duplicate=False))

    def flatten(self) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.parameters.values()])

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        pieces = theta.split(self.sizes, -1)
        leading = theta.shape[:-1]
        return {n: p.reshape(leading + s) for n, p, s in zip(self.parameters, pieces, self.shapes)}

    def call(self, theta: Tensor, x: Tensor | tuple) -> Tensor:
        """``module(x)`` (``module(*x)`` for a tuple) with the parameters ``theta``; writes to buffers are lost."""
        values = self.unflatten(theta)
        values.update((alias, values[name]) for alias, name in self._aliases)
        copies = {id(buffer): buffer.clone() for _, buffer in self._buffers}
        values.update((name, copies[id(buffer)]) for name, buffer in self._buffers)
        return torch.func.functional_call(self.module, values, x, tie_weights=False)
