"""The CPU engine's algorithms for convolutions against the reference: each in the shapes it is chosen for.

``csrc/engine/layout.cpp`` chooses by shape: Winograd's where a 3x3 filter with stride 1 has 16 channels or more at
both ends, ``Contract::few_rows`` for the first layer of a network of images, the direct product for all others.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import Batch, on_any_number_of_threads, relative_error, require_grad
from test_engine import assert_close, image_head, results
from test_engine import float32_errors as errors_of
from torch import nn

import maml_ext
from maml_ext.ops import library

pytestmark = pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled engine")


def block(inputs, outputs, padding=1, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=padding, **options), nn.BatchNorm2d(outputs), nn.ReLU()


# name: (network, shape of a sample)
NETWORKS = {
    "paddings, not square": (
        lambda: image_head(
            nn.Conv2d(16, 19, 3, padding=1), nn.Tanh(), nn.Conv2d(19, 17, 3), nn.Tanh(),
            nn.Conv2d(17, 16, 3, padding=2, bias=False), nn.Tanh(), features=16 * 9 * 6,
        ), (16, 9, 6),
    ),
    "one axis padded": (
        lambda: image_head(nn.Conv2d(16, 16, 3, padding=(2, 0)), nn.SiLU(), nn.Conv2d(16, 18, 3, padding=(0, 1)),
                           nn.SiLU(), features=18 * 7 * 9), (16, 7, 11),
    ),
    "more channels than a block": (
        lambda: image_head(nn.Conv2d(3, 70, 3, padding=1), nn.Tanh(), nn.Conv2d(70, 67, 3, padding=1), nn.Tanh(),
                           features=67 * 35), (3, 5, 7),
    ),
    "stride and dilation": (
        lambda: image_head(nn.Conv2d(16, 16, 3, 2, 1), nn.Tanh(), nn.Conv2d(16, 16, 3, dilation=2, padding=2),
                           nn.Tanh(), nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 16, 3, padding=3),
                           features=16 * 9 * 8), (16, 13, 11),
    ),
    "first layer, pooled": (
        lambda: image_head(*block(1, 17), nn.MaxPool2d(2), *block(17, 18), features=18 * 6 * 5), (1, 13, 11)
    ),
    "first layer, average over what is left": (
        lambda: image_head(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.AvgPool2d(3), features=8 * 9),
        (3, 21, 22),
    ),
    "first layer, not pooled": (lambda: image_head(*block(2, 8, 0, bias=False), features=8 * 110), (2, 12, 13)),
    "first layer, read twice": (lambda: image_head(Twice(), features=8 * 110), (2, 12, 13)),
    "first layer, kernel not square": (
        lambda: image_head(nn.Conv2d(3, 5, (2, 4)), nn.Tanh(), features=5 * 10 * 11), (3, 11, 14)
    ),
}  # fmt: skip


class Twice(nn.Module):
    """Batch norm and a second reader of what the first convolution puts out."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.first(x)
        return self.norm(y) + y


def made(name, tasks=2, support=3, query=4, seed=0):
    torch.manual_seed(seed)
    build, shape = NETWORKS[name]
    module = build().double()
    x = [torch.randn(tasks, n, *shape, dtype=torch.float64) for n in (support, query)]
    y = [torch.rand(tasks, n, 2, dtype=torch.float64) for n in (support, query)]
    return module, Batch(x[0], y[0], x[1], y[1])


@pytest.mark.parametrize("by_data", [False, True], ids=["by parameters", "by data too"])
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradient(name, by_data):
    module, batch = made(name)
    if by_data:
        batch = require_grad(batch)
    expected = results(module, batch, "torch", steps=2)
    assert_close(results(module, batch, "compiled", steps=2), expected)
    with torch.no_grad():  # the measure sees a change in one of many weights
        next(module.parameters()).view(-1)[4] += 1e-4
    assert relative_error(results(module, batch, "compiled", steps=2)[1], expected[1]) > 1e-8


@pytest.mark.parametrize("tasks, support, query", [(1, 1, 1), (1, 9, 2), (3, 1, 7)])
@pytest.mark.parametrize("name", ["paddings, not square", "first layer, pooled"])
def test_odd_sizes(name, tasks, support, query):
    """One sample, one task; more tiles than one slice of a sum."""
    module, batch = made(name, tasks, support, query)
    assert_close(*(results(module, batch, b, steps=2) for b in ("compiled", "torch")))


@pytest.mark.parametrize("name", ["paddings, not square", "more channels than a block", "first layer, pooled"])
def test_float32_is_as_near_to_float64_as_eager_pytorch(name):
    backends = [lambda module, batch, b=b: results(module, batch, b, steps=2) for b in ("compiled", "torch")]
    ours, eager = errors_of(lambda seed: made(name, seed=seed), backends)
    assert ours < 2 * eager


@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("name", ["paddings, not square", "first layer, pooled", "first layer, kernel not square"])
def test_the_same_bits_on_any_number_of_threads(name, tasks):
    module, batch = made(name, tasks, support=11, query=12)
    module, batch = module.float(), Batch(*(t.float() for t in batch))
    on_any_number_of_threads(lambda: results(module, batch, "compiled", steps=2))


@pytest.mark.parametrize("by_rates", [False, True], ids=["one rate", "a rate a parameter"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tasks_that_take_turns_in_front_of_the_query_set(reduction, by_rates):
    """csrc/cpu/engine/work.h: the query set's frame, 54 MB, is more than a thread has for its task.

    With three threads the last round has a task alone; another leaves samples out.
    """
    head = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 32 * 32, 1)
    module = nn.Sequential(*block(1, 8, bias=False), *head).double()
    x, y, weight = torch.randn(4, 62, 1, 64, 64), torch.randn(4, 62, 1), torch.ones(4, 62)
    weight[1, 1] = weight[2, 7:60] = 0
    x, y, weight = x.double(), y.double(), weight.double()
    lr = torch.full((sum(p.numel() for p in module.parameters()) if by_rates else 1,), 0.01, dtype=torch.float64)

    def gradients(backend):
        rate = lr.clone().requires_grad_(reduction == "mean")
        maml = maml_ext.MAML(module, lr=rate, steps=2, backend=backend, reduction=reduction)
        losses = maml(x[:, :2], (y[:, :2], weight[:, :2]), x[:, 2:], (y[:, 2:], weight[:, 2:]))
        inputs = [*module.parameters(), *([rate] if rate.requires_grad else [])]
        return [losses, *torch.autograd.grad(losses.sum(), inputs)]

    assert_close(on_any_number_of_threads(lambda: gradients("compiled")), gradients("torch"))


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_every_instruction_set(isa):
    """Those that the machine lacks are replaced by the best it has; the best is what all other tests run on."""
    file = f"{__file__}::test_meta_gradient"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file],
        env=os.environ | {"MAML_EXT_CPU": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout
