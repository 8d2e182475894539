"""The meta-gradient is that of a plain ``create_graph=True`` loop, for every input and every network."""

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    LOSSES,
    NETWORKS,
    QUERIES,
    SHOTS,
    TASKS,
    Batch,
    assert_same,
    both_ways,
    conv_net,
    errors,
    gradients,
    images,
    map_tensors,
    plain_maml,
    relative_error,
    relu_mlp,
    require_grad,
    runs_at_once,
    smooth_mlp,
    vectors,
    weighted_sum,
)
from torch import nn

import maml_ext
from maml_ext import reference

pytestmark = pytest.mark.usefixtures("float64")


def inputs(module, batch, lr):
    """Everything that can receive a gradient, by name; frozen and integer tensors cannot."""
    named = {"parameters": [p for p in module.parameters() if p.requires_grad], "lr": [lr]}
    for name, value in batch._asdict().items():
        tensors = torch.utils._pytree.tree_leaves(value)
        named[name] = [t for t in tensors if t.requires_grad]
    return {name: tensors for name, tensors in named.items() if tensors and tensors[0].requires_grad}


def ours(module, batch, lr, steps, loss, first_order=False, backend="auto"):
    """Losses and their gradients by maml_ext."""
    mode = "first_order" if first_order else "exact"
    maml = maml_ext.MAML(module, lr=lr, steps=steps, loss=loss, meta_gradient=mode, backend=backend)
    losses = maml(*batch)
    return {"losses": losses, **gradients(losses, inputs(module, batch, lr))}


def plain(module, batch, lr, steps, loss, first_order=False):
    """The same by the oracle."""
    losses = plain_maml(module, batch, lr, steps, LOSSES.get(loss, loss), first_order)[-1]
    return {"losses": losses, **gradients(losses, inputs(module, batch, lr))}


def rate(value=0.1, *shape):
    """A learning rate that requires grad, different everywhere."""
    return (value * (1 + 0.5 * torch.rand(shape))).requires_grad_()


def rates(module, steps):
    n, p = len(list(module.parameters())), sum(x.numel() for x in module.parameters())
    shapes = [(), (1,), (n,), (p,), (steps, 1), (steps, n), (steps, p), (steps + 2, n)]
    return [rate(0.1, *shape) for shape in shapes]


# The measure itself.


def test_relative_error_catches_what_it_should():
    x = torch.randn(5)
    assert relative_error(x, x) == relative_error([x, None], [x, None]) == relative_error(0 * x, 0 * x) == 0
    assert relative_error(x * (1 + 1e-6), x) == pytest.approx(1e-6, rel=1e-3)
    assert relative_error(0 * x, x) == pytest.approx(1)
    assert relative_error(-x, x) == pytest.approx(2)
    assert relative_error(2 * x, x) == pytest.approx(1)
    for broken in (None, x * float("nan"), x * float("inf")):
        assert relative_error(broken, x) == float("inf")
    assert relative_error(x, None) == relative_error(x, 0 * x) == float("inf")
    with pytest.raises(AssertionError):
        relative_error(x[:1], x)
    with pytest.raises(AssertionError):
        relative_error([x], [x, x])
    with pytest.raises(AssertionError):
        assert_same({"good": x, "bad": -x}, {"good": x, "bad": x})


# Networks, steps, rates.


@pytest.mark.parametrize("steps", [0, 1, 5])
@both_ways
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, wrap, steps):
    build, data, loss = NETWORKS[name]
    module, batch, lr = wrap(build()), require_grad(data()), rate()
    assert runs_at_once(maml_ext.MAML(module, lr=lr, steps=steps, loss=loss), batch) == (
        wrap is nn.Sequential
    )
    expected = plain(module, batch, lr, steps, loss)
    assert (expected["lr"][0] is None) == (steps == 0)
    assert_same(ours(module, batch, lr, steps, loss), expected)


@both_ways
def test_fifty_steps(wrap):
    module, batch, lr = wrap(relu_mlp()), require_grad(vectors()), rate(0.02)
    assert_same(ours(module, batch, lr, 50, "mse"), plain(module, batch, lr, 50, "mse"))


@pytest.mark.parametrize("which", range(8))
@both_ways
def test_every_shape_of_learning_rate(wrap, which):
    module, batch, steps = wrap(smooth_mlp()), require_grad(vectors()), 3
    lr = rates(module, steps)[which]
    found, expected = ours(module, batch, lr, steps, "mse"), plain(module, batch, lr, steps, "mse")
    assert found["lr"][0].shape == lr.shape
    assert_same(found, expected)


@both_ways
@pytest.mark.parametrize("first_order", [False, True], ids=["exact", "first order"])
@pytest.mark.parametrize("name", ["parameters", "lr", "support_x", "support_y", "query_x", "query_y"])
def test_one_input_alone(wrap, name, first_order):
    """A gradient does not depend on which others are asked for."""
    module, batch, lr = wrap(smooth_mlp()), require_grad(vectors()), rate()
    theta = maml_ext.flatten(module).detach().requires_grad_()
    named = {"parameters": theta, "lr": lr, **batch._asdict()}
    expected = plain(module, batch, lr, 2, "mse", first_order)[name]
    for other, tensor in named.items():
        tensor.requires_grad_(other == name)
    thetas = maml_ext.inner_loop(
        module, theta, *batch[:2], lr=lr, steps=2, meta_gradient="first_order" if first_order else "exact"
    )
    losses = maml_ext.task_loss(module, thetas[-1], *batch[2:])
    if first_order and name.startswith("support"):
        assert not losses.requires_grad
        return
    (found,) = torch.autograd.grad(weighted_sum(losses), named[name])
    assert relative_error(found, torch.cat([e.reshape(-1) for e in expected]).view_as(found)) < 1e-10


# Tasks and targets.


@both_ways
@pytest.mark.parametrize("tasks, shots, queries", [(1, SHOTS, QUERIES), (TASKS, 1, 1), (1, 1, 1)])
def test_one_task_or_one_sample(wrap, tasks, shots, queries):
    batch = vectors()
    batch = require_grad(Batch(*(t[:tasks, :n] for t, n in zip(batch, (shots, shots, queries, queries)))))
    module, lr = wrap(smooth_mlp()), rate()
    assert_same(ours(module, batch, lr, 2, "mse"), plain(module, batch, lr, 2, "mse"))


@both_ways
def test_tasks_of_unequal_size_by_weights_in_the_target(wrap):
    """Padding of weight 0 is as if it were not there."""

    def weighted_loss(prediction, target):
        y, weights = target
        return (weights * (prediction - y).square().mean(-1)).sum() / weights.sum()

    sizes = torch.tensor([SHOTS, 2, 1])
    batch = vectors()
    padding = (torch.arange(SHOTS) >= sizes[:, None])[..., None]
    weights = ((~padding[..., 0]) * (0.5 + torch.rand(TASKS, SHOTS))).clone()
    padded = Batch(
        batch.support_x.masked_fill(padding, 7.0),
        (batch.support_y.masked_fill(padding, -7.0), weights),
        batch.query_x,
        (batch.query_y, torch.ones(TASKS, QUERIES)),
    )
    module, lr, padded = wrap(smooth_mlp()), rate(), require_grad(padded)
    found = ours(module, padded, lr, 3, weighted_loss)
    assert_same(found, plain(module, padded, lr, 3, weighted_loss))
    assert not found["support_x"][0][padding.expand_as(batch.support_x)].any()
    for t, size in enumerate(sizes):
        alone = Batch(
            batch.support_x[t : t + 1, :size],
            (batch.support_y[t : t + 1, :size], weights[t : t + 1, :size]),
            *map_tensors(lambda leaf: leaf[t : t + 1], padded[2:]),
        )
        alone_loss = plain_maml(module, alone, lr, 3, weighted_loss)[-1]
        assert relative_error(found["losses"][t : t + 1], alone_loss) < 1e-10


@both_ways
def test_non_contiguous_inputs(wrap):
    module, lr = wrap(relu_mlp()), rate()
    batch = Batch(*(t.transpose(0, -1).contiguous().transpose(0, -1) for t in vectors()))
    batch = Batch(*(t.requires_grad_() for t in batch))
    assert not any(t.is_contiguous() for t in batch)
    assert_same(ours(module, batch, lr, 2, "mse"), plain(module, batch, lr, 2, "mse"))


@both_ways
@pytest.mark.parametrize("first_order", [False, True], ids=["exact", "first order"])
def test_initial_parameters_of_their_own_for_each_task(wrap, first_order):
    module, batch, lr = wrap(smooth_mlp()), vectors(), rate()
    theta = (maml_ext.flatten(module) + 0.1 * torch.randn(TASKS, 1)).detach().requires_grad_()
    names = {"theta": theta, "lr": lr}
    own = [maml_ext.unflatten(module, row) for row in theta]
    expected = gradients(plain_maml(module, batch, lr, 2, F.mse_loss, first_order, own)[-1], names)
    mode = "first_order" if first_order else "exact"
    thetas = maml_ext.inner_loop(module, theta, *batch[:2], lr=lr, steps=2, meta_gradient=mode)
    assert [t.shape for t in thetas] == [theta.shape] * 3
    found = gradients(maml_ext.task_loss(module, thetas[-1], *batch[2:]), names)
    assert_same(found, expected)


def soft_labels(labels):
    return F.one_hot(labels, 3).double().add(0.2).div(1.6)


def test_named_losses_have_their_published_values():
    """At values where huber is on both of its branches."""
    prediction, target = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.5, 0.0]])
    assert reference_loss("mse")(prediction, target) == pytest.approx((0.25 + 9) / 2)
    assert reference_loss("huber")(prediction, target) == pytest.approx((0.125 + 2.5) / 2)
    expected = F.binary_cross_entropy(prediction.sigmoid(), target)
    assert reference_loss("bce_with_logits")(prediction, target) == pytest.approx(expected.item())
    assert reference_loss("cross_entropy")(prediction, torch.tensor([1])) == pytest.approx(0.0485873516)


def reference_loss(name):
    """The loss of one task by its name, through the API: predictions are the module's inputs."""

    class Identity(nn.Module):
        def __init__(self):
            super().__init__()
            self.zero = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x + self.zero

    module = Identity()
    return lambda x, y: maml_ext.task_loss(
        module, maml_ext.flatten(module), x[None], y[None], loss=name
    ).item()


TARGETS = {
    "huber": lambda b: b._replace(support_y=3 * b.support_x[..., :2], query_y=3 * b.query_x[..., :2]),
    "bce_with_logits": lambda b: b._replace(
        support_y=torch.rand_like(b.support_y), query_y=torch.rand_like(b.query_y)
    ),
    "mse": lambda b: b,
}


@both_ways
@pytest.mark.parametrize("loss", TARGETS)
def test_regression_losses_and_their_targets(wrap, loss):
    module, lr, batch = wrap(smooth_mlp()), rate(), require_grad(TARGETS[loss](vectors()))
    assert_same(ours(module, batch, lr, 3, loss), plain(module, batch, lr, 3, loss))


LABELS = {
    "labels": lambda y: y,
    "ignored labels": lambda y: torch.where(torch.arange(y.shape[1]) == 1, -100, y),
    "soft labels": lambda y: soft_labels(y),
}


@both_ways
@pytest.mark.parametrize("kind", LABELS)
def test_cross_entropy_targets(wrap, kind):
    module, lr, batch = (
        wrap(nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3))),
        rate(),
        images(),
    )
    batch = batch._replace(support_y=LABELS[kind](batch.support_y), query_y=LABELS[kind](batch.query_y))
    batch = require_grad(batch)
    found = ours(module, batch, lr, 3, "cross_entropy")
    assert ("support_y" in found) == (kind == "soft labels")
    assert_same(found, plain(module, batch, lr, 3, "cross_entropy"))


@both_ways
@pytest.mark.parametrize("first_order", [False, True], ids=["exact", "first order"])
def test_losses_on_intermediate_steps(wrap, first_order):
    module, batch, lr, steps = wrap(smooth_mlp()), require_grad(vectors()), rate(0.1, 4, 1), 4
    mode = "first_order" if first_order else "exact"
    tasks = maml_ext.MAML(module, lr=lr, steps=steps, meta_gradient=mode).adapt(*batch[:2])
    expected = plain_maml(module, batch, lr, steps, F.mse_loss, first_order)
    named = inputs(module, batch, lr)
    for chosen in ([4], [2], [0, 3], [0, 1, 2, 3, 4]):
        losses = torch.stack([tasks.after(k).loss(*batch[2:]) for k in chosen])
        options = {"retain_graph": True, "allow_unused": True}
        leaves = [t for tensors in named.values() for t in tensors]
        found = torch.autograd.grad(weighted_sum(losses), leaves, **options)
        wanted = torch.autograd.grad(weighted_sum(expected[chosen]), leaves, **options)
        assert relative_error(losses, expected[chosen]) < 1e-10
        # An unused row of rates: the oracle's lr is one tensor, so zeros there too.
        assert relative_error(found, wanted) < 1e-10, chosen


# First order.


@both_ways
@pytest.mark.parametrize("which", range(8))
def test_first_order(wrap, which):
    """Every inner gradient is a constant: learning rates have a gradient, the support set has none."""
    module, batch = wrap(smooth_mlp()), require_grad(vectors())
    lr = rates(module, 3)[which]
    found, expected = (f(module, batch, lr, 3, "mse", first_order=True) for f in (ours, plain))
    assert found["lr"][0].abs().sum() > 0
    assert found["support_x"] == found["support_y"] == [None]
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["conv net", "GRU cell", "transformer"])
def test_first_order_networks(name):
    build, data, loss = NETWORKS[name]
    module, batch, lr = build(), require_grad(data()), rate()
    found, expected = (f(module, batch, lr, 3, loss, first_order=True) for f in (ours, plain))
    assert_same(found, expected)


# float32.


@both_ways
@pytest.mark.parametrize("name", ["smooth MLP", "ReLU MLP", "conv net"])
def test_float32_is_as_close_to_float64_as_the_plain_loop_is(name, wrap):
    """Either is a few roundings off; ours by at most 4 times what the plain loop is, in 8 draws."""
    build, data, loss = NETWORKS[name]
    totals = {}
    for _ in range(8):
        module, batch, lr = wrap(build()), require_grad(data()), rate()
        exact = plain(module, batch, lr, 5, loss)
        batch32 = map_tensors(lambda t: t.float() if t.is_floating_point() else t, batch)
        module, batch32, lr32 = module.float(), require_grad(batch32), lr.detach().float().requires_grad_()
        for engine in (ours, plain):
            for key, error in errors(engine(module, batch32, lr32, 5, loss), exact).items():
                totals[engine, key] = totals.get((engine, key), 0) + error**2
    for (engine, key), total in totals.items():
        assert 0 < total < (8 * 1e-4) ** 2, (engine, key)
        assert total**0.5 <= 4 * totals[plain, key] ** 0.5, key


# Negative controls: what these tests compare does differ where it should.


def test_first_order_is_not_the_exact_gradient():
    module, batch, lr = smooth_mlp(), require_grad(vectors()), rate(0.3)
    exact, first = (plain(module, batch, lr, 3, "mse", first_order) for first_order in (False, True))
    assert errors(exact, first)["losses"] == 0
    assert errors(exact, first)["parameters"] > 0.05
    assert errors(exact, first)["lr"] > 0.01
    exact, first = (ours(module, batch, lr, 3, "mse", first_order) for first_order in (False, True))
    assert errors(exact, first)["parameters"] > 0.05
    assert errors(exact, first)["lr"] > 0.01


def test_steps_and_rate_matter():
    module, batch = smooth_mlp(), require_grad(vectors())
    base = ours(module, batch, rate(0.1), 3, "mse")
    for lr, steps in [(rate(0.1), 2), (rate(0.2), 3)]:
        changed = errors(ours(module, batch, lr, steps, "mse"), base)
        assert min(changed.values()) > 1e-3, changed


def scaled_pullback(theta=1.0, data=1.0):
    """``Problem.gradient_vjp`` with its Hessian-vector product and its mixed derivatives scaled."""
    original = reference.Problem.gradient_vjp

    def broken(self, *args):
        g, pullback = original(self, *args)

        def scaled(cotangent):
            first, *rest = pullback(cotangent)
            return theta * first, *(data * r for r in rest)

        return g, scaled

    return reference.Problem, "gradient_vjp", broken


def wrong_step():
    """``Problem.gradient_vjp`` at initial parameters whatever the step."""
    original = reference.Problem.gradient_vjp
    return reference.Problem, "gradient_vjp", lambda self, theta, *args: original(self, 0.9 * theta, *args)


BUGS = {
    "no Hessian term": (lambda: scaled_pullback(theta=0.0), {"parameters", "lr", "support_x", "support_y"}),
    "its sign": (lambda: scaled_pullback(theta=-1.0), {"parameters", "lr", "support_x", "support_y"}),
    "its size": (lambda: scaled_pullback(theta=1 + 1e-6), {"parameters", "lr"}),
    "no mixed derivative": (lambda: scaled_pullback(data=0.0), {"support_x", "support_y"}),
    "Hessian elsewhere": (wrong_step, {"parameters", "lr", "support_x", "support_y"}),
    "rate gradient": (
        lambda: (reference, "reduce_rate", lambda product, row, sizes: 0.5 * product.sum()),
        {"lr"},
    ),
    "rate not applied": (
        lambda: (reference, "expand_rate", lambda row, sizes: torch.ones(())),
        {"losses", "parameters"},
    ),
}


@both_ways
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(wrap, bug, monkeypatch):
    module, batch, lr = wrap(smooth_mlp()), require_grad(vectors()), rate()
    expected = plain(module, batch, lr, 3, "mse")
    make, caught = BUGS[bug]
    monkeypatch.setattr(*make())
    found = errors(ours(module, batch, lr, 3, "mse", backend="torch"), expected)
    assert caught <= {name for name, error in found.items() if error > 1e-10}, found
    monkeypatch.undo()
    assert_same(ours(module, batch, lr, 3, "mse", backend="torch"), expected)


def test_the_oracle_agrees_with_finite_differences():
    """So that an error in the oracle itself would show."""
    module, batch = smooth_mlp(), require_grad(vectors())
    names, values = zip(*module.named_parameters())

    def losses(lr, *tensors):
        theta = dict(zip(names, tensors[:4]))
        return plain_maml(module, Batch(*tensors[4:]), lr, 2, F.mse_loss, parameters=theta)[-1]

    assert torch.autograd.gradcheck(losses, (rate(0.1, 2, 4), *values, *batch))


def test_batch_of_tasks_is_its_tasks():
    """A task's loss and gradient do not depend on the tasks beside it."""
    for module, batch, loss in ((relu_mlp(), vectors(), "mse"), (conv_net(), images(), "cross_entropy")):
        together = maml_ext.MAML(module, lr=0.1, steps=2, loss=loss)(*batch)
        for t in range(TASKS):
            alone = maml_ext.MAML(module, lr=0.1, steps=2, loss=loss)(*(x[t : t + 1] for x in batch))
            g = [
                torch.autograd.grad(x, list(module.parameters()), retain_graph=True)
                for x in (alone[0], together[t])
            ]
            assert relative_error(*g) < 1e-10
