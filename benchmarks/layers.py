"""The engine's layers against torch's own operators: `python -m benchmarks --layers`."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_ext import recognise
from maml_ext.program import ABSENT, LossKind
from maml_ext.stateless import Layout

from . import measure
from .measure import FLOAT64_LIMIT, Row
from .peak import BLOCK, QUICK_BLOCK, Peak
from .profile import need_engine, recorded
from .report import aligned, peak_line, percent, rounded

# Products of each layer: forward alone; forward, gradient by inputs, gradient by weights.
PASSES = {"forward": 1, "gradient": 3}
HEADINGS = ("layer", "pass", "tasks x samples", "ms", "torch ms", "its way", "ours/torch", "inside",
            "GFLOP/s", "torch's", "of peak", "torch's", "")  # fmt: skip
PROFILES = 5


@dataclass(frozen=True)
class Case:
    """`depth` layers in a row; `tasks` tasks with weights of their own, of `samples` samples each."""

    name: str
    layer: Callable[[], nn.Module]
    sample: tuple[int, ...]
    tasks: int
    samples: int
    depth: int = 1


def _linear(inputs: int, outputs: int, tasks: int, samples: int, depth: int = 1) -> Case:
    name = f"linear {inputs}, {outputs}"
    return Case(name, lambda: nn.Linear(inputs, outputs), (inputs,), tasks, samples, depth)


def _conv(
    inputs: int,
    outputs: int,
    side: int,
    tasks: int,
    samples: int,
    depth: int = 1,
    kernel: int = 3,
    stride: int = 1,
) -> Case:
    name = f"conv {inputs}, {outputs}, {kernel}x{kernel}{f' / {stride}' if stride > 1 else ''}, {side}x{side}"
    layer = lambda: nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)  # noqa: E731
    return Case(name, layer, (inputs, side, side), tasks, samples, depth)


class Block(nn.Sequential):
    """Batch norm with batch statistics, ReLU, max-pool 2: one pass over the data in the engine."""

    def __init__(self, channels: int):
        super().__init__(nn.BatchNorm2d(channels, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2))


def _block(channels: int, side: int, tasks: int, samples: int) -> Case:
    name = f"norm, relu, pool {channels}, {side}x{side}"
    return Case(name, lambda: Block(channels), (channels, side, side), tasks, samples)


CASES = [
    _linear(1, 40, 25, 10),  # the sinusoids
    _linear(40, 40, 25, 10, depth=8),
    _linear(40, 1, 25, 10),
    _linear(784, 256, 8, 80),  # mlp_omni
    _linear(256, 128, 8, 80),
    _linear(128, 64, 8, 80),
    _linear(64, 64, 8, 80, depth=8),
    _linear(512, 512, 4, 128, depth=4),
    _linear(1024, 1024, 2, 128, depth=2),
    _conv(1, 64, 28, 1, 80),  # omni_conv
    _conv(64, 64, 14, 1, 80, depth=3),
    _conv(64, 64, 7, 1, 80, depth=3),
    _conv(64, 64, 3, 1, 80, depth=3),
    _conv(3, 32, 84, 1, 25),  # mini_conv
    _conv(32, 32, 42, 1, 25, depth=3),
    _conv(32, 32, 21, 1, 25, depth=3),
    _conv(32, 32, 10, 1, 25, depth=3),
    _conv(32, 32, 28, 1, 80, stride=2),
    _conv(64, 64, 14, 1, 80, depth=3, kernel=1),
    _block(64, 28, 1, 80),
    _block(32, 84, 1, 25),
]  # fmt: skip
QUICK_CASES = [_linear(8, 8, 3, 4, depth=2), _conv(3, 4, 6, 2, 3, stride=2), _block(4, 6, 2, 3)]


@dataclass(frozen=True)
class Way:
    """How to compute a case: `call` returns predictions, or gradients by inputs and then by weights.

    `batched`: each tensor is of all tasks, `[T, ...]`; else those of a task come before the next task's.
    """

    name: str
    batched: bool
    call: Callable[[], Sequence[Tensor]]

    def by_task(self, tasks: int) -> Tensor:
        """What the call returns as a matrix, a row a task."""
        found = self.call()
        if self.batched:
            return torch.cat([part.flatten(1) for part in found], 1)
        return torch.cat([part.flatten() for part in found]).view(tasks, -1)


class Problem:
    """A case's network and tensors in a dtype: the values are those of float32 in either."""

    def __init__(self, case: Case, dtype: torch.dtype):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = [case.layer() for _ in range(case.depth)]
            module = nn.Sequential(*self.layers)
            layout = Layout(module)
            network = recognise.network(recognise.trace(module), layout, torch.Size(case.sample))
            shared = layout.flatten().detach()
            noise = torch.randn(case.tasks, len(shared))
            self.x = torch.randn(case.tasks, case.samples, *case.sample).to(dtype)
            self.cotangent = torch.randn(case.tasks, case.samples, *network.prediction).to(dtype)
        self.theta = (shared * (1 + 0.1 * noise)).to(dtype)
        self.shapes = [p.shape for p in module.parameters()]
        self.program = [*network.program, LossKind.NONE, 0, ABSENT, 0], [*network.numbers, 0.0, 0.0], None
        self.multiply_adds = 0  # of one forward pass of all tasks
        y = torch.empty(case.samples, *case.sample)
        for layer in self.layers:
            y = layer(y)
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                self.multiply_adds += case.tasks * y.numel() * layer.weight[0].numel()

    def ours(self, which: str) -> Way:
        """The engine: one call of its operator for all tasks and layers."""
        x, theta, prediction = self.x, self.theta, list(self.cotangent.shape[2:])

        def forward() -> list[Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                return torch.ops.maml_ext.predict(*self.program, theta, x, prediction)

        def gradient() -> list[Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                return torch.ops.maml_ext.pull(*self.program, theta, x, self.cotangent, [1, 1])[::-1]

        return Way("ours", True, forward if which == "forward" else gradient)

    def of_torch(self, which: str) -> list[Way]:
        """Eager torch: a loop over tasks; for linear layers also batched products."""
        parts = self.theta.split([shape.numel() for shape in self.shapes], 1)
        stacked = [self.x, *(part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes))]
        tasks = [[leaf.clone().requires_grad_() for leaf in of_task] for of_task in zip(*stacked)]
        leaves = [leaf for of_task in tasks for leaf in of_task]
        ways = [
            self._way("loop", False, which, lambda: [self._layers(*of_task) for of_task in tasks], leaves)
        ]
        if all(isinstance(layer, nn.Linear) for layer in self.layers):
            together = [leaf.clone().requires_grad_() for leaf in stacked]
            ways.append(self._way("baddbmm", True, which, lambda: [self._products(*together)], together))
        return ways

    def _way(self, name: str, batched: bool, which: str, predict: Callable, leaves: list[Tensor]) -> Way:
        def forward() -> list[Tensor]:
            with torch.no_grad():
                return predict()

        cotangents = [self.cotangent] if batched else list(self.cotangent)
        gradient = lambda: torch.autograd.grad(predict(), leaves, cotangents)  # noqa: E731
        return Way(name, batched, forward if which == "forward" else gradient)

    def _layers(self, y: Tensor, *parameters: Tensor) -> Tensor:
        for layer, weight, bias in zip(self.layers, parameters[::2], parameters[1::2]):
            if isinstance(layer, nn.Linear):
                y = F.linear(y, weight, bias)
            elif isinstance(layer, nn.Conv2d):
                y = F.conv2d(y, weight, bias, layer.stride, layer.padding)
            else:
                y = F.max_pool2d(F.relu(F.batch_norm(y, None, None, weight, bias, training=True)), 2)
        return y

    @staticmethod
    def _products(y: Tensor, *parameters: Tensor) -> Tensor:
        for weight, bias in zip(parameters[::2], parameters[1::2]):
            y = torch.baddbmm(bias.unsqueeze(1), y, weight.transpose(1, 2))
        return y


def error(case: Case, which: str) -> float:
    """Relative L2 distance of the engine's result to torch's, in float64."""
    problem = Problem(case, torch.float64)
    truth = problem.of_torch(which)[0].by_task(case.tasks)
    return float((problem.ours(which).by_task(case.tasks) - truth).norm() / truth.norm())


def inside(call: Callable[[], object]) -> float:
    """The part of a call that the engine's own layers take, the median of some."""
    parts = []
    for _ in range(PROFILES):
        rows, took = recorded(call)
        parts.append(sum(row[2] for row in rows) / took)
    return statistics.median(parts)


def measure_case(
    case: Case, which: str, dtype: torch.dtype, rounds: int, seconds: float, between: Callable
) -> dict:
    """Time the engine and torch's ways in turn; `torch_way` of the result is the fastest of these."""
    problem = Problem(case, dtype)
    ways = [problem.ours(which), *problem.of_torch(which)]
    rows = [Row(way.name, way.name) for way in ways]
    measure.interleave([(row, way.call) for row, way in zip(rows, ways)], rounds, seconds, between)
    ours, best = rows[0], min(rows[1:], key=lambda row: row.median_ms)
    return {
        "layer": case.name, "pass": which, "tasks": case.tasks, "samples": case.samples, "depth": case.depth,
        "gflop": 2e-9 * problem.multiply_adds * PASSES[which], "torch_way": best.contestant,
        "ours_over_torch": statistics.median(a / b for a, b in zip(ours.rounds_ms, best.rounds_ms)),
        "inside": inside(ways[0].call), "error_float64": error(case, which),
        "ms": {row.contestant: row.median_ms for row in rows},
        "rounds_ms": {row.contestant: row.rounds_ms for row in rows},
    }  # fmt: skip


def table(found: list[dict], peak: float) -> str:
    """A line a case and pass; `peak` in GFLOP/s."""
    cells = [HEADINGS]
    for entry in found:
        times = entry["ms"]["ours"], entry["ms"][entry["torch_way"]]
        rates = [1e3 * entry["gflop"] / ms for ms in times]
        off = entry["error_float64"]
        wrong = f"WRONG: off by {off:.1e}" if off > FLOAT64_LIMIT else ""
        cells.append((
            entry["layer"] + (f", {entry['depth']} in a row" if entry["depth"] > 1 else ""), entry["pass"],
            f"{entry['tasks']} x {entry['samples']}", *(f"{ms:#.3g}" for ms in times), entry["torch_way"],
            f"{entry['ours_over_torch']:#.3g}", percent(entry["inside"]),
            *(f"{rate:#.3g}" if rate else "-" for rate in rates),
            *(percent(rate / peak) if rate else "-" for rate in rates), wrong,
        ))  # fmt: skip
    return aligned(cells, left=2)


def run(meta: dict, stem: Path, rounds: int, seconds: float, quick: bool) -> int:
    """Measure all cases in `seconds`; print the table, write the JSON. Returns 1 if the engine was wrong."""
    need_engine("--layers")
    cases, dtype = QUICK_CASES if quick else CASES, getattr(torch, meta["dtype"])
    peak, block = Peak(meta["threads"], dtype), QUICK_BLOCK if quick else BLOCK
    share = seconds / (len(cases) * len(PASSES))
    found = [
        measure_case(case, which, dtype, rounds, share, lambda: peak.measure(block, 1))
        for case in cases
        for which in PASSES
    ]
    print(peak_line(peak.blocks, peak.source))
    print(table(found, max(peak.blocks)))
    meta["peak"] = {"source": peak.source, "blocks_gflop_per_s": peak.blocks}
    stem.parent.mkdir(parents=True, exist_ok=True)
    result = {"meta": meta, "layers": found}
    stem.with_name(stem.name + ".json").write_text(json.dumps(rounded(result), indent=1) + "\n")
    print(f"wrote {stem.name}.json")
    return int(any(entry["error_float64"] > FLOAT64_LIMIT for entry in found))
