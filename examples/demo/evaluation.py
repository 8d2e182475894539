"""Testing on letters: accuracy after every inner step, with intervals, on scripts that training never saw."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from maml_ext import MAML
from maml_ext.data import Glyphs, few_shot
from maml_ext.data.episodes import MetaBatches

from .training import Checkpoint, Settings, fresh_head

TOGETHER = "together"
AT_ONCE = 50  # tasks: enough to keep the processor busy, few enough for its cache


def interval(values: Tensor) -> tuple[float, float]:
    """Mean of ``values [tasks]`` and the half width of its 95% interval, 1.96 standard errors."""
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"values: expected [tasks] with at least 2 tasks, got {list(values.shape)}")
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))


def fine_tuned(network: nn.Sequential, ways: int) -> nn.Sequential:
    """A pre-trained network with a fresh head for ``ways`` classes, as MAML's had before its training."""
    *body, head = copy.deepcopy(network)
    return nn.Sequential(*body, fresh_head(head.in_features, ways))


@torch.no_grad()
def accuracy_by_step(maml: MAML, batches: MetaBatches, steps: int, checkpoint: Checkpoint) -> Tensor:
    """Accuracy on the query sets ``[tasks, steps + 1]``: before adaptation and after each inner step."""
    rows = []
    for support_x, support_y, query_x, query_y in batches:
        checkpoint.pause()
        tasks = maml.adapt(support_x, support_y, steps=steps)
        right = [tasks.after(k)(query_x).argmax(-1) == query_y for k in range(steps + 1)]
        rows.append(torch.stack([r.float().mean(1) for r in right], dim=1))
    return torch.cat(rows)


def test_sets(letters: Glyphs, ways: int) -> tuple[dict[str, Subset | Glyphs], list[str]]:
    """Each script with enough letters for a task, and all together; and the scripts with too few."""
    count = {script: letters.scripts.count(script) for script in sorted(set(letters.scripts))}
    sets: dict[str, Subset | Glyphs] = {}
    for script, number in count.items():
        if number >= ways:
            own = [i for i, target in enumerate(letters.targets) if letters.scripts[target] == script]
            sets[script] = Subset(letters, own)
    sets[TOGETHER] = letters
    return sets, [script for script, number in count.items() if number < ways]


def tasks_of(letters, settings: Settings, number: int, seed: int) -> MetaBatches:
    at_once = math.gcd(number, AT_ONCE)
    return few_shot(
        letters, settings.ways, 1, settings.test_queries, at_once, seed=seed, length=number // at_once
    )


def best_rate(
    network: nn.Module,
    rates: Sequence[float],
    letters: Glyphs,
    settings: Settings,
    seed: int,
    checkpoint: Checkpoint,
) -> tuple[float, dict[float, float]]:
    """The inner rate with the highest accuracy on training scripts after the last step, and all of them."""
    batches = tasks_of(letters, settings, settings.rate_tasks, seed + 1)
    found = {}
    for rate in rates:
        maml = MAML(network, lr=rate, loss="cross_entropy")
        found[rate] = accuracy_by_step(maml, batches, settings.test_steps, checkpoint)[:, -1].mean().item()
    return max(found, key=found.get), found


def test(
    networks: dict[str, tuple[nn.Module, float]],
    letters: Glyphs,
    settings: Settings,
    seed: int,
    checkpoint: Checkpoint,
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """method -> script -> for each number of inner steps, accuracy and half width of its interval.

    Args:
        networks: method -> (network, rate of its inner steps). All methods get the same tasks.
        letters: of the held-out scripts.
    """
    sets, _ = test_sets(letters, settings.ways)
    results = {method: {} for method in networks}
    with tqdm(total=len(sets) * len(networks), desc="testing", unit="set") as bar:
        for script, subset in sets.items():
            number = settings.together_tasks if script == TOGETHER else settings.test_tasks
            batches = tasks_of(subset, settings, number, seed + 2)
            for method, (network, rate) in networks.items():
                maml = MAML(network, lr=rate, loss="cross_entropy")
                by_step = accuracy_by_step(maml, batches, settings.test_steps, checkpoint)
                results[method][script] = [interval(column) for column in by_step.unbind(1)]
                bar.update()
    return results


def table(results: dict[str, dict[str, list[tuple[float, float]]]], letters: Glyphs) -> str:
    """``test``'s results for people to read."""
    steps = len(next(iter(results.values()))[TOGETHER])
    heads = ["before", *(f"step {k}" for k in range(1, steps))]
    lines = [f"{'script':<12}{'letters':>7}  {'method':<12}" + "".join(f"{head:>13}" for head in heads)]
    for script in next(iter(results.values())):
        number = len(letters.classes) if script == TOGETHER else letters.scripts.count(script)
        start = f"{script:<12}{number:>7}  "
        for method, by_script in results.items():
            cells = (f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in by_script[script])
            lines.append(f"{start:<21}{method:<12}" + "".join(f"{cell:>13}" for cell in cells))
            start = ""
    return "\n".join(lines)
