"""Where the compiled engine spends its time: `python -m benchmarks --profile WORKLOAD`."""

import time
from collections import defaultdict

import torch

from . import machine
from .contestants import CONTESTANTS
from .peak import Peak
from .workloads import Workload, make_problem

HEADINGS = ("layer", "phase", "ms", "share", "GFLOP/s", "of peak")


def recorder():
    """`maml_ext.ops.engine.profile`: calls a function, returns (layer, phase, seconds, multiply-adds) rows."""
    try:
        from maml_ext.ops import engine
    except ImportError as error:
        raise SystemExit(f"--profile: there is no compiled engine ({error})") from None
    if not hasattr(engine, "profile"):
        raise SystemExit("--profile: this maml_ext does not record profiles (maml_ext.ops.engine.profile)")
    return engine.profile


def table(rows: list[tuple[str, str, float, float]], peak: float) -> str:
    """Rows of the same layer and phase added up, the longest first; `peak` in GFLOP/s."""
    sums = defaultdict(lambda: [0.0, 0.0])
    for layer, phase, seconds, multiply_adds in rows:
        sums[layer, phase][0] += seconds
        sums[layer, phase][1] += multiply_adds
    total, work = (sum(entry[i] for entry in sums.values()) for i in (0, 1))
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    cells = [HEADINGS]
    for (layer, phase), (seconds, multiply_adds) in [*ordered, (("total", ""), (total, work))]:
        rate = 2e-9 * multiply_adds / seconds if seconds else 0.0
        share = seconds / total if total else 0.0
        done = (f"{rate:#.3g}", f"{rate / peak:.1%}") if multiply_adds else ("-", "-")
        cells.append((layer, phase, f"{1e3 * seconds:#.3g}", f"{share:.1%}", *done))
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  " + "  ".join(text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths)))
        for line in cells
    )


def run(workload: Workload, dtype: torch.dtype, quick: bool) -> int:
    """Profile one meta-gradient on one thread, where the rows' seconds are the call's, and print the table."""
    profile = recorder()
    machine.use_threads(1)
    call = CONTESTANTS["maml_ext-compiled"].build(make_problem(workload, dtype))
    try:
        call()
    except ValueError as error:
        raise SystemExit(f"--profile {workload.name}: {error}") from None
    call()
    peak, seconds = Peak(1, dtype), 0.01 if quick else 0.05
    peak.measure(seconds)
    rows = profile(call)
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    peak.measure(seconds)
    print(f"{workload.name}, 1 thread: {1e3 * took:#.3g} ms a meta-gradient when nothing is recorded;")
    print(f"peak {peak.best:.4g} GFLOP/s ({peak.source})")
    print(table(rows, peak.best))
    return 0
