"""The CUDA kernels, run on the CPU (tests/emulation), against the reference: layers, losses, derivatives, sizes.

The kernels' operators take the place of the CPU engine's, so that what is tested is the whole package on top of them.
"""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import Batch, relative_error, require_grad, weighted_sum
from test_engine import LOSSES, Wrapped, assert_close, float32_errors, mlp, results
from test_meta_operator import check_means, check_parts, check_support_to_first_order
from torch import nn

import maml_ext
from maml_ext import compiled, single_pass
from maml_ext.ops import library

pytestmark = pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled package beside it")

SMOOTH = {
    **{
        type(a).__name__ + getattr(a, "approximate", ""): (lambda a=a: mlp(a), (3,))
        for a in (nn.ELU(0.7), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Softplus(2.0, 3.0), nn.Tanh(), nn.Sigmoid())
    },
    "sin": (lambda: Wrapped(lambda x: torch.sin(2 * torch.sin(x)), nn.Linear(3, 2)), (3,)),
    "linear": (lambda: nn.Linear(3, 2, bias=False), (3,)),
    "wide": (lambda: nn.Sequential(nn.Linear(3, 67), nn.Tanh(), nn.Linear(67, 33), nn.SiLU(), nn.Linear(33, 1)), (3,)),
    "layer norm": (
        lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 2)), (3,)
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Linear(3, 70), nn.GroupNorm(2, 70, affine=False), nn.SiLU(), nn.Linear(70, 2)), (3,)
    ),
    "activations alone": (
        lambda: nn.Sequential(nn.Tanh(), nn.Sigmoid(), nn.Linear(3, 2), nn.SiLU(), nn.Tanh()), (3,)
    ),
    "images": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 2)), (2, 3, 2)),
}  # fmt: skip
KINKED = {
    "relu": (lambda: mlp(nn.ReLU()), (3,)),
    "leaky relu": (lambda: mlp(nn.LeakyReLU(0.2)), (3,)),
    "sinusoids": (
        lambda: nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)), (1,)
    ),
}  # fmt: skip
NETWORKS = {**SMOOTH, **KINKED}


@pytest.fixture(autouse=True)
def kernels(emulated, monkeypatch):
    """In place of the CPU engine's operators; as on an H100, threads and blocks in order."""
    emulated.shared_memory(227 * 1024)
    emulated.order("forward", 0)
    monkeypatch.setattr(compiled, "_ops", torch.ops.maml_ext_emulated)
    return emulated


def made(name, dtype=torch.float64, tasks=3, support=4, query=5, seed=0):
    torch.manual_seed(seed)
    build, shape = NETWORKS[name]
    module = build().to(dtype)
    outputs = module(torch.zeros(2, *shape, dtype=dtype)).shape[1:]
    x = [torch.randn(tasks, n, *shape, dtype=dtype) for n in (support, query)]
    y = [torch.rand(tasks, n, *outputs, dtype=dtype) for n in (support, query)]
    return module, Batch(x[0], y[0], x[1], y[1])


def launches(kernels, call):
    before = kernels.launches()
    call()
    return kernels.launches() - before


@pytest.mark.parametrize("single", [True, False], ids=["single pass", "two passes"])
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradient(name, single, monkeypatch):
    """By parameters, support and query data, against the reference in float64."""
    module, batch = made(name)
    batch = require_grad(batch)
    if not single:
        monkeypatch.setattr(single_pass, "meta_losses", lambda *_: None)
    expected = results(module, batch, "torch")
    assert_close(results(module, batch, "compiled"), expected)
    first_order = results(module, batch, "compiled", meta_gradient="first_order")
    assert_close(first_order[1:], results(module, batch, "torch", meta_gradient="first_order")[1:])
    if name != "linear":  # of least squares the Hessian is there all the same
        assert max(relative_error(f, e) for f, e in zip(first_order[1:], expected[1:])) > 1e-6  # the orders differ


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_bits_in_any_order_of_threads_and_blocks(name, kernels):
    """A missing barrier, or two threads that write one place, make a difference."""
    module, batch = made(name)
    batch, found = require_grad(batch), []
    for order, seed in (("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)):
        kernels.order(order, seed)
        found.append(results(module, batch, "compiled", reduction="mean", lr=torch.tensor(0.05).double()))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_as_near_to_float64_as_eager_pytorch(name):
    backends = [lambda module, batch, b=b: results(module, batch, b) for b in ("compiled", "torch")]
    ours, eager = float32_errors(lambda seed: made(name, seed=seed), backends)
    assert ours < 2 * eager


def check_derivatives(module, batch):
    """Finite differences of the adapted parameters; second ones of the network and of the loss."""
    theta = maml_ext.flatten(module).detach().requires_grad_()
    lr = theta.new_tensor(0.05).requires_grad_()
    x, y = batch.support_x.clone().requires_grad_(), batch.support_y.clone().requires_grad_()

    def adapted(theta, lr, x):
        (_, result) = maml_ext.inner_loop(module, theta, x, batch.support_y, lr=lr, steps=1, backend="compiled")
        return weighted_sum(result)

    network = lambda theta, x: maml_ext.network(module, theta, x, backend="compiled")  # noqa: E731
    loss = lambda theta, x, y: maml_ext.task_loss(module, theta, x, y, backend="compiled")  # noqa: E731
    assert torch.autograd.gradcheck(adapted, (theta, lr, x), fast_mode=True)
    assert torch.autograd.gradgradcheck(network, (theta, x), fast_mode=True, atol=1e-4)
    assert torch.autograd.gradgradcheck(loss, (theta, x, y), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name):
    check_derivatives(*made(name, tasks=1, support=2, query=2))


@pytest.mark.parametrize("name", NETWORKS)
def test_hvp(name):
    module, batch = made(name)
    theta = maml_ext.flatten(module).detach()
    vector = torch.randn(3, len(theta), dtype=torch.float64)
    found, expected = (
        maml_ext.hvp(module, theta, batch.support_x, batch.support_y, vector, backend=b) for b in ("compiled", "torch")
    )
    assert_close([found], [expected])
    assert expected.norm() > 0


def check_losses(name, weighted, steps=3, module=None, shape=(3,), places=(), device="cpu"):
    """Against the reference, with gradients of soft labels and of weights; one sample of a task has weight 0.

    The module puts out two classes at each of so many ``places``.
    """
    options = dict(dtype=torch.float64, device=device)
    loss = LOSSES[name].to(device).double() if isinstance(LOSSES[name], nn.Module) else LOSSES[name]
    module, data = (module or nn.Linear(3, 2)).to(device, torch.float64), []
    for n in (4, 5):
        x = torch.randn(3, n, *shape, **options, requires_grad=True)
        y = torch.rand(3, n, 2, *places, **options).requires_grad_()
        if name == "labels":
            y = torch.randint(2, (3, n, *places), device=device)
            y[:, 0] = 0
        if weighted:
            weight = torch.rand(3, n, **options)
            weight[1, 2] = 0
            y = y, weight.requires_grad_()
        data += [x, y]

    def gradients(backend):
        maml = maml_ext.MAML(module, lr=0.05, steps=steps, loss=loss, backend=backend)
        leaves = [t for pair in data for t in (pair if isinstance(pair, tuple) else [pair]) if t.requires_grad]
        losses = maml(*data)
        return [losses, *torch.autograd.grad(weighted_sum(losses), [*module.parameters(), *leaves])]

    assert_close(gradients("compiled"), gradients("torch"))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, weighted):
    check_losses(name, weighted)


def check_a_sample_of_weight_0(module, batch):
    weight = torch.ones_like(batch.support_y[..., 0])
    weight[1, 2] = 0
    good = results(module, batch._replace(support_y=(batch.support_y, weight)), "compiled")
    batch.support_x[1, 2], batch.support_y[1, 2] = math.nan, math.inf
    spoilt = results(module, batch._replace(support_y=(batch.support_y, weight)), "compiled")
    assert all(torch.equal(a, b) for a, b in zip(good, spoilt)) and good[1].isfinite().all()


def test_a_sample_of_weight_0_may_be_anything():
    check_a_sample_of_weight_0(*made("Tanh"))


def check_labels_that_are_no_class(device="cpu"):
    """On a device nobody looks at labels before the kernel does."""
    module = nn.Linear(3, 2, dtype=torch.float64, device=device)
    theta, x = maml_ext.flatten(module).detach(), torch.randn(2, 3, 3, dtype=torch.float64, device=device)
    for weight in (None, torch.tensor([0.3, 2.0], dtype=torch.float64, device=device)):
        for label in (2, -1, 2**40, -(2**40)):
            y = torch.tensor([[0, 1, 0], [1, label, 0]], device=device)
            losses = maml_ext.task_loss(module, theta, x, y, loss=nn.CrossEntropyLoss(weight), backend="compiled")
            assert losses[0].isfinite() and losses[1].isnan()


def test_a_label_that_is_no_class_gives_nan():
    check_labels_that_are_no_class()


@pytest.mark.parametrize("shape", [(), (4,), ("P",), (3, 1), (3, 4), (3, "P"), (5, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("meta_gradient", ["exact", "first_order"])
def test_rates(shape, reduction, meta_gradient):
    module, batch = made("Tanh")
    size = sum(p.numel() for p in module.parameters())
    lr = (0.1 * torch.rand([size if s == "P" else s for s in shape], dtype=torch.float64)).requires_grad_()
    options = dict(lr=lr, reduction=reduction, meta_gradient=meta_gradient)
    found, expected = (results(module, batch, b, **options) for b in ("compiled", "torch"))
    assert_close(found, expected)
    assert expected[-1].norm() > 0


@pytest.mark.parametrize("tasks, support, query, steps", [(1, 1, 1, 1), (1, 7, 1, 0), (5, 1, 3, 2), (17, 3, 2, 1)])
@pytest.mark.parametrize("name", ["wide", "layer norm", "sinusoids"])
def test_odd_sizes(name, tasks, support, query, steps):
    module, batch = made(name, torch.float64, tasks, support, query)
    batch = Batch(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in batch))  # not contiguous
    assert_close(*(results(module, batch, b, steps=steps) for b in ("compiled", "torch")))


@pytest.mark.parametrize("kibibytes", [13, 16, 24])
@pytest.mark.parametrize("name", ["wide", "layer norm"])
def test_samples_that_do_not_fit_take_turns(name, kibibytes, kernels, monkeypatch):
    module, batch = made(name, torch.float32 if name == "wide" else torch.float64, 2, 70, 33)
    batch = require_grad(batch)
    whole = results(module, batch, "compiled")
    kernels.shared_memory(kibibytes * 1024 * (5 if name == "wide" else 1))
    assert_close(results(module, batch, "compiled"), whole, 1e-5 if name == "wide" else 1e-12)


@pytest.mark.parametrize("steps", [64, 65, 130])
def test_more_steps_than_a_launch_takes(steps, kernels):
    module, batch = made("Tanh")
    theta = maml_ext.flatten(module).detach().requires_grad_()

    def adapted(backend):
        thetas = maml_ext.inner_loop(module, theta, *batch[:2], lr=0.02, steps=steps, backend=backend)
        return [thetas[-1], *torch.autograd.grad(weighted_sum(thetas[-1]) + weighted_sum(thetas[7]), theta)]

    assert launches(kernels, lambda: adapted("compiled")) == 2 * -(-steps // 64)
    assert_close(adapted("compiled"), adapted("torch"))


def test_launches_do_not_depend_on_the_number_of_steps(kernels, monkeypatch):
    module, batch = made("sinusoids", torch.float32, 25, 10, 10)
    for steps in (1, 5, 20):
        call = lambda steps=steps: results(module, batch, "compiled", steps=steps, reduction="mean")  # noqa: E731
        assert launches(kernels, call) == 2  # the meta-gradient of each task, and their sum
        with monkeypatch.context() as patch:
            patch.setattr(single_pass, "meta_losses", lambda *_: None)
            assert launches(kernels, call) == 3  # the inner loop, the loss with its gradient, the adjoint recursion


class Part(nn.Module):
    """With parameters that are frozen, and that nothing reads."""

    def __init__(self):
        super().__init__()
        self.frozen, self.spare, self.head = nn.Linear(3, 5), nn.Linear(2, 3), nn.Linear(5, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.frozen(x)))


def check_cotangents_of_several_steps(module, batch, steps=3):
    """The inner loop where the meta-loss depends on the last parameters, by the loss too, and on earlier ones."""
    theta = maml_ext.flatten(module).detach().requires_grad_()

    def adapted(backend):
        thetas = maml_ext.inner_loop(module, theta, *batch[:2], lr=0.1, steps=steps, backend=backend)
        loss = maml_ext.task_loss(module, thetas[-1], *batch[2:], backend=backend)
        total = weighted_sum(loss) + weighted_sum(thetas[-2])
        return [thetas[-1], loss, *torch.autograd.grad(total, theta)]

    assert_close(adapted("compiled"), adapted("torch"))


def test_frozen_and_unused_parameters():
    module = Part().double()
    data = Batch(*(torch.randn(3, n, w, dtype=torch.float64) for n, w in ((4, 3), (4, 2), (5, 3), (5, 2))))
    check_cotangents_of_several_steps(module, data)


def test_tied_weights():
    linear = nn.Linear(4, 4)
    module = nn.Sequential(linear, nn.Tanh(), linear, nn.Tanh(), linear).double()
    batch = require_grad(Batch(*(torch.randn(3, n, 4, dtype=torch.float64) for n in (4, 4, 5, 5))))
    assert_close(results(module, batch, "compiled"), results(module, batch, "torch"))


def test_means_over_tasks():
    check_means(torch.ops.maml_ext_emulated.meta)


def test_theta_in_parts():
    check_parts(torch.ops.maml_ext_emulated.meta)


def test_the_support_set_has_no_gradient_to_first_order():
    check_support_to_first_order(torch.ops.maml_ext_emulated.meta)


def test_zero_tasks_and_no_layers():
    nothing = [1, 0, 0, 3, 1, 1, 0, 0, 0, -1, 0], [0.0, 0.0], None, torch.zeros(0, dtype=torch.float64)
    x, y = torch.randn(2, 2, 5, 3, dtype=torch.float64).unbind()
    loss, _, to_x = torch.ops.maml_ext_emulated.score(*nothing, x, y, None, [1, 1, 0, 0])
    none = torch.ops.maml_ext_emulated.score(*nothing, x[:0], y[:0], None, [1, 1, 0, 0])
    assert [r.shape[0] for r in none] == [0, 0, 0]
    assert_close([loss, to_x], [(x - y).square().mean((1, 2)), 2 * (x - y) / 15])


class Drawn(nn.Module):
    """A random chain of the layers that the kernels know, some frozen, some tied."""

    def __init__(self, draw):
        super().__init__()
        width = draw.choice([1, 2, 3, 17])
        self.shape, self.layers = (width,), nn.ModuleList()
        for _ in range(draw.randint(1, 5)):
            kind = draw.random()
            if kind < 0.5:
                out = draw.choice([1, 2, 5, 16, 33])
                layer = nn.Linear(width, out, bias=draw.random() < 0.7)
                width = out
            elif kind < 0.7:
                groups = draw.choice([g for g in range(1, width + 1) if width % g == 0 and width // g > 1] or [0])
                layer = nn.GroupNorm(groups, width, affine=draw.random() < 0.7) if groups else nn.Identity()
            else:
                layer = draw.choice([nn.Tanh(), nn.SiLU(), nn.ELU(), nn.Softplus(), nn.GELU(), nn.Sigmoid()])
            if self.layers and draw.random() < 0.2:
                layer.requires_grad_(False)
            self.layers.append(layer)
        self.layers.append(nn.Linear(width, draw.choice([1, 2, 4])))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed, kernels):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    module = Drawn(draw).double()
    kernels.order("shuffled", seed)
    tasks, outputs = draw.choice([1, 2, 5]), module.layers[-1].out_features
    loss = draw.choice(["mse", "huber", "bce_with_logits", "cross_entropy"])
    data = []
    for _ in range(2):
        n = draw.choice([1, 2, 7, 12])
        x = torch.randn(tasks, n, *module.shape, dtype=torch.float64, requires_grad=draw.random() < 0.5)
        y = torch.rand(tasks, n, outputs, dtype=torch.float64)
        if loss == "cross_entropy" and draw.random() < 0.5:
            y = torch.randint(outputs, (tasks, n))
        data += [x, y]
    options = dict(
        loss=loss,
        lr=draw.choice([0.05, torch.rand(3, 1, dtype=torch.float64).requires_grad_()]),
        steps=draw.choice([0, 1, 3]),
        reduction=draw.choice(["none", "mean"]),
        meta_gradient=draw.choice(["exact", "exact", "first_order"]),
    )
    learned = [p for p in module.parameters() if p.requires_grad]

    def gradients(backend):
        losses = maml_ext.MAML(module, backend=backend, **options)(*data)
        leaves = [t for t in (*data, options["lr"]) if isinstance(t, torch.Tensor) and t.requires_grad]
        return [losses, *torch.autograd.grad(weighted_sum(losses), [*learned, *leaves], materialize_grads=True)]

    assert_close(gradients("compiled"), gradients("torch"), 1e-9)


# What the kernels do not run.


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


@pytest.mark.parametrize(
    "module, shape, reason",
    [
        (nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 2)), (1, 3, 3), "a convolution has no rule"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (3,), "batch norm or pooling has no rule"),
        (Branching(), (3,), "branches that join have no rule"),
        (Wrapped(lambda x: F.softmax(x, 1), nn.Linear(3, 2)), (3,), "a softmax has no rule"),
        (nn.Sequential(*[nn.Linear(3, 3)] * 1, *[nn.Linear(3, 3) for _ in range(17)]), (3,), "more than 16 layers"),
        (nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 5)), (784,), "too many parameters for shared"),
        (nn.Sequential(nn.Linear(64, 500), nn.ReLU(), nn.Linear(500, 5)), (64,), "would need .* KiB of shared memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons(module, shape, reason, emulated):
    module = module.double()
    theta, x = maml_ext.flatten(module).detach(), torch.randn(2, 3, *shape, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=reason):
        maml_ext.network(module, theta, x, backend="compiled")
    call = compiled.choose(module, maml_ext.stateless.Layout(module), theta, x, None, None, "compiled")
    assert reason.split(" .*")[0] in compiled._ops.cuda_misfit(call.program, call.numbers, 8, 227 * 1024)


@pytest.mark.parametrize("kibibytes, fits", [(27, False), (48, True), (227, True)])
def test_the_sizing_is_what_runs(kibibytes, fits, kernels):
    """Where it says that a network fits, every call does; where not, the operator refuses the largest one."""
    module, batch = made("sinusoids", torch.float32, 2, 10, 10)
    theta = maml_ext.flatten(module).detach()
    lr = torch.tensor(0.01, requires_grad=True)
    call = compiled.choose(module, maml_ext.stateless.Layout(module), theta, *batch[:2], "mse", "compiled")
    assert (compiled._ops.cuda_misfit(call.program, call.numbers, 4, kibibytes * 1024) == "") == fits
    kernels.shared_memory(kibibytes * 1024)
    if fits:
        results(module, batch, "compiled", lr=lr)
    else:
        with pytest.raises(RuntimeError, match="KiB of shared memory"):
            results(module, batch, "compiled", lr=lr, reduction="mean")
