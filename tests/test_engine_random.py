"""Random networks (residual, tied and frozen weights, values read twice) and calls, against the reference."""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import weighted_sum
from torch import nn

import maml_ext
from maml_ext.ops import library

pytestmark = pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled engine")

NORMS = (
    nn.BatchNorm2d,
    lambda c: nn.GroupNorm(1, c),
    lambda c: nn.InstanceNorm2d(c, affine=True),
    lambda c: nn.Identity(),
)
POOLS = (
    nn.MaxPool2d(2), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, 3), nn.MaxPool2d((2, 1)), nn.MaxPool2d(3, 2, 1),
    nn.AvgPool2d(2), nn.AvgPool2d(2, divisor_override=3), nn.Identity(),
)  # fmt: skip
ACTIVATIONS = (nn.ReLU(), nn.Tanh(), nn.SiLU(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.GELU(), nn.Softplus())


class ConvNet(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.shape = draw.choice([1, 2, 3]), draw.randint(4, 9), draw.randint(4, 9)
        c = draw.choice([2, 3, 5, 17])
        self.first = nn.Conv2d(self.shape[0], c, draw.choice([1, 2, 3]), padding=draw.choice([0, 1]))
        self.block = nn.Sequential(draw.choice(NORMS)(c), draw.choice(ACTIVATIONS), draw.choice(POOLS))
        self.second, self.third = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1)
        self.norm = nn.BatchNorm2d(c)
        self.linear, self.head = nn.Linear(c, c), nn.Linear(c, draw.choice([1, 2, 5]))
        self.branch = draw.choice(["none", "sum", "read twice", "two convolutions"])
        self.tied = draw.random() < 0.3

    def forward(self, x):
        y = self.block(self.first(x))
        z = self.second(y)
        if self.branch == "sum":
            y = F.relu(self.norm(z) + y)
        elif self.branch == "read twice":
            y = F.silu(z) * z
        elif self.branch == "two convolutions":
            y = torch.tanh(z) + self.third(y)
        else:
            y = F.relu(self.norm(z))
        if self.tied:
            y = torch.tanh(self.second(y))
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        return self.head(self.linear(F.silu(self.linear(y))) if self.tied else y)


class Mlp(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.shape, outputs = (draw.choice([1, 2, 3, 17]),), draw.choice([1, 2, 3, 5])
        h = draw.choice([1, 2, 3, 4, 16, 17, 33])
        self.first, self.second = nn.Linear(*self.shape, h), nn.Linear(h, h, bias=draw.random() < 0.5)
        self.last, self.skip = nn.Linear(h, outputs), nn.Linear(*self.shape, outputs)
        self.act, self.norm = draw.choice(ACTIVATIONS), draw.choice((nn.Identity(), nn.LayerNorm(h)))
        self.tied, self.skips = draw.random() < 0.3, draw.random() < 0.4

    def forward(self, x):
        y = self.act(self.second(self.act(self.norm(self.first(x)))))
        if self.tied:
            y = self.act(self.second(y))
        y = self.last(y)
        return y + self.skip(x) if self.skips else y


def problem(seed):
    """(module, data, options, what is differentiated) of a random call in float64."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        module = draw.choice((ConvNet, Mlp))(draw)
        for parameter in module.parameters():
            parameter.requires_grad_(draw.random() < 0.8)
        tasks, steps = draw.choice([1, 2, 7]), draw.choice([0, 1, 2, 3])
        loss = draw.choice(["mse", "huber", "cross_entropy", "bce_with_logits"])
        adapted = [p for p in module.parameters() if p.requires_grad]
        shapes = (), (len(adapted),), (max(1, steps), len(adapted))
        lr = 0.1 * torch.rand(draw.choice(shapes))
        inputs, data = [*adapted, lr.requires_grad_()], []
        weighted, active = draw.random() < 0.3, draw.random() < 0.5
        for samples in (draw.choice([2, 5]), draw.choice([2, 4])):
            x = torch.randn(tasks, samples, *module.shape)
            outputs = module(x[0]).shape[1:]
            y = torch.rand(tasks, samples, *outputs)
            if loss == "cross_entropy" and draw.random() < 0.7:
                y = torch.randint(outputs[0], (tasks, samples))
            weight = (torch.rand(tasks, samples) + 0.1).requires_grad_(active)
            inputs += [t for t in ([x, weight] if weighted else [x]) if active]
            data += [x.requires_grad_(active), (y, weight) if weighted else y]
    finally:
        torch.set_default_dtype(torch.float32)
    options = dict(loss=loss, steps=steps, lr=lr, reduction=draw.choice(["none", "mean"]))
    return module, data, {**options, "meta_gradient": draw.choice(["exact", "exact", "first_order"])}, inputs


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(seed):
    module, data, options, inputs = problem(seed)
    found = {}
    for backend in ("compiled", "torch"):
        maml = maml_ext.MAML(module, backend=backend, **options)
        single, double = maml(*data), maml.adapt(*data[:2]).loss(*data[2:])
        found[backend] = [single, double]
        for losses in (single, double):
            found[backend] += torch.autograd.grad(weighted_sum(losses), inputs, materialize_grads=True)
    for i, (a, b) in enumerate(zip(*found.values(), strict=True)):
        assert (a - b).norm() <= 1e-10 * b.norm() + 1e-12, i
