"""The CPU engine against the reference: every layer, loss and derivative; threads; what anybody may pass to it."""

import math
import os
import statistics
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import OPERATORS, Batch, on_any_number_of_threads, relative_error, require_grad, weighted_sum
from torch import nn

import maml_ext
from maml_ext import recognise, single_pass
from maml_ext.ops import library
from maml_ext.stateless import Layout

pytestmark = pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled engine")


class Wrapped(nn.Module):
    """A function of the output of a layer."""

    def __init__(self, function, *layers):
        super().__init__()
        self.body, self.function = nn.Sequential(*layers), function

    def forward(self, x):
        return self.function(self.body(x))


class Bottleneck(nn.Module):
    """A residual block with batch norm and a projection, as in ResNet-12."""

    def __init__(self, inputs=2, outputs=3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.1),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.relu, self.pool, self.head = nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Linear(outputs, 2)

    def forward(self, x):
        out = self.body(x)
        out += self.project(x)
        out = self.pool(self.relu(out))
        return self.head(F.adaptive_avg_pool2d(out, 1).view(x.size(0), -1))


class Tied(nn.Module):
    """A linear layer that is applied twice, between two that are not."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(self.first(x))))))


def image_head(*layers, features):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 2))


def mlp(activation):
    return nn.Sequential(nn.Linear(3, 19), activation, nn.Linear(19, 2))


IMAGE = (2, 5, 7)
# name: (network, shape of a sample); the smooth ones have finite differences
SMOOTH = {
    **{
        type(a).__name__ + getattr(a, "approximate", ""): (lambda a=a: mlp(a), (3,))
        for a in (nn.ELU(0.7), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Softplus(2.0, 3.0), nn.Tanh(), nn.Sigmoid())
    },
    "sin": (lambda: Wrapped(lambda x: torch.sin(2 * x), nn.Linear(3, 2)), (3,)),
    "softmax": (lambda: Wrapped(lambda x: x.softmax(-1), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (3,)),
    "log softmax": (lambda: Wrapped(lambda x: F.log_softmax(x, 1), nn.Linear(3, 3)), (3,)),
    "wide": (lambda: nn.Sequential(nn.Linear(3, 67), nn.Tanh(), nn.Linear(67, 33), nn.SiLU(), nn.Linear(33, 1)), (3,)),
    "tied": (Tied, (3,)),
    "convolution": (
        lambda: image_head(nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 2), (1, 2)), nn.Tanh(), features=3 * 3 * 9), IMAGE
    ),
    "1x1, stride 2": (
        lambda: image_head(nn.Conv2d(2, 3, 3, padding="same"), nn.Conv2d(3, 2, 1, 2), nn.SiLU(), features=24), IMAGE
    ),
    "large stride": (
        lambda: image_head(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 2, 2, 3, 1), features=12), IMAGE
    ),
    "groups": (lambda: image_head(nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 4, 1, groups=4), features=60), IMAGE),
    "batch norm": (
        lambda: image_head(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.AvgPool2d(2), features=6), IMAGE
    ),
    "batch norm 1d": (lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)), (3,)),
    "group norm": (lambda: image_head(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), nn.Tanh(), features=90), IMAGE),
    "instance norm": (lambda: image_head(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, affine=True), features=45), IMAGE),
    "layer norm": (lambda: image_head(nn.LayerNorm(IMAGE), nn.Conv2d(2, 2, 3, padding=1), features=70), IMAGE),
    "average pool": (
        lambda: image_head(nn.Conv2d(2, 3, 2), nn.AvgPool2d(3, 2, 1, count_include_pad=False), features=18), IMAGE
    ),
    "adaptive": (lambda: image_head(nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d((3, 4)), features=36), IMAGE),
    "mean": (lambda: Wrapped(lambda x: x.mean((2, 3)), nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 1)), IMAGE),
    "product": (lambda: Wrapped(lambda x: x * torch.tanh(x) - 2 * x + 1, nn.Linear(3, 2)), (3,)),
    "square": (lambda: Wrapped(lambda x: x * x, nn.Linear(3, 2)), (3,)),
}  # fmt: skip
KINKED = {
    "relu": (lambda: mlp(nn.ReLU()), (3,)),
    "leaky relu": (lambda: mlp(nn.LeakyReLU(0.2)), (3,)),
    "negative slope": (lambda: mlp(nn.LeakyReLU(-0.5)), (3,)),
    "relu at both ends": (lambda: nn.Sequential(nn.ReLU(), mlp(nn.ReLU()), nn.LeakyReLU(0.1)), (3,)),
    "relu beside its input": (lambda: Wrapped(lambda x: F.relu(x) - 0.3 * x, nn.Linear(3, 2)), (3,)),
    "relu between convolutions": (
        lambda: image_head(
            nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1), nn.LeakyReLU(0.1), features=70
        ), IMAGE
    ),
    "many features": (
        lambda: nn.Sequential(nn.Linear(400, 150), nn.ReLU(), nn.Linear(150, 70), nn.Tanh(), nn.Linear(70, 9)), (400,)
    ),
    "max pool": (
        lambda: image_head(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), features=18), IMAGE
    ),
    "overlapping max pool": (
        lambda: image_head(nn.Conv2d(2, 3, 2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Tanh(), features=36), IMAGE
    ),
    "residual": (Bottleneck, (2, 6, 5)),
}  # fmt: skip
NETWORKS = {**SMOOTH, **KINKED}
LOSSES = {
    "mse": "mse",
    "huber": nn.HuberLoss(delta=0.3),
    "bce_with_logits": "bce_with_logits",
    "labels": nn.CrossEntropyLoss(torch.tensor([0.3, 2.0]), ignore_index=1, label_smoothing=0.2),
    "soft labels": nn.CrossEntropyLoss(torch.tensor([0.3, 2.0]), label_smoothing=0.1),
}


def made(name, dtype, tasks=3, support=4, query=5, seed=0):
    torch.manual_seed(seed)
    build, shape = NETWORKS[name]
    module = build().to(dtype)
    outputs = module(torch.zeros(2, *shape, dtype=dtype)).shape[1:]
    x = [torch.randn(tasks, n, *shape, dtype=dtype) for n in (support, query)]
    y = [torch.rand(tasks, n, *outputs, dtype=dtype) for n in (support, query)]
    return module, Batch(x[0], y[0], x[1], y[1])


def results(module, batch, backend, loss="mse", lr=0.05, steps=3, **options):
    """Losses and every gradient of a call of MAML."""
    maml = maml_ext.MAML(module, lr=lr, steps=steps, loss=loss, backend=backend, **options)
    inputs = [*module.parameters(), *(t for t in (*batch, lr) if isinstance(t, torch.Tensor) and t.requires_grad)]
    losses = maml(*batch)
    return [losses, *torch.autograd.grad(weighted_sum(losses), inputs, materialize_grads=True)]


def assert_close(found, expected, tolerance=1e-10):
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(f, e) < tolerance if e.norm() > 1e-9 else f.norm() < 1e-9, i


@pytest.mark.parametrize("single", [True, False], ids=["single pass", "two passes"])
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradient(name, single, monkeypatch):
    """By parameters, support and query data, against the reference in float64."""
    module, batch = made(name, torch.float64)
    batch = require_grad(batch)
    if not single:
        monkeypatch.setattr(single_pass, "meta_losses", lambda *_: None)
    expected = results(module, batch, "torch")
    assert_close(results(module, batch, "compiled"), expected)
    first_order = results(module, batch, "compiled", meta_gradient="first_order")
    assert_close(first_order[1:], results(module, batch, "torch", meta_gradient="first_order")[1:])
    assert max(relative_error(f, e) for f, e in zip(first_order[1:], expected[1:])) > 1e-6  # the orders differ


def float32_errors(make, ways, seeds=5):
    """Of each way to compute float32 gradients, a function of (module, batch), the error against float64.

    The median of some: where rounding tips a kink the other way, any may be far off. ``make`` is of a seed.
    """
    errors = [[] for _ in ways]
    for seed in range(seeds):
        module, batch = make(seed)
        module.float().double()
        batch = Batch(*(t.float().double() for t in batch))
        truth = torch.cat([g.flatten() for g in results(module, batch, "torch")[1:]])
        module, batch = module.float(), Batch(*(t.float() for t in batch))
        for way, found in zip(ways, errors):
            gradients = torch.cat([g.flatten() for g in way(module, batch)[1:]])
            found.append(float(relative_error(gradients.cpu().double(), truth)))
    print([sorted(found) for found in errors])
    return [statistics.median(found) for found in errors]


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_as_near_to_float64_as_eager_pytorch(name):
    backends = [lambda module, batch, b=b: results(module, batch, b) for b in ("compiled", "torch")]
    ours, eager = float32_errors(lambda seed: made(name, torch.float64, seed=seed), backends)
    assert ours < 2 * eager


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name):
    """Finite differences of the adapted parameters and of the single pass."""
    module, batch = made(name, torch.float64, tasks=1, support=2, query=2)
    theta = maml_ext.flatten(module).detach().requires_grad_()
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

    def adapted(theta, lr, x):
        (_, result) = maml_ext.inner_loop(module, theta, x, batch.support_y, lr=lr, steps=1, backend="compiled")
        return weighted_sum(result)

    x = batch.support_x.clone().requires_grad_()
    assert torch.autograd.gradcheck(adapted, (theta, lr, x), fast_mode=True)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradgradcheck_of_network_and_task_loss(name):
    module, batch = made(name, torch.float64, tasks=2, support=2)
    theta = maml_ext.flatten(module).detach().requires_grad_()
    x, y = batch.support_x.requires_grad_(), batch.support_y.requires_grad_()
    network = lambda theta, x: maml_ext.network(module, theta, x, backend="compiled")  # noqa: E731
    loss = lambda theta, x, y: maml_ext.task_loss(module, theta, x, y, backend="compiled")  # noqa: E731
    assert torch.autograd.gradgradcheck(network, (theta, x), fast_mode=True, atol=1e-4)
    assert torch.autograd.gradgradcheck(loss, (theta, x, y), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_hvp(name):
    module, batch = made(name, torch.float64)
    theta = maml_ext.flatten(module).detach()
    vector = torch.randn(3, len(theta), dtype=torch.float64)
    found, expected = (
        maml_ext.hvp(module, theta, batch.support_x, batch.support_y, vector, backend=b) for b in ("compiled", "torch")
    )
    assert_close([found], [expected])
    assert expected.norm() > 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dense", [False, True], ids=["vectors", "images"])
def test_losses(name, dense):
    """Of a class a sample, and of one a pixel."""
    torch.manual_seed(0)
    loss = LOSSES[name]
    if isinstance(loss, nn.Module):
        loss = loss.double()
    module = nn.Conv2d(3, 2, 2, dtype=torch.float64) if dense else nn.Linear(3, 2, dtype=torch.float64)
    shape, places = ((3, 3, 4), (2, 3)) if dense else ((3,), ())
    data = []
    for n in (4, 5):
        x = torch.randn(3, n, *shape, dtype=torch.float64)
        y = torch.rand(3, n, 2, *places, dtype=torch.float64).requires_grad_()
        data += [x, torch.randint(2, (3, n, *places)) if name == "labels" else y]
        if name == "labels":
            data[-1][:, 0] = 0
    found, expected = (results(module, Batch(*data), b, loss) for b in ("compiled", "torch"))
    assert_close(found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_prediction_makes_its_gradients_nan(name):
    loss, module = LOSSES[name], nn.Linear(3, 2, dtype=torch.float64)
    loss = loss.double() if isinstance(loss, nn.Module) else loss
    theta = maml_ext.flatten(module).detach().repeat(2, 1).requires_grad_()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    y = torch.zeros(2, 4, dtype=torch.long) if name == "labels" else torch.rand(2, 4, 2, dtype=torch.float64)
    x[0, 1] = math.nan
    value = maml_ext.task_loss(module, theta, x, y, loss=loss, backend="compiled")
    (gradient,) = torch.autograd.grad(value.sum(), theta)
    assert value.isnan().tolist() == [True, False]
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()


@pytest.mark.parametrize("shape", [(), (4,), ("P",), (3, 1), (3, 4), (3, "P"), (5, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_rates(shape, reduction):
    module, batch = made("Tanh", torch.float64)
    size = sum(p.numel() for p in module.parameters())
    lr = (0.1 * torch.rand([size if s == "P" else s for s in shape], dtype=torch.float64)).requires_grad_()
    found, expected = (results(module, batch, b, lr=lr, reduction=reduction) for b in ("compiled", "torch"))
    assert_close(found, expected)
    assert expected[-1].norm() > 0


@pytest.mark.parametrize("tasks, support, query, steps", [(1, 1, 1, 1), (1, 7, 1, 0), (5, 1, 3, 2), (17, 3, 2, 1)])
@pytest.mark.parametrize("name", ["wide", "tied", "relu", "convolution", "max pool", "group norm"])
def test_odd_sizes(name, tasks, support, query, steps):
    module, batch = made(name, torch.float64, tasks, support, query)
    batch = Batch(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in batch))  # not contiguous
    assert_close(*(results(module, batch, b, steps=steps) for b in ("compiled", "torch")))


@pytest.mark.parametrize("name", ["wide", "tied", "many features", "batch norm 1d"])
@pytest.mark.parametrize("rates", ["one", "a tensor", "a parameter"])
def test_many_samples(name, rates):
    """More than a block of rows has, some left out; the step is taken at once, or after the gradient."""
    module, batch = made(name, torch.float64, 2, 53, 61)
    sizes = [p.numel() for p in module.parameters()]
    count = {"a tensor": len(sizes), "a parameter": sum(sizes)}.get(rates)
    lr = 0.1 * torch.rand(count, dtype=torch.float64) if count else 0.07
    weight = torch.rand(2, 53, dtype=torch.float64)
    weight[:, ::3] = 0
    for data in (batch, batch._replace(support_y=(batch.support_y, weight))):
        found, expected = (results(module, data, b, lr=lr) for b in ("compiled", "torch"))
        assert_close(found, expected)
    assert relative_error(found[0], results(module, batch, "torch", lr=lr)[0]) > 1e-6  # the weights count


def test_frozen_parameters_and_running_statistics_are_read_anew():
    module, batch = made("batch norm", torch.float64)
    module[0].requires_grad_(False)
    module(batch.support_x[0])
    module.eval()
    for _ in range(2):
        found, expected = [], []
        for backend, into in (("compiled", found), ("torch", expected)):
            maml = maml_ext.MAML(module, lr=0.05, steps=2, backend=backend)
            losses = maml(*batch)
            into += [losses, *torch.autograd.grad(losses.sum(), [p for p in module.parameters() if p.requires_grad])]
        assert_close(found, expected)
        with torch.no_grad():
            module[0].weight.mul_(1.5)
            module[1].running_mean.add_(0.3)


def test_a_changed_setting_is_seen():
    module, batch = made("leaky relu", torch.float64)
    before = maml_ext.MAML(module)(*batch)
    module[1].negative_slope = 0.9
    after = maml_ext.MAML(module)(*batch)
    assert relative_error(after, before) > 1e-3
    assert_close([after], [maml_ext.MAML(module, backend="torch")(*batch)])
    module[1].register_forward_hook(lambda *_: None)
    assert maml_ext.MAML(module).explain(*batch[:2]).engine == "torch"


def test_a_nan_is_gone_with_its_task():
    """What stays of it in padding does not reach another task, or a later call in the same memory."""
    module, batch = made("wide", torch.float64, 4)
    expected = maml_ext.MAML(module, lr=0.05, steps=3)
    good = [expected(*batch), expected.adapt(*batch[:2]).loss(*batch[2:])]
    spoilt = batch._replace(support_y=batch.support_y.index_fill(0, torch.tensor([1]), 1e300))
    for _ in range(2):
        for losses in (expected(*spoilt), expected.adapt(*spoilt[:2]).loss(*spoilt[2:])):
            assert losses.isfinite().tolist() == [True, False, True, True]
        assert_close([expected(*batch), expected.adapt(*batch[:2]).loss(*batch[2:])], good)


def test_a_padded_convolution_of_one_position_is_no_linear_layer():
    module = nn.Conv2d(4, 1, 1, padding=1).double()
    theta, x = maml_ext.flatten(module).detach(), torch.randn(2, 3, 4, 1, 1, dtype=torch.float64)
    assert_close(*([maml_ext.network(module, theta, x, backend=b)] for b in ("compiled", "torch")))


@pytest.mark.parametrize("name", ["wide", "many features", "max pool", "residual"])
@pytest.mark.parametrize("tasks", [1, 3, 25])
def test_the_same_bits_on_any_number_of_threads(name, tasks):
    module, batch = made(name, torch.float32, tasks)
    on_any_number_of_threads(lambda: results(module, batch, "compiled", reduction="mean"))


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_every_instruction_set(isa):
    """Those that the machine lacks are replaced by the best it has; the best is what all other tests run on."""
    code = (
        "import torch, maml_ext; from torch import nn; torch.manual_seed(0)\n"
        "head = nn.Flatten(), nn.Linear(45, 19), nn.ReLU(), nn.Linear(19, 1)\n"
        "net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.SiLU(), *head).double()\n"
        "data = [torch.randn(2, 4, 2, 5, 5).double(), torch.randn(2, 4, 1).double()] * 2\n"
        "g = [torch.autograd.grad(maml_ext.MAML(net, lr=.1, steps=2, backend=b)(*data).sum(), list(net.parameters()))"
        " for b in ('compiled', 'torch')]\n"
        "print(max(float((a - b).norm() / (1e-9 + b.norm())) for a, b in zip(*g) if b.norm() > 1e-9))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MAML_EXT_CPU": isa},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1e-10


# The operators, called directly.


def problem(dtype=torch.float64):
    module = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).to(dtype)
    layout = Layout(module)
    network = recognise.network(recognise.trace(module), layout, torch.Size([2, 3, 3]))
    program, numbers = [*network.program, 0, 0, -1, 0], [*network.numbers, 0.0, 0.0]
    theta = layout.flatten().detach()
    return program, numbers, theta, torch.randn(2, 3, 2, 3, 3, dtype=dtype), torch.randn(2, 3, 2, dtype=dtype)


def score(program, numbers, theta, x, y):
    return torch.ops.maml_ext.score(program, numbers, None, theta, x, y, None, [1, 1, 1, 0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p, n, t, x, y: (p[:-1], n, t, x, y), "program: expected 11 integers"),
        (lambda p, n, t, x, y: ([2, *p[1:]], n, t, x, y), "expected version 1, got 2"),
        (lambda p, n, t, x, y: (p, n[1:], t, x, y), "numbers, got"),
        (lambda p, n, t, x, y: (p, n, t[1:], x, y), "theta: expected"),
        (lambda p, n, t, x, y: (p, n, t, x[:, :0], y), "with a sample at least"),
        (lambda p, n, t, x, y: (p, n, t, x, y[:1]), "y: expected 12 elements, got 6"),
        (lambda p, n, t, x, y: (p, n, t, x.float(), y), "x: expected theta's dtype"),
        (lambda p, n, t, x, y: (p, n, t.half(), x, y), "theta: expected float32 or float64"),
        (lambda p, n, t, x, y: ([*p[:7], 99, *p[8:]], n, t, x, y), "kind: expected 0 to 7, got 99"),
        (lambda p, n, t, x, y: ([*p[:8], 5, *p[9:]], n, t, x, y), "expected a value from 0 to 0, got 5"),
        (lambda p, n, t, x, y: ([*p[:10], 2**31 - 1, *p[11:]], n, t, x, y), "does not lie within"),
        (lambda p, n, t, x, y: ([p[0], 2**62, *p[2:]], n, t, x, y), "header 1"),
    ],
)
def test_wrong_arguments_of_an_operator(change, message):
    with pytest.raises(RuntimeError, match=message):
        score(*change(*problem()))


def test_zero_tasks_nan_and_aliased_tensors():
    program, numbers, theta, x, y = problem()
    assert [r.shape[0] for r in score(program, numbers, theta, x[:0], y[:0])[:2]] == [0, 0]
    tangents = torch.ops.maml_ext.score_tangent(
        program, numbers, None, theta, x[:0], y[:0], None, None, None, y[:0], None, [1, 1, 0]
    )
    assert [t.shape[0] for t in tangents] == [0, 0, 0]
    assert all(math.isnan(v) for v in score(program, numbers, theta * math.nan, x, y)[0].tolist())
    same = torch.ops.maml_ext.meta(
        program, numbers, None, [theta], torch.full((1, 1), 0.1).double(), x, y, None, x, y, None, 1, False, True,
        [0] * 7,
    )
    copy = torch.ops.maml_ext.meta(
        program, numbers, None, [theta], torch.full((1, 1), 0.1).double(), x, y, None, x.clone(), y.clone(), None, 1,
        False, True, [0] * 7,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(same, copy))


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    """All of its tests; tensors require grad where the operator is differentiable, in all of its results."""
    program, numbers, theta, x, y = problem()
    lr, cotangent = torch.full((1, 1), 0.1, dtype=torch.float64), torch.randn(2, *theta.shape, dtype=torch.float64)
    arguments = {
        "predict": (x, [2]),
        "pull": (x, y, [1, 1]),
        "pull_tangent": (x, y, torch.randn_like(theta), torch.randn_like(x)),
        "score": (x, y, torch.rand(2, 3, dtype=torch.float64), [1, 1, 1, 1]),
        "score_tangent": (x, y, None, cotangent, torch.randn_like(x), None, None, [1, 1, 0]),
        "adapt": (lr, x, y, None, 2),
        "adjoint": (lr, x, y, None, [cotangent], [cotangent, cotangent], [0, 1], False, [1, 1, 1, 0]),
        "meta": (lr, x, y, None, x, y, None, 2, False, True, [1, 1, 1, 0, 1, 1, 0]),
    }[name]
    if name in ("predict", "pull", "score", "adapt"):
        theta.requires_grad_()
    elif name == "score_tangent":
        cotangent.requires_grad_()
    operator = getattr(torch.ops.maml_ext, name).default
    parts = [theta[:50], theta[50:].view(-1, 1)] if name == "meta" else theta
    torch.library.opcheck(operator, (program, numbers, None, parts, *arguments))
    if name == "meta":  # its losses alone have a derivative, and compiled graphs are tested on all results
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        arguments = (program, numbers, None, [t.requires_grad_() for t in parts], *arguments)
        torch.library.opcheck(operator, arguments, test_utils=tests)


def test_compiled_without_a_graph_break():
    program, numbers, theta, x, y = problem(torch.float32)
    call = lambda theta: torch.ops.maml_ext.score(program, numbers, None, theta, x, y, None, [1, 0, 0, 0])[0] * 2  # noqa: E731
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(theta), call(theta))


@pytest.mark.parametrize("parameter", ["theta", "x"])
def test_a_batch_of_calls_is_a_loop(parameter):
    program, numbers, theta, x, y = problem()
    thetas, xs = torch.stack([theta, 2 * theta]), torch.stack([x, 0.5 * x])
    dims = (0, None) if parameter == "theta" else (None, 0)
    call = lambda theta, x: score(program, numbers, theta, x, y)[0]  # noqa: E731
    given = (thetas, x) if parameter == "theta" else (theta, xs)
    found = torch.vmap(call, in_dims=dims)(*given)
    for b in range(2):
        assert torch.equal(found[b], call(*(g[b] if d == 0 else g for g, d in zip(given, dims))))
