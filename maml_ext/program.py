"""The network program: what a recognised network looks like to a compiled engine.

Integers: ``[1, P, Q, c, h, w, L]`` (version, sizes of theta and of the constants, shape of a sample, number of
layers), then 17 for each layer, ``[kind, input, second or -1, attributes ...]``, then 4 for the loss, ``[kind,
ignore_index, class weights, precision]``. Numbers: two for each layer and two for the loss. Value 0 is the input, layer
j computes value j + 1, the last is the prediction; a value is (channels, height, width), a vector (features, 1, 1).
A parameter is an offset in theta, -1 if absent, or -(offset + 2) in the constants: running statistics, frozen
parameters and class weights, which are read anew at every call. Orders and meanings are PyTorch's.

Attributes by kind (numbers in braces):
    CONTRACT    out, kernel (2), stride (2), padding (top, bottom, left, right), dilation (2), groups, weight, bias
    NORM        statistics, groups, whether weights are per element, weight, bias, mean, variance {eps}
    ACTIVATION  which {its parameters}
    POOL        1 for average, kernel (2), stride (2), padding (top, left), dilation (2), output (2),
                count_include_pad, divisor (0: none)
    AVERAGE     output (2): adaptive average pooling
    RESHAPE     channels, height, width
    COMBINE     0: {a} x + {b} y, or {a} x + {b} without a second input; 1: x y
    SOFTMAX     1 for its logarithm

The precision is the least in which products may be computed, an engine may do better. Sums, parameters and everything
that is stored are in theta's dtype whatever it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

VERSION, HEADER_INTS, LAYER_INTS = 1, 7, 17
ABSENT = -1


class Kind(IntEnum):
    CONTRACT, NORM, ACTIVATION, POOL, AVERAGE, RESHAPE, COMBINE, SOFTMAX = range(8)


class Statistics(IntEnum):
    BATCH, FIXED, SAMPLE = range(3)


class Activation(IntEnum):
    RELU, LEAKY_RELU, ELU, GELU, GELU_TANH, SILU, SOFTPLUS, TANH, SIGMOID, SIN = range(10)


class Precision(IntEnum):
    FULL, TF32, BFLOAT16, FLOAT16 = range(4)


class LossKind(IntEnum):
    NONE, MSE, HUBER, LABELS, SOFT_LABELS, BINARY = range(-1, 5)


@dataclass(frozen=True)
class Network:
    """A recognised network at one shape of samples.

    Args:
        program: the integers without those of the loss.
        numbers: likewise.
        sources: what makes up the constants, in this order: references, so that changed values are seen.
        prediction: shape of the prediction of a sample.
        fewest_positions: of a sample, that a norm over the batch sees; 0 where there is no such norm.
        descriptions: a line for each layer.
    """

    program: tuple[int, ...]
    numbers: tuple[float, ...]
    sources: tuple[Tensor, ...]
    prediction: torch.Size
    fewest_positions: int
    descriptions: tuple[str, ...]

    @property
    def layers(self) -> int:
        return self.program[6]

    def layer(self, j: int) -> tuple[int, ...]:
        return self.program[HEADER_INTS + LAYER_INTS * j :][:LAYER_INTS]
