"""What several test files need: MAML as a plain ``create_graph=True`` loop, networks, and a measure of error.

The loop is the definition that maml_ext is compared with. It is written from Finn et al. (2017), eq. 1, one
task and one parameter tensor at a time, and uses nothing of maml_ext.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import emulation
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import maml_ext

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run on CPU tensors
torch.set_num_threads(1)  # the tensors here are tiny
TASKS, SHOTS, QUERIES = 3, 4, 5
OPERATORS = ("predict", "pull", "pull_tangent", "score", "score_tangent", "adapt", "adjoint", "meta")  # of an engine


@pytest.fixture(autouse=True)
def seeded():
    """The numbers of a test depend on nothing but the test."""
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """float64 unless a test says otherwise: to use with ``pytestmark``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The emulated kernels take a quarter of a minute to build: one process of the tests has them."""
    for item in items:
        if "emulated" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("emulated"))


@pytest.fixture(scope="session")
def emulated():
    """The CUDA kernels on the CPU: operators like those of maml_ext in torch.ops.maml_ext_emulated, and a module."""
    if emulation.unavailable():
        pytest.skip(emulation.unavailable())
    from emulation import operators

    return operators.load()


class Batch(NamedTuple):
    """A batch of tasks."""

    support_x: Tensor | tuple
    support_y: Tensor | tuple
    query_x: Tensor | tuple
    query_y: Tensor | tuple


def on_any_number_of_threads(function: Callable[[], Sequence[Tensor]], counts: Sequence[int] = (1, 2, 3)):
    """What ``function`` returns, which has to be the same bits on each of these numbers of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            found.append(function())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    return found[0]


def map_tensors(function: Callable, tree):
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def require_grad(tree):
    """Copies of the tensors; those of a floating dtype require grad."""
    return map_tensors(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), tree)


# The oracle.


def step_rates(lr: Tensor, step: int, parameters: dict[str, Tensor]) -> list[Tensor]:
    """The learning rate of every parameter tensor in a step, in the shape of the tensor or a scalar."""
    row = lr[step] if lr.dim() == 2 else lr.reshape(-1)
    if len(row) == 1:
        return [row[0]] * len(parameters)
    if len(row) == len(parameters):
        return list(row)
    rates, offset = [], 0
    for p in parameters.values():
        rates.append(row[offset : offset + p.numel()].view(p.shape))
        offset += p.numel()
    return rates


def plain_maml(
    module: nn.Module,
    batch: Batch,
    lr: Tensor | float,
    steps: int,
    loss: Callable,
    first_order: bool = False,
    parameters: dict[str, Tensor] | list[dict[str, Tensor]] | None = None,
) -> Tensor:
    """Query losses after 0 .. K inner steps, ``[steps + 1, T]``, recorded by autograd from end to end.

    ``parameters`` is one dict for all tasks (default: the module's) or a list of one a task.
    """
    if parameters is None:
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    tasks = pytree.tree_leaves(batch)[0].shape[0]
    rows = []
    with sdpa_kernel(SDPBackend.MATH):
        for t in range(tasks):
            support_x, support_y, query_x, query_y = map_tensors(lambda leaf: leaf[t], batch)
            theta = dict(parameters[t] if isinstance(parameters, list) else parameters)
            row = [loss(call(module, theta, query_x), query_y)]
            for k in range(steps):
                value = loss(call(module, theta, support_x), support_y)
                gradients = torch.autograd.grad(
                    value, list(theta.values()), create_graph=True, allow_unused=True
                )
                rates = step_rates(torch.as_tensor(lr), k, theta)
                for (name, p), g, rate in zip(list(theta.items()), gradients, rates):
                    if g is not None:
                        theta[name] = p - rate * (g.detach() if first_order else g)
                row.append(loss(call(module, theta, query_x), query_y))
            rows.append(torch.stack(row))
    return torch.stack(rows, 1)


def call(module: nn.Module, parameters: dict[str, Tensor], x: Tensor | tuple) -> Tensor:
    """The module with these parameters; statistics it would update are updated in a copy."""
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    return functional_call(module, {**parameters, **buffers}, x)


def weighted_sum(losses: Tensor) -> Tensor:
    """A scalar to which every loss contributes with a weight of its own, so that a mix-up of tasks shows."""
    weights = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype, device=losses.device)
    return (losses * weights.view_as(losses)).sum()


def gradients(losses: Tensor, wrt: dict[str, Tensor | list[Tensor]], create_graph: bool = False) -> dict:
    """By name the gradient of ``weighted_sum(losses)``; None where the losses do not depend on an input."""
    leaves, spec = pytree.tree_flatten(wrt)
    found = torch.autograd.grad(weighted_sum(losses), leaves, allow_unused=True, create_graph=create_graph)
    return pytree.tree_unflatten(found, spec)


# How results are compared.


def relative_error(actual, expected) -> float:
    """|actual - expected| / |expected| over all elements; infinity for NaN, or where one alone is None."""
    actual, expected = ([x] if isinstance(x, Tensor) or x is None else list(x) for x in (actual, expected))
    assert len(actual) == len(expected), f"{len(actual)} results, expected {len(expected)}"
    squares = [0.0, 0.0]
    for a, e in zip(actual, expected):
        if a is None and e is None:
            continue
        if a is None or e is None:
            return float("inf")
        assert a.shape == e.shape, f"{list(a.shape)}, expected {list(e.shape)}"
        a, e = a.detach().double(), e.detach().double()
        squares[0] += (a - e).square().sum().item()
        squares[1] += e.square().sum().item()
    if squares[0] == 0:
        return 0.0
    error = (squares[0] / squares[1]) ** 0.5 if squares[1] else float("inf")
    return error if error == error else float("inf")


def errors(actual: dict, expected: dict) -> dict[str, float]:
    """``relative_error`` by name."""
    assert actual.keys() == expected.keys()
    return {name: relative_error(actual[name], expected[name]) for name in expected}


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-10) -> None:
    found = errors(actual, expected)
    assert max(found.values()) <= tolerance, found


@contextlib.contextmanager
def unchanged(module: nn.Module):
    """Fails if the block changes a parameter, a buffer, a gradient, a flag or the random generator."""

    def state():
        tensors = {
            n: (t, t.detach().clone(), t.grad)
            for n, t in [*module.named_parameters(), *module.named_buffers()]
        }
        flags = [
            {k: v for k, v in vars(m).items() if isinstance(v, (bool, int, float))} for m in module.modules()
        ]
        return tensors, flags, torch.get_rng_state()

    before = state()
    yield
    after = state()
    for name, (tensor, value, grad) in before[0].items():
        now, now_value, now_grad = after[0][name]
        assert now is tensor and torch.equal(now_value, value) and now_grad is grad, f"{name} changed"
    assert after[1] == before[1]
    assert torch.equal(after[2], before[2]), "random numbers were drawn"


# The networks.


class TaskByTask(nn.Module):
    """A wrapper that vmap cannot run (its control flow depends on the data): so tasks are looped over."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        if inputs[0].sum().item() == float("inf"):
            raise AssertionError("unreachable")
        return self.module(*inputs)


class Residual(nn.Module):
    """x + f(x) with batch norm, then a linear layer on the average of each channel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        self.body = nn.Sequential(nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 3, 3, padding=1, bias=False))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.body(x)).mean((2, 3)))


class Recurrent(nn.Module):
    """A GRU cell read over the columns of x as a sequence."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(1, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4)
        for column in x.unbind(1):
            state = self.cell(column[:, None], state)
        return self.head(state)


class Transformer(nn.Module):
    """One encoder layer over the columns of x as tokens."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.position = nn.Parameter(0.1 * torch.randn(3, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=dropout, activation="gelu", batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x[..., None]) + self.position).mean(1))


def smooth_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def relu_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(27, 3),
    )


def vectors(dtype: torch.dtype | None = None) -> Batch:
    """Regression tasks: [3] -> [2]."""
    shapes = [(SHOTS, 3), (SHOTS, 2), (QUERIES, 3), (QUERIES, 2)]
    return Batch(*(torch.randn(TASKS, *shape, dtype=dtype) for shape in shapes))


def images(dtype: torch.dtype | None = None) -> Batch:
    """Classification tasks: images [1, 6, 6] of 3 classes."""
    return Batch(
        torch.randn(TASKS, SHOTS, 1, 6, 6, dtype=dtype),
        torch.randint(3, (TASKS, SHOTS)),
        torch.randn(TASKS, QUERIES, 1, 6, 6, dtype=dtype),
        torch.randint(3, (TASKS, QUERIES)),
    )


LOSSES = {
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}

# name: (network, data, loss); all of them run under vmap, and task by task inside TaskByTask
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch], str]] = {
    "smooth MLP": (smooth_mlp, vectors, "mse"),
    "ReLU MLP": (relu_mlp, vectors, "mse"),
    "conv net": (conv_net, images, "cross_entropy"),
    "residual net": (Residual, images, "cross_entropy"),
    "GRU cell": (Recurrent, vectors, "mse"),
    "transformer": (Transformer, vectors, "mse"),
}
both_ways = pytest.mark.parametrize("wrap", [nn.Sequential, TaskByTask], ids=["at once", "looped"])


def runs_at_once(maml: maml_ext.MAML, batch: Batch) -> bool:
    """Whether the reference runs all tasks at once; the compiled engine may take its place."""
    chosen, maml.backend = maml.backend, "torch"
    report = str(maml.explain(batch.support_x, batch.support_y)).split("because")[0]
    maml.backend = chosen
    return "all at once" in report
