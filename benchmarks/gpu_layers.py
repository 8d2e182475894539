"""What the Triton engine does for a meta-gradient, launch by launch, and the least that has to cross memory for it.

The executor's own code runs, on CPU tensors, while no launch takes place: so nothing is computed, and what is counted
is what a GPU would be given (kernels/launch.py says of each launch how much it does). PyTorch's operators around the
launches, which copy arguments in and results out, are counted as they are dispatched.

The least is counted from the shapes of the network alone, for an engine that has one launch a layer and pass, does
value and tangent in the same launch and keeps theta_k of all steps, not their values:

- a launch reads each operand once and writes each result once, tangents too, however often tiles of it are loaded;
- what launches hand on are the values behind a contraction (linear, conv2d; its activation with it, either follows
  from the other) and, where a norm over the batch needs all of them first, those behind norm, activation and pooling;
  the gradients at the same places; the gradients of the parameters, of which a Hessian-vector product needs the
  tangents alone;
- sums over the batch in a norm's backward pass need their operands before the pass that uses them: both read them;
- theta is read by each pass forth and, where a layer hands a gradient on, back; theta_0 once for all tasks; the step
  and its adjoint read and write the vectors of kernels/update.py once each.

So lower counts exist, for kernels that are not layer by layer; this one says what these could save.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from .gpu_launches import Counting
from .workloads import Problem, Workload, gflop

NUMBER_BYTES = 4

# Assumptions, in microseconds. On the device, from the end of a launch to the begin of the next: in a CUDA graph (1 to
# 2), and as single launches that wait in the queue. Of the CPU: a launch through Triton's launcher in Python with our
# wrapper around it (10 to 50), an eager operator of PyTorch.
REPLAYED, LAUNCH, TRITON, EAGER = 1.5, 2.5, 25.0, 7.0


@dataclass(frozen=True)
class Work:
    """Of one launch."""

    kernel: str
    programs: int
    flops: int
    moved: int


@dataclass(frozen=True)
class Counts:
    launches: list[Work]
    eager: int  # operators of PyTorch around them
    copied: int  # bytes that these move

    @property
    def flops(self) -> int:
        return sum(work.flops for work in self.launches)

    @property
    def moved(self) -> int:
        return sum(work.moved for work in self.launches) + self.copied


class Copying(Counting):
    """The bytes that PyTorch's operators move: each tensor they take or return, once."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        before = self.eager
        result = super().__torch_dispatch__(operator, types, arguments, options)
        if self.eager > before:
            leaves = torch.utils._pytree.tree_leaves((arguments, options, result))
            tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
            self.moved += sum(map(extent, tensors.values()))
        return result


def extent(tensor: torch.Tensor) -> int:
    """Bytes of memory behind it: what is expanded is there once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def count(program: tuple[list[int], list[float]], problem: Problem) -> Counts:
    """What a meta-gradient, summed over tasks, is in the Triton engine."""
    from maml_ext.kernels import engine
    from maml_ext.kernels.launch import watched

    launches = []

    def watch(launch) -> bool:
        function = launch.kernel.fn
        name = f"{function.__module__.rpartition('.')[2]} {function.__name__.strip('_')}"
        launches.append(Work(name, launch.programs, launch.flops, launch.moved))
        return False

    workload = problem.workload
    theta = torch.cat([p.detach().flatten() for p in problem.initial.parameters()])
    rates = torch.full((1, 1), workload.lr)
    support, query = (problem.support_x, problem.support_y, None), (problem.query_x, problem.query_y, None)
    arguments = *program, None, [theta], rates, *support, *query, workload.steps, False, True, [0] * 7
    with watched(watch):
        engine.run("meta", torch.ops.maml_ext.checked_meta, *arguments)  # which lays out memory, once for all calls
        launches.clear()
        with Copying() as copying:
            engine.run("meta", torch.ops.maml_ext.checked_meta, *arguments)
    return Counts(launches, copying.eager, copying.moved)


@dataclass(frozen=True)
class Stage:
    """A contraction and what follows it up to the next one: numbers of a sample, and of parameters."""

    reads: int
    writes: int
    contraction: int  # parameters
    norm: int = 0  # parameters
    behind: int = 0  # numbers of a sample behind norm, activation and pooling; 0 where no norm is there


def stages(workload: Workload) -> list[Stage]:
    """Of a chain of linear layers, convolutions, norms over the batch, activations and poolings."""
    found: list[dict] = []

    def see(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        sizes = inputs[0][0].numel(), output[0].numel()
        parameters = sum(p.numel() for p in layer.parameters())
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            found.append({"reads": sizes[0], "writes": sizes[1], "contraction": parameters})
        elif isinstance(layer, nn.BatchNorm2d):
            found[-1] |= {"norm": parameters, "behind": sizes[1]}
        elif isinstance(layer, nn.MaxPool2d) and "norm" in found[-1]:
            found[-1]["behind"] = sizes[1]
        elif not isinstance(layer, (nn.ReLU, nn.Flatten)):
            raise NotImplementedError(f"the least for {type(layer).__name__} is not counted")

    with torch.device("meta"):  # shapes only, nothing is computed
        network = workload.network()
        for layer in network:
            layer.register_forward_hook(see)
        network(torch.empty(2, *workload.input_shape))
    return [Stage(**stage) for stage in found]


def least(workload: Workload) -> int:
    """The least bytes of a meta-gradient, as above."""
    network, tasks = stages(workload), workload.tasks
    parameters = sum(stage.contraction + stage.norm for stage in network)
    handing_back = sum(stage.contraction for stage in network[1:]) + sum(stage.norm for stage in network)

    def samples(count: int, parts: int) -> int:
        """Numbers of values and gradients, of which ``parts`` of each, in a pass forth and back over one task."""
        numbers = 2 * parts * network[-1].writes + 1  # the loss: prediction, its gradient, the label
        for i, stage in enumerate(network):
            read = stage.reads * (parts if i else 1)  # the input has no tangent
            numbers += read + parts * stage.writes  # forth
            numbers += parts * stage.writes + read + (parts * stage.reads if i else 0)  # back
            if stage.norm:
                numbers += parts * (stage.writes + stage.behind)
                numbers += parts * (2 * (stage.writes + stage.behind) + stage.writes)
        return count * numbers

    def theta(step: int, vectors: int = 1) -> int:
        """Reading theta, and with two vectors a direction, forth and back."""
        each = parameters + handing_back
        return each * (tasks if step else 1) + each * tasks * (vectors - 1)

    vector = tasks * parameters
    numbers = 0
    for step in range(workload.steps):
        inner = samples(workload.support, 1) * tasks + theta(step) + 2 * vector  # the gradient there and back
        inner += vector + (vector if step else parameters)  # theta_{k+1} of theta_k
        adjoint = samples(workload.support, 2) * tasks + theta(step, 2) + 2 * vector
        adjoint += 2 * vector + (vector if step else 0)  # lambda, and the direction of the step before
        numbers += inner + adjoint
    numbers += samples(workload.query, 1) * tasks + theta(workload.steps) + 2 * vector
    numbers += vector + (vector if workload.steps else 0)  # lambda_K and the first direction
    numbers += vector + parameters  # their sum over tasks
    return NUMBER_BYTES * numbers


@dataclass(frozen=True)
class Estimate:
    """Of a meta-gradient on a device, in microseconds: a roofline for each launch, and what launches cost."""

    device: str
    arithmetic: float  # of launches that are held by it
    memory: float  # of the others
    replayed: float  # all of it, launches in CUDA graphs
    launched: float  # without graphs
    of_peak: float  # the FLOP needed, of what the device could do meanwhile, with graphs
    shares: dict[str, float]  # by kernel, of the time without launches


def estimate(workload: Workload, counts: Counts, device) -> Estimate:
    """Float32 at the full rate of as many SMs as have a program, memory at its full bandwidth: nothing is faster."""
    peak = 2e3 * device.lanes * device.clock  # FLOP of an SM in a microsecond
    spent, by = Counter(), Counter()
    for work in counts.launches:
        arithmetic = work.flops / (peak * min(work.programs, device.multiprocessors))
        memory = 1e-3 * work.moved / device.bandwidth
        by["arithmetic" if arithmetic > memory else "memory"] += max(arithmetic, memory)
        spent[work.kernel] += max(arithmetic, memory)
    busy, launches, around = spent.total(), len(counts.launches), EAGER * counts.eager
    replayed = busy + REPLAYED * launches + around
    return Estimate(
        device.name,
        by["arithmetic"],
        by["memory"],
        replayed,
        max(busy + LAUNCH * launches, TRITON * launches) + around,
        1e9 * gflop(workload) / (peak * device.multiprocessors * replayed),
        {name: amount / busy for name, amount in spent.most_common()},
    )
