"""``MAML`` and its adapted tasks as an API: what each argument and method does, and what ``explain`` says."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    QUERIES,
    TASKS,
    TaskByTask,
    both_ways,
    call,
    conv_net,
    images,
    plain_maml,
    relative_error,
    runs_at_once,
    smooth_mlp,
    unchanged,
    vectors,
)
from torch import nn

import maml_ext
from maml_ext import plan
from maml_ext.ops import library

pytestmark = pytest.mark.usefixtures("float64")


def row(tensors, task):
    return {name: t[task] for name, t in tensors.items()}


# Adapted tasks.


@both_ways
def test_call_is_adapt_then_loss(wrap):
    maml, batch = maml_ext.MAML(wrap(smooth_mlp()), lr=0.1, steps=3), vectors()
    tasks = maml.adapt(*batch[:2])
    assert isinstance(tasks, maml_ext.AdaptedTasks)
    assert torch.equal(maml(*batch), tasks.loss(*batch[2:]))
    assert maml(*batch).shape == (TASKS,) and len(tasks) == TASKS and tasks.steps == 3


@both_ways
def test_predictions_and_losses_are_those_of_the_adapted_parameters(wrap):
    module, batch = wrap(smooth_mlp()), vectors()
    tasks = maml_ext.MAML(module, lr=0.1, steps=2).adapt(*batch[:2])
    predictions, parameters = tasks(batch.query_x), tasks.parameters()
    assert predictions.shape == (TASKS, QUERIES, 2)
    assert {n: p.shape for n, p in parameters.items()} == {
        n: (TASKS, *p.shape) for n, p in module.named_parameters()
    }
    for t in range(TASKS):
        expected = call(module, row(parameters, t), batch.query_x[t])
        assert relative_error(predictions[t], expected) < 1e-14
        assert relative_error(tasks.loss(*batch[2:])[t], F.mse_loss(expected, batch.query_y[t])) < 1e-14


@both_ways
def test_every_step_can_be_looked_at(wrap):
    """``after(k)`` is what k steps alone would give, and ``after(0)`` the initial parameters."""
    module, batch = wrap(smooth_mlp()), vectors()
    maml = maml_ext.MAML(module, lr=torch.rand(4, 1), steps=4)
    tasks = maml.adapt(*batch[:2])
    for k in range(5):
        after, alone = tasks.after(k), maml.adapt(*batch[:2], steps=k)
        assert after.steps == alone.steps == k and len(after) == TASKS
        assert relative_error(after.loss(*batch[2:]), alone.loss(*batch[2:])) < 1e-14
        assert relative_error(after(batch.query_x), alone(batch.query_x)) < 1e-14
    for name, p in module.named_parameters():
        assert torch.equal(tasks.after(0).parameters()[name], p.expand(TASKS, *p.shape))
    losses = torch.stack([tasks.after(k).loss(*batch[2:]) for k in range(5)])
    assert relative_error(losses, plain_maml(module, batch, maml.lr, 4, F.mse_loss)) < 1e-12
    assert tasks.after(4).after(2).steps == 2


def test_adapted_parameters_and_predictions_are_differentiable():
    module, batch = smooth_mlp(), vectors()
    tasks = maml_ext.MAML(module, lr=0.1, steps=2).adapt(*batch[:2])
    by_hand = (tasks(batch.query_x) - batch.query_y).square().mean((1, 2))
    gradients = [
        torch.autograd.grad(x.sum(), list(module.parameters()), retain_graph=True)
        for x in (by_hand, tasks.loss(*batch[2:]))
    ]
    assert relative_error(*gradients) < 1e-12
    penalty = sum(p.square().sum() for p in tasks.parameters().values())
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(penalty, list(module.parameters())))


def test_one_set_of_tasks_serves_many_queries():
    """Of any number of samples; also without targets."""
    batch = vectors()
    tasks = maml_ext.MAML(smooth_mlp()).adapt(*batch[:2])
    for n in (1, 2, QUERIES):
        assert tasks(batch.query_x[:, :n]).shape == (TASKS, n, 2)
        assert tasks.loss(batch.query_x[:, :n], batch.query_y[:, :n]).shape == (TASKS,)


# Arguments.


def test_reduction():
    module, batch = smooth_mlp(), vectors()
    each, mean = (maml_ext.MAML(module, lr=0.1, reduction=r) for r in ("none", "mean"))
    assert mean(*batch).shape == () and torch.equal(mean(*batch), each(*batch).mean())
    assert torch.equal(mean.adapt(*batch[:2]).loss(*batch[2:]), mean(*batch))
    found, expected = (
        torch.autograd.grad(m, module.parameters()) for m in (mean(*batch), each(*batch).mean())
    )
    assert relative_error(found, expected) < 1e-14


def test_steps_of_one_call():
    module, batch = smooth_mlp(), vectors()
    maml = maml_ext.MAML(module, lr=0.1, steps=1)
    for steps in (0, 1, 4):
        expected = plain_maml(module, batch, 0.1, steps, F.mse_loss)[-1]
        assert relative_error(maml(*batch, steps=steps), expected) < 1e-12
        assert relative_error(maml.adapt(*batch[:2], steps=steps).loss(*batch[2:]), expected) < 1e-12
    assert maml.steps == 1 and relative_error(maml(*batch), maml(*batch, steps=1)) == 0


def test_defaults():
    """One step of 0.01 on the mean squared error."""
    module, batch = smooth_mlp(), vectors()
    expected = plain_maml(module, batch, 0.01, 1, F.mse_loss)[-1]
    assert relative_error(maml_ext.MAML(module)(*batch), expected) < 1e-12


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("lr", [0, 0.1, 1])
def test_rates_and_backends(lr, backend):
    module, batch = smooth_mlp(), vectors()
    maml = maml_ext.MAML(module, lr=lr, backend=backend)
    assert relative_error(maml(*batch), plain_maml(module, batch, lr, 1, F.mse_loss)[-1]) < 1e-12
    assert "lr=" in repr(maml) and f"backend={backend}" in repr(maml)


def test_a_rate_is_a_parameter_if_it_is_one():
    module = smooth_mlp()
    own = {id(p) for p in module.parameters()}
    parameter, tensor = nn.Parameter(torch.tensor(0.1)), torch.tensor(0.1, requires_grad=True)
    assert {id(p) for p in maml_ext.MAML(module, lr=parameter).parameters()} == own | {id(parameter)}
    for lr in (0.1, tensor, torch.tensor(0.1)):
        assert {id(p) for p in maml_ext.MAML(module, lr=lr).parameters()} == own
    batch = vectors()
    for lr in (parameter, tensor):
        maml_ext.MAML(module, lr=lr)(*batch).sum().backward()
    assert parameter.grad is not None and torch.equal(parameter.grad, tensor.grad)


def test_gradients_go_to_the_modules_own_parameters():
    module, batch = smooth_mlp(), vectors()
    maml = maml_ext.MAML(module, lr=0.1, steps=2)
    assert maml.module is module
    for times in (1, 2):  # gradients accumulate
        maml(*batch).sum().backward()
        expected = torch.autograd.grad(
            plain_maml(module, batch, 0.1, 2, F.mse_loss)[-1].sum(), module.parameters()
        )
        assert relative_error([p.grad for p in module.parameters()], [times * g for g in expected]) < 1e-10


@both_ways
def test_repeated_calls_give_the_same(wrap):
    """And a call changes nothing: not the parameters, not the data, not the random generator."""
    module, batch = wrap(conv_net()), images()
    maml, copies = maml_ext.MAML(module, lr=0.1, steps=2, loss="cross_entropy"), [t.clone() for t in batch]
    results = []
    with unchanged(module):
        for _ in range(3):
            losses = maml(*batch)
            results.append([losses, *torch.autograd.grad(losses.sum(), list(module.parameters()))])
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0]))
    assert all(torch.equal(a, b) for a, b in zip(batch, copies))


def test_the_functional_layer_is_the_same_computation():
    module, batch = smooth_mlp(), vectors()
    theta = maml_ext.flatten(module)
    assert theta.shape == (sum(p.numel() for p in module.parameters()),)
    for name, p in maml_ext.unflatten(module, theta).items():
        assert torch.equal(p, dict(module.named_parameters())[name])
    stacked = maml_ext.unflatten(module, theta.expand(2, 5, -1))
    assert all(p.shape == (2, 5, *q.shape) for p, q in zip(stacked.values(), module.parameters()))
    thetas = maml_ext.inner_loop(module, theta, *batch[:2], lr=0.1, steps=2)
    maml = maml_ext.MAML(module, lr=0.1, steps=2)
    tasks = maml.adapt(*batch[:2])
    assert torch.equal(maml_ext.network(module, thetas[-1], batch.query_x), tasks(batch.query_x))
    losses = maml_ext.task_loss(module, thetas[-1], *batch[2:])
    assert torch.equal(losses, maml(*batch))
    losses.sum().backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    maml(*batch).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), found))


# explain.


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_explain(backend):
    maml, batch = maml_ext.MAML(smooth_mlp(), lr=0.1, steps=3, backend=backend), vectors()
    explanation = maml.explain(*batch[:2])
    report = str(explanation)
    engine = "torch" if backend == "torch" or library.ABSENT else "cpu"
    assert explanation.engine == engine and engine in report.splitlines()[0]
    assert isinstance(explanation.reasons, list) and all(isinstance(r, str) for r in explanation.reasons)
    assert all(reason in report for reason in explanation.reasons)
    assert (engine == "cpu") == (not explanation.reasons)
    assert f"tasks          {TASKS}, {'all at once' if engine == 'torch' else 'shared out over threads'}" in report
    assert all(layer in report for layer in ("linear 5", "tanh", "linear 2")) == (engine == "cpu")
    assert "3 steps" in report and "32 parameters (4 tensors)" in report and "exact" in report
    assert "first_order" in str(maml_ext.MAML(smooth_mlp(), meta_gradient="first_order").explain(*batch[:2]))


def test_explain_gives_the_reason_for_a_loop():
    batch = vectors()
    modules = smooth_mlp(), TaskByTask(smooth_mlp())
    at_once, looped = (maml_ext.MAML(m, backend="torch").explain(*batch[:2]) for m in modules)
    assert "all at once" in str(at_once) and not any("vmap" in r for r in at_once.reasons)
    assert "one after another" in str(looped)
    assert any("torch.vmap" in reason and ".item()" in reason for reason in looped.reasons)


def test_explain_says_what_was_asked_for():
    explanation = maml_ext.MAML(smooth_mlp(), backend="torch").explain(*vectors()[:2])
    assert explanation.engine == "torch" and explanation.reasons == ["backend='torch' was asked for"]


def test_large_convolutions_are_looped_over_on_a_cpu(monkeypatch):
    """Small ones run all at once; the results are the same."""
    module, batch = conv_net(), images()
    maml = maml_ext.MAML(module, lr=0.1, steps=2, loss="cross_entropy", backend="torch")
    assert runs_at_once(maml, batch)
    at_once = maml(*batch)
    monkeypatch.setattr(plan, "LARGE_CONVOLUTIONS", 100)
    other = maml_ext.MAML(nn.Sequential(module), lr=0.1, steps=2, loss="cross_entropy", backend="torch")
    assert not runs_at_once(other, batch)
    (reason,) = [r for r in other.explain(*batch[:2]).reasons if "one after another" in r]
    assert "3,888 multiply-adds of convolutions" in reason  # 4 images, 6 x 6 pixels, 3 filters of 3 x 3
    assert relative_error(other(*batch), at_once) < 1e-12


def test_explain_leaves_everything_alone():
    module, batch = nn.Sequential(conv_net()[:3], nn.Dropout(0.5), nn.Flatten(), nn.Linear(108, 3)), images()
    maml = maml_ext.MAML(module, loss="cross_entropy")
    with unchanged(module):
        maml.explain(*batch[:2])
        assert all(p.grad is None for p in module.parameters())


# MAML is a module: it saves, copies and converts.


def filled(**options):
    return maml_ext.MAML(smooth_mlp(), lr=nn.Parameter(torch.full((4,), 0.1)), steps=2, **options)


def test_state_dict():
    source, target, batch = filled(), filled(), vectors()
    assert list(source.state_dict()) == [
        "lr",
        *(f"module.{name}" for name, _ in source.module.named_parameters()),
    ]
    with torch.no_grad():
        source.lr.mul_(2)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    assert relative_error(target(*batch), source(*batch)) > 1e-3
    target.load_state_dict(torch.load(file))
    assert torch.equal(target(*batch), source(*batch))


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(copier):
    source, batch = filled(loss="huber", reduction="mean"), vectors()
    source(*batch).backward()
    twin = copier(source)
    assert torch.equal(twin(*batch), source(*batch))
    assert len({p.data_ptr() for p in [*twin.parameters(), *source.parameters()]}) == 10
    before = source(*batch)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    assert torch.equal(source(*batch), before) and not torch.equal(twin(*batch), before)
    twin(*batch).backward()


RATES = {
    "float": lambda: 0.1,
    "tensor": lambda: torch.tensor(0.1),
    "tensor that requires grad": lambda: torch.tensor(0.1, requires_grad=True),
    "parameter per tensor": lambda: nn.Parameter(torch.full((4,), 0.1)),
}


@pytest.mark.parametrize("rate", RATES)
def test_conversion_to_another_dtype(rate):
    rate = RATES[rate]()
    maml, batch = maml_ext.MAML(smooth_mlp(), lr=rate, steps=2), vectors()
    wide = maml(*batch)
    maml.to(torch.float32)
    narrow = maml(*(t.float() for t in batch))
    assert narrow.dtype == torch.float32 and relative_error(narrow, wide) < 1e-5
    maml.to(torch.float64)
    twin = copy.deepcopy(maml)
    losses = twin(*batch)
    assert losses.dtype == torch.float64
    losses.sum().backward()
    if isinstance(rate, torch.Tensor) and rate.requires_grad:
        assert twin.lr.grad.abs().sum() > 0


# Learning.


@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_meta_training_learns_sinusoids(mode):
    """The loss after one step falls well below that of the untrained network's, on tasks not seen."""
    tasks = maml_ext.data.Sinusoid(shots=10, queries=10, tasks=16, dtype=torch.float64)
    batches = [tasks[i] for i in range(64)]
    module = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    maml = maml_ext.MAML(
        module, lr=nn.Parameter(torch.tensor(0.02)), steps=1, meta_gradient=mode, reduction="mean"
    )
    optimizer = torch.optim.Adam(maml.parameters(), 5e-3)
    held_out = batches[-4:]

    def evaluate():
        with torch.no_grad():
            return torch.stack([maml(*batch) for batch in held_out]).mean().item()

    before, rate = evaluate(), maml.lr.item()
    for batch in batches[:-4]:
        optimizer.zero_grad()
        maml(*batch).backward()
        optimizer.step()
    assert evaluate() < 0.8 * before
    assert maml.lr.item() != rate


# Without the compiled part.


def test_absence_of_the_compiled_part_is_said_once(monkeypatch):
    """At first use, not at import; and backend="torch", which does not want it, is silent."""
    monkeypatch.setattr(library, "ABSENT", "for this test")
    monkeypatch.setattr(library, "_warned", False)
    batch = vectors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml_ext.MAML(smooth_mlp(), backend="torch")(*batch)
    maml = maml_ext.MAML(smooth_mlp())
    with pytest.warns(UserWarning, match="compiled engines are absent.*for this test"):
        maml(*batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml(*batch)
        maml_ext.MAML(smooth_mlp())(*batch)


def test_without_the_compiled_part_everything_works():
    """In a process of its own, whose import of the binary fails."""
    script = """
import sys, warnings
sys.modules["maml_ext._C"] = None
warnings.simplefilter("error")
import torch, maml_ext
from maml_ext.ops import library
assert library.ABSENT
net, x = torch.nn.Linear(2, 1), torch.randn(3, 4, 2)
maml = maml_ext.MAML(net, steps=2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    maml(x, x[..., :1], x, x[..., :1]).sum().backward()
    maml_ext.sgd_update(torch.ones(3), torch.ones(3), 0.5)
assert net.weight.grad.abs().sum() > 0
print([str(w.message) for w in caught])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled engines are absent") == 1
