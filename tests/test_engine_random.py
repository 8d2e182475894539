"""Random networks (residual, tied and frozen weights, values read twice) and calls, against the reference."""

import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import weighted_sum
from torch import nn

import maml_ext
from maml_ext.ops import library

pytestmark = pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled engine")


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


NORMS = (
    nn.BatchNorm2d,
    lambda c: nn.GroupNorm(1, c),
    lambda c: nn.InstanceNorm2d(c, affine=True),
    lambda c: nn.Identity(),
)
MAX_POOLS = nn.MaxPool2d(2), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, 3), nn.MaxPool2d((2, 1)), nn.MaxPool2d(3, 2, 1)
POOLS = nn.AvgPool2d(2), nn.AvgPool2d(2, divisor_override=3), nn.Identity()
KINKED = nn.ReLU(), nn.LeakyReLU(0.2)
SMOOTH = nn.Tanh(), nn.SiLU(), nn.Sigmoid(), nn.GELU(), nn.Softplus(), nn.ELU(), Sine()


def activation(draw, smooth):
    return draw.choice(SMOOTH if smooth or draw.random() < 0.6 else KINKED)


class ConvNet(nn.Module):
    def __init__(self, draw, smooth):
        super().__init__()
        pools = POOLS if smooth or draw.random() < 0.5 else MAX_POOLS
        self.shape = draw.choice([1, 2, 3]), draw.randint(4, 9), draw.randint(4, 9)
        c = draw.choice([2, 3, 5, 17])
        self.first = nn.Conv2d(self.shape[0], c, draw.choice([1, 2, 3]), padding=draw.choice([0, 1]))
        self.block = nn.Sequential(draw.choice(NORMS)(c), activation(draw, smooth), draw.choice(pools))
        self.act = activation(draw, smooth)
        self.second, self.third = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1)
        self.norm = nn.BatchNorm2d(c)
        self.linear, self.head = nn.Linear(c, c), nn.Linear(c, draw.choice([1, 2, 5]))
        self.branch = draw.choice(["none", "sum", "read twice", "two convolutions"])
        self.tied = draw.random() < 0.3

    def forward(self, x):
        y = self.block(self.first(x))
        z = self.second(y)
        if self.branch == "sum":
            y = self.act(self.norm(z) + y)
        elif self.branch == "read twice":
            y = self.act(z) * z
        elif self.branch == "two convolutions":
            y = torch.tanh(z) + self.third(y)
        else:
            y = self.act(self.norm(z))
        if self.tied:
            y = torch.tanh(self.second(y))
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        return self.head(self.linear(F.silu(self.linear(y))) if self.tied else y)


class Mlp(nn.Module):
    def __init__(self, draw, smooth):
        super().__init__()
        self.shape, outputs = (draw.choice([1, 2, 3, 17]),), draw.choice([1, 2, 3, 5])
        h = draw.choice([1, 2, 3, 4, 16, 17, 33])
        self.first, self.second = nn.Linear(*self.shape, h), nn.Linear(h, h, bias=draw.random() < 0.5)
        self.last, self.skip = nn.Linear(h, outputs), nn.Linear(*self.shape, outputs)
        self.act, self.norm = activation(draw, smooth), draw.choice((nn.Identity(), nn.LayerNorm(h)))
        self.tied, self.skips = draw.random() < 0.3, draw.random() < 0.4

    def forward(self, x):
        y = self.norm(self.first(x))
        y = self.act(self.second(self.act(y) + y))  # y is read twice
        if self.tied:
            y = self.act(self.second(y))
        y = self.last(y)
        return y + self.skip(x) if self.skips else y


def problem(seed, smooth=False, dtype=torch.float64):
    """(module, data, options, what is differentiated) of a random call, of values that float32 has."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        module = draw.choice((ConvNet, Mlp))(draw, smooth).float().to(dtype)
        for parameter in module.parameters():
            parameter.requires_grad_(draw.random() < 0.8)
        tasks, steps = draw.choice([1, 2, 7]), draw.choice([0, 1, 2, 3])
        loss = draw.choice(["mse", "huber", "cross_entropy", "bce_with_logits"])
        adapted = [p for p in module.parameters() if p.requires_grad]
        shapes = (), (len(adapted),), (max(1, steps), len(adapted))
        lr = (0.1 * torch.rand(draw.choice(shapes))).float().to(dtype)
        inputs, data = [*adapted, lr.requires_grad_()], []
        weighted, active = draw.random() < 0.3, draw.random() < 0.5
        for samples in (draw.choice([2, 5]), draw.choice([2, 4])):
            x = torch.randn(tasks, samples, *module.shape).float().to(dtype)
            outputs = module(x[0]).shape[1:]
            y = torch.rand(tasks, samples, *outputs).float().to(dtype)
            if loss == "cross_entropy" and draw.random() < 0.7:
                y = torch.randint(outputs[0], (tasks, samples))
            weight = (torch.rand(tasks, samples) + 0.1).float().to(dtype).requires_grad_(active)
            inputs += [t for t in ([x, weight] if weighted else [x]) if active]
            data += [x.requires_grad_(active), (y, weight) if weighted else y]
    finally:
        torch.set_default_dtype(torch.float32)
    options = dict(loss=loss, steps=steps, lr=lr, reduction=draw.choice(["none", "mean"]))
    return module, data, {**options, "meta_gradient": draw.choice(["exact", "exact", "first_order"])}, inputs


def results(backend, module, data, options, inputs):
    """Losses and gradients of the single pass, then of two."""
    maml = maml_ext.MAML(module, backend=backend, **options)
    found = [maml(*data), maml.adapt(*data[:2]).loss(*data[2:])]
    for losses in found[:2]:
        found += torch.autograd.grad(weighted_sum(losses), inputs, materialize_grads=True)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_float64(seed):
    call = problem(seed, smooth=False)
    for i, (a, b) in enumerate(zip(results("compiled", *call), results("torch", *call), strict=True)):
        assert (a - b).norm() <= 1e-10 * b.norm() + 1e-12, i


@pytest.mark.parametrize("seed", range(100, 130))
def test_float32(seed):
    """Its kernels are others: what a compiler makes of them shows only here. Eager PyTorch sets the scale."""
    truth, ours, eager = (
        torch.cat([t.double().flatten() for t in results(backend, *problem(seed, True, dtype))])
        for backend, dtype in (("torch", torch.float64), ("compiled", torch.float32), ("torch", torch.float32))
    )
    assert (ours - truth).norm() <= 10 * (eager - truth).norm() + 1e-5 * truth.norm()


@pytest.mark.thorough
@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_other_instruction_sets(isa):
    """This file's first cases again, with kernels that are not this machine's choice."""
    tests = [f"{__file__}::test_float64[{seed}]" for seed in range(12)]
    tests += [f"{__file__}::test_float32[{seed}]" for seed in range(100, 112)]
    command, environment = [sys.executable, "-m", "pytest", "-q", *tests], {**os.environ, "MAML_EXT_CPU": isa}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
