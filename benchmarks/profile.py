"""Where the compiled engine spends its time: `python -m benchmarks --profile WORKLOAD`."""

import time
from collections.abc import Callable

import torch

from maml_ext.ops import engine, library

from .contestants import CONTESTANTS
from .peak import BLOCK, QUICK_BLOCK, Peak
from .report import aligned, peak_line, percent
from .workloads import Workload, gflop, make_problem

HEADINGS = ("work", "rule", "ms", "of the time", "GFLOP", "GFLOP/s", "of peak")
SURROUNDINGS = "around it"
MOST_CALLS = 100


def need_engine(option: str) -> None:
    """Ends the program where there is no compiled engine."""
    if library.ABSENT:
        raise SystemExit(f"{option}: there is no compiled engine: {library.ABSENT}")


def recorded(call: Callable[[], object]) -> tuple[list[tuple[str, str, float, float]], float]:
    """The rows of one call (see `maml_ext.ops.engine.profile`), and the seconds it took while recorded."""
    times = []

    def timed() -> None:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)

    return engine.profile(timed), times[0]


def table(rows: list[tuple[str, str, float, float]], took: float, peak: float) -> str:
    """Rows of (work, rule, seconds, multiply-adds), the longest first; `took` seconds in all; `peak` GFLOP/s.

    What the rows leave of `took` is a row of its own: Python, and data reordered on the way in and out.
    """
    inside, work = sum(row[2] for row in rows), sum(row[3] for row in rows)
    ordered = sorted(rows, key=lambda row: -row[2])
    rest = (SURROUNDINGS, "", max(0.0, took - inside), 0.0)
    cells = [HEADINGS]
    for kind, rule, seconds, multiply_adds in [*ordered, rest, ("total", "", took, work)]:
        done = ("-", "-", "-")
        if multiply_adds:
            rate = 2e-9 * multiply_adds / seconds
            done = (f"{2e-9 * multiply_adds:#.3g}", f"{rate:#.3g}", percent(rate / peak))
        cells.append((kind, rule, f"{1e3 * seconds:#.3g}", percent(seconds / took), *done))
    return aligned(cells, left=2)


def run(workload: Workload, dtype: torch.dtype, quick: bool) -> int:
    """Profile meta-gradients on one thread, where the rows' seconds are the call's, and print the means."""
    need_engine("--profile")
    call = CONTESTANTS["maml_ext-compiled"].build(make_problem(workload, dtype))
    call()
    peak, block = Peak(1, dtype), QUICK_BLOCK if quick else BLOCK
    silent, recording, rows = 0.0, 0.0, {}
    calls = 0
    while calls < MOST_CALLS and (calls < 3 or silent < 4 * block):
        if calls % 10 == 0 or silent > calls * block:
            peak.measure(block)
        start = time.perf_counter()
        call()
        silent += time.perf_counter() - start
        found, took = recorded(call)
        recording += took
        for kind, rule, seconds, multiply_adds in found:
            total = rows.setdefault((kind, rule), [0.0, 0.0])
            total[0], total[1] = total[0] + seconds, total[1] + multiply_adds
        calls += 1
    peak.measure(block)
    means = [(*key, seconds / calls, work / calls) for key, (seconds, work) in rows.items()]
    print(f"{workload.name}, 1 thread, {gflop(workload):.3g} GFLOP needed; mean of {calls} meta-gradients:")
    print(f"  {1e3 * silent / calls:#.3g} ms, {1e3 * recording / calls:#.3g} ms while recorded")
    print(f"  {peak_line(peak.blocks, peak.source)}")
    print(table(means, recording / calls, max(peak.blocks)))
    return 0
