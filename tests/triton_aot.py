"""What ptxas makes of the Triton kernels that workloads launch: registers, stack, shared memory.

``python tests/triton_aot.py`` (`make triton-resources`) writes the table that tests/test_triton_build.py holds kernels
to. Workloads run without a GPU: their launches are recorded instead of made, and each kernel is compiled for what
Triton's JIT would have made of the arguments. TRITON_INTERPRET has to be unset: interpreted kernels can't be compiled.

Not all are compiled, for time: of kernels of a row of the table that have the same arguments (others are None) and
flags, the one with the largest tile; of these in turn the ``MOST`` with the most arguments. Others may need more: when
all 1200 were compiled once, five small tiles in float32 had 8 bytes of stack, which none has that is compiled.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import resource_table
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from maml_ext.kernels import sgd, statistics, update
from maml_ext.kernels.geometry import Statistics
from maml_ext.kernels.launch import Launch, launch, watched
from resource_table import ARCHITECTURES
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import workloads
from benchmarks.workloads import Workload
from maml_ext import compiled
from maml_ext.program import Precision
from maml_ext.stateless import Layout

TABLE = Path(__file__).parent.parent / "kernels" / "resources.txt"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NAMES = ("kernel", "dtype", "precision", "tangents")
MOST = 4


class Resources(NamedTuple):
    """Of a kernel: registers a thread, then bytes. Registers that do not suffice are spilled to the stack."""

    registers: int
    stack: int
    shared: int


class Specialised(NamedTuple):
    """A launch as Triton's JIT sees it."""

    kernel: object
    signature: dict
    constants: dict
    attributes: dict
    options: object
    target: GPUTarget

    @classmethod
    def of(cls, launch: Launch, architecture: str) -> Specialised:
        target = GPUTarget("cuda", int(architecture.replace(".", "")), 32)
        backend, kernel = make_backend(target), launch.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialisation, _ = bind(*launch.arguments, **launch.constants)
        options, signature, constants, attributes = kernel._pack_args(
            backend, dict(launch.constants), bound, specialisation, None
        )
        return cls(kernel, signature, constants, attributes, options, target)

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.split('.')[-1]}.{self.kernel.__name__}"

    @property
    def key(self) -> tuple:
        """What makes kernels differ, but for what Triton knows of integers and addresses: 1, or multiples of 16."""
        chosen = {path: value for path, value in self.constants.items() if value is None or self._is_constant(path)}
        types = re.sub("i32|i64|constexpr", "-", str(self.signature))
        return self.name, str(chosen), types, str(self.options), self.target

    @property
    def kind(self) -> tuple:
        """Of a row: which arguments are not there, and flags."""
        absent = frozenset(path for path, value in self.constants.items() if value is None)
        return absent, frozenset(path for path, value in self.constants.items() if value is True)

    @property
    def tile(self) -> int:
        """The product of integers among the constants: no size, but it grows with it."""
        constants = (value for path, value in self.constants.items() if self._is_constant(path))
        return math.prod(value for value in constants if isinstance(value, int) and value > 0)

    def _is_constant(self, path: tuple[int, ...]) -> bool:
        return self.kernel.params[path[0]].is_constexpr

    @property
    def row(self) -> tuple[str, ...]:
        """What the table tells apart: the most that kernels of a row need is recorded."""
        values = {self.kernel.params[path[0]].name: value for path, value in self.constants.items() if len(path) == 1}
        types = [v for v in values.values() if isinstance(v, tl.dtype)] + list(flat(self.signature.values()))
        dtype = next(name for name in map(str, types) if "fp32" in name or "fp64" in name).strip("*")
        tangents = any(isinstance(argument, tuple) and len(argument) == 2 for argument in self.signature.values())
        return self.name, dtype, values.get("PRECISION", "-"), "yes" if tangents else "no", f"sm_{self.target.arch}"

    def compile(self) -> Resources:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        result = triton.compile(source, target=self.target, options=self.options.__dict__)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(result.asm["cubin"])
            command = [CUOBJDUMP, "--dump-resource-usage", file.name]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = dict(word.split(":") for word in output.splitlines()[-1].split())
        return Resources(int(found["REG"]), int(found["STACK"]), result.metadata.shared)


def flat(items):
    for item in items:
        if isinstance(item, tuple):
            yield from flat(item)
        else:
            yield item


def kernels(runs: list[Callable[[], None]]) -> list[Specialised]:
    """Of those with different keys the few to compile."""
    found = {}

    def watch(launch):
        for architecture in ARCHITECTURES:
            kernel = Specialised.of(launch, architecture)
            found.setdefault(kernel.key, kernel)
        return False

    with watched(watch):
        for run in runs:
            run()
    largest, rows = {}, {}
    for kernel in found.values():
        kind = kernel.row, kernel.kind
        largest[kind] = max(largest.get(kind, kernel), kernel, key=lambda kernel: kernel.tile)
    for (row, _), kernel in largest.items():
        rows.setdefault(row, []).append(kernel)
    return [kernel for row in rows.values() for kernel in sorted(row, key=lambda kernel: len(kernel.kind[0]))[:MOST]]


_kernels: list[Specialised]  # of the processes that compile, which are forks


def compile_one(i: int) -> Resources:
    try:
        return _kernels[i].compile()
    except Exception as error:
        raise RuntimeError(f"{' '.join(_kernels[i].row)} {_kernels[i]}: {error}") from error


def compile_all(kernels: list[Specialised]) -> dict[tuple[str, ...], Resources]:
    global _kernels
    _kernels = kernels
    found = {}
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count(), 8)) as pool:
        for kernel, resources in zip(kernels, pool.imap(compile_one, range(len(kernels)))):
            found[kernel.row] = Resources(*map(max, resources, found.get(kernel.row, resources)))
    return found


# What is launched. Nothing is computed; networks copy what comes in and out.


def passes(dtype: torch.dtype) -> None:
    """Over vectors of parameters, with the rates that there are."""
    tasks, steps, parameters = 4, 5, 112_005
    table = update.Table.of([update.Slot(0, parameters, 0, 32)], "cpu")
    partials = tuple(torch.empty(2, 32 * tasks * parameters, dtype=dtype))
    vector, cotangent, direction = torch.empty(3, tasks, parameters, dtype=dtype)
    update.gather(table, partials[:1], (vector,))
    update.gather(table, partials, (vector, vector))
    for count in (1, parameters):
        rates = torch.empty(steps, count, dtype=dtype)
        to_rates = torch.empty(tasks, steps, table.blocks if count == 1 else count, dtype=dtype)
        update.gather(table, partials[:1], (vector,), rates=rates[-1], direction=direction)
        for theta in (vector[0], vector):
            update.step(table, partials[:1], (theta,), rates[0], (vector,))
        for given, parts, to, k in product((None, cotangent), (partials, partials[:1]), (None, to_rates[:, 1]), (0, 1)):
            update.adjoint(
                table, parts, vector, vector, cotangent=given, to_rates=to,
                rates=rates[0] if k else None, direction=direction if k else None,
            )  # fmt: skip


def operators(dtype: torch.dtype) -> None:
    tensors, rates = [torch.empty(3, 5, dtype=dtype)], [torch.empty((), dtype=dtype)]
    for theta in (tensors, []):
        sgd.update(theta, tensors, rates, [])
    for to_grad in (True, False):
        sgd.backward(tensors, tensors, rates, [], to_grad)


def measurements(dtype: torch.dtype) -> None:
    for tasks, samples, positions, channels in ((4, 5, 784, 64), (4, 75, 1, 64), (2, 75, 84 * 84, 32)):
        shape = tasks, statistics.ranges(samples * positions)
        x = tuple(torch.empty(2, tasks, samples, positions, channels, dtype=dtype))
        count, mean = torch.empty(shape, dtype=dtype), tuple(torch.empty(2, *shape, channels, dtype=dtype))
        for weight in (None, torch.empty(tasks, samples, dtype=dtype)):
            for parts in (1, 2):
                moments = Statistics(count, mean[:parts], mean[:parts])
                statistics.measure(x[:parts], moments, weight, tasks, samples, positions, channels)


def meta_gradient(module: nn.Module, loss, sets: list, *, rates=1, wanted=0, precision=Precision.FULL) -> None:
    """Two steps are as good as five.

    Args:
        sets: x, y and weights, of support and query.
        rates: 1, or as many as there are parameters.
        wanted: 1, where the gradients by rates, data and weights are.
    """
    layout = Layout(module)
    theta = layout.flatten().detach()
    call = compiled.choose(module, layout, theta, *sets[0][:2], loss, "compiled")
    program, *rest = call.arguments([theta])
    program[-1] = precision
    lr = theta.new_zeros(1, rates)
    torch.ops.maml_ext.triton_meta(program, *rest, lr, *sets[0], *sets[1], 2, False, True, [wanted] * 7)


def benchmark(workload: Workload, dtype: torch.dtype, precision: Precision) -> None:
    counts = [(workload.tasks, n) for n in (workload.support, workload.query)]
    sets = [(torch.zeros(*n, *workload.input_shape, dtype=dtype), torch.zeros(n).long(), None) for n in counts]
    meta_gradient(workload.network().to(dtype), workload.loss, sets, precision=precision)


class Others(nn.Module):
    """The layers that benchmarks do not have."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(), nn.MaxPool2d(3, 2, 1)),
            *(nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.BatchNorm2d(32).eval(), nn.SiLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(3)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.LayerNorm(9 * 32), nn.Linear(9 * 32, 5))

    def forward(self, x):
        x = self.body(x)
        x = self.head(x * torch.tanh(x) - 2 * x)
        return F.log_softmax(x, 1) + x.softmax(1)


def others(dtype: torch.dtype) -> None:
    """With every gradient there is."""
    module = Others().to(dtype)
    shapes = (3, 32, 32), (5,), ()
    sets = [[torch.zeros(2, n, *shape, dtype=dtype) for shape in shapes] for n in (5, 15)]
    loss = nn.CrossEntropyLoss(torch.ones(5, dtype=dtype), label_smoothing=0.1)
    meta_gradient(module, loss, sets, rates=sum(p.numel() for p in module.parameters()), wanted=1)


DTYPES = {
    torch.float32: (Precision.FULL, Precision.TF32, Precision.BFLOAT16, Precision.FLOAT16),
    torch.float64: (Precision.FULL,),
}
WORKLOADS = [partial(run, dtype) for run in (passes, operators, measurements, others) for dtype in DTYPES]
WORKLOADS += [
    partial(benchmark, workloads.WORKLOADS[name], dtype, precision)
    for dtype, precisions in DTYPES.items()
    for precision in precisions
    for name in (("mlp_omni", "omni_conv", "mini_conv") if precision == Precision.FULL else ("omni_conv",))
]


@triton.jit
def _spilled(x, steps):
    """Of each thread 256 numbers that every step needs: one more than it has registers."""
    at = tl.arange(0, 8192)
    tile = tl.load(x + at)
    for step in range(steps):
        tile = tile * tile + tl.load(x + step)
    tl.store(x + at, tile)


def planted() -> None:
    launch(_spilled, 1, torch.empty(1), 7, flops=0, moved=0, warps=1)


def write(path: Path, runs: list[Callable[[], None]]) -> None:
    origin = f"by `make triton-resources`, with triton {triton.__version__}"
    chosen = kernels(runs)
    print(len(chosen), "kernels are compiled")
    resource_table.write(path, origin, NAMES, compile_all(chosen))


if __name__ == "__main__":
    path, *only = sys.argv[1:] or [TABLE]
    write(Path(path), [planted] if only else WORKLOADS)
    print(Path(path).read_text(), end="")
