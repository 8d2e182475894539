"""The one place where kernels are started, and where what they do is counted.

Every wrapper says how many floating-point operations its kernel has to do and how many bytes it has to move between
the processor and memory: each operand read once, each result written once, however often tiles of it are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    kernel: object  # a triton.jit function
    programs: int
    arguments: tuple
    constants: dict  # with num_warps and num_stages
    flops: int
    moved: int  # bytes


_watch: Callable[[Launch], bool] | None = None


@contextmanager
def watched(watch: Callable[[Launch], bool]):
    """Within it, ``watch`` sees every launch, and says whether it is to take place."""
    global _watch
    before, _watch = _watch, watch
    try:
        yield
    finally:
        _watch = before


def is_watched() -> bool:
    return _watch is not None


def launch(kernel, programs: int, *arguments, flops: int, moved: int, warps: int = 4, stages: int = 2, **constants):
    """Run so many programs of a kernel, on one axis. Tuples of tensors are numbers, see ``numbers.py``."""
    constants |= {"num_warps": warps, "num_stages": stages}
    if _watch and not _watch(Launch(kernel, programs, arguments, constants, flops, moved)):
        return
    if programs:
        kernel[(programs,)](*arguments, **constants)


def size(*numbers) -> int:
    """Bytes of tensors, of numbers (tuples of them) and of nothing (None)."""
    return sum(
        0 if n is None else size(*n) if isinstance(n, (tuple, list)) else n.numel() * n.element_size() for n in numbers
    )
