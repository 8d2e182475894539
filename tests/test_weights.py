"""Weights of samples on the compiled engine, against the reference (which ``test_losses.py`` checks)."""

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    QUERIES,
    SHOTS,
    TASKS,
    Batch,
    assert_same,
    gradients,
    images,
    relative_error,
    require_grad,
    smooth_mlp,
    vectors,
    weighted_sum,
)
from torch import nn

import maml_ext
from maml_ext import single_pass
from maml_ext.ops import library

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled engine"),
]
# Which samples a task has: all of them, others with padding anywhere.
SUPPORT = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 1, 1]])
QUERY = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
CLASSES = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
LABELS = functools.partial(F.cross_entropy, weight=CLASSES, ignore_index=-1, label_smoothing=0.1)


def norm_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def norm_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 1))


def group_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 3, 1))


def targets(batch: Batch, shape: tuple[int, ...], make) -> Batch:
    return batch._replace(support_y=make((TASKS, SHOTS, *shape)), query_y=make((TASKS, QUERIES, *shape)))


def probabilities(shape):
    return torch.rand(shape).softmax(2)


def labels(shape):
    return torch.randint(-1, 3, shape)


# name: (network, inputs, shape of a target, targets, loss)
SOFT = nn.CrossEntropyLoss(CLASSES, label_smoothing=0.2)
CASES = {
    "vectors, mse": (norm_mlp, vectors, (3,), torch.randn, "mse"),
    "vectors, Huber": (norm_mlp, vectors, (3,), torch.randn, nn.HuberLoss(delta=0.3)),
    "vectors, binary": (norm_mlp, vectors, (3,), torch.rand, "bce_with_logits"),
    "vectors, soft labels": (norm_mlp, vectors, (3,), probabilities, SOFT),
    "vectors, labels": (norm_mlp, vectors, (), lambda shape: torch.randint(3, shape), LABELS),
    "images, mse": (norm_net, images, (3, 6, 6), torch.randn, "mse"),
    "images, Huber": (group_net, images, (3, 6, 6), torch.randn, "huber"),
    "images, binary": (norm_net, images, (3, 6, 6), torch.rand, "bce_with_logits"),
    "images, soft labels": (group_net, images, (3, 6, 6), probabilities, "cross_entropy"),
    "images, labels, some ignored": (norm_net, images, (6, 6), labels, LABELS),
}
each_case = pytest.mark.parametrize("case", CASES)
each_side = pytest.mark.parametrize("sides", ["support", "query", "both"])


def made(case):
    """Network, batch of which all that is floating requires grad, and loss."""
    build, data, shape, make, loss = CASES[case]
    return build(), require_grad(targets(data(), shape, make)), loss


def positive() -> list[torch.Tensor]:
    return [torch.rand(TASKS, n).add(0.1).requires_grad_() for n in (SHOTS, QUERIES)]


def padding() -> list[torch.Tensor]:
    return [torch.rand(kept.shape).add(0.1) * kept for kept in (SUPPORT, QUERY)]


def weighted(batch: Batch, weights, sides="both") -> Batch:
    support, query = weights
    return Batch(
        batch.support_x,
        (batch.support_y, support) if sides != "query" else batch.support_y,
        batch.query_x,
        (batch.query_y, query) if sides != "support" else batch.query_y,
    )


def inputs(module, batch, lr) -> dict:
    leaves = torch.utils._pytree.tree_leaves(batch)
    return {"parameters": list(module.parameters()), "lr": lr, "data": [t for t in leaves if t.requires_grad]}


def both_engines(module, batch, loss, steps=2, again=False, **options):
    """Losses and all gradients (``again``: also of a function of the parameters' gradient) by engine."""
    lr = torch.tensor([0.1, 0.2]).reshape(2, 1).requires_grad_()
    results = {}
    for backend in ("compiled", "torch"):
        maml = maml_ext.MAML(module, lr=lr, steps=steps, loss=loss, backend=backend, **options)
        value = maml(*batch)
        wrt = inputs(module, batch, lr)
        results[backend] = {"value": value, **gradients(value, wrt)}
        if again:
            first = torch.autograd.grad(weighted_sum(maml(*batch)), wrt["parameters"], create_graph=True)
            second = gradients(torch.cat([g.sin().reshape(-1) for g in first]), wrt)
            results[backend].update((f"{name} again", g) for name, g in second.items())
    return results["compiled"], results["torch"]


@each_case
@each_side
@pytest.mark.parametrize("weights", [positive, padding])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_meta_gradient(case, sides, weights, reduction):
    """By everything, weights included where all are positive."""
    module, batch, loss = made(case)
    batch = weighted(batch, weights(), sides)
    found, expected = both_engines(module, batch, loss, reduction=reduction)
    assert_same(found, expected)
    assert all(g.norm() > 0 for g in found["data"])


@pytest.mark.parametrize("weights", [positive, padding])
@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_a_single_pass_is_two(weights, mode, monkeypatch):
    module, batch, loss = made("images, mse")
    batch = weighted(batch, weights())
    maml = maml_ext.MAML(module, lr=0.1, steps=2, loss=loss, backend="compiled", meta_gradient=mode)
    wrt = inputs(module, batch, list(module.parameters())[0])
    single = maml(*batch)
    assert single.grad_fn.name() == "MetaBackward"
    found = gradients(single, wrt)
    monkeypatch.setattr(single_pass, "meta_losses", lambda *_: None)
    double = maml(*batch)
    assert double.grad_fn.name() == "ScoreBackward"
    assert_same(found, gradients(double, wrt))


@pytest.mark.parametrize("case", ["vectors, Huber", "vectors, soft labels", "images, labels, some ignored"])
@pytest.mark.parametrize("weights", [positive, padding])
def test_a_derivative_of_the_meta_gradient(case, weights):
    module, batch, loss = made(case)
    found, expected = both_engines(module, weighted(batch, weights()), loss, again=True, reduction="mean")
    assert_same(found, expected)
    assert all(g.norm() > 0 for g in found["data again"])


@each_case
@pytest.mark.parametrize("weights", [positive, padding])
def test_the_functional_layer(case, weights):
    """Values and three derivatives of task_loss, inner_loop and hvp."""
    module, batch, loss = made(case)
    theta = maml_ext.flatten(module).detach().requires_grad_()
    x, y, w = batch.support_x, batch.support_y, weights()[0]
    steps = {"lr": 0.1, "steps": 2}
    vector, pair = torch.randn(theta.shape, requires_grad=True), (y, w)
    wrt = [t for t in (theta, x, y, w) if t.requires_grad]
    functions = {
        "task_loss": lambda **o: maml_ext.task_loss(module, theta, x, pair, loss=loss, **o),
        "inner_loop": lambda **o: maml_ext.inner_loop(module, theta, x, pair, loss=loss, **steps, **o)[-1],
        "hvp": lambda **o: maml_ext.hvp(module, theta, x, pair, vector, loss=loss, **o),
    }
    results = {"compiled": {}, "torch": {}}
    for backend, found in results.items():
        for name, function in functions.items():
            value = function(backend=backend)
            first = torch.autograd.grad(weighted_sum(value), wrt, retain_graph=True)
            (recorded,) = torch.autograd.grad(weighted_sum(value), theta, create_graph=True)
            second = torch.autograd.grad(recorded.sin().sum(), wrt, create_graph=True)
            third = torch.autograd.grad(second[0].sin().sum(), wrt)
            found.update({f"{name} {i}": d for i, d in enumerate(([value], first, second, third))})
    assert_same(results["compiled"], results["torch"])


@pytest.mark.parametrize("case", ["vectors, mse", "vectors, binary", "vectors, soft labels", "images, mse"])
def test_gradcheck_of_weights(case):
    """Finite differences of task_loss (twice), the inner loop and the single pass."""
    module, batch, loss = made(case)
    batch = Batch(*(t.detach()[:2] for t in batch))
    theta = maml_ext.flatten(module).detach().requires_grad_()
    weights = [w.detach()[:2].requires_grad_() for w in positive()]
    options = {"loss": loss, "backend": "compiled"}
    maml = maml_ext.MAML(module, lr=0.1, steps=2, **options)

    def score(theta, w):
        return maml_ext.task_loss(module, theta, batch.support_x, (batch.support_y, w), **options)

    def adapt(theta, w):
        return maml_ext.inner_loop(
            module, theta, batch.support_x, (batch.support_y, w), lr=0.1, steps=2, **options
        )[-1]

    def meta(*weights):
        return maml(*weighted(batch, weights))

    assert torch.autograd.gradcheck(score, (theta, weights[0]))
    assert torch.autograd.gradgradcheck(score, (theta, weights[0]), fast_mode=True, atol=1e-4)
    assert torch.autograd.gradcheck(adapt, (theta, weights[0]), fast_mode=True)
    assert torch.autograd.gradcheck(meta, weights)


@each_case
def test_equal_weights_change_nothing_and_others_do(case):
    module, batch, loss = made(case)
    maml = maml_ext.MAML(module, lr=0.1, steps=2, loss=loss, backend="compiled")
    wrt = {"parameters": list(module.parameters())}
    expected = maml(*batch)
    plain = gradients(expected, wrt)
    equal = maml(*weighted(batch, [torch.full((TASKS, n), 0.3) for n in (SHOTS, QUERIES)]))
    assert_same({"loss": equal, **gradients(equal, wrt)}, {"loss": expected, **plain})
    for sides in ("support", "query"):
        value = maml(*weighted(batch, positive(), sides))
        assert relative_error(value, expected) > 1e-5
        assert relative_error(gradients(value, wrt)["parameters"], plain["parameters"]) > 1e-5


@each_case
@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_padded_tasks_are_what_each_is_alone(case, mode):
    module, batch, loss = made(case)
    maml = maml_ext.MAML(module, lr=0.1, steps=2, loss=loss, backend="compiled", meta_gradient=mode)
    wrt = {"parameters": list(module.parameters())}
    found = maml(*weighted(batch, (3.0 * SUPPORT, QUERY.double())))
    tasks = []
    for t in range(TASKS):
        kept = SUPPORT[t].bool(), SUPPORT[t].bool(), QUERY[t].bool(), QUERY[t].bool()
        tasks.append(maml(*(d[t, keep][None] for d, keep in zip(batch, kept))))
    expected = torch.cat(tasks)
    assert_same({"loss": found, **gradients(found, wrt)}, {"loss": expected, **gradients(expected, wrt)})
    unpadded = maml(*batch)  # the padding would count
    assert relative_error(unpadded, expected) > 1e-5


def test_the_gradient_of_a_weight_that_is_0():
    """Where batch norm leaves its sample out, the reference has it; elsewhere the engine."""
    for build, engine in ((norm_mlp, "torch"), (smooth_mlp, "cpu")):
        module, batch = build(), vectors()
        if engine == "torch":
            batch = targets(batch, (3,), torch.randn)
        pairs = weighted(batch, [w.requires_grad_() for w in padding()])
        maml = maml_ext.MAML(module, lr=0.1, steps=2)
        known = maml_ext.MAML(module, lr=0.1, steps=2, backend="torch")
        maml(*weighted(batch, padding()))  # what is remembered of such calls decides nothing
        explained = maml.explain(*pairs[:2])
        assert explained.engine == engine
        assert ("weights is wanted and some of them are 0" in str(explained)) == (engine == "torch")
        assert maml.explain(*weighted(batch, positive())[:2]).engine == "cpu"
        wrt = {"weights": [pairs.support_y[1], pairs.query_y[1]], "parameters": list(module.parameters())}
        found, expected = maml(*pairs), known(*pairs)
        assert (found.grad_fn.name() == "MetaBackward") == (engine == "cpu")
        assert_same(gradients(found, wrt), gradients(expected, wrt))
        assert (gradients(maml(*pairs), wrt)["weights"][0][SUPPORT == 0] != 0).all()
        if engine == "torch":
            maml.backend = "compiled"
            with pytest.raises(ValueError, match="^backend: 'compiled' .* the gradient of weights is wanted"):
                maml(*pairs)
            with torch.no_grad():  # where none is wanted
                maml(*pairs)
            # Held constant in the inner loop, weights of the support set have no gradient at all.
            maml.meta_gradient = "first_order"
            assert maml.explain(*pairs[:2]).engine == "cpu"
            assert maml(*pairs[:3], batch.query_y).grad_fn.name() == "MetaBackward"


def test_weights_of_another_call_are_not_those_of_this():
    """Calls with and without weights, and of other shapes of them, are told apart."""
    module, batch, loss = made("vectors, mse")
    maml = maml_ext.MAML(module, lr=0.1, loss=loss, backend="compiled")
    w = positive()
    values = [maml(*weighted(batch, w, sides)) for sides in ("support", "query", "both", "support")]
    values.append(maml(*batch))
    assert torch.equal(values[0], values[3])
    for i in range(3):
        assert all(relative_error(values[i], values[j]) > 1e-4 for j in range(5) if j not in (i, i + 3))
    short = weighted(batch, (w[0][:, :-1], w[1]))
    with pytest.raises(ValueError, match="^support_y: expected weights"):
        maml(*short)
    with pytest.raises(TypeError, match="^query_y: expected a tensor"):
        maml(*batch[:3], (batch.query_y, None))
