"""Which engine runs an operator on CUDA tensors, and the one entry there, which asks that.

The CUDA kernels take what fits a thread block's shared memory, the Triton engine whatever else there is. Both are
behind private names, ``cuda_`` and ``triton_`` and the operator's; ``checked_``, which the Triton engine begins with,
checks arguments as the engines in C++ do and makes results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

from . import library


def triton_absent() -> str | None:
    """Why there is no Triton engine; None where there is one, a device or not."""
    return library.ABSENT or library.triton_absent()  # the binary checks what it is given


def absent() -> str | None:
    """Why there is no engine for CUDA devices at all."""
    if library.cuda_absent() and triton_absent():
        return f"{library.cuda_absent()}; nor the Triton engine: {triton_absent()}"
    return None


def misfit(program: Sequence[int], numbers: Sequence[float], element_size: int, device: int, ops=None) -> str:
    """Why the CUDA kernels cannot run a network on a device; "" where they can."""
    if library.cuda_absent():
        return f"there are no CUDA kernels: {library.cuda_absent()}"
    ops = ops or torch.ops.maml_ext
    return ops.cuda_misfit(program, numbers, element_size, ops.cuda_shared_memory(device))


def _without_derivative(name: str, public: str) -> Callable:
    """A private operator's kernel for autograd: a gradient would be None, a tangent 0, and nobody would know."""

    def kernel(*arguments):
        tensors = [t for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor)]
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        forward = forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
        if recorded or forward:
            raise RuntimeError(f"maml_ext::{name} has no derivative: maml_ext::{public} has")
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.maml_ext, name)(*arguments)

    return kernel


def define(name: str, arguments: str, fake: Callable) -> None:
    """The private names of an operator, and its entry for CUDA tensors."""
    for prefix in ("checked", "cuda", "triton"):
        library.declare(f"{prefix}_{name}{arguments}", fake)
        library.implement(f"{prefix}_{name}", _without_derivative(f"{prefix}_{name}", name), "Autograd")
    operators = torch.ops.maml_ext

    def by_triton(*arguments):
        if triton_absent():
            raise RuntimeError(f"maml_ext::{name}: there is no Triton engine: {triton_absent()}")
        from maml_ext.kernels import engine

        return engine.run(name, getattr(operators, f"checked_{name}"), *arguments)

    def entry(program, numbers, constants, theta, *rest):
        like = rest[0]  # x or lr: of theta's dtype and device, or the engine refuses them
        fits = like.is_cuda and not misfit(program, numbers, like.element_size(), like.device.index)
        operator = getattr(operators, f"cuda_{name}" if fits else f"triton_{name}")
        return operator(program, numbers, constants, theta, *rest)

    library.implement(f"triton_{name}", by_triton, "CompositeExplicitAutograd")
    library.implement(name, entry, "CUDA")
