"""How many kernels PyTorch would launch for a meta-gradient, counted while the real code runs on CPU tensors.

An operator that computes something is one launch at least: some are two or more on a GPU (a convolution with its
bias, a mean), so that the counts are on the low side. Views and allocations launch nothing.
"""

import dataclasses

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .contestants import ours, plain, torch_func
from .workloads import Workload, make_problem

# Beside the views, which the schemas tell. (`_unsafe_view` is a view that does not say so; `is_same_size` and
# `_local_scalar_dense` compute nothing, though the latter waits for the device.)
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size",
             "_local_scalar_dense"}  # fmt: skip


def launches(operator: torch._ops.OpOverload) -> bool:
    schema = operator._schema
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return not view and schema.name.split("::")[1] not in NO_LAUNCH


class Counting(TorchDispatchMode):
    """Counts what would be launched, below autograd and torch.func: `eager` operators of PyTorch, and `own` ones."""

    def __init__(self):
        super().__init__()
        self.eager = self.own = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "maml_ext":
            self.own += 1
        elif launches(operator):
            self.eager += 1
        return operator(*arguments, **(options or {}))


def count(build, workload: Workload) -> Counting:
    """What a meta-gradient launches; the first one, which may prepare something, is not counted."""
    call = build(make_problem(workload, torch.float32))
    call()
    with Counting() as counting:
        call()
    return counting


def plain_loop(workload: Workload) -> int:
    """Of the `create_graph=True` loop: by task always the same, so that two tasks tell of all."""
    one, two = (count(plain, dataclasses.replace(workload, tasks=tasks)).eager for tasks in (1, 2))
    return one + (workload.tasks - 1) * (two - one)


def torch_func_way(workload: Workload) -> int:
    """Of `vmap(grad(...))`, where all tasks are in the same operators."""
    return count(torch_func, dataclasses.replace(workload, tasks=2)).eager


def around_ours(workload: Workload) -> int:
    """PyTorch's operators around the one of the compiled package: parameters put together, the mean of losses."""
    return count(lambda problem: ours(problem, "compiled"), dataclasses.replace(workload, tasks=2)).eager
