"""Gradient checks and interleaved timing."""

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .contestants import BASELINE, Contestant, Gradient, plain
from .workloads import Workload, make_problem

# A right gradient is wrong only by rounding. In float32 a ReLU or max-pool may tip the other way, which costs
# up to 4e-2 in conv nets at large inner rates; that limit only catches gross errors, and float64 decides.
FLOAT64_LIMIT = 1e-9
FLOAT32_LIMIT = {"mlp": 1e-3, "conv": 1e-1}
WARM_UP_BELOW = 0.1  # seconds: calls shorter than this get an untimed call before each timed block
LEAST_ROUNDS = 3


@dataclass
class Row:
    """What is known of one contestant on one workload.

    `status`: "ok", "wrong" (its gradient), "not installed", "not tried", "refused" (by our engine), "no
    answer", "failed"; `note` says more. Errors are relative L2 against the float64 plain loop, `error` in the
    run's dtype and `error_float64` in float64. `share`: of the machine's peak. `first_call_ms`: first call of
    a new shape beyond the second.
    """

    contestant: str
    family: str
    status: str = "ok"
    note: str = ""
    first_call_s: float | None = None
    compile_s: float | None = None
    error: float | None = None
    error_float64: float | None = None
    rounds_ms: list[float] = field(default_factory=list)
    ratio: float | None = None
    share: float | None = None
    first_call_ms: float | None = None
    extra_mib: float | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.rounds_ms) if self.rounds_ms else None

    @property
    def spread(self) -> float | None:
        """The interquartile range of the rounds, as a share of the median."""
        if len(self.rounds_ms) < 2:
            return None
        low, _, high = statistics.quantiles(self.rounds_ms, n=4, method="inclusive")
        return (high - low) / self.median_ms


def flat(gradient: Gradient) -> Tensor:
    """A gradient as one float64 vector."""
    return torch.cat([torch.tensor(np.asarray(part), dtype=torch.float64).flatten() for part in gradient])


def reference(workload: Workload) -> Tensor:
    """The truth: the plain loop in float64."""
    return flat(plain(make_problem(workload, torch.float64))())


def relative_error(gradient: Gradient, truth: Tensor) -> float:
    """`|gradient - truth| / |truth|`; infinite where the gradient is not finite."""
    error = ((flat(gradient) - truth).norm() / truth.norm()).item()
    return error if np.isfinite(error) else float("inf")


def judge(row: Row, workload: Workload, dtype: torch.dtype) -> None:
    """Set the row's status to "wrong" if an error is past its limit."""
    limit = FLOAT32_LIMIT["conv" if workload.convolutional else "mlp"]
    limit = FLOAT64_LIMIT if dtype == torch.float64 else limit
    for error, most in ((row.error, limit), (row.error_float64, FLOAT64_LIMIT)):
        if error is not None and error > most:
            row.status, row.note = "wrong", f"WRONG: gradient off by {error:.1e}, limit {most:.0e}"


def brief(error: BaseException) -> str:
    """An exception as one short line without the paths of this machine."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"(?:/[\w.+-]+)+/", "", lines[0])
    return f"{type(error).__name__}: {text}"[:160]


def check(
    contestant: Contestant, workload: Workload, truth: Tensor, dtype: torch.dtype
) -> tuple[Row, Callable[[], Gradient] | None]:
    """Build a contestant, call it once, and compare its gradient with the truth, in `dtype` and in float64.

    Returns its row and, if it ran, its callable.
    """
    row = Row(contestant.name, contestant.family)
    try:
        start = time.perf_counter()
        call = contestant.build(make_problem(workload, dtype))
        gradient = call()
        row.first_call_s = time.perf_counter() - start
        row.error = relative_error(gradient, truth)
        del gradient
        if dtype == torch.float64:
            row.error_float64 = row.error
        elif contestant.float64:
            row.error_float64 = relative_error(
                contestant.build(make_problem(workload, torch.float64))(), truth
            )
    except Exception as error:  # a peer that breaks is a row of the table, not the end of the run
        refused = contestant.is_ours and isinstance(error, ValueError)
        row.status, row.note = "refused" if refused else "failed", brief(error)
        return row, None
    judge(row, workload, dtype)
    return row, call


def _time_block(call: Callable[[], object], repeats: int) -> float:
    """Seconds a call, over `repeats` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleave(
    entries: list[tuple[Row, Callable[[], object]]],
    rounds: int,
    seconds: float,
    between: Callable[[], object] = lambda: None,
) -> None:
    """Time all contestants of a workload in turn, `rounds` times or for `seconds`, whichever ends first.

    A round times each one once, repeating short calls so that each gets its share of the seconds; where calls
    are long there are fewer rounds, but at least three (if that many were asked for). Each round starts with
    another contestant, so that none always follows the same one, after a call of `between`. Fills in
    `rounds_ms`, and `ratio`: the median over rounds of plain's time over the contestant's in the same round
    (where plain takes part).
    """
    share = seconds / (rounds * len(entries))
    once = [_time_block(call, 1) for _, call in entries]
    start = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        between()
        for index in _rotated(range(len(entries)), number):
            row, call = entries[index]
            gc.collect()  # nobody pays for another's garbage
            if once[index] < WARM_UP_BELOW:
                once[index] = _time_block(call, 1)
            row.rounds_ms.append(1e3 * _time_block(call, max(1, int(share / once[index]))))
    between()
    baseline = next((row for row, _ in entries if row.contestant == BASELINE), None)
    for row, _ in entries if baseline else ():
        row.ratio = statistics.median(b / own for b, own in zip(baseline.rounds_ms, row.rounds_ms))


def _rotated(items: Iterable[int], by: int) -> list[int]:
    items = list(items)
    by %= len(items)
    return items[by:] + items[:by]
