"""What a run leaves: the table, the JSON file and the picture."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .contestants import BASELINE
from .measure import Row
from .workloads import Workload, gflop

HEADINGS = ("contestant", "ms", "vs plain", "GFLOP/s", "of peak", "spread", "first s", "first call ms",
            "compile s", "error", "error f64", "extra MiB")  # fmt: skip
# One colour a family, the same in every picture, in the order of the bars; a new family takes the next
# colour.
COLOURS = ("#e39a86", "#c4331f", "#1f6fb4", "#7fb3d9", "#4d8f3c", "#9c7bb8", "#c9a227", "#8a8a8a", "#3a9d97")
LEAST_MIB = 0.1  # less than this is not told apart from nothing


def _short(value: float) -> str:
    """Two figures, never an exponent."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def percent(share: float) -> str:
    """Two figures of a share, never an exponent."""
    value = 100 * share
    if 0 < value < 0.0995:
        return f"{value:.{1 - math.floor(math.log10(value))}f}%"
    return f"{_short(value)}%"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def aligned(cells: Sequence[Sequence[str]], left: int) -> str:
    """Lines of cells as text: the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for line in cells:
        padded = [t.ljust(w) if i < left else t.rjust(w) for i, (t, w) in enumerate(zip(line, widths))]
        lines.append(("  " + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def _cells(row: Row, work: float) -> list[str]:
    rate = None if row.median_ms is None else 1e3 * work / row.median_ms
    return [
        row.contestant,
        _cell(row.median_ms, "#.3g"),
        "-" if row.ratio is None else f"{row.ratio:#.3g}x",
        _cell(rate, "#.3g"),
        "-" if row.share is None else percent(row.share),
        _cell(row.spread, ".0%"),
        _cell(row.first_call_s, ".2f"),
        _cell(row.first_call_ms, ".1f"),
        _cell(row.compile_s, ".1f"),
        _cell(row.error, ".1e"),
        _cell(row.error_float64, ".1e"),
        _cell(row.extra_mib, ".1f"),
    ]


def peak_line(blocks: list[float], source: str) -> str:
    """What the machine can do, in words, from GFLOP/s of the blocks beside the rows."""
    best, lower = max(blocks), 1 - statistics.median(blocks) / max(blocks)
    text = f"peak {best:.4g} GFLOP/s ({source}, best of {len(blocks)} blocks, their median {lower:.0%} lower)"
    return text + (": shares of it are too low, the machine was not quiet" if lower > 0.1 else "")


def table(workload: Workload, rows: list[Row], peak: str = "") -> str:
    """The block of the table for one workload; a contestant without a time has its reason instead.

    `peak`: a `peak_line`.
    """
    work = gflop(workload)
    samples = f"({workload.support}, {workload.query})"
    head = f"{workload.name}: {workload.tasks} tasks x {samples}, K = {workload.steps}"
    lines = [f"{head}, {work:.3g} GFLOP needed ({gflop(workload, needed=False):.3g} by the plain convention)"]
    if peak:
        lines.append(f"  {peak}")
    cells = [_cells(row, work) for row in rows]
    heading, *texts = aligned([HEADINGS, *cells], left=1).split("\n")
    lines.append(heading)
    longest = max(len(text) for text in (HEADINGS[0], *(row.contestant for row in rows)))
    for row, text in zip(rows, texts):
        if row.median_ms is None:
            lines.append(f"  {row.contestant.ljust(longest)}  {row.note}")
        else:
            lines.append(text + (f"  {row.note}" if row.note else ""))
    return "\n".join(lines)


def write_json(
    path: Path, meta: dict, results: dict[str, tuple[Workload, list[Row]]], peaks: dict[str, list[float]]
) -> None:
    """Everything measured, with each round's time, so that other figures can be computed later.

    `peaks`: GFLOP/s of the blocks of multiply-adds beside each workload.
    """
    workloads = {}
    for name, (workload, rows) in results.items():
        contestants = {}
        for row in rows:
            entry = asdict(row) | {"median_ms": row.median_ms, "spread": row.spread}
            del entry["contestant"]
            contestants[row.contestant] = rounded(entry)
        workloads[name] = {
            "gflop_needed": gflop(workload),
            "gflop_convention": gflop(workload, needed=False),
            "peak_gflop_per_s": round(max(peaks[name]), 1),
            "peak_blocks_gflop_per_s": [round(block, 1) for block in peaks[name]],
            "contestants": contestants,
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "workloads": workloads}, indent=1) + "\n")


def rounded(value):
    """Six digits of every number, which are more than a timing has; an infinite error is not JSON."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) != float("inf") else str(value)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def _fastest(rows: list[Row]) -> dict[str, Row]:
    """The fastest right contestant of each family."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.status == "ok" and row.ratio is not None:
            if row.family not in best or row.ratio > best[row.family].ratio:
                best[row.family] = row
    return best


def picture(path: Path, meta: dict, results: dict[str, tuple[Workload, list[Row]]]) -> None:
    """Bars for each workload: speed as a ratio to the plain loop, share of peak, memory; axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    best = {name: _fastest(rows) for name, (_, rows) in results.items()}
    present = dict.fromkeys(row.family for _, rows in results.values() for row in rows)
    families = [family for family in present if any(family in rows for rows in best.values())]
    baseline = next(row.family for _, rows in results.values() for row in rows if row.contestant == BASELINE)
    challengers = [family for family in families if family != baseline]
    colour = dict(zip(challengers, COLOURS)) | {baseline: "#222222"}
    with_memory = any(row.extra_mib is not None for rows in best.values() for row in rows.values())

    panels = 3 if with_memory else 2
    width = max(9.0, 1.75 * len(results) + 1.5)
    figure, axes = plt.subplots(panels, 1, figsize=(width, 4.1 * panels), squeeze=False, layout="constrained")
    speed = {name: {f: row.ratio for f, row in rows.items() if f != baseline} for name, rows in best.items()}
    _bars(axes[0, 0], speed, challengers, colour, bottom=1.0, form=lambda value: f"{_short(value)}x")
    axes[0, 0].axhline(1, color="#222222", linewidth=1)
    axes[0, 0].set_ylabel("speed, plain create_graph loop = 1")
    axes[0, 0].set_title(
        "Meta-gradients a second, as a multiple of the plain loop in the same rounds", loc="left", fontsize=11
    )
    shares = {
        name: {f: 100 * row.share for f, row in rows.items() if row.share} for name, rows in best.items()
    }
    least = min((share for group in shares.values() for share in group.values()), default=1.0)
    bottom = 10.0 ** math.floor(math.log10(least))
    _bars(axes[1, 0], shares, families, colour, bottom=bottom, form=lambda share: percent(share / 100))
    axes[1, 0].set_ylabel("% of peak")
    axes[1, 0].set_title(
        f"Operations needed, as a share of the machine's multiply-add peak ({meta['peak']['source']})",
        loc="left",
        fontsize=11,
    )
    if with_memory:
        memory = {
            name: {f: max(row.extra_mib, LEAST_MIB) for f, row in rows.items() if row.extra_mib is not None}
            for name, rows in best.items()
        }
        _bars(
            axes[2, 0],
            memory,
            families,
            colour,
            bottom=LEAST_MIB,
            form=lambda mib: _short(mib) if mib > LEAST_MIB else "<0.1",
        )
        axes[2, 0].set_ylabel("MiB")
        axes[2, 0].set_title(
            "Extra peak memory of one meta-gradient (a process each; less is better)", loc="left", fontsize=11
        )
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour[family], label=family) for family in families]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    figure.suptitle(subtitle(meta), fontsize=9, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def subtitle(meta: dict) -> str:
    """The machine in a line, for a picture."""
    threads = f"{meta['threads']} thread" + "s" * (meta["threads"] != 1)
    return f"{meta['processor']}, {threads}, {meta['dtype']}, torch {meta['versions']['torch']}"


def _bars(
    axis, values: dict[str, dict[str, float]], families: list[str], colour: dict[str, str], bottom, form
) -> None:
    """One group of bars a workload, from `bottom`; a family without a value leaves its place out."""
    slot = 0.84 / max(len(families), 1)
    for place, group in enumerate(values.values()):
        shown = [family for family in families if family in group]
        for index, family in enumerate(shown):
            x = place + (index - (len(shown) - 1) / 2) * slot
            axis.bar(x, group[family] - bottom, slot * 0.92, bottom=bottom, color=colour[family])
            up = group[family] >= bottom
            place_of_label = {"xytext": (0, 2 if up else -2), "va": "bottom" if up else "top", "ha": "center"}
            axis.annotate(
                form(group[family]),
                (x, group[family]),
                textcoords="offset points",
                fontsize=7,
                rotation=90,
                **place_of_label,
            )
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: "")
    heights = [value for group in values.values() for value in group.values()] + [bottom]
    # Room for the labels beyond the longest bars.
    low, high = min(heights), max(*heights, 10 * bottom)
    margin = (high / low) ** 0.15
    axis.set_ylim(low / margin if low < bottom else bottom, high * margin)
    axis.set_xticks(range(len(values)), values)
    axis.tick_params(axis="x", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def spread_warning(rows: list[Row], limit: float) -> str:
    """A line of warning if the timings of this workload wander, else nothing."""
    spreads = [row.spread for row in rows if row.spread is not None]
    if spreads and (typical := statistics.median(spreads)) > limit:
        return f"  warning: the median contestant's rounds spread by {typical:.0%}: the machine was not quiet"
    return ""
