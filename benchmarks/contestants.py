"""The contestants: one function each, from a problem to a callable that computes its meta-gradient.

The callable takes nothing and returns the gradient of the mean query loss over the tasks with respect to the
initial parameters, one array a parameter in the network's order. A further engine or peer is one more entry
of `CONTESTANTS`.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.func import functional_call, grad, vmap

from .workloads import Problem, Workload

Gradient = Sequence[Any]


def plain(problem: Problem, create_graph: bool = True) -> Callable[[], Gradient]:
    """The baseline: record the inner loop of one task, differentiate through the record, go to the next task.

    `create_graph=False` drops the second-order terms: a wrong gradient, for testing that the check can fail.
    """
    network, loss, lr = problem.network(), problem.loss, problem.workload.lr
    initial = dict(network.named_parameters())

    def call() -> Gradient:
        network.zero_grad()
        for support_x, support_y, query_x, query_y in zip(*problem.data):
            fast = initial
            for _ in range(problem.workload.steps):
                value = loss(functional_call(network, fast, (support_x,)), support_y)
                grads = torch.autograd.grad(value, tuple(fast.values()), create_graph=create_graph)
                fast = {name: p - lr * g for (name, p), g in zip(fast.items(), grads)}
            value = loss(functional_call(network, fast, (query_x,)), query_y)
            (value / problem.workload.tasks).backward()
        return [p.grad for p in initial.values()]

    return call


def ours(problem: Problem, backend: str) -> Callable[[], Gradient]:
    """`maml_ext.MAML` with one backend; the first call raises ValueError where it refuses the problem."""
    import maml_ext

    workload, network = problem.workload, problem.network()
    maml = maml_ext.MAML(
        network, lr=workload.lr, steps=workload.steps, loss=workload.loss, reduction="mean", backend=backend
    )

    def call() -> Gradient:
        network.zero_grad()
        maml(*problem.data).backward()
        return [p.grad for p in network.parameters()]

    return call


def torch_func(problem: Problem, compiled: bool = False) -> Callable[[], Gradient]:
    """`vmap(grad(unrolled inner loop))`, and the same under `torch.compile`.

    Not `grad(mean(vmap(inner loop)))`: in torch 2.13 that is silently wrong where there is batch norm.
    """
    network, loss, lr = problem.network(), problem.loss, problem.workload.lr
    params = {name: p.detach() for name, p in network.named_parameters()}

    def task_loss(params, x, y):
        return loss(functional_call(network, params, (x,)), y)

    def adapted_loss(params, support_x, support_y, query_x, query_y):
        for _ in range(problem.workload.steps):
            grads = grad(task_loss)(params, support_x, support_y)
            params = {name: p - lr * grads[name] for name, p in params.items()}
        return task_loss(params, query_x, query_y)

    def meta_gradient(params, *data):
        grads = vmap(grad(adapted_loss), in_dims=(None, 0, 0, 0, 0))(params, *data)
        return [g.mean(0) for g in grads.values()]

    if compiled:
        # Several workloads in one run: the second one's shapes must not be taken for a reason to go dynamic.
        torch._dynamo.reset()
        meta_gradient = torch.compile(meta_gradient, fullgraph=True, dynamic=False)
    return partial(meta_gradient, params, *problem.data)


def learn2learn(problem: Problem) -> Callable[[], Gradient]:
    """learn2learn's `MAML`: clone, adapt, backward, task by task."""
    for name in ("learn2learn", "learn2learn.algorithms"):
        # The packages' own __init__ need torchvision and gym, which the algorithm does not: leave them
        # unexecuted.
        if name not in sys.modules:
            sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
    algorithm = importlib.import_module("learn2learn.algorithms.maml").MAML
    network, loss, workload = problem.network(), problem.loss, problem.workload
    maml = algorithm(network, lr=workload.lr)

    def call() -> Gradient:
        network.zero_grad()
        for support_x, support_y, query_x, query_y in zip(*problem.data):
            learner = maml.clone()
            for _ in range(workload.steps):
                learner.adapt(loss(learner(support_x), support_y))
            (loss(learner(query_x), query_y) / workload.tasks).backward()
        return [p.grad for p in network.parameters()]

    return call


def higher(problem: Problem) -> Callable[[], Gradient]:
    """higher's `innerloop_ctx`, task by task."""
    import higher

    network, loss, workload = problem.network(), problem.loss, problem.workload
    optimizer = torch.optim.SGD(network.parameters(), lr=workload.lr)

    def call() -> Gradient:
        network.zero_grad()
        for support_x, support_y, query_x, query_y in zip(*problem.data):
            with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(workload.steps):
                    inner.step(loss(fast(support_x), support_y))
                (loss(fast(query_x), query_y) / workload.tasks).backward()
        return [p.grad for p in network.parameters()]

    return call


def torchopt(problem: Problem) -> Callable[[], Gradient]:
    """TorchOpt's `MetaSGD` as its documentation uses it: all tasks' graphs are kept for one backward pass."""
    import torchopt

    network, loss, workload = problem.network(), problem.loss, problem.workload
    initial = list(network.parameters())  # MetaSGD rebinds the network's own
    optimizer = torchopt.MetaSGD(network, lr=workload.lr)

    def call() -> Gradient:
        for p in initial:
            p.grad = None
        network_state = torchopt.extract_state_dict(network, by="reference")
        optimizer_state = torchopt.extract_state_dict(optimizer, by="reference")
        losses = []
        for support_x, support_y, query_x, query_y in zip(*problem.data):
            for _ in range(workload.steps):
                optimizer.step(loss(network(support_x), support_y))
            losses.append(loss(network(query_x), query_y))
            torchopt.recover_state_dict(network, network_state)
            torchopt.recover_state_dict(optimizer, optimizer_state)
        torch.stack(losses).mean().backward()
        return [p.grad for p in initial]

    return call


def jax(problem: Problem, tasks: str, steps: str) -> Callable[[], Gradient]:
    """JAX, jitted; see `jax_contestant`."""
    from .jax_contestant import meta_gradient

    return meta_gradient(problem, tasks, steps)


@dataclass(frozen=True)
class Contestant:
    """An entry of the table.

    `build` makes the callable; `requires` is the package it needs; contestants of one `family` share a bar of
    the picture (the fastest is drawn). `compiles`: its first call compiles. `limited`: that may take very
    long, so it is first tried in a process that can be stopped. `float64`: whether a second check in float64
    is cheap enough. `skip` says why a workload is not tried by default (empty: it is).
    """

    name: str
    family: str
    requires: str
    build: Callable[[Problem], Callable[[], Gradient]]
    compiles: bool = False
    limited: bool = False
    float64: bool = True
    skip: Callable[[Workload], str] = lambda workload: ""

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.requires) is not None

    @property
    def is_ours(self) -> bool:
        return self.requires == "maml_ext"


def _skip_compile(workload: Workload) -> str:
    if workload.convolutional or workload.steps >= 50:
        return "not tried: torch.compile gave no answer in minutes (--try-all tries it)"
    return ""


def _skip_jax(workload: Workload, tasks: str, steps: str) -> str:
    if steps == "unroll" and workload.steps >= 50:
        return "not tried: compiling 50 or more unrolled steps takes minutes (--try-all tries it)"
    if workload.convolutional and (tasks, steps) != ("loop", "unroll"):
        return "not tried: JAX on the CPU is many times slower this way on convolutions (--try-all tries it)"
    return ""


BASELINE = "plain"
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(BASELINE, "plain loop", "torch", plain),
        Contestant("maml_ext-torch", "maml_ext torch", "maml_ext", partial(ours, backend="torch")),
        Contestant("maml_ext-compiled", "maml_ext compiled", "maml_ext", partial(ours, backend="compiled")),
        Contestant("torch.func", "torch.func", "torch", torch_func),
        Contestant("torch.func-compiled", "torch.func compiled", "torch", partial(torch_func, compiled=True),
                   compiles=True, limited=True, float64=False, skip=_skip_compile),
        Contestant("learn2learn", "learn2learn", "learn2learn", learn2learn),
        Contestant("higher", "higher", "higher", higher),
        Contestant("torchopt", "TorchOpt MetaSGD", "torchopt", torchopt),
        *(
            Contestant(f"jax-{tasks}-{steps}", "JAX, best way", "jax", partial(jax, tasks=tasks, steps=steps),
                       compiles=True, skip=partial(_skip_jax, tasks=tasks, steps=steps))
            for tasks in ("vmap", "loop")
            for steps in ("scan", "unroll")
        ),
    )
}  # fmt: skip
