"""Network programs in plain PyTorch: ``run`` executes one, ``check`` compares it with its module."""

import math

import torch
import torch.nn.functional as F
from conftest import relative_error, unchanged
from torch import nn

from maml_ext import recognise
from maml_ext.program import HEADER_INTS, LAYER_INTS, Activation, Kind, Statistics
from maml_ext.stateless import Layout

ACTIVATIONS = {
    Activation.RELU: lambda x, a, b: F.relu(x),
    Activation.LEAKY_RELU: lambda x, a, b: F.leaky_relu(x, a),
    Activation.ELU: lambda x, a, b: F.elu(x, a),
    Activation.GELU: lambda x, a, b: F.gelu(x),
    Activation.GELU_TANH: lambda x, a, b: F.gelu(x, approximate="tanh"),
    Activation.SILU: lambda x, a, b: F.silu(x),
    Activation.SOFTPLUS: lambda x, a, b: F.softplus(x, a, b),
    Activation.TANH: lambda x, a, b: torch.tanh(x),
    Activation.SIGMOID: lambda x, a, b: torch.sigmoid(x),
    Activation.SIN: lambda x, a, b: torch.sin(x),
}


def run(network, theta, x):
    """The program, on samples ``x`` in whatever shape."""
    constants = torch.cat([s.detach().reshape(-1) for s in network.sources]) if network.sources else theta[:0]
    assert network.program[:3] == (1, len(theta), len(constants))
    assert len(network.program) == HEADER_INTS + LAYER_INTS * network.layers
    assert len(network.numbers) == 2 * network.layers == 2 * len(network.descriptions)

    def get(r, *shape):
        if r == -1:
            return None
        source, at = (theta, r) if r >= 0 else (constants, -(r + 2))
        return source[at : at + math.prod(shape)].view(shape)

    values = [x.reshape(len(x), *network.program[3:6])]
    for j in range(network.layers):
        kind, first, second, *a = network.layer(j)
        first_number, second_number = network.numbers[2 * j : 2 * j + 2]
        assert 0 <= first <= j and -1 <= second <= j, "a layer reads a later value"
        v = values[first]
        c, h, w = v.shape[1:]
        if kind == Kind.CONTRACT:
            out, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups, weight, bias = a
            weight, bias = get(weight, out, c // groups, kh, kw), get(bias, out)
            v = F.conv2d(F.pad(v, (left, right, top, bottom)), weight, bias, (sh, sw), 0, (dh, dw), groups)
        elif kind == Kind.NORM:
            statistics, groups, elements, weight, bias, mean, variance, *_ = a
            shape = (c, h, w) if elements else (c, 1, 1)
            weight, bias = get(weight, *shape), get(bias, *shape)
            if statistics == Statistics.BATCH:
                v = F.batch_norm(v, None, None, training=True, eps=first_number)
            elif statistics == Statistics.FIXED:
                v = (v - get(mean, c, 1, 1)) / (get(variance, c, 1, 1) + first_number).sqrt()
            else:
                v = F.group_norm(v, groups, eps=first_number)
            v = v if weight is None else v * weight
            v = v if bias is None else v + bias
        elif kind == Kind.ACTIVATION:
            v = ACTIVATIONS[a[0]](v, first_number, second_number)
        elif kind == Kind.POOL:
            v = pooled(v, *a[:13])
        elif kind == Kind.AVERAGE:
            v = F.adaptive_avg_pool2d(v, a[:2])
        elif kind == Kind.RESHAPE:
            v = v.reshape(len(x), *a[:3])
        elif kind == Kind.COMBINE and second == -1:
            assert a[0] == 0
            v = first_number * v + second_number
        elif kind == Kind.COMBINE:
            y = values[second]
            assert v.shape == y.shape
            v = v * y if a[0] else first_number * v + second_number * y
        elif kind == Kind.SOFTMAX:
            v = F.log_softmax(v, 1) if a[0] else F.softmax(v, 1)
        values.append(v)
    return values[-1].reshape(len(x), *network.prediction)


def pooled(v, average, kh, kw, sh, sw, top, left, dh, dw, oh, ow, count_pad, divisor):
    """Window by window, as the encoding says: padding before, and after it what the output size implies."""
    h, w = v.shape[2:]
    # What lies in the padding proper counts for an average; what ceil_mode adds beyond it never does.
    rows, columns = [], []
    for oy in range(oh):
        for ox in range(ow):
            ys = [y for y in range(oy * sh - top, oy * sh - top + dh * kh, dh)]
            xs = [x for x in range(ox * sw - left, ox * sw - left + dw * kw, dw)]
            inside = [(y, x) for y in ys for x in xs if 0 <= y < h and 0 <= x < w]
            window = torch.stack([v[:, :, y, x] for y, x in inside])
            if not average:
                columns.append(window.amax(0))
                continue
            padded = sum(y < h + top for y in ys) * sum(x < w + left for x in xs)
            columns.append(window.sum(0) / (divisor or (padded if count_pad else len(inside))))
        rows.append(torch.stack(columns, -1))
        columns = []
    return torch.stack(rows, -2)


def recognised(module, *shape):
    return recognise.network(recognise.trace(module), Layout(module), torch.Size(shape))


def check(module, *shape, samples=4):
    """The program computes what the module computes, and recognising leaves the module alone."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():  # away from initial ones and zeros, at which mix-ups do not show
            p.add_(0.1 * torch.randn_like(p))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    with unchanged(module):
        network = recognised(module, *shape)
    layout = Layout(module)
    x = torch.randn(samples, *shape)
    with torch.no_grad():
        actual = run(network, layout.flatten(), x)
        expected = module(x.clone())
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < 1e-12
    return network


class Calls(nn.Module):
    """A network whose forward is ``function(self, x)``, with the given children."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        self.anchor = nn.Linear(5, 5)
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.function(self, x)


def kinds(network):
    return [Kind(network.layer(j)[0]) for j in range(network.layers)]
