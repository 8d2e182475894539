"""The Triton engine against the reference: whole networks, every operator, sizes, orders, precisions, plans.

Its operators take the place of those of the CPU engine, so that what is tested is the whole package on top of them.
Interpreted, a kernel's program takes milliseconds: networks are small, and most of them `thorough`.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Batch, relative_error, require_grad, weighted_sum
from test_cuda_engine import (
    Part,
    check_a_sample_of_weight_0,
    check_cotangents_of_several_steps,
    check_derivatives,
    check_labels_that_are_no_class,
    check_losses,
)
from test_engine import LOSSES, NETWORKS, SMOOTH, assert_close, float32_errors, made, problem, results
from test_meta_operator import check_means, check_parts, check_support_to_first_order
from torch import nn
from triton_tools import Operators, device, needs_triton

import maml_ext
from maml_ext import compiled, single_pass
from maml_ext.ops import library
from maml_ext.program import Precision

pytestmark = [needs_triton, pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled package")]
needs_cuda = pytest.mark.skipif(device != "cuda", reason="needs a CUDA device")
double = dict(dtype=torch.float64, device=device)


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    monkeypatch.setattr(compiled, "_ops", Operators())


def some(names, *shown):
    """A parametrisation by all names, of which those that are not ``shown`` are thorough."""
    assert set(shown) <= set(names)
    return pytest.mark.parametrize(
        "name", [n if n in shown else pytest.param(n, marks=pytest.mark.thorough) for n in names]
    )


# A large network takes the interpreter seconds: `test_meta_gradient` has it.
FEW = [name for name in NETWORKS if name != "many features"]


def small(name, dtype=torch.float64, tasks=2, support=2, query=2, seed=0):
    module, batch = made(name, dtype, tasks, support, query, seed)
    return module.to(device), Batch(*(t.to(device) for t in batch))


def data(*shape, outputs=2, tasks=2, samples=2):
    return Batch(*(torch.randn(tasks, samples, *s, **double) for s in 2 * (shape, (outputs,))))


def both(module, batch, **options):
    return [results(module, batch, backend, **options) for backend in ("compiled", "torch")]


def two_passes(monkeypatch):
    monkeypatch.setattr(single_pass, "meta_losses", lambda *_: None)


# Networks


@some(NETWORKS, "convolution", "groups", "batch norm", "layer norm", "softmax", "residual")
def test_meta_gradient(name):
    """By parameters, support and query data, against the reference in float64."""
    module, batch = small(name)
    found, expected = both(module, require_grad(batch), steps=1)
    assert_close(found, expected)


@some(FEW, "batch norm 1d")
def test_meta_gradient_in_two_passes(name, monkeypatch):
    two_passes(monkeypatch)
    module, batch = small(name)
    assert_close(*both(module, require_grad(batch), steps=2))


@pytest.mark.parametrize("single", [True, False], ids=["single pass", "two passes"])
@some(FEW, "Tanh")
def test_first_order(name, single, monkeypatch):
    if not single:
        two_passes(monkeypatch)
    module, batch = small(name)
    found, expected = both(module, require_grad(batch), steps=2, meta_gradient="first_order")
    assert_close(found, expected)
    exact = results(module, batch, "torch", steps=2)
    assert max(relative_error(f, e) for f, e in zip(found[1:], exact[1:])) > 1e-6  # the orders differ


@some(FEW, "GELUnone")
def test_float32_is_as_near_to_float64_as_eager_pytorch(name):
    backends = [lambda module, batch, b=b: results(module, batch, b, steps=1) for b in ("compiled", "torch")]
    ours, eager = float32_errors(lambda seed: small(name, seed=seed), backends, seeds=3)
    assert ours < 2 * eager


@some(SMOOTH, "sin")
def test_gradcheck(name):
    check_derivatives(*small(name, tasks=1))


@some(NETWORKS, "relu", "square")
def test_hvp(name):
    module, batch = small(name)
    theta = maml_ext.flatten(module).detach()
    vector = torch.randn(2, len(theta), **double)
    found, expected = (maml_ext.hvp(module, theta, *batch[:2], vector, backend=b) for b in ("compiled", "torch"))
    assert_close([found], [expected])
    assert expected.norm() > 0


@pytest.mark.parametrize("tasks, support, query, steps", [(1, 1, 1, 1), (1, 3, 1, 0), (3, 1, 2, 2), (5, 2, 9, 1)])
@some(FEW, "Tanh")
def test_odd_sizes(name, tasks, support, query, steps):
    module, batch = small(name, torch.float64, tasks, support, query)
    batch = Batch(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in batch))  # not contiguous
    if name != "batch norm 1d" or min(support, query) > 1:  # one value a channel has no statistics
        assert_close(*both(module, batch, steps=steps))


@pytest.mark.thorough
def test_more_than_a_tile_of_everything():
    """Of samples, inputs, outputs, and parameters of a block."""
    module = nn.Sequential(nn.Linear(37, 41), nn.Tanh(), nn.Linear(41, 2)).to(**double)
    assert_close(*both(module, require_grad(data(37, tasks=1, samples=35)), steps=1))


# Losses and rates


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, weighted):
    check_losses(name, weighted, steps=1, device=device)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_images(name):
    check_losses(name, True, 1, nn.Conv2d(3, 2, 2), (3, 2, 3), (1, 2), device)


def test_a_sample_of_weight_0_may_be_anything():
    check_a_sample_of_weight_0(*small("Tanh", tasks=3, support=4))
    check_a_sample_of_weight_0(*small("batch norm 1d", tasks=3, support=4))


def test_samples_of_weight_0_are_left_out_of_batch_statistics():
    module, batch = small("batch norm", support=4)
    weight = torch.rand(2, 4, **double)
    weight[0, 1] = weight[1, 3] = 0
    plain = results(module, batch, "torch", steps=1)
    found, expected = both(module, batch._replace(support_y=(batch.support_y, weight)), steps=1)
    assert_close(found, expected)
    assert relative_error(plain[1], expected[1]) > 1e-3


def test_a_label_that_is_no_class_gives_nan():
    check_labels_that_are_no_class(device)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("meta_gradient", ["exact", pytest.param("first_order", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("shape", [(), (2,), ("P",), (2, 1), (2, 2), (2, "P"), (4, 1)], ids=str)
def test_rates(shape, reduction, meta_gradient):
    module, batch = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).to(**double), data(3)
    lr = (0.1 * torch.rand([8 if s == "P" else s for s in shape], **double)).requires_grad_()
    found, expected = both(module, batch, lr=lr, steps=2, reduction=reduction, meta_gradient=meta_gradient)
    assert_close(found, expected)
    assert expected[-1].norm() > 0


# Parameters


@pytest.mark.parametrize("single", [True, False], ids=["single pass", "two passes"])
def test_frozen_and_unused_parameters(single, monkeypatch):
    module, batch = Part().to(**double), data(3)  # with a layer that is frozen, and one that nothing reads
    check_cotangents_of_several_steps(module, batch)
    if not single:
        two_passes(monkeypatch)
    assert_close(*both(module.requires_grad_(), batch, steps=2))


class Tied(nn.Module):
    """A linear layer that sits behind a flatten, and in other places too; and filters that are one tensor."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(12, 12)

    def forward(self, x):
        x = self.conv(torch.tanh(self.conv(x)))
        x = torch.tanh(self.linear(x.flatten(1)))
        return self.linear(torch.tanh(self.linear(x)))


@pytest.mark.parametrize("frozen", [False, True])
def test_tied_parameters(frozen):
    module, batch = Tied().to(**double), require_grad(data(1, 3, 4, outputs=12))
    module.conv.weight.requires_grad_(not frozen)
    learned = [p for p in module.parameters() if p.requires_grad]

    def gradients(backend):
        losses = maml_ext.MAML(module, lr=0.05, steps=1, backend=backend)(*batch)
        return [losses, *torch.autograd.grad(weighted_sum(losses), [*learned, *batch])]

    assert_close(gradients("compiled"), gradients("torch"))


def test_running_statistics_and_frozen_layers_are_read_anew():
    module, batch = small("max pool")
    module[0].requires_grad_(False)
    module(batch.support_x[0])
    module.eval()
    learned = [p for p in module.parameters() if p.requires_grad]
    for _ in range(2):
        pairs = []
        for backend in ("compiled", "torch"):
            losses = maml_ext.MAML(module, lr=0.05, steps=1, backend=backend)(*batch)
            pairs.append([losses, *torch.autograd.grad(losses.sum(), learned)])
        assert_close(*pairs)
        with torch.no_grad():
            module[0].weight.mul_(1.5)
            module[1].running_mean.add_(0.3)


# The operators, called directly


def run(name, program, numbers, constants, theta, *rest):
    theta = [theta] if name == "meta" else theta
    return getattr(torch.ops.maml_ext, f"triton_{name}")(program, numbers, constants, theta, *rest)


def test_means_over_tasks():
    check_means(torch.ops.maml_ext.triton_meta, device)


def test_theta_in_parts():
    check_parts(torch.ops.maml_ext.triton_meta, device)


def test_the_support_set_has_no_gradient_to_first_order():
    check_support_to_first_order(torch.ops.maml_ext.triton_meta, device)


def test_no_layers_no_parameters_and_no_tasks():
    """The prediction is the input; of nothing to learn there is a gradient of no elements, whatever the rates."""
    nothing = [1, 0, 0, 3, 1, 1, 0, 0, 0, -1, 0], [0.0, 0.0], None, torch.zeros(0, **double)
    x, y = torch.randn(2, 2, 5, 3, **double).unbind()
    loss, to_theta, to_x, to_y = run("score", *nothing, x, y, None, [1, 1, 1, 0])
    assert_close([loss, to_x, to_y], [(x - y).square().mean((1, 2)), 2 * (x - y) / 15, 2 * (y - x) / 15])
    assert to_theta.shape == (2, 0)
    assert torch.equal(run("predict", *nothing, x, [3])[0], x)
    for width in (0, 1):
        lr = torch.ones(1, width, **double)
        loss, _, to_lr, to_support = run(
            "meta", *nothing, lr, x, y, None, x, y, None, 2, False, True, [1, 1, 0, 0, 0, 0, 0]
        )
        assert_close([loss], [(x - y).square().mean()])
        assert to_lr.shape == lr.shape and not to_lr.any() and not to_support.any()
    assert [r.shape[0] for r in run("score", *nothing, x[:0], y[:0], None, [1, 1, 0, 0])[:3]] == [0, 0, 0]


def test_filters_of_the_same_size_may_be_one_tensor():
    """A row and a column of three."""
    contract = lambda j, kh, kw: [0, j, -1, 1, kh, kw, 1, 1, kh // 2, kh // 2, kw // 2, kw // 2, 1, 1, 1, 0, -1]  # noqa: E731
    program = [1, 3, 0, 1, 3, 4, 2, *contract(0, 3, 1), *contract(1, 1, 3), 0, 0, -1, 0]
    theta, x, y = torch.randn(3, **double), torch.randn(2, 2, 12, **double), torch.randn(2, 2, 12, **double)
    loss, gradient, *_ = run("score", program, [0.0] * 6, None, theta, x, y, None, [1, 0, 0, 0])
    theta.requires_grad_()
    z = F.conv2d(x.view(4, 1, 3, 4), theta.view(1, 1, 3, 1), padding=(1, 0))
    z = F.conv2d(z, theta.view(1, 1, 1, 3), padding=(0, 1)).view(2, 2, 12)
    expected = (z - y).square().mean((1, 2))
    assert_close([loss, gradient.sum(0)], [expected, *torch.autograd.grad(expected.sum(), theta)])


@pytest.mark.parametrize(
    "precision, tolerance", [(Precision.TF32, 5e-3), (Precision.BFLOAT16, 2e-2), (Precision.FLOAT16, 3e-3)]
)
def test_precision(precision, tolerance):
    """Products in less, in the tangents too; of float64 none. The interpreter knows no TF32."""
    program, numbers, theta, x, y = (t.to(device) if isinstance(t, torch.Tensor) else t for t in problem(torch.float32))
    lr, wanted = torch.full((1, 1), 0.1, device=device), [0] * 7

    def meta(precision, dtype):
        given = (t.to(dtype) for t in (lr, x, y))
        rate, x_, y_ = given
        return run(
            "meta", [*program[:-1], int(precision)], numbers, None, theta.to(dtype), rate, x_, y_, None, x_, y_, None,
            1, False, True, wanted,
        )[:2]  # fmt: skip

    exact = meta(Precision.FULL, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(meta(precision, torch.float64), exact))
    full, less = (
        max(relative_error(a, b) for a, b in zip(meta(p, torch.float32), exact)) for p in (Precision.FULL, precision)
    )
    assert full < 1e-5 and less < tolerance
    assert precision == Precision.TF32 or less > 10 * full


@needs_cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_autocast(dtype, tolerance):
    module, batch = small("wide", torch.float32)
    expected = results(module, batch, "compiled")
    with torch.autocast("cuda", dtype):
        found = results(module, batch, "compiled")
    errors = [relative_error(f, e) for f, e in zip(found, expected)]
    assert 1e-6 < max(errors) < tolerance


@needs_cuda
def test_explain(monkeypatch):
    monkeypatch.setattr(compiled, "_ops", torch.ops.maml_ext)
    module, batch = small("residual", torch.float32)
    report = maml_ext.MAML(module, steps=2).explain(*batch[:2])
    assert report.engine == "triton" and "not a network that the CUDA kernels run" in str(report)


# Plans


def outcomes(*calls):
    return [results(module, batch, "compiled", steps=1) for module, batch in calls]


@pytest.fixture
def plans(monkeypatch):
    """None yet, and two kept at most."""
    from maml_ext.kernels import engine

    monkeypatch.setattr(engine, "_plans", type(engine._plans)())
    monkeypatch.setattr(engine, "KEPT", 2)
    return engine._plans


def test_plans(plans):
    """Other data, other shapes in turn, more kinds than are kept: the same bits as in memory that is new."""
    module, first = small("sin")
    _, second = small("sin", seed=1)
    _, wider = small("sin", support=3)
    other, third = small("square")
    calls = [(module, first), (module, second), (module, wider), (other, third)]
    expected = []
    for call in calls:
        plans.clear()
        expected += outcomes(call)
    assert relative_error(expected[0][1], expected[1][1]) > 1e-3
    plans.clear()
    found = outcomes(*calls, *calls[:2], *calls[::-1])
    for f, e in zip(found, [*expected, *expected[:2], *expected[::-1]]):
        assert all(torch.equal(a, b) for a, b in zip(f, e))
    assert len(plans) == 2


def test_a_nan_is_gone_with_its_task():
    """What stays of it in memory does not reach another task, or a later call."""
    module, batch = small("batch norm 1d", tasks=3)
    maml = maml_ext.MAML(module, lr=0.05, steps=1)
    good = [maml(*batch), maml.adapt(*batch[:2]).loss(*batch[2:])]
    spoilt = batch._replace(support_y=batch.support_y.index_fill(0, torch.tensor([1], device=device), 1e300))
    for losses in (maml(*spoilt), maml.adapt(*spoilt[:2]).loss(*spoilt[2:])):
        assert losses.isfinite().tolist() == [True, False, True]
    assert_close([maml(*batch), maml.adapt(*batch[:2]).loss(*batch[2:])], good)


@pytest.mark.thorough
def test_many_steps():
    module, batch = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh()).to(**double), data(1, outputs=1, tasks=1)
    assert_close(*both(module, batch, steps=70))


def test_a_plan_made_in_inference_mode_serves_afterwards(plans):
    program, numbers, theta, x, y = (t.to(device) if isinstance(t, torch.Tensor) else t for t in problem())
    score = lambda: run("score", program, numbers, None, theta, x, y, None, [1, 0, 0, 0])  # noqa: E731
    with torch.inference_mode():
        before = score()
    after = score()
    with torch.inference_mode():
        again = score()
    assert torch.equal(before[1], after[1]) and torch.equal(before[1], again[1])
    assert after[1].is_inference() is False and len(plans) == 1


# That the comparisons see a wrong term


@pytest.mark.parametrize("dropped", ["the Hessian", "the tangent of a norm", "half of the partial sums"])
def test_a_wrong_term_is_seen(dropped, monkeypatch, plans):
    from maml_ext.kernels import block, update

    module, batch = small("batch norm 1d")
    expected = results(module, batch, "torch", steps=2)
    if dropped == "the Hessian":
        adjoint = update.adjoint
        monkeypatch.setattr(update, "adjoint", lambda table, partials, *a, **k: adjoint(table, partials[:1], *a, **k))
    elif dropped == "the tangent of a norm":
        backward = block.backward

        def wrong(spec, x, kept, *rest):
            return backward(spec, x, (kept[0], torch.zeros_like(kept[0])) if len(kept) == 2 else kept, *rest)

        monkeypatch.setattr(block, "backward", wrong)
    else:
        gather = update.gather
        monkeypatch.setattr(
            update, "gather", lambda table, partials, *a, **k: gather(table, tuple(p * 0.5 for p in partials), *a, **k)
        )
    with pytest.raises(AssertionError):
        assert_close(results(module, batch, "compiled", steps=2), expected)


def test_the_same_bits_again(plans):
    module, batch = small("batch norm 1d", torch.float32)
    first = results(module, batch, "compiled", steps=1, reduction="mean")
    plans.clear()
    assert all(map(torch.equal, first, results(module, batch, "compiled", steps=1, reduction="mean")))
    assert all(math.isfinite(f.sum()) for f in first)
