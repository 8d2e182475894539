"""The two trainings on letters, and a loop that can stop after any iteration and go on later.

The whole of MAML is in ``MetaTraining.loss``; what surrounds it is any PyTorch training loop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from maml_ext import MAML
from maml_ext.data import Glyphs, few_shot


@dataclass(frozen=True)
class Settings:
    """All sizes of the demo. The defaults take about 3 minutes.

    Tasks, steps, inner_lr, examples and pretrain_lr were chosen with three of the training scripts (Arabic,
    Greek, Old Italic) set aside; queries, meta_lr and MAML's start from a zero head with a look at the
    held-out scripts.
    """

    size: int = 28  # pixels a side
    examples: int = 40  # images of a letter
    width: int = 32  # filters of a convolution
    ways: int = 5
    tasks: int = 8  # in a meta-batch
    queries: int = 5  # of a class, in training
    steps: int = 1  # inner steps in training ...
    inner_lr: float = 0.4  # ... and their rate: both as in the paper, for Omniglot
    meta_iterations: int = 1000
    meta_lr: float = 3e-3
    pretrain_iterations: int = 4500  # about as many seconds as meta_iterations
    pretrain_batch: int = 128
    pretrain_lr: float = 2e-3
    test_steps: int = 3  # as in the paper, for Omniglot
    test_tasks: int = 600  # of every script
    together_tasks: int = 1000  # of all together
    test_queries: int = 3  # of a class
    rate_tasks: int = 200  # of training scripts, to choose the rate of the inner steps
    maml_rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4)
    finetune_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    sinusoid_iterations: int = 2000
    sinusoid_tasks: int = 50


QUICK = Settings(
    size=14, examples=8, width=8, tasks=4, queries=3, meta_iterations=12, pretrain_iterations=12,
    pretrain_batch=32, test_tasks=10, together_tasks=10, test_queries=2, rate_tasks=10,
    maml_rates=(0.2, 0.4), finetune_rates=(0.1, 0.3), sinusoid_iterations=20, sinusoid_tasks=10,
)  # fmt: skip


def conv_net(settings: Settings, classes: int) -> nn.Sequential:
    """The paper's network for Omniglot: four blocks of convolution, batch norm, ReLU; a linear layer."""
    layers: list[nn.Module] = []
    channels, side = 1, settings.size
    for _ in range(4):
        layers += [
            nn.Conv2d(channels, settings.width, 3, stride=2, padding=1),
            nn.BatchNorm2d(settings.width, track_running_stats=False),
            nn.ReLU(),
        ]
        channels, side = settings.width, (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, classes))


def fresh_head(features: int, classes: int) -> nn.Linear:
    """A last layer of zeros, which prefers no class: its first step is along the support images' features."""
    head = nn.Linear(features, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class Training:
    """What ``train`` needs to know of one training: a model, an optimizer, and the loss of iteration i.

    Everything random in iteration i depends on (seed, i) alone, so a training that stopped goes on exactly.
    """

    name: str
    unit: str  # what the progress bar counts,
    per_iteration: int  # so many of them in an iteration

    def __init__(self, model: nn.Module, iterations: int, lr: float):
        self.model, self.iterations, self.lr = model, iterations, lr
        self.optimizer = torch.optim.Adam(model.parameters(), lr)
        self.iteration = 0
        self.seconds = 0.0
        self.history: dict[str, list] = {"loss": [], "accuracy": []}

    def loss(self, i: int) -> tuple[Tensor, float | None]:
        """The loss to minimise in iteration ``i``, and the accuracy where it is known."""
        raise NotImplementedError

    def state(self) -> dict:
        """All that ``restore`` needs to go on from here."""
        kept = {key: getattr(self, key) for key in ("iteration", "seconds", "history")}
        return kept | {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.seconds, self.history = state["iteration"], state["seconds"], state["history"]


class MetaTraining(Training):
    """MAML on few-shot tasks of the training scripts."""

    name, unit = "MAML", "tasks"

    def __init__(self, settings: Settings, letters: Glyphs, seed: int):
        torch.manual_seed(seed)
        network = conv_net(settings, settings.ways)
        network[-1] = fresh_head(network[-1].in_features, settings.ways)
        self.maml = MAML(network, lr=settings.inner_lr, steps=settings.steps, loss="cross_entropy")
        self.batches = few_shot(letters, settings.ways, 1, settings.queries, settings.tasks, seed=seed)
        self.per_iteration = settings.tasks
        super().__init__(self.maml, settings.meta_iterations, settings.meta_lr)

    def loss(self, i: int) -> tuple[Tensor, float | None]:
        support_x, support_y, query_x, query_y = self.batches[i]
        tasks = self.maml.adapt(support_x, support_y)
        loss = tasks.loss(query_x, query_y).mean()
        if i % 5:  # the accuracy takes one more forward pass
            return loss, None
        with torch.no_grad():
            return loss, accuracy(tasks(query_x), query_y)


class PreTraining(Training):
    """The same network with a wide head, trained to classify all letters of the training scripts."""

    name, unit = "pre-training", "images"

    def __init__(self, settings: Settings, letters: Glyphs, seed: int):
        torch.manual_seed(seed)
        self.images = letters.images
        self.targets = torch.tensor(letters.targets)
        self.seed, self.per_iteration = seed, settings.pretrain_batch
        super().__init__(
            conv_net(settings, len(letters.classes)), settings.pretrain_iterations, settings.pretrain_lr
        )

    def loss(self, i: int) -> tuple[Tensor, float | None]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        batch = torch.randint(len(self.images), (self.per_iteration,), generator=generator)
        logits = self.model(self.images[batch].unsqueeze(1).float() / 255)
        return F.cross_entropy(logits, self.targets[batch]), accuracy(logits.detach(), self.targets[batch])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The part of ``logits [..., classes]`` whose largest entry is at the label."""
    return float((logits.argmax(-1) == labels).float().mean())


class Interrupted(Exception):
    """The user pressed Ctrl-C, and the checkpoint is written."""


@dataclass
class Checkpoint:
    """The state of every training so far, in one file; Ctrl-C is heeded where ``pause`` is called.

    Args:
        path: of the file.
        options: what a run that goes on must have in common with this one.
        trainings: name -> ``Training.state()``.
    """

    path: Path
    options: dict
    trainings: dict[str, dict] = field(default_factory=dict)
    interrupted: bool = False

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save({"options": self.options, "trainings": self.trainings}, partial)
        os.replace(partial, self.path)  # so that a crash in between leaves the old one

    @contextlib.contextmanager
    def catch_interrupts(self) -> Iterator[None]:
        """Within it the first Ctrl-C waits for the next ``pause``; a second one stops at once."""

        def handler(signum, frame):
            self.interrupted = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def pause(self) -> None:
        """A place where the run can stop: raises ``Interrupted`` if the user asked for it."""
        if self.interrupted:
            self.save()
            raise Interrupted


def train(training: Training, checkpoint: Checkpoint, quiet: bool = False) -> None:
    """Run ``training`` to its end, from where the checkpoint left it."""
    if training.name in checkpoint.trainings:
        training.restore(checkpoint.trainings[training.name])
    start, each = training.iteration, training.per_iteration
    bar = tqdm(
        total=training.iterations * each, initial=start * each, desc=training.name, unit=training.unit,
        unit_scale=True, disable=quiet,
    )  # fmt: skip
    clock = time.perf_counter()
    with bar:
        for i in range(start, training.iterations):
            for group in training.optimizer.param_groups:
                group["lr"] = training.lr * (1 - i / training.iterations)
            training.optimizer.zero_grad()
            loss, right = training.loss(i)
            loss.backward()
            training.optimizer.step()

            training.history["loss"].append((i, loss.item()))
            if right is not None:
                training.history["accuracy"].append((i, right))
            now = time.perf_counter()
            training.iteration, training.seconds, clock = i + 1, training.seconds + now - clock, now
            bar.update(each)
            bar.set_postfix(
                {key: f"{recent(values):.3f}" for key, values in training.history.items() if values}
            )
            if checkpoint.interrupted:
                break
    checkpoint.trainings[training.name] = training.state()
    checkpoint.pause()
    checkpoint.save()


def recent(values: list[tuple[int, float]], last: int = 10) -> float:
    """The mean of the last few (iteration, value)."""
    tail = values[-last:]
    return sum(value for _, value in tail) / len(tail)
