"""What only resembles a known network has no program, and the reason says why."""

import contextlib
import random
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from conftest import unchanged
from programs import Calls, check, recognised
from torch import nn

from maml_ext import recognise
from maml_ext.recognise import Unrecognised

pytestmark = pytest.mark.usefixtures("float64")


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sized(linear_net(), torch.nn.utils.weight_norm)


TRAPS = {
    # name: (module, shape of samples, what the reason says)
    "a subclass that does more": (lambda: MyLinear(5, 5), (5,), "exp"),
    "a subclass inside": (lambda: nn.Sequential(nn.Linear(5, 5), MyLinear(5, 5)), (5,), "exp"),
    "forward hook": (lambda: hooked(lambda m: m.register_forward_hook(lambda *_: None)), (5,), "hook"),
    "forward pre-hook": (
        lambda: hooked(lambda m: m.register_forward_pre_hook(lambda *_: None)),
        (5,),
        "hook",
    ),
    "backward hook": (lambda: hooked(lambda m: m.register_full_backward_hook(lambda *_: None)), (5,), "hook"),
    "backward pre-hook": (
        lambda: hooked(lambda m: m.register_full_backward_pre_hook(lambda *_: None)),
        (5,),
        "hook",
    ),
    "forward on the instance": (weird_forward, (5,), "1 (ReLU)"),
    "weight norm": (
        lambda: sized(linear_net(), torch.nn.utils.parametrizations.weight_norm),
        (5,),
        "parametrization",
    ),
    "spectral norm": (
        lambda: sized(linear_net(), torch.nn.utils.parametrizations.spectral_norm),
        (5,),
        "parametriz",
    ),
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
    "a view over samples": (
        lambda: image_calls(lambda m, x: m.conv(x).view(-1, 5)),
        (2, 5, 5),
        "mixes samples",
    ),
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
    "layer norm over part": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.LayerNorm([4])),
        (2, 3, 4),
        "layer norm",
    ),
    "indices": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.MaxPool2d(2, return_indices=True)),
        (2, 4, 4),
        "indices",
    ),
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
    "samples of rank 4": (
        lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
        (2, 2, 2, 2),
        "shape",
    ),
    "an LSTM": (lambda: Calls(lambda m, x: m.cell(x), cell=nn.GRUCell(5, 5)), (5,), "GRUCell"),
    "its input": (lambda: Calls(lambda m, x: m.anchor.weight), (5,), "one tensor"),
    "another dtype": (lambda: Calls(lambda m, x: m.anchor(x).float()), (5,), "float"),
    "isinstance": (lambda: Branches(lambda x: isinstance(x, torch.Tensor)), (5,), "type of a value"),
    "is_tensor": (lambda: Branches(torch.is_tensor), (5,), "type of a value"),
    "its own call": (OwnCall, (5,), "__call__"),
    "a method on the instance": (own_convolution, (1, 5, 5), "_conv_forward"),
    "autograd function": (lambda: Calls(lambda m, x: negated(m.anchor(x))), (5,), "autograd.Function"),
    "no_grad": (
        lambda: Calls(lambda m, x: m.anchor(within(torch.no_grad(), lambda: m.anchor(x)))),
        (5,),
        "gradients",
    ),
    "autocast": (
        lambda: Calls(lambda m, x: within(torch.autocast("cpu", torch.bfloat16), lambda: m.anchor(x))),
        (5,),
        "autocast",
    ),
    "a random branch": (
        lambda: Calls(lambda m, x: m.anchor(x) if torch.rand(()) < 0.5 else x),
        (5,),
        "aten.rand",
    ),
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
    "a shuffled dimension": (
        lambda: image_calls(lambda m, x: m.conv(x).transpose(1, 2)),
        (2, 5, 5),
        "transpose",
    ),
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
    with pytest.raises(Unrecognised, match=r"exp.*test_unrecognised\.py:\d+"):
        recognised(MyLinear(5, 5), 5)
    module = nn.Sequential(OrderedDict(features=nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5))))
    with pytest.raises(Unrecognised, match=r"features\.1"):
        recognised(module, 5)
