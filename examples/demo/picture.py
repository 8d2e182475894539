"""One picture of everything: example tasks, the learning curve, accuracy by inner step, and the sinusoids."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, GridSpecFromSubplotSpec
from torch import nn

from maml_ext import MAML
from maml_ext.data import Glyphs, few_shot

from .evaluation import TOGETHER, test_sets
from .training import Settings

BLUE, ORANGE, GREEN, RED, GREY, INK = "#1f6fb4", "#e07b00", "#2a9d55", "#d62839", "#8a8f98", "#22262b"
COLOURS = {"MAML": BLUE, "fine-tuning": ORANGE, "pre-trained": ORANGE}
STYLE = {
    "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "text.color": INK, "legend.frameon": False,
    "axes.grid": True, "grid.color": "#e6e8eb", "axes.axisbelow": True, "font.family": "DejaVu Sans",
}  # fmt: skip
SCRIPTS, QUERIES, OF = 4, 3, 5


@torch.no_grad()
def example_tasks(
    network: nn.Module, rate: float, letters: Glyphs, settings: Settings, seed: int
) -> list[dict]:
    """For each of the scripts with the most letters the hardest of a few tasks, and the predictions.

    The first task drawn would do as well, but most have no error to show.
    """
    subsets = test_sets(letters, settings.ways)[0]
    scripts = sorted(sorted(subsets.keys() - {TOGETHER}, key=letters.scripts.count)[-SCRIPTS:])
    maml = MAML(network, lr=rate, steps=settings.test_steps, loss="cross_entropy")
    examples = []
    for script in scripts:
        batch = few_shot(subsets[script], settings.ways, 1, QUERIES, OF, seed=seed + 4)[0]
        predicted = maml.adapt(batch.support_x, batch.support_y)(batch.query_x).argmax(-1)
        hardest = int((predicted != batch.query_y).sum(1).argmax())
        examples.append({
            "script": script,
            "support": batch.support_x[hardest, :, 0],
            "query": batch.query_x[hardest, :, 0].unflatten(0, (settings.ways, QUERIES)),
            "predicted": predicted[hardest].unflatten(0, (settings.ways, QUERIES)),
        })  # fmt: skip
    return examples


def draw(path: Path, *, examples: list[dict], history: dict, results: dict, curves: dict[str, dict]) -> None:
    """Write the picture.

    Args:
        path: of the PNG.
        examples: of ``example_tasks``.
        history: "loss" and "accuracy" of the MAML training, lists of (iteration, value).
        results: of ``evaluation.test``.
        curves: method -> ``sinusoid.example``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 10.8), dpi=160, facecolor="white")
        rows = GridSpec(
            3, 1, figure, height_ratios=(0.58, 1, 1), left=0.07, right=0.98, top=0.91, bottom=0.05, hspace=0.4
        )
        _tasks(figure, rows[0], examples)
        middle = GridSpecFromSubplotSpec(1, 2, rows[1], wspace=0.42)
        _learning(figure.add_subplot(middle[0]), history)
        _steps(figure.add_subplot(middle[1]), results)
        bottom = GridSpecFromSubplotSpec(1, 2, rows[2], wspace=0.08)
        first = None
        for cell, (method, curve) in zip(bottom, curves.items()):
            first = _sinusoid(figure.add_subplot(cell, sharey=first), method, curve, legend=first is None)
        figure.savefig(path)


def _tasks(figure: Figure, cell, examples: list[dict]) -> None:
    right = sum(int((e["predicted"] == torch.arange(len(e["support"]))[:, None]).sum()) for e in examples)
    total = sum(e["predicted"].numel() for e in examples)
    figure.text(0.02, 0.971, "Scripts never seen in training: one example of each letter, then its test",
                fontsize=14, fontweight="bold")  # fmt: skip
    caption = (
        f"The hardest of {OF} tasks of each script: {right} of {total} right (green). "
        "Where wrong (red), the letter it was taken for is inset."
    )
    figure.text(0.02, 0.95, caption, color=GREY)
    blocks = GridSpecFromSubplotSpec(1, len(examples), cell, wspace=0.1)
    for block, e in zip(blocks, examples):
        ways = len(e["support"])
        grid = GridSpecFromSubplotSpec(1 + QUERIES, ways, block, wspace=0.08, hspace=0.08)
        for way in range(ways):
            axes = figure.add_subplot(grid[0, way])
            _letter(axes, e["support"][way], GREY, 1.0)
            if way == 0:
                axes.set_title(e["script"], pad=6)
            for query in range(QUERIES):
                predicted = int(e["predicted"][way, query])
                axes = figure.add_subplot(grid[1 + query, way])
                correct = predicted == way
                _letter(axes, e["query"][way, query], GREEN if correct else RED, 2.0 if correct else 2.6)
                if not correct:
                    inset = axes.inset_axes((0.55, 0.0, 0.45, 0.45))
                    _letter(inset, e["support"][predicted], RED, 1.2)


def _letter(axes, image, colour: str, width: float) -> None:
    axes.imshow(1 - image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=width)


def _learning(axes, history: dict) -> None:
    axes.set_title("Meta-training")
    iterations, losses = zip(*history["loss"])
    axes.plot(iterations, losses, color=BLUE, alpha=0.2, linewidth=0.8)
    axes.plot(iterations, _smooth(losses), color=BLUE, linewidth=2)
    axes.set(xlabel="meta-batch", ylim=(0, max(losses[:5]) * 1.05), xlim=(0, iterations[-1] + 1))
    axes.set_ylabel("query loss", color=BLUE)
    twin = axes.twinx()
    iterations, values = zip(*history["accuracy"])
    percent = [100 * value for value in values]
    twin.plot(iterations, percent, color=GREEN, alpha=0.2, linewidth=0.8)
    twin.plot(iterations, _smooth(percent, 0.8), color=GREEN, linewidth=2)
    twin.set_ylabel("query accuracy, %", color=GREEN)
    twin.set_ylim(0, 100)
    twin.grid(False)


def _smooth(values, keep: float = 0.95) -> list[float]:
    """Running mean, exponential, without bias at the start."""
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def _steps(axes, results: dict) -> None:
    axes.set_title("Held-out scripts, all together")
    for method, by_script in results.items():
        means, halves = zip(*((100 * mean, 100 * half) for mean, half in by_script[TOGETHER]))
        label = f"{method}: {means[-1]:.1f} ± {halves[-1]:.1f}"
        axes.errorbar(range(len(means)), means, halves, color=COLOURS[method], marker="o", markersize=4,
                      linewidth=2, capsize=4, label=label)  # fmt: skip
    axes.set(xlabel="inner steps", ylabel="accuracy, %", xticks=range(len(means)), ylim=(0, 100))
    axes.legend(loc="lower right")
    # All of interest happens within a few percent near the top.
    zoom = axes.inset_axes((0.4, 0.32, 0.58, 0.5))
    for method, by_script in results.items():
        means, halves = zip(*((100 * mean, 100 * half) for mean, half in by_script[TOGETHER][1:]))
        zoom.errorbar(range(1, 1 + len(means)), means, halves, color=COLOURS[method], marker="o",
                      markersize=3, linewidth=1.5, capsize=3)  # fmt: skip
    zoom.tick_params(labelsize=9)
    zoom.set_xticks(range(1, 1 + len(means)))


def _sinusoid(axes, method: str, curve: dict, legend: bool):
    name = "MAML" if method == "MAML" else "Pre-trained on all sinusoids"
    axes.set_title(f"{name}: fit to {len(curve['px'])} points")
    axes.plot(curve["x"], curve["true"], color=INK, linewidth=1.6, label="true curve")
    styles = {0: (":", 0.55), 1: ("--", 0.85), 10: ("-", 1.0)}
    for steps, values in curve["fits"].items():
        dash, strength = styles[steps]
        label = "before" if steps == 0 else f"after {steps} step" + "s" * (steps > 1)
        axes.plot(curve["x"], values, dash, color=COLOURS[method], alpha=strength, linewidth=2.2, label=label)
    axes.plot(curve["px"], curve["py"], "^", color=RED, markersize=8, label="the points", zorder=5)
    axes.set(xlim=(-5, 5), xlabel="x")
    low, high = min(curve["true"]), max(curve["true"])
    axes.set_ylim(low - 1.2, high + 2.4)
    axes.legend(loc="upper center", ncols=3, fontsize=9, columnspacing=1.2, handlelength=1.8)
    if not legend:
        axes.tick_params(labelleft=False)
    return axes
