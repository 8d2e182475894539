"""What the wrappers of kernels are told about layers and memory.

Values are ``[T, N, H, W, C]``, channels last. A Number is a tuple of one or two tensors of the same layout: value and,
where there is one, tangent. In the engine's vectors of parameters ``[T, P]`` filters are ``[taps, inputs, outputs]``
(inputs of a group), weights of single elements ``[H, W, C]``, so that channels are contiguous everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Number = tuple[Tensor, ...]


@dataclass(frozen=True)
class Slice:
    """A parameter tensor in vectors of parameters: of task t it starts at ``t * stride + offset``.

    Parameters have stride P; constants, which are the same for all tasks and have no tangent, have stride 0.
    """

    numbers: Number
    stride: int
    offset: int


@dataclass(frozen=True)
class Partials:
    """Where a kernel puts its share of a parameter's gradient: ``[splits, T, size]`` from ``offset`` on.

    A kernel that sums over many positions does so in ``splits`` parts, in fixed order; the pass that updates the
    parameters adds them up. So no sum needs a launch of its own, and none depends on which program is first.
    """

    numbers: Number  # flat
    offset: int
    splits: int


@dataclass(frozen=True)
class Activation:
    """kernels.activation, with its parameters."""

    kind: int
    a: float = 0.0
    b: float = 0.0


@dataclass(frozen=True)
class Window:
    """A convolution, or a linear layer (all 1): shapes of a sample before and behind it, and how it moves over it."""

    in_h: int
    in_w: int
    in_c: int
    out_h: int
    out_w: int
    out_c: int
    kh: int = 1
    kw: int = 1
    sh: int = 1
    sw: int = 1
    top: int = 0
    left: int = 0
    dh: int = 1
    dw: int = 1
    groups: int = 1


@dataclass(frozen=True)
class Statistics:
    """Of the samples of a task that have weight, each channel's moments over ranges of rows, see ``statistics.py``."""

    count: Tensor  # [T, chunks]
    mean: Number  # [T, chunks, C]
    m2: Number  # [T, chunks, C]: sums of squared distances to that mean
