"""The CPU engine with two tasks abreast (csrc/cpu/engine/work.h): float32, the mean over 16 tasks or more."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import Batch, on_any_number_of_threads, relative_error
from test_engine_fuzz import Problem, Writer, fuzz
from torch import nn

import maml_ext
from maml_ext.ops import library
from maml_ext.program import ABSENT, Activation, Kind

pytestmark = pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled engine")


class Residual(nn.Module):
    """Adds and multiplies branches; a layer is applied twice."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(3, 10), nn.Linear(10, 10), nn.Linear(10, 2, bias=False)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = x + 0.5 * F.relu(self.twice(x))
        return self.last(x * torch.sigmoid(self.twice(x)))


def mlp(*sizes, activation=nn.ReLU):
    layers = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), activation())]
    return nn.Sequential(*layers[:-1])


NETWORKS = {
    "sinusoid": lambda: mlp(1, 40, 40, 1),
    "five outputs": lambda: mlp(3, 10, 5, activation=nn.SiLU),
    "odd sizes": lambda: mlp(2, 37, 9, 3, activation=lambda: nn.LeakyReLU(0.1)),
    "one layer": lambda: nn.Linear(3, 2),
    "residual": Residual,
}
LOSSES = {
    "mse": "mse",
    "huber": nn.HuberLoss(delta=0.3),
    "bce_with_logits": "bce_with_logits",
    "labels": nn.CrossEntropyLoss(torch.tensor([0.3, 2.0]), ignore_index=1, label_smoothing=0.2),
    "soft labels": nn.CrossEntropyLoss(torch.tensor([0.3, 2.0]), label_smoothing=0.1),
}


def problem(name, tasks=17, support=10, query=7):
    module = NETWORKS[name]().float()
    inputs = next(p for p in module.parameters() if p.dim() == 2).shape[1]
    outputs = module(torch.zeros(1, inputs)).shape[1]
    sets = [(torch.randn(tasks, n, inputs), torch.rand(tasks, n, outputs)) for n in (support, query)]
    return module, Batch(*sets[0], *sets[1])


def result(module, batch, backend, dtype=torch.float32, loss="mse", lr=0.05, steps=3, **options):
    """The mean loss and every gradient of it, one vector each; how many losses there were, of one task or a pair."""
    module = module.to(dtype)
    if isinstance(loss, nn.Module):
        loss = loss.to(dtype)
    if isinstance(lr, torch.Tensor):
        lr = lr.detach().to(dtype).requires_grad_()
    floats = [t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in batch]
    maml = maml_ext.MAML(module, lr=lr, steps=steps, loss=loss, backend=backend, reduction="mean", **options)
    torch.ops.maml_ext.record(True)
    value = maml(*floats)
    torch.ops.maml_ext.record(False)
    kind, rule, *_ = torch.ops.maml_ext.recorded(torch.zeros((), dtype=torch.float64)).T
    inputs = [*module.parameters(), *(t for t in (lr, *floats) if isinstance(t, torch.Tensor) and t.requires_grad)]
    found = torch.autograd.grad(value, inputs, materialize_grads=True)
    return [value.reshape(1), *(g.flatten() for g in found)], int(((kind == -3) & (rule == 1)).sum())


def errors(problem_of, **options):
    """Medians over seeds of the errors against float64, of the engine and of eager PyTorch; how many losses."""
    ours, eager = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        module, batch = problem_of()
        truth = result(module, batch, "torch", torch.float64, **options)[0]
        found, count = result(module, batch, "compiled", **options)
        by_eager = result(module, batch, "torch", **options)[0]
        for way, into in ((found, ours), (by_eager, eager)):
            into.append([float(relative_error(f.double(), t)) for f, t in zip(way, truth, strict=True) if t.norm() > 0])
    return torch.tensor(ours).median(0).values, torch.tensor(eager).median(0).values, count


def check(problem_of, units, steps=3, **options):
    """``units``: what passes by in turn, a pair of tasks or one."""
    anew = steps if options.get("meta_gradient") == "first_order" and "lr" in options else 0
    assert passes(problem_of, steps=steps, **options) == units * (steps + 1 + anew)


def passes(problem_of, **options):
    """How many losses there were, of gradients at most twice as far from float64 as those of eager PyTorch."""
    ours, eager, count = errors(problem_of, **options)
    assert (ours < 2 * eager + 2e-7).all(), (ours, eager)
    return count


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    check(lambda: problem(name), units=9)


@pytest.mark.parametrize("tasks, support, query, steps", [(16, 1, 1, 1), (17, 1, 23, 0), (33, 19, 1, 2), (16, 8, 9, 5)])
@pytest.mark.parametrize("name", ["sinusoid", "odd sizes"])
def test_odd_sizes(name, tasks, support, query, steps):
    check(lambda: problem(name, tasks, support, query), units=(tasks + 1) // 2, steps=steps)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss):
    """Labels that differ from task to task, and some to ignore; gradients of soft labels."""

    def with_targets():
        module, batch = problem("residual")
        if loss == "labels":
            labels = [torch.randint(2, t.shape[:2]).index_fill(1, torch.tensor([0]), 0) for t in batch[1::2]]
        else:
            labels = [t.requires_grad_() for t in batch[1::2]]
        return module, Batch(batch.support_x, labels[0], batch.query_x, labels[1])

    check(with_targets, units=9, loss=LOSSES[loss])


@pytest.mark.parametrize("shape", [(), (4,), ("P",), (3, 1), (3, "P")], ids=str)
@pytest.mark.parametrize("meta_gradient", ["exact", "first_order"])
def test_rates(shape, meta_gradient):
    """Learned, a number, one a tensor, one a parameter; for each step or for all."""
    size = sum(p.numel() for p in problem("five outputs")[0].parameters())
    lr = 0.1 * torch.rand([size if s == "P" else s for s in shape])
    check(lambda: problem("five outputs"), units=9, lr=lr, meta_gradient=meta_gradient)


def test_only_where_it_gains():
    """One by one: few tasks, float64, whole vectors, weights, the gradient of x, losses that are not summed."""
    module, batch = problem("sinusoid")
    few = Batch(*(t[:15] for t in batch))
    assert result(module, few, "compiled")[1] == 15 * 4
    assert result(module, batch, "compiled", torch.float64)[1] == 17 * 4
    assert result(module.float(), batch._replace(query_x=batch.query_x.requires_grad_()), "compiled")[1] == 17 * 4
    whole = mlp(1, 64, 64, 64)
    sets = [torch.randn(17, 5, n) for n in (1, 64, 1, 64)]
    assert result(whole, Batch(*sets), "compiled")[1] == 17 * 4
    weight = torch.ones(17, 10)
    maml = maml_ext.MAML(module, lr=0.05, steps=3, reduction="mean")
    plain = maml(*batch)
    assert relative_error(maml(batch[0], (batch[1], weight), *batch[2:]), plain) < 1e-6
    weight[3, :4] = 0
    assert relative_error(maml(batch[0], (batch[1], weight), *batch[2:]), plain) > 1e-6


def test_every_task_counts():
    """The gradient moves with each task's data, by what the reference says."""
    module, batch = problem("sinusoid", tasks=17, support=3, query=2)
    before = result(module, batch, "compiled")[0]
    for task in (0, 1, 15, 16):
        moved = batch._replace(support_y=batch.support_y.clone())
        moved.support_y[task] += 1
        found, expected = (result(module, moved, "compiled", dtype)[0] for dtype in (torch.float32, torch.float64))
        module.float()
        assert torch.cat(found).sub(torch.cat(before)).norm() > 1e-4
        assert relative_error(torch.cat(found).double(), torch.cat(expected)) < 1e-5


def test_the_same_bits_on_any_number_of_threads():
    module, batch = problem("sinusoid", tasks=25)
    on_any_number_of_threads(lambda: result(module, batch, "compiled")[0], counts=(1, 2, 3, 7))


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_every_instruction_set(isa):
    """Those that the machine lacks are replaced by the best it has; the best is what all other tests run on."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); import torch, test_abreast as t\n"
        "print(*(t.passes(lambda: t.problem(name)) for name in t.NETWORKS))"
    )
    environment = os.environ | {"MAML_EXT_CPU": isa}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert str(9 * 4) in run.stdout.split(), run.stdout  # which networks gain differs


class Vectors(Writer):
    """A program of layers on vectors: what may go abreast."""

    def layer(self):
        random, last = self.random, len(self.layers)
        if not last:
            self.shapes = [(self.shapes[0][0], 1, 1)]
        i = random.choice([last, last, last, random.randint(0, last)])
        (c, *_), second, out = self.shapes[i], ABSENT, self.shapes[i]
        kind = random.choice([Kind.CONTRACT, Kind.CONTRACT, Kind.ACTIVATION, Kind.COMBINE])
        if kind == Kind.CONTRACT:
            out = (random.choice([1, 2, 3, 5, 9, 10, 24, 37]), 1, 1)
            weight = self.slot(c * out[0], 1, 1, c, out[0], 1, absent=False)
            attributes = [out[0], 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, weight, self.slot(out[0], out[0])]
        elif kind == Kind.ACTIVATION:
            attributes = [random.choice(list(Activation))]
        else:
            second = random.choice([ABSENT, *(v for v, shape in enumerate(self.shapes) if shape == out)])
            attributes = [random.randint(0, 1) if second != ABSENT else 0]
        self.append(kind, i, second, attributes, out)


@fuzz(150)
def test_any_program_gives_the_mean_over_its_tasks(random):
    """What comes of tasks abreast, against the mean of what each task gives, in float32 and float64."""
    tasks = random.choice([16, 17])
    p = Problem(random, tasks=tasks, dtype=torch.float32, writer=Vectors)
    given = p.given
    given["theta"] = given["theta"].reshape(-1)[: p.writer.parameters]
    given["wanted7"] = [random.randint(0, 1), 0, given["wanted7"][2], 0, 0, given["wanted7"][5], 0]
    given["support_weight"] = random.choice([None, None, given["support_weight"]])
    given["query_weight"] = random.choice([None, None, given["query_weight"]])
    apart, mean = p("meta", reduce=False), p("meta", reduce=True)
    double = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in given.items()}
    given.update(double)
    truth = p("meta", reduce=False)
    for results in (apart, truth):
        results[:] = results[0].mean(), results[1].mean(0), *(gradient / tasks for gradient in results[2:])
    for a, m, t in zip(apart, mean, truth, strict=True):
        if a.isfinite().all() and t.numel() and t.norm() < 1e9:  # float32 can follow
            error = lambda f: (f.double() - t).norm()  # noqa: E731, B023
            assert error(m) <= 3 * error(a) + 1e-5 * t.norm() + 1e-7, (m, a, t)
