"""The operator library ``torch.ops.maml_ext``: schemas and Python rules here, compiled kernels in ``_C``.

Schemas are declared in Python, so that an installation without a compiler has the same operators; ``_C``
only adds implementations for a device, which take precedence over the PyTorch formula.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from importlib import metadata
from importlib.util import find_spec

import torch

_library = torch.library.Library("maml_ext", "DEF")

ABSENT: str | None  # why the compiled kernels are not there; None where they are
try:
    importlib.import_module("maml_ext._C")  # which registers the kernels
    ABSENT = None
except ModuleNotFoundError:
    ABSENT = "maml_ext was installed without its compiled part (no compiler, or MAML_EXT_BUILD=none)"
except ImportError as error:
    ABSENT = f"maml_ext._C does not load: {error}"

CUDA_ABSENT = "the installed package was built without CUDA kernels: MAML_EXT_BUILD=cuda builds them"

TRITON = 3, 8  # the oldest version whose kernels were compiled and run

_warned = False


def cuda_absent() -> str | None:
    """Why there are no CUDA kernels in what is installed; None where there are some, a device or not."""
    if ABSENT:
        return ABSENT
    name, key = "maml_ext::cuda_architectures", "CompositeExplicitAutograd"
    built = torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    return None if built else CUDA_ABSENT


@cache
def triton_absent() -> str | None:
    """Why no kernels in Triton can run on any device; None where some can. Imports nothing."""
    if not find_spec("triton"):
        return "triton is not installed"
    try:
        found = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None  # a build that came under another name, with its torch
    old = tuple(map(int, found.split("+")[0].split(".")[:2])) < TRITON
    return f"expected triton {'.'.join(map(str, TRITON))} or later, got {found}" if old else None


def warn_if_absent() -> None:
    """Say once, at first use, that the compiled kernels are absent."""
    global _warned
    if ABSENT and not _warned:
        _warned = True
        warnings.warn(f"the compiled engines are absent, PyTorch formulas stand in: {ABSENT}", stacklevel=3)


def declare(schema: str, fake: Callable | None = None) -> None:
    """An operator without a derivative, and without a formula: what there is of it is implemented elsewhere."""
    _library.define(schema)
    if fake is not None:
        torch.library.register_fake(f"maml_ext::{schema.split('(')[0]}", fake, lib=_library)


def implement(name: str, function: Callable, key: str) -> None:
    """An operator's implementation in Python for one dispatch key."""
    _library.impl(name, function, key)


def define(schema: str, *, formula: Callable, fake: Callable, autograd: Callable, vmap: Callable) -> Callable:
    """Define a differentiable operator ``maml_ext::<schema>`` and return it.

    Args:
        formula: what it computes, in PyTorch operators: for every device without a kernel of its own.
        fake: the same for shapes only.
        autograd: the operator through its ``autograd.Function``; installed for the raw operator too.
            (An operator whose gradient comes from ``register_autograd`` alone returns silent zeros under
            forward-mode differentiation.)
        vmap: the batching rule, as for ``torch.library.register_vmap``.
    """
    _library.define(schema)
    name = schema.split("(")[0]
    _library.impl(name, formula, "CompositeExplicitAutograd")
    torch.library.register_fake(f"maml_ext::{name}", fake, lib=_library)
    torch.library.register_vmap(f"maml_ext::{name}", vmap, lib=_library)
    _library.impl(name, autograd, "Autograd")
    return getattr(torch.ops.maml_ext, name)


declare("cuda_devices() -> int")  # that this build can use
declare("cuda_shared_memory(int device) -> int")  # bytes that a block may have
declare("cuda_architectures() -> str")  # "8.0,9.0+PTX": what the CUDA kernels were compiled for
