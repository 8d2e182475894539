"""Derivatives of any order, in reverse and forward mode, by autograd and torch.func; and nothing is kept."""

import gc
import weakref

import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TaskByTask,
    both_ways,
    gradients,
    plain_maml,
    relative_error,
    relu_mlp,
    smooth_mlp,
    vectors,
    weighted_sum,
)
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hvp as autograd_hvp
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import maml_ext
from maml_ext import reference
from maml_ext.ops import library

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # torch.func's own
]
modes = pytest.mark.parametrize("mode", ["exact", "first_order"])
STEPS = 2


class Case:
    """A tiny network, its data, and every differentiable function of the package on it."""

    def __init__(self, wrap=nn.Sequential):
        self.module = wrap(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)))
        self.theta = maml_ext.flatten(self.module).detach().requires_grad_()
        self.lr = torch.tensor([[0.3], [0.2]], requires_grad=True)
        self.x, self.query_x = torch.randn(2, 3, 2, requires_grad=True), torch.randn(2, 3, 2)
        self.y, self.query_y = torch.randn(2, 3, 1, requires_grad=True), torch.randn(2, 3, 1)
        self.vector = torch.randn_like(self.theta, requires_grad=True)

    def function(self, name):
        """(function, its differentiable arguments)."""
        m = self.module
        return {
            "inner_loop": (
                lambda theta, lr, x, y: maml_ext.inner_loop(m, theta, x, y, lr=lr, steps=STEPS),
                (self.theta, self.lr, self.x, self.y),
            ),
            "network": (lambda theta, x: maml_ext.network(m, theta, x), (self.theta, self.x)),
            "task_loss": (
                lambda theta, x, y: maml_ext.task_loss(m, theta, x, y),
                (self.theta, self.x, self.y),
            ),
            "hvp": (
                lambda theta, x, y, vector: maml_ext.hvp(m, theta, x, y, vector),
                (self.theta, self.x, self.y, self.vector),
            ),
        }[name]

    def meta_loss(self, mode="exact"):
        """theta, lr -> a scalar, through both the inner loop and the query loss."""

        def function(theta, lr):
            options = {"lr": lr, "steps": STEPS, "meta_gradient": mode}
            thetas = maml_ext.inner_loop(self.module, theta, self.x.detach(), self.y.detach(), **options)
            return weighted_sum(maml_ext.task_loss(self.module, thetas[-1], self.query_x, self.query_y))

        return function

    def plain_meta_loss(self, mode="exact"):
        """The same by the oracle."""
        batch = (self.x.detach(), self.y.detach(), self.query_x, self.query_y)

        def function(theta, lr):
            parameters = maml_ext.unflatten(self.module, theta)
            first_order = mode == "first_order"
            return weighted_sum(
                plain_maml(self.module, batch, lr, STEPS, F.mse_loss, first_order, parameters)[-1]
            )

        return function


# gradcheck: first and second derivatives against finite differences.

functions = pytest.mark.parametrize("name", ["inner_loop", "network", "task_loss", "hvp"])


@functions
@both_ways
def test_gradcheck(name, wrap):
    function, arguments = Case(wrap).function(name)
    assert gradcheck(function, arguments, check_forward_ad=True)


@functions
@both_ways
def test_gradgradcheck(name, wrap):
    function, arguments = Case(wrap).function(name)
    assert gradgradcheck(function, arguments)


@both_ways
def test_gradcheck_of_parameters_of_each_task(wrap):
    case = Case(wrap)
    theta = torch.randn(2, case.theta.numel(), requires_grad=True)
    for name in ("inner_loop", "task_loss", "hvp"):
        function, arguments = case.function(name)
        assert gradcheck(function, (theta, *arguments[1:]), check_forward_ad=True), name


@both_ways
def test_gradcheck_of_one_parameter_alone(wrap):
    """A rate alone, or parameters alone: as an argument that is not asked for plays no part."""
    case = Case(wrap)
    function, arguments = case.function("inner_loop")
    for i, argument in enumerate(arguments):
        fixed = [a.detach() for a in arguments]

        def alone(x):
            return function(*fixed[:i], x, *fixed[i + 1 :])[1:]  # theta_0 depends on no other argument

        assert gradcheck(alone, (argument,), check_forward_ad=True)
        assert gradgradcheck(alone, (argument,))


def test_gradcheck_catches_a_wrong_backward(monkeypatch):
    """The negative control, for a backward rule that is off by a tenth."""
    monkeypatch.setattr(reference, "reduce_rate", lambda product, row, sizes: 0.9 * product.sum())
    function, arguments = Case(TaskByTask).function("inner_loop")  # which the reference runs
    with pytest.raises(GradcheckError):
        gradcheck(function, arguments)


# Against the oracle.


@modes
@both_ways
def test_second_derivatives_are_those_of_the_plain_loop(wrap, mode):
    """First order: second derivatives of a loop whose inner gradients are detached."""
    case = Case(wrap)
    named = {"theta": case.theta, "lr": case.lr}
    direction = [torch.randn_like(t) for t in named.values()]
    results = []
    for function in (case.meta_loss(mode), case.plain_meta_loss(mode)):
        first = gradients(function(*named.values())[None], named, create_graph=True)
        projected = sum((g * d).sum() for g, d in zip(first.values(), direction))
        second = torch.autograd.grad(projected, list(named.values()))
        results.append([*first.values(), *second])
    assert relative_error(*results) < 1e-10
    assert all(g.abs().sum() > 1e-3 for g in results[0])


@both_ways
def test_third_derivative(wrap):
    case = Case(wrap)
    results = []
    for function in (case.meta_loss(), case.plain_meta_loss()):
        value = function(case.theta, case.lr)
        for _ in range(3):
            (g,) = torch.autograd.grad(value, case.theta, create_graph=True)
            value = g.square().sum()
        results.append(g)
    assert relative_error(*results) < 1e-10


@both_ways
def test_task_loss_uses_its_prepaid_gradient_in_a_plain_backward_pass_only(wrap):
    """Under create_graph the gradient is differentiable: its own derivative is the Hessian, not zeros."""
    case = Case(wrap)
    losses = maml_ext.task_loss(case.module, case.theta, case.x, case.y)
    plain = torch.autograd.grad(losses.sum(), case.theta, retain_graph=True)[0]
    recorded = torch.autograd.grad(losses.sum(), case.theta, create_graph=True)[0]
    assert not plain.requires_grad and recorded.requires_grad
    assert relative_error(plain, recorded) < 1e-14
    second, mixed = torch.autograd.grad(recorded @ case.vector.detach(), [case.theta, case.x])
    expected = maml_ext.hvp(case.module, case.theta, case.x, case.y, case.vector).sum(0)
    assert relative_error(second, expected) < 1e-10 and expected.norm() > 0.1
    assert mixed.norm() > 0.1


@both_ways
@pytest.mark.parametrize("own", [False, True], ids=["shared parameters", "parameters of each task"])
def test_hvp_is_autograds(wrap, own):
    module, (x, y, *_) = wrap(smooth_mlp()), vectors()
    theta = maml_ext.flatten(module).detach()
    theta = theta + torch.randn(len(x), 1) if own else theta
    vector = torch.randn_like(theta)
    found = maml_ext.hvp(module, theta, x, y, vector)
    for t in range(len(x)):
        row, direction = (theta[t], vector[t]) if own else (theta, vector)

        def loss(flat):
            return F.mse_loss(functional_call(module, maml_ext.unflatten(module, flat), (x[t],)), y[t])

        assert relative_error(found[t], autograd_hvp(loss, row, direction)[1]) < 1e-10


# torch.func.


@modes
@both_ways
def test_func_grad_and_jvp(wrap, mode):
    case = Case(wrap)
    function, theta, lr = case.meta_loss(mode), case.theta.detach(), case.lr.detach()
    expected = torch.autograd.grad(case.plain_meta_loss(mode)(case.theta, case.lr), [case.theta, case.lr])
    assert relative_error(grad(function, (0, 1))(theta, lr), expected) < 1e-10
    tangents = torch.randn_like(theta), torch.randn_like(lr)
    value, tangent = jvp(function, (theta, lr), tangents)
    assert relative_error(value, function(theta, lr)) < 1e-14
    assert relative_error(tangent, sum((e * d).sum() for e, d in zip(expected, tangents))) < 1e-10


@modes
def test_func_vmap_hessian_and_jacobian(mode):
    """Batched by the user's own vmap, over the package's own."""
    case = Case()
    function, plain, lr = case.meta_loss(mode), case.plain_meta_loss(mode), case.lr.detach()
    starts = torch.randn(3, case.theta.numel())
    values = torch.stack([function(s, lr) for s in starts])
    assert relative_error(vmap(function, (0, None))(starts, lr), values) < 1e-10
    slopes = torch.stack([grad(function)(s, lr) for s in starts])
    assert relative_error(vmap(grad(function), (0, None))(starts, lr), slopes) < 1e-10
    expected = torch.autograd.functional.hessian(lambda theta: plain(theta, lr), case.theta.detach())
    assert relative_error(hessian(function)(case.theta.detach(), lr), expected) < 1e-10
    assert relative_error(jacrev(jacrev(function))(case.theta.detach(), lr), expected) < 1e-10


def test_autograd_hessian_of_looped_tasks():
    """torch.func.vmap cannot batch what vmap cannot run, but autograd's own loops do."""
    case = Case(TaskByTask)
    lr = case.lr.detach()
    found, expected = (
        torch.autograd.functional.hessian(lambda theta: function(theta, lr), case.theta.detach())
        for function in (case.meta_loss(), case.plain_meta_loss())
    )
    assert relative_error(found, expected) < 1e-10


# Nothing is kept.


@both_ways
def test_a_backward_pass_frees_the_graph(wrap):
    case = Case(wrap)
    loss = case.meta_loss()(case.theta, case.lr)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# The single pass of MAML's own call computes its gradients in the forward pass: autograd's promises hold all the same.


needs_engine = pytest.mark.skipif(library.ABSENT is not None, reason="the compiled engine has the single pass")


def single_pass():
    """The loss, and what it depends on."""
    batch = [t.requires_grad_() for t in vectors()]
    maml = maml_ext.MAML(smooth_mlp(), lr=nn.Parameter(torch.tensor(0.1)), reduction="mean")
    return maml(*batch), [*maml.parameters(), *batch]


@needs_engine
def test_a_single_pass_is_differentiated_once_or_with_its_graph_retained():
    loss, wrt = single_pass()
    found = [torch.autograd.grad(loss, wrt, retain_graph=again) for again in (True, False)]
    assert all(map(torch.equal, *found))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wrt)


@needs_engine
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_single_pass_sees_that_its_inputs_have_changed(create_graph):
    for i in range(len(single_pass()[1])):
        loss, wrt = single_pass()
        with torch.no_grad():
            wrt[i].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, wrt, create_graph=create_graph)


@needs_engine
def test_a_single_pass_lets_go_of_its_data_after_the_backward_pass():
    batch = list(vectors())
    held = [weakref.ref(t) for t in batch]
    loss = maml_ext.MAML(smooth_mlp(), reduction="mean")(*batch)
    batch.clear()
    assert all(ref() is not None for ref in held)
    loss.backward()
    assert all(ref() is None for ref in held)


@needs_engine
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_single_pass_keeps_its_tensors_where_it_is_told_to(create_graph):
    torch.manual_seed(0)
    loss, wrt = single_pass()
    expected = torch.autograd.grad(loss, wrt, create_graph=create_graph)
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        loss, wrt = single_pass()
    found = torch.autograd.grad(loss, wrt, create_graph=create_graph)
    assert all(map(torch.equal, found, expected))


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@both_ways
@modes
def test_fifty_iterations_leave_no_tensor_behind(wrap, mode):
    module, batch = wrap(relu_mlp()), vectors()
    maml = maml_ext.MAML(module, lr=nn.Parameter(torch.tensor(0.1)), steps=3, meta_gradient=mode)
    optimizer = torch.optim.SGD(maml.parameters(), 0.01)

    def iterate():
        optimizer.zero_grad()
        tasks = maml.adapt(*batch[:2])
        (tasks.loss(*batch[2:]).mean() + tasks.after(1).loss(*batch[2:]).mean()).backward()
        optimizer.step()
        with torch.no_grad():
            maml(*batch)

    iterate()
    before = live_tensors()
    for _ in range(50):
        iterate()
    assert live_tensors() == before


def test_fifty_iterations_leave_memory_as_it_was():
    """A trajectory theta_1 .. theta_10 of 8 tasks is 13 MB here: 640 MB if each one stayed."""
    module = nn.Linear(100, 200)
    maml = maml_ext.MAML(module, lr=0.1, steps=10)
    batch = torch.randn(8, 1, 100), torch.randn(8, 1, 200), torch.randn(8, 1, 100), torch.randn(8, 1, 200)
    for i in range(50):
        maml(*batch).sum().backward()
        if i == 9:
            before = psutil.Process().memory_info().rss
    assert psutil.Process().memory_info().rss - before < 100e6


@pytest.mark.parametrize("holds", [False, True], ids=["loss by name", "loss that holds the module"])
def test_a_module_is_freed(holds):
    """What is remembered of a module lives no longer than it, nor keeps it alive."""

    def use():
        module = smooth_mlp()
        loss = (lambda p, y: F.mse_loss(p, y) + 0.0 * len(list(module.children()))) if holds else "mse"
        maml_ext.MAML(module, loss=loss)(*vectors()).sum().backward()
        return weakref.ref(module)

    gone = use()
    gc.collect()
    assert gone() is None
