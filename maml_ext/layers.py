"""The layers of a network program, written one by one as a graph is read.

``Layers`` has a method for each layer, named and called like the function in ``torch.nn.functional``. It
knows shapes, parameters and layers, and nothing of graphs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .program import ABSENT, LAYER_INTS, VERSION, Activation, Kind, Network, Statistics
from .stateless import Layout
from .tracing import Unrecognised


class Samples:
    """The number of samples, which no program knows: fit only for the first argument of view and reshape."""


N = Samples()


class Value:
    """A tensor of the program: its number, and the shape PyTorch gives it without the samples."""

    def __init__(self, index: int, shape: tuple[int, ...], opaque: bool = False):
        self.index, self.shape, self.opaque = index, tuple(shape), opaque

    @property
    def chw(self) -> tuple[int, int, int]:
        """A vector is (F, 1, 1), a sequence [C, L] is (C, 1, L)."""
        if len(self.shape) == 3:
            return self.shape
        return (self.shape[0], 1, math.prod(self.shape[1:])) if self.shape else (1, 1, 1)


def dimension(dim: int, rank: int) -> int:
    if not -rank <= dim < rank:
        raise Unrecognised(f"there is no dimension {dim} of {rank}")
    return dim % rank


def pair_of(value) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise Unrecognised(f"expected two sizes, got {value}")
    return pair


class Layers:
    """The program of a network as far as it was read, for one shape of samples.

    ``flat``: the samples are flattened before anything else looks at them, and so are vectors from the start.
    """

    def __init__(self, layout: Layout, sample: torch.Size, flat: bool):
        self.parameters, self.sample, self.flat = layout.size, tuple(sample), flat
        self.rows: list[list[int]] = []
        self.numbers: list[float] = []
        self.descriptions: list[str] = []
        self.sources: list[Tensor] = []
        self.offsets, at = {}, 0
        for parameter in layout.parameters.values():
            self.offsets[id(parameter)] = at
            at += parameter.numel()
        self.dtype = next(iter(layout.parameters.values())).dtype
        self.fewest_positions = 0

    def input(self) -> Value:
        return Value(0, self.sample, opaque=self.flat)

    def program(self, result: Value) -> Network:
        """With ``result`` as the prediction: what was read after it (and is not used) is cut off."""
        if result.opaque:
            raise Unrecognised("the network returns its input")
        rows = self.rows[: result.index]
        header = (math.prod(self.sample), 1, 1) if self.flat else self.input().chw
        constants = sum(source.numel() for source in self.sources)
        return Network(
            (VERSION, self.parameters, constants, *header, len(rows), *(i for row in rows for i in row)),
            tuple(self.numbers[: 2 * result.index]),
            tuple(self.sources),
            torch.Size(result.shape),
            self.fewest_positions,
            tuple(self.descriptions[: result.index]),
        )

    # Building blocks.

    def layer(
        self, kind: Kind, x: Value, attributes, shape, text: str, second: int = -1, numbers=(0.0, 0.0)
    ) -> Value:
        if not isinstance(x, Value):
            raise Unrecognised(f"{text.split()[0]} of something that is not computed from the input")
        if x.opaque:
            raise Unrecognised(f"samples of shape {list(x.shape)} have a rule only if flattened at once")
        if any(isinstance(value, Tensor) for value in (*attributes, *numbers)):
            raise Unrecognised(f"{text.split()[0]} with a parameter where a number is expected")
        row = [int(kind), x.index, second, *map(int, attributes)]
        self.rows.append(row + [0] * (LAYER_INTS - len(row)))
        self.numbers += [float(number) for number in numbers]
        self.descriptions.append(f"{text:44} {list(shape)}")
        return Value(len(self.rows), shape)

    def reference(self, tensor: Tensor | None, shape: tuple[int, ...], what: str) -> int:
        if tensor is None:
            return ABSENT
        if not isinstance(tensor, Tensor):
            raise Unrecognised(f"{what} is computed, not a parameter")
        if tuple(tensor.shape) != tuple(shape):
            raise Unrecognised(f"{what}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if id(tensor) in self.offsets:
            return self.offsets[id(tensor)]
        if tensor.requires_grad:
            raise Unrecognised(f"{what} requires grad and is no parameter of the network")
        if tensor.dtype != self.dtype:
            raise Unrecognised(f"{what} has dtype {tensor.dtype}, the parameters {self.dtype}")
        at = 0
        for source in self.sources:
            if source is tensor:
                break
            at += source.numel()
        else:
            self.sources.append(tensor)
        return -(at + 2)

    # Layers, each called like torch's function.

    def linear(self, input, weight, bias=None):
        if len(input.shape) != 1:
            raise Unrecognised(f"linear on samples of shape {list(input.shape)}, expected vectors")
        out = weight.shape[0]
        refs = self.reference(weight, (out, *input.shape), "weight"), self.reference(bias, (out,), "bias")
        attributes = [out, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, *refs]
        return self.layer(Kind.CONTRACT, input, attributes, (out,), f"linear {out}")

    def conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        c, h, w = self.image(input, "conv2d")
        out, _, kh, kw = weight.shape
        (sh, sw), (dh, dw) = pair_of(stride), pair_of(dilation)
        if padding == "same":
            total = dh * (kh - 1), dw * (kw - 1)
            top, left = total[0] // 2, total[1] // 2
            bottom, right = total[0] - top, total[1] - left
        else:
            top, left = bottom, right = (0, 0) if padding == "valid" else pair_of(padding)
        if min(sh, sw, dh, dw) < 1 or min(top, left) < 0 or padding == "same" and max(sh, sw) > 1:
            raise Unrecognised(f"conv2d: stride {stride}, padding {padding!r}, dilation {dilation}")
        if c % groups or out % groups:
            raise Unrecognised(f"conv2d: {groups} groups do not divide {c} and {out} channels")
        oh = (h + top + bottom - dh * (kh - 1) - 1) // sh + 1
        ow = (w + left + right - dw * (kw - 1) - 1) // sw + 1
        if min(oh, ow) < 1:
            raise Unrecognised(f"conv2d: the kernel is larger than the padded input {[c, h, w]}")
        shape = out, c // groups, kh, kw
        refs = self.reference(weight, shape, "weight"), self.reference(bias, (out,), "bias")
        attributes = [out, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups, *refs]
        grouped = f", {groups} groups (run as one)" if groups > 1 else ""
        text = f"conv2d {out}, {kh}x{kw}, stride {sh}{grouped}"
        return self.layer(Kind.CONTRACT, input, attributes, (out, oh, ow), text)

    def image(self, x: Value, what: str) -> tuple[int, int, int]:
        if not isinstance(x, Value) or len(x.shape) != 3:
            found = list(getattr(x, "shape", []))
            raise Unrecognised(f"{what} on samples of shape {found}, expected [C, H, W]")
        return x.shape

    def norm(self, x, statistics, groups, elements, weight, bias, mean, variance, eps, text):
        shape = x.shape if elements else x.shape[:1]
        refs = [self.reference(t, shape, name) for t, name in ((weight, "weight"), (bias, "bias"))]
        refs += [self.reference(t, x.shape[:1], "running statistics") for t in (mean, variance)]
        if statistics == Statistics.BATCH:
            positions = math.prod(x.shape[1:])
            self.fewest_positions = min(self.fewest_positions or positions, positions)
        attributes = [statistics, groups, int(elements), *refs]
        return self.layer(Kind.NORM, x, attributes, x.shape, text, numbers=(eps, 0.0))

    def batch_norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        if training:
            running_mean = running_var = None
        kind = Statistics.BATCH if training else Statistics.FIXED
        text = f"batch norm, statistics of the {'batch' if training else 'training'}"
        return self.norm(input, kind, 1, False, weight, bias, running_mean, running_var, eps, text)

    def layer_norm(self, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        if tuple(normalized_shape) != input.shape:
            raise Unrecognised(f"layer norm over {list(normalized_shape)}, not all of {list(input.shape)}")
        return self.norm(input, Statistics.SAMPLE, 1, True, weight, bias, None, None, eps, "layer norm")

    def group_norm(self, input, num_groups, weight=None, bias=None, eps=1e-5):
        text = f"group norm, {num_groups} groups"
        if input.shape[0] % num_groups:
            raise Unrecognised(f"{text}, do not divide {input.shape[0]} channels")
        return self.norm(input, Statistics.SAMPLE, num_groups, False, weight, bias, None, None, eps, text)

    def instance_norm(
        self, input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
        momentum=0.1, eps=1e-5,
    ):  # fmt: skip
        if not use_input_stats:
            raise Unrecognised("instance norm with running statistics has no compiled rule")
        c, *_ = self.image(input, "instance norm")
        return self.norm(input, Statistics.SAMPLE, c, False, weight, bias, None, None, eps, "instance norm")

    def pool(self, x, average, kernel, stride, padding, dilation, ceil_mode, count_padding, divisor):
        c, *size = self.image(x, "pooling")
        kernel, padding, dilation = pair_of(kernel), pair_of(padding), pair_of(dilation)
        stride = kernel if stride is None or stride == [] else pair_of(stride)
        out = []
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation):
            extra = s - 1 if ceil_mode else 0
            o = (n + 2 * p - d * (k - 1) - 1 + extra) // s + 1
            if ceil_mode and (o - 1) * s >= n + p:
                o -= 1
            if o < 1 or p > k // 2:
                raise Unrecognised(f"pooling: kernel {list(kernel)} does not fit {[c, *size]}")
            out.append(o)
        window = *kernel, *stride, *padding, *dilation
        attributes = [average, *window, *out, count_padding, divisor or 0]
        text = f"{'average' if average else 'max'} pool {kernel[0]}x{kernel[1]}, stride {stride[0]}"
        return self.layer(Kind.POOL, x, attributes, (c, *out), text)

    def max_pool2d(
        self, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
    ):
        if return_indices:
            raise Unrecognised("max pooling that returns indices has no compiled rule")
        return self.pool(input, False, kernel_size, stride, padding, dilation, ceil_mode, True, None)

    def avg_pool2d(
        self, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
        divisor_override=None,
    ):  # fmt: skip
        return self.pool(
            input, True, kernel_size, stride, padding, 1, ceil_mode, count_include_pad, divisor_override
        )

    def adaptive_avg_pool2d(self, input, output_size):
        c, h, w = self.image(input, "adaptive pooling")
        sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
        out = tuple(n if o is None else o for n, o in zip((h, w), sizes))
        return self.layer(Kind.AVERAGE, input, out, (c, *out), f"adaptive average pool {out[0]}x{out[1]}")

    def mean(self, input, dim=None, keepdim=False):
        rank = len(input.shape) + 1
        dims = {dimension(d, rank) for d in ((dim,) if isinstance(dim, int) else tuple(dim or ()))}
        if rank < 3 or dims != set(range(2, rank)):
            raise Unrecognised(f"mean over dimensions {dim}: only over all spatial ones")
        c = input.shape[0]
        shape = (c, *[1] * (rank - 2)) if keepdim else (c,)
        return self.layer(Kind.AVERAGE, input, (1, 1), shape, "mean over positions")

    def reshaped(self, x: Value, shape: tuple[int, ...]) -> Value:
        if math.prod(shape) != math.prod(x.shape):
            raise Unrecognised(f"a reshape of {list(x.shape)} to {list(shape)} mixes samples")
        if not 1 <= len(shape) <= 3:
            raise Unrecognised(f"samples of shape {list(shape)} have no compiled rule")
        before = (math.prod(x.shape), 1, 1) if x.opaque else x.chw
        after = Value(x.index, shape)
        if before == after.chw:
            return after
        x = Value(x.index, before)
        return self.layer(Kind.RESHAPE, x, after.chw, shape, "reshape")

    def view(self, input, *shape):
        shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        first, *rest = shape
        if not all(isinstance(s, int) for s in rest) or not isinstance(first, (int, Samples)):
            raise Unrecognised("a reshape whose sizes depend on the number of samples")
        if isinstance(first, int) and first != -1:
            raise Unrecognised(f"a reshape to a fixed number of samples, {first}")
        if -1 in rest:
            if first == -1:
                raise Unrecognised("a reshape with two unknown sizes")
            known = -math.prod(rest)
            rest[rest.index(-1)] = math.prod(input.shape) // max(known, 1)
        return self.reshaped(input, tuple(rest))

    reshape = view

    def flatten(self, input, start_dim=0, end_dim=-1):
        rank = len(input.shape) + 1
        start, end = dimension(start_dim, rank), dimension(end_dim, rank)
        if start == 0:
            raise Unrecognised("flatten from dimension 0 mixes samples")
        kept = input.shape[: start - 1], input.shape[start - 1 : end], input.shape[end:]
        return self.reshaped(input, (*kept[0], math.prod(kept[1]), *kept[2]))

    def unflatten(self, input, dim, sizes):
        d = dimension(dim, len(input.shape) + 1)
        if d == 0:
            raise Unrecognised("unflatten of dimension 0 mixes samples")
        sizes = list(sizes)
        if -1 in sizes:
            sizes[sizes.index(-1)] = input.shape[d - 1] // -math.prod(sizes)
        return self.reshaped(input, (*input.shape[: d - 1], *sizes, *input.shape[d:]))

    def same(self, x, *_, **__):
        return x

    contiguous = same

    def dropout(self, input, p=0.5, training=True, inplace=False):
        if p and training:
            raise Unrecognised(f"dropout with p = {p} in training mode draws random numbers")
        return input

    def combine(self, x, y, alpha, beta, multiply=False):
        if not isinstance(beta, (int, float)):
            raise Unrecognised("alpha is no number")
        if isinstance(x, Value) and isinstance(y, Value):
            if x.shape != y.shape or x.opaque or y.opaque:
                raise Unrecognised(f"shapes {list(x.shape)} and {list(y.shape)} do not match: broadcasting")
            text, numbers = ("multiply", (0, 0)) if multiply else ("add", (alpha, beta))
            return self.layer(Kind.COMBINE, x, [int(multiply)], x.shape, text, y.index, numbers)
        if not isinstance(x, Value):
            x, y, alpha, beta = y, x, beta, alpha
        if isinstance(y, bool) or not isinstance(y, (int, float)) or not isinstance(x, Value):
            raise Unrecognised("arithmetic with what is neither a number nor computed from the input")
        numbers = (y, 0.0) if multiply else (alpha, beta * y)
        text = f"{numbers[0]:g} x + {numbers[1]:g}"
        return self.layer(Kind.COMBINE, x, [0], x.shape, text, numbers=numbers)

    def add(self, input, other, alpha=1):
        return self.combine(input, other, 1.0, alpha)

    def sub(self, input, other, alpha=1):
        return self.combine(input, other, 1.0, -alpha)

    def mul(self, input, other):
        return self.combine(input, other, 1.0, 1.0, multiply=True)

    def div(self, input, other):
        if isinstance(other, bool) or not isinstance(other, (int, float)) or not other:
            raise Unrecognised("division by something that is not a number")
        return self.combine(input, 1.0 / other, 1.0, 1.0, multiply=True)

    def neg(self, input):
        return self.combine(input, -1.0, 1.0, 1.0, multiply=True)

    def activation(self, x, which: Activation, *numbers: float) -> Value:
        numbers = (*numbers, 0.0, 0.0)[:2]
        return self.layer(Kind.ACTIVATION, x, [which], x.shape, which.name.lower(), numbers=numbers)

    def relu(self, input, inplace=False):
        return self.activation(input, Activation.RELU)

    def clamp(self, input, min=None, max=None):
        if max is not None or isinstance(min, bool) or not isinstance(min, (int, float)) or min != 0:
            raise Unrecognised("clamp has a compiled rule for min=0 alone")
        return self.activation(input, Activation.RELU)

    def leaky_relu(self, input, negative_slope=0.01, inplace=False):
        return self.activation(input, Activation.LEAKY_RELU, negative_slope)

    def elu(self, input, alpha=1.0, inplace=False):
        return self.activation(input, Activation.ELU, alpha)

    def gelu(self, input, approximate="none"):
        return self.activation(input, Activation.GELU if approximate == "none" else Activation.GELU_TANH)

    def silu(self, input, inplace=False):
        return self.activation(input, Activation.SILU)

    def softplus(self, input, beta=1.0, threshold=20.0):
        return self.activation(input, Activation.SOFTPLUS, beta, threshold)

    def tanh(self, input):
        return self.activation(input, Activation.TANH)

    def sigmoid(self, input):
        return self.activation(input, Activation.SIGMOID)

    def sin(self, input):
        return self.activation(input, Activation.SIN)

    def softmax(self, input, dim=None, _stacklevel=3, dtype=None, logarithm=0):
        rank = len(input.shape) + 1
        if dim is None or dimension(dim, rank) != 1 or dtype is not None:
            raise Unrecognised(f"softmax over dimension {dim}: only over channels, dimension 1")
        text = "log softmax" if logarithm else "softmax"
        return self.layer(Kind.SOFTMAX, input, [logarithm], input.shape, text)

    def log_softmax(self, input, dim=None, _stacklevel=3, dtype=None):
        return self.softmax(input, dim, dtype=dtype, logarithm=1)

    # Sizes.

    def size(self, input, dim=None):
        shape = (N, *input.shape)
        return shape if dim is None else shape[dim]

    def getattr(self, input, name):
        if name != "shape":
            raise Unrecognised(f"the attribute {name} of a tensor has no compiled rule")
        return (N, *input.shape)

    def getitem(self, input, index):
        if isinstance(input, Value):
            raise Unrecognised("indexing has no compiled rule")
        return input[index]

    add_, sub_, mul_, div_, neg_, clamp_, relu_ = add, sub, mul, div, neg, clamp, relu
    leaky_relu_, elu_, tanh_, sigmoid_, sin_ = leaky_relu, elu, tanh, sigmoid, sin
