"""The emulation of CUDA on the CPU: it runs right kernels, and shows each of the bugs planted in them."""

from functools import cache

import emulation
import pytest

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.xdist_group("emulation"),  # which builds once
    pytest.mark.skipif(bool(emulation.unavailable()), reason=emulation.unavailable() or "-"),
]

NONE, READ_BEFORE_WRITE, WRITE_AFTER_READ, REUSED_SCRATCH, BEHIND_ARRAY, BEHIND_MEMORY = range(6)
UNINITIALISED, DIVERGENT_BARRIER, SHARED_RESULT, ONLY_SHUFFLES, DEAD_LOCK, EARLY_END = range(6, 12)

PLAIN, DIFFERENT, ADDRESS, RACE, ABORTED = None, 3, 1, 66, -6  # the exit status of each kind of report

# Bug, mode, exit status, what the report names: a kernel, or what was found in which one.
CASES = [
    (NONE, PLAIN, 0, []),
    (NONE, "address", 0, []),
    (NONE, "thread", 0, []),
    (READ_BEFORE_WRITE, PLAIN, DIFFERENT, ["differs: sum_rows"]),
    (READ_BEFORE_WRITE, "thread", RACE, ["data race", "sum_rows"]),
    (WRITE_AFTER_READ, PLAIN, DIFFERENT, ["differs: transpose"]),
    (WRITE_AFTER_READ, "thread", RACE, ["data race", "transpose"]),
    (REUSED_SCRATCH, PLAIN, DIFFERENT, ["differs: row_norms"]),
    (REUSED_SCRATCH, "thread", RACE, ["data race", "row_norms"]),
    (ONLY_SHUFFLES, PLAIN, DIFFERENT, ["differs: sum_heads"]),
    (ONLY_SHUFFLES, "thread", RACE, ["data race", "sum_heads"]),
    (BEHIND_ARRAY, "address", ADDRESS, ["use-after-poison", "WRITE of size 4", "sum_rows"]),
    (BEHIND_MEMORY, "address", ADDRESS, ["use-after-poison", "WRITE of size 4", "sum_rows"]),
    (UNINITIALISED, PLAIN, DIFFERENT, ["differs: sum_rows"]),
    (DIVERGENT_BARRIER, PLAIN, ABORTED, ["divergent __syncthreads"]),
    (DIVERGENT_BARRIER, "thread", ABORTED, ["divergent __syncthreads"]),
    (DEAD_LOCK, PLAIN, ABORTED, ["dead lock", "thread 0 waits for its block at", "thread 16 waits for its warp at"]),
    (EARLY_END, PLAIN, ABORTED, ["divergent __syncthreads", "thread 0 waits for its block at", "thread 50 has ended"]),
    (SHARED_RESULT, PLAIN, DIFFERENT, ["differs: sum_rows"]),
    (SHARED_RESULT, "thread", RACE, ["data race", "sum_rows"]),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(bug, mode, shuffles): of one build a mode, which has all bugs in it."""
    folder = tmp_path_factory.mktemp("emulation")
    driver = emulation.HERE / "planted_driver.cpp"

    @cache
    def build(mode):
        return emulation.compile([driver], folder / f"planted_{mode}", sanitizer=mode, flags=["-Werror"])

    return lambda bug, mode, shuffles: emulation.run(["env", f"PLANTED={bug}", build(mode), shuffles], sanitizer=mode)


@pytest.mark.parametrize("bug, mode, status, report", CASES)
def test_planted(run, bug, mode, status, report):
    result = run(bug, mode, 1 if mode == "thread" else 10)  # races show in any order, in time
    assert result.returncode == status, result.stdout
    assert all(part in result.stdout for part in report), result.stdout
    assert status or not result.stdout


def lines_with(text):
    lines = (emulation.HERE / "planted.cu").read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if text in line]


def test_a_divergent_barrier_is_reported_with_both_lines(run):
    report = run(DIVERGENT_BARRIER, PLAIN, 0).stdout
    (planted,) = lines_with("kBug == kDivergentBarrier")
    (loop,) = lines_with("for (int half = threads / 2")
    assert f"planted.cu:{planted}" in report and f"planted.cu:{loop + 5}" in report


@pytest.mark.parametrize(
    "bug, mode, line",
    [
        (BEHIND_ARRAY, "address", "kBug == kBehindArray"),
        (BEHIND_MEMORY, "address", "kBug == kBehindMemory"),
        (SHARED_RESULT, "thread", "kBug == kSharedResult"),
    ],
)
def test_a_sanitizer_names_the_line(run, bug, mode, line):
    report = run(bug, mode, 0).stdout
    assert f"planted.cu:{lines_with(line)[0]}" in report


def test_the_portable_switch_between_threads(tmp_path):
    """The one that processors other than x86-64 use."""
    driver = emulation.HERE / "planted_driver.cpp"
    program = emulation.compile([driver], tmp_path / "portable", defines=["EMULATION_UCONTEXT"])
    result = emulation.run([program, 2])
    assert result.returncode == 0, result.stdout
