"""Which modules have a network program, and that the program says what the module does.

``run`` below executes a program with plain PyTorch operators; its result is compared with the module's.
"""

import contextlib
import math
import random
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, unchanged
from torch import nn

from maml_ext import recognise
from maml_ext.program import HEADER_INTS, LAYER_INTS, Activation, Kind, Statistics
from maml_ext.recognise import Unrecognised
from maml_ext.stateless import Layout

pytestmark = pytest.mark.usefixtures("float64")
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


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "conv": (lambda: nn.Conv2d(2, 3, 3), (2, 7, 5)),
    "conv stride": (lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0)), (2, 7, 6)),
    "conv dilation": (lambda: nn.Conv2d(2, 3, (2, 3), padding=(2, 1), dilation=(3, 2)), (2, 8, 9)),
    "conv groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 7)),
    "conv depthwise": (lambda: nn.Conv2d(3, 3, 5, 2, 2, groups=3), (3, 7, 7)),
    "conv same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (2, 5, 7)),
    "conv valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 5, 7)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(5), (5,)),
    "batch norm 1d, sequences": (lambda: nn.BatchNorm1d(5), (5, 3)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3, eps=0.1), (3, 4, 5)),
    "batch norm, eval": (lambda: nn.BatchNorm2d(3).eval(), (3, 4, 5)),
    "batch norm without running statistics, eval": (
        lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(),
        (3, 4, 5),
    ),
    "layer norm": (lambda: nn.LayerNorm(5, eps=0.1), (5,)),
    "layer norm, image": (lambda: nn.LayerNorm([2, 3, 4]), (2, 3, 4)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (5,)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (6, 3, 2)),
    "group norm, vector": (lambda: nn.GroupNorm(2, 6), (6,)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 4, 5)),
    "max pool": (lambda: nn.MaxPool2d(2), (2, 5, 7)),
    "max pool, all options": (lambda: nn.MaxPool2d((3, 2), (2, 1), (1, 1), (2, 3), ceil_mode=True), (2, 8, 9)),
    "max pool, ceil": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 6, 8)),
    "average pool": (lambda: nn.AvgPool2d(2), (2, 5, 7)),
    "average pool, ceil": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 6, 8)),
    "average pool, padding": (lambda: nn.AvgPool2d((3, 2), (2, 3), (1, 0), count_include_pad=False), (2, 7, 8)),
    "average pool, divisor": (lambda: nn.AvgPool2d(3, 1, 1, divisor_override=4), (2, 4, 5)),
    "adaptive pool": (lambda: nn.AdaptiveAvgPool2d((3, 2)), (2, 7, 5)),
    "adaptive pool, one kept": (lambda: nn.AdaptiveAvgPool2d((None, 2)), (2, 7, 5)),
    "flatten": (nn.Flatten, (2, 3, 4)),
    "flatten some": (lambda: nn.Flatten(2), (2, 3, 4)),
    "unflatten": (lambda: nn.Unflatten(1, (2, 3, 4)), (24,)),
    "relu": (nn.ReLU, (5,)),
    "leaky relu": (lambda: nn.LeakyReLU(0.1), (5,)),
    "elu": (lambda: nn.ELU(0.7), (5,)),
    "gelu": (nn.GELU, (5,)),
    "gelu, tanh": (lambda: nn.GELU("tanh"), (5,)),
    "silu": (nn.SiLU, (5,)),
    "softplus": (lambda: nn.Softplus(2, 0.5), (5,)),
    "tanh": (nn.Tanh, (5,)),
    "sigmoid": (nn.Sigmoid, (2, 3, 4)),
    "softmax": (lambda: nn.Softmax(1), (5,)),
    "softmax, last": (lambda: nn.Softmax(-1), (5,)),
    "log softmax, image": (lambda: nn.LogSoftmax(1), (2, 3, 4)),
    "dropout, p=0": (lambda: nn.Dropout(0.0), (5,)),
    "dropout, eval": (lambda: nn.Dropout2d().eval(), (2, 3, 4)),
    "identity": (nn.Identity, (5,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_as_a_module(name):
    make, shape = LAYERS[name]
    first = nn.Linear(shape[0], shape[0]) if len(shape) == 1 else nn.PReLU(1)
    if len(shape) == 3:
        first = nn.Conv2d(shape[0], shape[0], 1)
    if len(shape) == 2:
        first = nn.Sequential(nn.Flatten(), nn.Linear(15, 15), nn.Unflatten(1, shape))
    check(nn.Sequential(first, make()), *shape)


def normalised(m, x):
    return F.batch_norm(x, None, None, m.weight, m.bias, True)


VECTOR = {
    "F.linear": lambda m, x: F.linear(x, m.anchor.weight, m.anchor.bias),
    "relu": lambda m, x: x.relu() + torch.relu(x) + F.relu(x),
    "relu in place": lambda m, x: F.relu(m.anchor(x), inplace=True) + m.anchor(x).relu_(),
    "torch.relu_": lambda m, x: torch.relu_(m.anchor(x)),
    "clamp": lambda m, x: m.anchor(x).clamp(min=0) + torch.clamp(m.anchor(x), 0),
    "leaky relu": lambda m, x: F.leaky_relu(x, 0.2) + F.leaky_relu_(m.anchor(x), negative_slope=0.3),
    "elu": lambda m, x: F.elu(x, 0.5),
    "gelu": lambda m, x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "silu": lambda m, x: F.silu(x),
    "softplus": lambda m, x: F.softplus(x, 2.0),
    "tanh": lambda m, x: x.tanh() + torch.tanh(x) + F.tanh(x),
    "sigmoid": lambda m, x: x.sigmoid() + torch.sigmoid(x) + F.sigmoid(x),
    "sin": lambda m, x: torch.sin(30 * m.anchor(x)) + x.sin(),
    "softmax": lambda m, x: F.softmax(x, dim=1) + x.softmax(-1) + torch.softmax(x, 1),
    "log softmax": lambda m, x: F.log_softmax(x, dim=-1) + x.log_softmax(1) + torch.log_softmax(x, dim=1),
    "add": lambda m, x: torch.add(m.anchor(x), x, alpha=2) + x.add(m.anchor(x)),
    "sub": lambda m, x: torch.sub(m.anchor(x), x) - x.sub(m.anchor(x), alpha=3),
    "mul": lambda m, x: torch.mul(m.anchor(x), x) * x.mul(m.anchor(x)),
    "neg": lambda m, x: -x + torch.neg(m.anchor(x)) + x.neg(),
    "in place": lambda m, x: inplace(m, x),
    "the same twice": lambda m, x: x * x + (x + x),
    "c x": lambda m, x: 3 * x + x * 0.5,
    "x + c": lambda m, x: (x + 3) * (0.5 + x),
    "x / c": lambda m, x: x / 4 + torch.div(x, 3),
    "c - x": lambda m, x: (2 - x) * (x - 0.25),
    "dropout": lambda m, x: F.dropout(x, 0.5, training=False) + F.dropout(x, 0.0),
    "contiguous": lambda m, x: m.anchor(x).contiguous(),
    "layer norm": lambda m, x: F.layer_norm(x, (5,), m.anchor.bias, None, 0.1),
    "layer norm by size": lambda m, x: F.layer_norm(x, x.shape[1:]),
    "batch norm": lambda m, x: F.batch_norm(x, None, None, m.anchor.bias, training=True),
    "view": lambda m, x: m.anchor(x).view(x.size(0), -1).view(-1, 5, 1, 1).flatten(1),
    "size arithmetic": lambda m, x: x.reshape(x.shape[0], 1, x.size(1), x.size(-1) // 5).view(-1, x.shape[1] * 1),
}
IMAGE = {  # samples [2, 6, 5]
    "F.conv2d": lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, stride=2, padding=(1, 2)),
    "F.conv2d same": lambda m, x: F.conv2d(x, m.conv.weight, padding="same"),
    "torch.conv2d": lambda m, x: torch.conv2d(x, m.conv.weight, None, 1, 1, 2),
    "max pool": lambda m, x: F.max_pool2d(x, 2) + torch.max_pool2d(x, 2, 2),
    "max pool options": lambda m, x: F.max_pool2d(x, (3, 2), stride=1, padding=1, dilation=(1, 2), ceil_mode=True),
    "average pool": lambda m, x: F.avg_pool2d(x, 3, 2, 1, True, False),
    "adaptive pool": lambda m, x: F.adaptive_avg_pool2d(x, 2) * F.adaptive_avg_pool2d(x, (2, 2)),
    "mean": lambda m, x: x.mean((2, 3)) + x.mean([-1, -2]) + torch.mean(x, dim=(3, 2)),
    "mean, kept": lambda m, x: x.mean((-2, -1), keepdim=True),
    "mean, flattened": lambda m, x: x.flatten(2).mean(2) + x.flatten(2).mean(-1),
    "flatten": lambda m, x: x.flatten(1) + torch.flatten(x, 1) + torch.flatten(x, start_dim=1, end_dim=-1),
    "view": lambda m, x: x.view(x.size(0), -1) + x.reshape(x.shape[0], -1) + x.view(-1, 60),
    "view by product": lambda m, x: x.view(-1, x.size(1) * x.size(2) * x.shape[3]),
    "unpacked sizes": lambda m, x: unpacked(x),
    "reshape": lambda m, x: m.conv(x.view(-1, 2, 5, 6)),
    "unflatten": lambda m, x: x.flatten(1).unflatten(1, (3, 4, 5)) + x.flatten(1).unflatten(1, (3, -1, 5)),
    "norms": lambda m, x: F.instance_norm(F.group_norm(m.conv(x), 3, m.norm.weight, m.norm.bias)),
    "batch norm": lambda m, x: normalised(m.norm, m.conv(x)),
    "layer norm": lambda m, x: F.layer_norm(x, [2, 6, 5]),
    "softmax": lambda m, x: F.softmax(x, 1) + x.log_softmax(-3),
    "flatten, then channels": lambda m, x: m.conv(x.flatten(1).view(-1, 2, 6, 5)),
    "nested": lambda m, x: (m.conv(x) + m.side(x)).relu_().mean((2, 3)),
}


def inplace(m, x):
    y = m.anchor(x)
    y += x
    y -= x * 2
    y *= x
    return y.add_(x).mul_(0.5).sub_(x)


def unpacked(x):
    n, c, h, w = x.shape
    return x.view(n, c * h, w).reshape(n, c * h * w)


@pytest.mark.parametrize("name", VECTOR)
def test_a_spelling_on_vectors(name):
    check(Calls(VECTOR[name]), 5)


@pytest.mark.parametrize("name", IMAGE)
def test_a_spelling_on_images(name):
    children = {"conv": nn.Conv2d(2, 3, 3), "norm": nn.BatchNorm2d(3), "side": nn.Conv2d(2, 3, 3, bias=False)}
    check(Calls(IMAGE[name], **children), 2, 6, 5)


# Networks.


class Block(nn.Module):
    """ResNet-12's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        widths = (inputs, outputs, outputs)
        self.convs = nn.ModuleList([nn.Conv2d(c, outputs, 3, padding=1, bias=False) for c in widths])
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs) for _ in range(3)])
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        out = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            out = norm(conv(out))
            if i < 2:
                out = self.act(out)
        out += self.downsample(x)
        return self.pool(self.act(out))


class Classifier(nn.Module):
    def __init__(self, *blocks, features):
        super().__init__()
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(features, 3)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x, scale=None):
        if scale is not None:
            raise AssertionError("unreachable")
        return self.second(self.first(self.first(x)))


class Defaults(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, scale=2.0, flag=True, *, other=3):
        x = self.fc(x)
        return x * scale - other if flag else x


class Siren(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 7), nn.Linear(7, 7), nn.Linear(7, 1)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.sin(30 * layer(x))
        return self.layers[-1](x)


def conv4(norm=True, stride=False):
    blocks = []
    for c in (1, 4, 4, 4):
        blocks.append(
            nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(c, 4, 3, stride=2 if stride else 1, padding=1),
                    norm=nn.BatchNorm2d(4, track_running_stats=False) if norm else nn.Identity(),
                    relu=nn.ReLU(inplace=True),
                    pool=nn.Identity() if stride else nn.MaxPool2d(2),
                )
            )
        )
    return blocks


NETWORKS = {
    "MLP": (lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), (3,)),
    "Conv4": (lambda: nn.Sequential(*conv4(), nn.Flatten(), nn.Linear(4, 5)), (1, 28, 28)),
    "Conv4, strides": (lambda: Classifier(*conv4(stride=True), features=4), (1, 28, 28)),
    "Conv4, no norm": (lambda: Classifier(*conv4(norm=False), features=4), (1, 17, 20)),
    "ResNet-12": (lambda: Classifier(Block(3, 4), Block(4, 5), Block(5, 6), Block(6, 7), features=7), (3, 16, 16)),
    "ResNet-12, eval": (lambda: Classifier(Block(3, 4), Block(4, 5), features=5).eval(), (3, 7, 9)),
    "SIREN": (Siren, (2,)),
    "shared weight": (Shared, (4,)),
    "defaults": (Defaults, (4,)),
    "flattened images": (lambda: Calls(lambda m, x: m.fc(x.view(-1, 784)).relu(), fc=nn.Linear(784, 3)), (1, 28, 28)),
    "flattened volumes": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), (2, 3, 2, 4)),
    "a layer alone": (lambda: nn.Linear(4, 2), (4,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network(name):
    make, shape = NETWORKS[name]
    check(make(), *shape)


def test_what_changes_nothing_is_no_layer():
    inner = nn.Sequential(nn.Identity(), nn.Dropout(0.0), nn.Flatten(), nn.Linear(4, 2), nn.Unflatten(1, (2, 1, 1)))
    network = check(nn.Sequential(inner, nn.Flatten()), 4)
    assert kinds(network) == [Kind.CONTRACT]
    network = check(nn.Sequential(nn.Flatten(), nn.Linear(784, 2)), 1, 28, 28)
    assert network.program[3:6] == (784, 1, 1) and kinds(network) == [Kind.CONTRACT]


def test_numbers_take_one_layer():
    network = check(Calls(lambda m, x: 2 - x), 5)
    assert kinds(network) == [Kind.COMBINE] and network.layer(0)[1:3] == (0, -1) and network.numbers == (-1.0, 2.0)


def test_a_shared_parameter_has_one_reference():
    network = check(Shared(), 4)
    weights = [network.layer(j)[3 + 12] for j in range(3)]
    assert weights == [0, 0, 0] and network.program[1] == 4 * 4 + 4 + 4


def test_frozen_parameters_and_statistics_are_live_references():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    network = check(module, 3)
    wanted = [module[0].weight, module[0].bias, module[1].running_mean, module[1].running_var]
    assert len(network.sources) == 4 and all(any(s is w for s in network.sources) for w in wanted)
    with torch.no_grad():
        module[0].weight.mul_(2)
        module[1].running_mean.add_(1)
    x = torch.randn(4, 3)
    assert relative_error(run(network, Layout(module).flatten(), x), module(x)) < 1e-12


def test_one_trace_serves_every_shape():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    graph, layout = recognise.trace(module), Layout(module)
    for shape in [(1, 5, 5), (1, 9, 4)]:
        network = recognise.network(graph, layout, torch.Size(shape))
        assert network.program[3:6] == shape and network.prediction == (3,)
    with pytest.raises(Unrecognised):
        recognise.network(graph, layout, torch.Size([1, 2, 2]))


def test_a_norm_over_the_batch_tells_its_positions():
    assert check(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), 1, 5, 4).fewest_positions == 6
    assert check(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 2).fewest_positions == 1
    assert check(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval()), 2).fewest_positions == 0


# What only resembles a known network.


class MyLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x).exp()


class TwiceLinear(nn.Linear):
    """Traced through: what it does is known."""

    def forward(self, x):
        return 2 * super().forward(x)


class DoubledConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return 2 * super()._conv_forward(input, weight, bias)


def hooked(register):
    module = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
    register(module[1])
    return module


def weird_forward():
    module = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
    module[1].forward = lambda x: x.sin()
    return module


def sized(module, make):
    """``make`` applied to the last module of a copy."""
    module[-1] = make(module[-1])
    return module


def linear_net():
    return nn.Sequential(nn.ReLU(), nn.Linear(5, 5))


def frozen_half():
    module = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5).float().requires_grad_(False))
    return module


def image_calls(function):
    return Calls(function, conv=nn.Conv2d(2, 2, 3, padding=1))


class WithBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.register_buffer("shift", torch.randn(5))
        self.gain = nn.Parameter(torch.ones(5))


class Buffered(WithBuffer):
    def forward(self, x):
        return self.fc(x) + self.shift


class Gained(WithBuffer):
    def forward(self, x):
        return self.fc(x) * self.gain


class Attribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.plain = nn.Linear(5, 5), [torch.randn(5)]

    def forward(self, x):
        return self.fc(x) + self.plain[0]


class Counting(nn.Module):
    """Its forward has a side effect."""

    def __init__(self):
        super().__init__()
        self.fc, self.calls = nn.Linear(5, 5), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen.add_(1)
        return self.fc(x)


class Keywords(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.fc = nn.Linear(5, 5)


class TwoInputs(Keywords):
    def forward(self, x, y):
        return self.fc(x) + y


class KeywordInput(Keywords):
    def forward(self, x, *, scale):
        return self.fc(x) * scale


def read_later(m, x):
    y = m.anchor(x)
    z = y.relu_()
    return m.anchor(y) * z


def changed_then_read(m, x):
    y = m.anchor(x)
    flat = y.view(-1, 5)
    z = F.relu(y, inplace=True)
    return z + flat


def changed_by_another_name(m, x, name):
    y = m.anchor(x)
    return F.relu(name(y), inplace=True) + y


class Branches(Keywords):
    """A network unless what it asks, which is true of tensors, is false."""

    def __init__(self, asks):
        super().__init__()
        self.asks = asks

    def forward(self, x):
        return self.fc(x) if self.asks(x) else 2 * x


class OwnCall(Keywords):
    def forward(self, x):
        return self.fc(x)

    def __call__(self, x):
        return 2 * super().__call__(x)


class Negated(torch.autograd.Function):
    """Its gradient is none of its value."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, cotangent):
        return -cotangent


negated = Negated.apply


class Slope(Keywords):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3), requires_grad=False)
        self.register_buffer("kept", torch.tensor(0.3))
        self.plain = [torch.tensor(0.3)]


class SlopeOfRelu(Slope):
    def forward(self, x):
        return F.leaky_relu(self.fc(x), self.slope)


class SlopeOfAdd(Slope):
    def forward(self, x):
        return torch.add(self.fc(x), x, alpha=self.slope)


class NumberOfBuffer(Slope):
    def forward(self, x):
        return self.fc(x) * self.kept.item()


class NumberOfTensor(Slope):
    def forward(self, x):
        return self.fc(x) * self.plain[0].item()


def within(context, function):
    with context:
        return function()


def own_convolution():
    module = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())
    module[0]._conv_forward = lambda x, weight, bias: 2 * F.conv2d(x, weight, bias)
    return module


def old_weight_norm():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sized(linear_net(), torch.nn.utils.weight_norm)


TRAPS = {
    # name: (module, shape of samples, what the reason says)
    "a subclass that does more": (lambda: MyLinear(5, 5), (5,), "exp"),
    "a subclass inside": (lambda: nn.Sequential(nn.Linear(5, 5), MyLinear(5, 5)), (5,), "exp"),
    "forward hook": (lambda: hooked(lambda m: m.register_forward_hook(lambda *_: None)), (5,), "hook"),
    "forward pre-hook": (lambda: hooked(lambda m: m.register_forward_pre_hook(lambda *_: None)), (5,), "hook"),
    "backward hook": (lambda: hooked(lambda m: m.register_full_backward_hook(lambda *_: None)), (5,), "hook"),
    "backward pre-hook": (lambda: hooked(lambda m: m.register_full_backward_pre_hook(lambda *_: None)), (5,), "hook"),
    "forward on the instance": (weird_forward, (5,), "1 (ReLU)"),
    "weight norm": (lambda: sized(linear_net(), torch.nn.utils.parametrizations.weight_norm), (5,), "parametrization"),
    "spectral norm": (lambda: sized(linear_net(), torch.nn.utils.parametrizations.spectral_norm), (5,), "parametriz"),
    "old weight norm": (old_weight_norm, (5,), "hook"),
    "old spectral norm": (lambda: sized(linear_net(), torch.nn.utils.spectral_norm), (5,), "hook"),
    "randn": (lambda: Calls(lambda m, x: m.anchor(x) + torch.randn(5)), (5,), ""),
    "randn_like": (lambda: Calls(lambda m, x: m.anchor(x) + torch.randn_like(x)), (5,), "randn_like"),
    "a tensor in an attribute": (Attribute, (5,), "tensor"),
    "a buffer": (Buffered, (5,), "shift"),
    "a parameter used otherwise": (Gained, (5,), "neither a number nor"),
    "a side effect": (Counting, (5,), "changes"),
    "control flow": (lambda: Calls(lambda m, x: m.anchor(x) if x.sum() > 0 else x), (5,), "control flow"),
    "float of a value": (lambda: Calls(lambda m, x: m.anchor(x) * float(x.sum())), (5,), ""),
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)), (5,), "dropout"),
    "F.dropout": (lambda: Calls(lambda m, x: F.dropout(m.anchor(x), 0.1)), (5,), "dropout"),
    "padding mode": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 5, 5), "circular"),
    "two inputs": (TwoInputs, (5,), "several inputs"),
    "a keyword": (KeywordInput, (5,), "several inputs"),
    "two results": (lambda: Calls(lambda m, x: (m.anchor(x), x)), (5,), "one tensor"),
    "N in arithmetic": (lambda: Calls(lambda m, x: m.anchor(x) * x.size(0)), (5,), ""),
    "N compared": (lambda: Calls(lambda m, x: m.anchor(x) if len(x) > 3 else x), (5,), ""),
    "N elsewhere": (lambda: Calls(lambda m, x: m.anchor(x).view(5, x.size(0))), (5,), ""),
    "N in a product": (lambda: Calls(lambda m, x: m.anchor(x).view(x.size(0) * 5)), (5,), ""),
    "a fixed N": (lambda: Calls(lambda m, x: m.anchor(x).view(4, 5)), (5,), "fixed number"),
    "a view over samples": (lambda: image_calls(lambda m, x: m.conv(x).view(-1, 5)), (2, 5, 5), "mixes samples"),
    "flatten all": (lambda: Calls(lambda m, x: m.anchor(x).flatten()), (5,), "mixes samples"),
    "mean of all": (lambda: Calls(lambda m, x: m.anchor(x).mean()), (5,), "mean"),
    "mean over samples": (lambda: image_calls(lambda m, x: m.conv(x).mean((0, 2, 3))), (2, 5, 5), "mean"),
    "mean over one dimension": (lambda: image_calls(lambda m, x: m.conv(x).mean(3)), (2, 5, 5), "mean"),
    "softmax over samples": (lambda: nn.Sequential(nn.Linear(5, 5), nn.Softmax(0)), (5,), "softmax"),
    "softmax over a width": (lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.Softmax(-1)), (2, 3, 4), "softmax"),
    "broadcasting": (
        lambda: image_calls(lambda m, x: m.conv(x) + m.conv(x).mean((2, 3), True)),
        (2, 5, 5),
        "broadcast",
    ),
    "layer norm over part": (lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.LayerNorm([4])), (2, 3, 4), "layer norm"),
    "indices": (lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(2, return_indices=True)), (2, 4, 4), "indices"),
    "linear on sequences": (lambda: nn.Linear(5, 5), (3, 5), "linear"),
    "clamp from above": (lambda: Calls(lambda m, x: m.anchor(x).clamp(0, 1)), (5,), "clamp"),
    "indexing": (lambda: Calls(lambda m, x: m.anchor(x)[:, :2]), (5,), "index"),
    "read after it changed": (lambda: Calls(read_later), (5,), "in place"),
    "a view read after it changed": (lambda: Calls(changed_then_read), (5,), "in place"),
    "dropout's argument read after its result changed": (
        lambda: Calls(lambda m, x: changed_by_another_name(m, x, lambda y: F.dropout(y, 0.0))),
        (5,),
        "in place",
    ),
    "likewise in eval": (
        lambda: Calls(lambda m, x: changed_by_another_name(m, x, m.drop), drop=nn.Dropout()).eval(),
        (5,),
        "in place",
    ),
    "the input changed through dropout": (
        lambda: Calls(lambda m, x: m.anchor(F.dropout(x, 0.0).relu_())),
        (5,),
        "in place",
    ),
    "the input changed": (lambda: Calls(lambda m, x: m.anchor(x.relu_())), (5,), "in place"),
    "relu module on a residual": (
        lambda: Calls(lambda m, x: twice_used(m, x), act=nn.ReLU(inplace=True)),
        (5,),
        "in place",
    ),
    "running statistics of instance norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.InstanceNorm2d(2, track_running_stats=True)).eval(),
        (2, 4, 4),
        "instance norm",
    ),
    "frozen in another dtype": (frozen_half, (5,), "dtype"),
    "samples of rank 4": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)), (2, 2, 2, 2), "shape"),
    "an LSTM": (lambda: Calls(lambda m, x: m.cell(x), cell=nn.GRUCell(5, 5)), (5,), "GRUCell"),
    "its input": (lambda: Calls(lambda m, x: m.anchor.weight), (5,), "one tensor"),
    "another dtype": (lambda: Calls(lambda m, x: m.anchor(x).float()), (5,), "float"),
    "isinstance": (lambda: Branches(lambda x: isinstance(x, torch.Tensor)), (5,), "type of a value"),
    "is_tensor": (lambda: Branches(torch.is_tensor), (5,), "type of a value"),
    "its own call": (OwnCall, (5,), "__call__"),
    "a method on the instance": (own_convolution, (1, 5, 5), "_conv_forward"),
    "autograd function": (lambda: Calls(lambda m, x: negated(m.anchor(x))), (5,), "autograd.Function"),
    "no_grad": (lambda: Calls(lambda m, x: m.anchor(within(torch.no_grad(), lambda: m.anchor(x)))), (5,), "gradients"),
    "autocast": (
        lambda: Calls(lambda m, x: within(torch.autocast("cpu", torch.bfloat16), lambda: m.anchor(x))),
        (5,),
        "autocast",
    ),
    "a random branch": (lambda: Calls(lambda m, x: m.anchor(x) if torch.rand(()) < 0.5 else x), (5,), "aten.rand"),
    "Python's random numbers": (
        lambda: Calls(lambda m, x: m.anchor(x) if random.random() < 0.5 else 2 * m.anchor(x)),
        (5,),
        "random",
    ),
    "a parameter for a number": (SlopeOfRelu, (5,), "where a number"),
    "a parameter for alpha": (SlopeOfAdd, (5,), ""),
    "a number from a buffer": (NumberOfBuffer, (5,), "kept"),
    "a number from a tensor": (NumberOfTensor, (5,), "other than its input"),
    "no such dimension": (lambda: nn.Sequential(nn.Linear(5, 5), nn.Softmax(3)), (5,), "dimension 3"),
    "stride 0": (lambda: nn.Conv2d(2, 2, 3, stride=0), (2, 5, 5), "stride"),
    "negative padding": (lambda: nn.Conv2d(2, 2, 3, padding=-1), (2, 7, 7), "padding"),
    "same padding with a stride": (
        lambda: image_calls(lambda m, x: F.conv2d(x, m.conv.weight, None, 2, "same")),
        (2, 5, 5),
        "padding",
    ),
    "a size divided by 0": (lambda: Calls(lambda m, x: m.anchor(x).view(-1, x.size(1) // 0)), (5,), "zero"),
    "groups that do not divide": (lambda: Calls(lambda m, x: F.group_norm(m.anchor(x), 2)), (5,), "divide"),
    "a shuffled dimension": (lambda: image_calls(lambda m, x: m.conv(x).transpose(1, 2)), (2, 5, 5), "transpose"),
}


def twice_used(m, x):
    y = m.anchor(x)
    return m.act(y) + y


@pytest.mark.parametrize("name", TRAPS)
def test_what_only_resembles_a_network(name):
    make, shape, says = TRAPS[name]
    module = make()
    with pytest.raises(Unrecognised, match=".") as error:
        recognised(module, *shape)
    assert says.lower() in str(error.value).lower()


def test_subclasses_are_traced_through():
    check(nn.Sequential(TwiceLinear(5, 3), nn.ReLU()), 5)
    check(DoubledConv(2, 3, 3), 2, 5, 5)


def test_values_have_the_attributes_of_tensors():
    check(Branches(lambda x: not hasattr(x, "no_such_attribute")), 5)


def test_what_a_subclass_overrides_is_not_lost():
    """Types match exactly: also where torch.fx would take a class from torch.nn's own module for a leaf."""

    class Loud(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    Loud.__module__ = "torch.nn.loud"
    with contextlib.suppress(Unrecognised):
        check(nn.Sequential(nn.Linear(5, 3), Loud()), 5)


def test_a_weight_that_is_computed_is_refused():
    outer = Calls(lambda m, x: F.linear(x, m.anchor.weight * 2))
    with pytest.raises(Unrecognised):
        recognised(outer, 5)


def test_global_hooks():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(Unrecognised, match="hook"):
            recognise.trace(nn.Linear(2, 2))
    finally:
        handle.remove()


def test_inside_another_trace():
    found = []

    class Outer(nn.Module):
        def forward(self, x):
            try:
                recognise.trace(nn.Linear(2, 2))
            except Unrecognised as reason:
                found.append(str(reason))
            return x

    torch.fx.symbolic_trace(Outer())
    assert found and "traced" in found[0]


@pytest.mark.parametrize("make", [Counting, lambda: Calls(lambda m, x: m.anchor(x) + torch.randn(5))])
def test_a_refused_module_is_left_alone(make):
    module = make()
    with unchanged(module), pytest.raises(Unrecognised):
        recognised(module, 5)


def test_the_reason_says_where():
    with pytest.raises(Unrecognised, match=r"exp.*test_recognise\.py:\d+"):
        recognised(MyLinear(5, 5), 5)
    module = nn.Sequential(OrderedDict(features=nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5))))
    with pytest.raises(Unrecognised, match=r"features\.1"):
        recognised(module, 5)
