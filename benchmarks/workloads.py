"""The workloads: networks, tasks and the number of floating-point operations a meta-gradient needs."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSSES = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}
WAYS = 5


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet(channels: int, width: int, features: int, blocks: int = 4) -> nn.Sequential:
    """Blocks of (3x3 convolution, batch norm with batch statistics, ReLU, max-pool 2) and a linear layer."""
    layers = []
    for block in range(blocks):
        layers += [
            nn.Conv2d(channels if block == 0 else width, width, 3, padding=1),
            nn.BatchNorm2d(width, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, WAYS))


@dataclass(frozen=True)
class Workload:
    """A meta-batch: `tasks` tasks of `support` and `query` samples, `steps` inner steps at rate `lr`."""

    name: str
    network: Callable[[], nn.Sequential]
    input_shape: tuple[int, ...]
    tasks: int
    support: int
    query: int
    steps: int
    loss: str
    lr: float

    @property
    def convolutional(self) -> bool:
        return len(self.input_shape) == 3


def _sinusoid(name: str, steps: int, lr: float = 0.01) -> Workload:
    return Workload(name, lambda: mlp(1, 40, 40, 1), (1,), 25, 10, 10, steps, "mse", lr)


WORKLOADS = {
    workload.name: workload
    for workload in (
        _sinusoid("sin1", 1),
        _sinusoid("sin5", 5),
        _sinusoid("sin10", 10),
        _sinusoid("long100", 100, lr=0.001),
        Workload("mlp_omni", lambda: mlp(784, 256, 128, 64, 64, WAYS), (784,), 32, 5, 75, 5,
                 "cross_entropy", 0.1),
        Workload("omni_conv", lambda: convnet(1, 64, 64), (1, 28, 28), 4, 5, 75, 5, "cross_entropy", 0.4),
        Workload("mini_conv", lambda: convnet(3, 32, 800), (3, 84, 84), 2, 5, 75, 5, "cross_entropy", 0.01),
    )
}  # fmt: skip

# Not benchmarks: they wake the libraries up before a memory measurement, and serve --quick and the tests.
TINY = {
    workload.name: workload
    for workload in (
        Workload("tiny_mlp", lambda: mlp(1, 8, 8, 1), (1,), 3, 4, 4, 2, "mse", 0.05),
        Workload("tiny_conv", lambda: convnet(1, 4, 4, blocks=2), (1, 5, 5), 2, 5, 10, 2,
                 "cross_entropy", 0.1),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A workload's initial network and data in one dtype.

    `support_x` is `[T, N, ...]` and `query_x` is `[T, Q, ...]`; the targets are values `[T, N, 1]` or class
    numbers `[T, N]`.
    """

    workload: Workload
    initial: nn.Sequential
    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    @property
    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.support_x, self.support_y, self.query_x, self.query_y

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return LOSSES[self.workload.loss]

    def network(self) -> nn.Sequential:
        """A copy of the initial network: some peers rebind the parameters of the one they are given."""
        return copy.deepcopy(self.initial)


def make_problem(workload: Workload, dtype: torch.dtype, seed: int = 0) -> Problem:
    """The network and data of `workload`; the values are those of float32 in any dtype, so they compare."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = workload.network().to(dtype)
    tasks, samples = workload.tasks, workload.support + workload.query
    if workload.loss == "mse":  # sinusoids of random amplitude and phase
        x = 10 * torch.rand(tasks, samples, 1, generator=generator) - 5
        amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
        phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
        y = (amplitude * torch.sin(x + phase)).to(dtype)
    else:  # noise in place of images: the time does not depend on what they show
        x = torch.randn(tasks, samples, *workload.input_shape, generator=generator)
        y = (torch.arange(samples) % WAYS).repeat(tasks, 1)
    x, cut = x.to(dtype), workload.support
    parts = x[:, :cut], y[:, :cut], x[:, cut:], y[:, cut:]
    return Problem(workload, network, *(part.contiguous() for part in parts))


def layer_macs(workload: Workload) -> list[int]:
    """Multiply-adds of one sample's forward pass in each linear and convolution layer, first layer first."""
    counts = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Every output element is a dot product as long as one row (or filter) of the weight.
        counts.append(output[0].numel() * layer.weight[0].numel())

    with torch.device("meta"):  # shapes only, nothing is computed
        network = workload.network()
        for layer in network:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.register_forward_hook(count)
        network(torch.empty(2, *workload.input_shape))
    return counts


def gflop(workload: Workload, needed: bool = True) -> float:
    """GFLOP of one meta-gradient: 2 per multiply-add of linear and convolution layers, nothing else.

    In units of a forward pass, a support sample takes in every step: forward 1, backward 2 (weights, inputs)
    and Hessian-vector product 6 (tangent forward 2, tangent backward 4); a query sample takes forward 1,
    backward 2. `needed` leaves out what is never needed in the first layer, whose inputs want no gradient and
    have no tangent: a step is then forward 1, backward 1, Hessian-vector product 2, and the query 2.
    `needed=False` is the plain convention, 9 and 3 for every layer.
    """
    first, *rest = layer_macs(workload)
    steps, support, query = workload.steps, workload.support, workload.query
    full = 9 * steps * support + 3 * query
    lean = 4 * steps * support + 2 * query
    return 2e-9 * workload.tasks * (first * (lean if needed else full) + sum(rest) * full)
