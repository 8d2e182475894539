"""The sinusoids of Finn et al. (section 5.1): a MAML training in a few seconds, and pre-training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_ext import MAML
from maml_ext.data import Sinusoid

from .training import Settings, Training

SHOTS = 10
INNER_LR = 0.01
STEPS = 10  # in testing; training takes one
SHOWN = (0, 1, 10)  # the numbers of steps after which the fit is shown


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


class SinusoidTraining(Training):
    """MAML with one inner step, the paper's setting: 10 points of one curve, then 10 others."""

    name, unit = "MAML, sinusoids", "tasks"

    def __init__(self, settings: Settings, seed: int):
        torch.manual_seed(seed)
        self.maml = MAML(network(), lr=INNER_LR, steps=1, loss="mse", reduction="mean")
        self.batches = Sinusoid(settings.sinusoid_tasks, SHOTS, seed=seed)
        self.per_iteration = settings.sinusoid_tasks
        super().__init__(self.maml, settings.sinusoid_iterations, lr=5e-3)

    def loss(self, i: int) -> tuple[Tensor, None]:
        return self.maml(*self.batches[i]), None


class SinusoidPreTraining(Training):
    """The same network fitted to the points of all the curves at once."""

    name, unit = "pre-training, sinusoids", "tasks"

    def __init__(self, settings: Settings, seed: int):
        torch.manual_seed(seed)
        self.batches = Sinusoid(settings.sinusoid_tasks, SHOTS, seed=seed)
        self.per_iteration = settings.sinusoid_tasks
        super().__init__(network(), settings.sinusoid_iterations, lr=5e-3)

    def loss(self, i: int) -> tuple[Tensor, None]:
        support_x, support_y, query_x, query_y = self.batches[i]
        x, y = torch.cat([support_x, query_x], 1), torch.cat([support_y, query_y], 1)
        return F.mse_loss(self.model(x), y), None


@torch.no_grad()
def errors(net: nn.Module, seed: int, lr: float = INNER_LR) -> list[float]:
    """Mean squared error on 600 new curves before adaptation and after each inner step."""
    support_x, support_y, query_x, query_y = Sinusoid(600, SHOTS, 50, seed=seed + 2)[0]
    tasks = MAML(net, lr=lr).adapt(support_x, support_y, steps=STEPS)
    return [tasks.after(k).loss(query_x, query_y).mean().item() for k in range(STEPS + 1)]


@torch.no_grad()
def example(net: nn.Module, seed: int, lr: float = INNER_LR) -> dict:
    """The fits to one curve: ``x``, ``true``, points ``px``, ``py``, and ``fits``: steps -> values."""
    # The first of 50 curves that is high enough to tell the fits apart.
    curves = Sinusoid(50, SHOTS, seed=seed + 3)
    amplitude, phase = curves.amplitude_phase(0)
    support_x, support_y = curves[0][:2]
    chosen = int(((amplitude[:, 0, 0] - 3.5).abs() < 0.7).nonzero()[0])
    x = torch.linspace(-5, 5, 200).reshape(1, -1, 1)
    points = support_x[chosen : chosen + 1], support_y[chosen : chosen + 1]
    tasks = MAML(net, lr=lr).adapt(*points, steps=STEPS)
    true = amplitude[chosen] * torch.sin(x - phase[chosen])
    fits = {k: tasks.after(k)(x).flatten().tolist() for k in SHOWN}
    px, py = (p.flatten().tolist() for p in points)
    return {"x": x.flatten().tolist(), "true": true.flatten().tolist(), "px": px, "py": py, "fits": fits}
