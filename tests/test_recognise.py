"""Which modules have a network program, and that the program says what the module does."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from programs import Calls, check, kinds, run
from torch import nn

from maml_ext import recognise
from maml_ext.program import Kind
from maml_ext.recognise import Unrecognised
from maml_ext.stateless import Layout

pytestmark = pytest.mark.usefixtures("float64")
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
    "max pool, all options": (
        lambda: nn.MaxPool2d((3, 2), (2, 1), (1, 1), (2, 3), ceil_mode=True),
        (2, 8, 9),
    ),
    "max pool, ceil": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 6, 8)),
    "average pool": (lambda: nn.AvgPool2d(2), (2, 5, 7)),
    "average pool, ceil": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 6, 8)),
    "average pool, padding": (
        lambda: nn.AvgPool2d((3, 2), (2, 3), (1, 0), count_include_pad=False),
        (2, 7, 8),
    ),
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
    "size arithmetic": lambda m, x: x.reshape(x.shape[0], 1, x.size(1), x.size(-1) // 5).view(
        -1, x.shape[1] * 1
    ),
}
IMAGE = {  # samples [2, 6, 5]
    "F.conv2d": lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, stride=2, padding=(1, 2)),
    "F.conv2d same": lambda m, x: F.conv2d(x, m.conv.weight, padding="same"),
    "torch.conv2d": lambda m, x: torch.conv2d(x, m.conv.weight, None, 1, 1, 2),
    "max pool": lambda m, x: F.max_pool2d(x, 2) + torch.max_pool2d(x, 2, 2),
    "max pool options": lambda m, x: F.max_pool2d(
        x, (3, 2), stride=1, padding=1, dilation=(1, 2), ceil_mode=True
    ),
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
    "MLP": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)),
        (3,),
    ),
    "Conv4": (lambda: nn.Sequential(*conv4(), nn.Flatten(), nn.Linear(4, 5)), (1, 28, 28)),
    "Conv4, strides": (lambda: Classifier(*conv4(stride=True), features=4), (1, 28, 28)),
    "Conv4, no norm": (lambda: Classifier(*conv4(norm=False), features=4), (1, 17, 20)),
    "ResNet-12": (
        lambda: Classifier(Block(3, 4), Block(4, 5), Block(5, 6), Block(6, 7), features=7),
        (3, 16, 16),
    ),
    "ResNet-12, eval": (lambda: Classifier(Block(3, 4), Block(4, 5), features=5).eval(), (3, 7, 9)),
    "SIREN": (Siren, (2,)),
    "shared weight": (Shared, (4,)),
    "defaults": (Defaults, (4,)),
    "flattened images": (
        lambda: Calls(lambda m, x: m.fc(x.view(-1, 784)).relu(), fc=nn.Linear(784, 3)),
        (1, 28, 28),
    ),
    "flattened volumes": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), (2, 3, 2, 4)),
    "a layer alone": (lambda: nn.Linear(4, 2), (4,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network(name):
    make, shape = NETWORKS[name]
    check(make(), *shape)


def test_what_changes_nothing_is_no_layer():
    inner = nn.Sequential(
        nn.Identity(), nn.Dropout(0.0), nn.Flatten(), nn.Linear(4, 2), nn.Unflatten(1, (2, 1, 1))
    )
    network = check(nn.Sequential(inner, nn.Flatten()), 4)
    assert kinds(network) == [Kind.CONTRACT]
    network = check(nn.Sequential(nn.Flatten(), nn.Linear(784, 2)), 1, 28, 28)
    assert network.program[3:6] == (784, 1, 1) and kinds(network) == [Kind.CONTRACT]


def test_numbers_take_one_layer():
    network = check(Calls(lambda m, x: 2 - x), 5)
    assert (
        kinds(network) == [Kind.COMBINE]
        and network.layer(0)[1:3] == (0, -1)
        and network.numbers == (-1.0, 2.0)
    )


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
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
    )
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
