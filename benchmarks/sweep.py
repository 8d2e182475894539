"""The cost of our meta-gradient against tasks, steps, width and threads: `python -m benchmarks --sweep`."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch

from . import measure
from .contestants import CONTESTANTS, Gradient
from .measure import Row
from .report import rounded
from .workloads import WORKLOADS, Workload, gflop, make_problem, mlp

BASE = dataclasses.replace(WORKLOADS["sin5"], name="sweep", tasks=32)
WIDTH = 40
# What the ideal time is proportional to: this power of the value.
SLOPES = {"tasks": 1, "steps": 1, "width": 2, "threads": -1}
LABELS = {"tasks": "tasks", "steps": "inner steps", "width": "hidden width", "threads": "threads"}


def values(threads: int, quick: bool) -> dict[str, list[int]]:
    """The points of each panel."""
    powers = [2**k for k in range(10) if 2**k < threads] + [threads]
    if quick:
        return {"tasks": [1, 2, 4], "steps": [1, 2], "width": [16, 32], "threads": powers}
    return {
        "tasks": [1, 2, 4, 8, 16, 32, 64],
        "steps": [1, 2, 4, 8, 16, 32],
        "width": [16, 32, 64, 128, 256],
        "threads": powers,
    }


def workload(panel: str, value: int) -> Workload:
    """The sinusoid problem with one number changed."""
    if panel == "width":
        return dataclasses.replace(BASE, network=lambda: mlp(1, value, value, 1))
    return BASE if panel == "threads" else dataclasses.replace(BASE, **{panel: value})


def engine(dtype: torch.dtype) -> str:
    """The contestant to time: the compiled engine, or the reference where it refuses."""
    try:
        CONTESTANTS["maml_ext-compiled"].build(make_problem(BASE, dtype))()
    except ValueError:
        return "maml_ext-torch"
    return "maml_ext-compiled"


def _on_threads(call: Callable[[], Gradient], threads: int) -> Callable[[], Gradient]:
    """The call on so many threads. Changing them costs time: the untimed call before a block pays for it."""

    def changed() -> Gradient:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return call()

    return changed


def run(meta: dict, stem: Path, rounds: int, seconds: float, quick: bool) -> int:
    """Time all points of all panels in turn; print, write and draw them."""
    dtype, threads = getattr(torch, meta["dtype"]), meta["threads"]
    contestant = CONTESTANTS[engine(dtype)]
    entries, panels = [], {}
    for panel, numbers in values(threads, quick).items():
        panels[panel] = []
        for value in numbers:
            row = Row(contestant.name, contestant.family)
            call = contestant.build(make_problem(workload(panel, value), dtype))
            entries.append((row, _on_threads(call, value if panel == "threads" else threads)))
            panels[panel].append((value, row))
    measure.interleave(entries, rounds, seconds)
    torch.set_num_threads(threads)

    found = {}
    for panel, points in panels.items():
        found[panel] = [
            {"value": value, "gflop_needed": gflop(workload(panel, value))}
            | {"median_ms": row.median_ms, "spread": row.spread, "rounds_ms": row.rounds_ms}
            for value, row in points
        ]
        print(f"{LABELS[panel]}:", ", ".join(f"{p['value']}: {p['median_ms']:#.3g} ms" for p in found[panel]))
    base = {name: getattr(BASE, name) for name in ("tasks", "steps", "support", "query")} | {"width": WIDTH}
    result = {"meta": meta, "contestant": contestant.name, "base": base, "slopes": SLOPES, "panels": {}}
    result["panels"] = {panel: [rounded(point) for point in points] for panel, points in found.items()}
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".json").write_text(json.dumps(result, indent=1) + "\n")
    picture(stem.with_name(stem.name + ".png"), result)
    print(f"wrote {stem.name}.json and {stem.name}.png")
    return 0


def ideal(panel: str, points: list[dict]) -> list[float]:
    """The straight line: through one thread, or through the largest problem, where overheads weigh least."""
    anchor = points[0] if panel == "threads" else points[-1]
    return [anchor["median_ms"] * (point["value"] / anchor["value"]) ** SLOPES[panel] for point in points]


def picture(path: Path, result: dict) -> None:
    """Four panels, both axes logarithmic: the medians, and the ideal line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    from .report import COLOURS, subtitle

    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for axis, (panel, points) in zip(axes.flat, result["panels"].items()):
        numbers = [point["value"] for point in points]
        power = {1: "proportional", 2: "proportional to the square", -1: "inversely proportional"}
        label = f"ideal: {power[SLOPES[panel]]}"
        axis.plot(numbers, ideal(panel, points), color="#8a8a8a", linewidth=1, label=label)
        median = [point["median_ms"] for point in points]
        axis.plot(numbers, median, "o-", color=COLOURS[0], markersize=4, label=result["contestant"])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(numbers, [str(number) for number in numbers])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(f"ms against {LABELS[panel]}", loc="left", fontsize=11)
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    base = result["base"]
    what = f"sinusoid MLP, else {base['tasks']} tasks, {base['steps']} steps, width {base['width']}; "
    figure.suptitle(what + subtitle(result["meta"]), fontsize=9, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
