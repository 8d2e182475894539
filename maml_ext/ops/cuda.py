"""Which engine runs an operator on CUDA tensors, and the one entry there, which asks that.

The CUDA kernels take what fits a thread block's shared memory, the Triton engine whatever else there is. Both are behind
private names, ``cuda_`` and ``triton_`` and the operator's; ``checked_``, which the Triton engine begins with, checks
arguments as the engines in C++ do and makes results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

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


def define(name: str, arguments: str, fake: Callable) -> None:
    """The private names of an operator, and its entry for CUDA tensors."""
    for prefix in ("checked", "cuda", "triton"):
        library.declare(f"{prefix}_{name}{arguments}", fake)
    operators = torch.ops.maml_ext

    def by_triton(*arguments):
        if triton_absent():
            raise RuntimeError(f"maml_ext::{name}: there is no Triton engine: {triton_absent()}")
        from maml_ext.kernels import engine

        return engine.run(name, getattr(operators, f"checked_{name}"), *arguments)

    def entry(program, numbers, constants, theta, *rest):
        fits = not misfit(program, numbers, theta.element_size(), theta.device.index)
        operator = getattr(operators, f"cuda_{name}" if fits else f"triton_{name}")
        return operator(program, numbers, constants, theta, *rest)

    library.implement(f"triton_{name}", by_triton, "CompositeExplicitAutograd")
    library.implement(name, entry, "CUDA")
