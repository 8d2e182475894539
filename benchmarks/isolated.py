"""Measurements that need a process of their own: peak memory, first calls, and compilations to be stopped.

`python -m benchmarks.isolated '<json>'` is the child; `peak_memory`, `first_call` and `compile_time` are what
the benchmark calls.
"""

import ctypes
import gc
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from .contestants import CONTESTANTS, Contestant
from .machine import use_threads
from .measure import brief
from .workloads import TINY, WORKLOADS, Workload, make_problem

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 300  # seconds for one measurement of memory or of a first call
_STATUS = Path("/proc/self/status")


class NoAnswer(Exception):
    """The child was stopped at its time limit."""


def peak_memory(contestant: Contestant, workload: Workload, threads: int, dtype: torch.dtype) -> float:
    """MiB that one meta-gradient needs beyond what its process already held; see `_measure_memory`."""
    return _run_child("memory", contestant, workload, threads, dtype, LIMIT_S)


def first_call(contestant: Contestant, workload: Workload, threads: int, dtype: torch.dtype) -> float:
    """Milliseconds that the first call of a new shape takes beyond the second; see `_measure_first_call`."""
    return _run_child("first call", contestant, workload, threads, dtype, LIMIT_S)


def compile_time(
    contestant: Contestant, workload: Workload, threads: int, dtype: torch.dtype, limit_s: float
) -> float:
    """Seconds of the first call in a fresh process; raises `NoAnswer` after `limit_s`.

    What it compiles stays in torch's on-disk cache (`TORCHINDUCTOR_CACHE_DIR`), so that the caller's own
    first call is short.
    """
    return _run_child("compile", contestant, workload, threads, dtype, limit_s)


def _run_child(
    task: str, contestant: Contestant, workload: Workload, threads: int, dtype: torch.dtype, limit_s: float
) -> float:
    """Run a task in a child; raises `NoAnswer` at the limit and RuntimeError with the child's message."""
    order = {
        "task": task,
        "contestant": contestant.name,
        "workload": workload.name,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.isolated", json.dumps(order)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # so that the compilers it starts are stopped with it
    )
    try:
        output, _ = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"no answer in {limit_s:.0f} s") from None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    lines = output.splitlines()
    if child.returncode or not lines:
        raise RuntimeError(f"the process ended with exit status {child.returncode} and no result")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["result"]


def _resident_mib(field: str) -> float:
    """`VmRSS` (held now) or `VmHWM` (the peak) in MiB; without /proc, the peak since the start for both."""
    if _STATUS.exists():
        return int(re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE).group(1)) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024  # bytes there, KiB elsewhere


def _release_free_memory() -> None:
    """Give freed memory back to the system, so that reusing it counts."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _wake(contestant: Contestant, workload: Workload, dtype: torch.dtype) -> None:
    """Solve a tiny problem of the same kind twice: libraries are loaded, threads are there."""
    tiny = contestant.build(make_problem(TINY["tiny_conv" if workload.convolutional else "tiny_mlp"], dtype))
    for _ in range(2):
        tiny()


def _measure_memory(contestant: Contestant, workload: Workload, dtype: torch.dtype) -> float:
    """Peak resident memory during one meta-gradient less that before it, in MiB.

    Before it: the libraries are awake (the contestant has solved a tiny problem of the same kind twice),
    network and data exist, freed memory is given back. On Linux the peak is reset by writing 5 to
    /proc/self/clear_refs; elsewhere it is the peak since the process began (ru_maxrss), an underestimate for
    small workloads. It is the contestant's first call, so buffers that it keeps count; where the first call
    compiles, it is the second.
    """
    _wake(contestant, workload, dtype)
    call = contestant.build(make_problem(workload, dtype))
    if contestant.compiles:
        call()
    _release_free_memory()
    before = _resident_mib("VmRSS")
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")
    call()
    return _resident_mib("VmHWM") - before


def _measure_compilation(contestant: Contestant, workload: Workload, dtype: torch.dtype) -> float:
    """Seconds to build the contestant and call it once."""
    problem = make_problem(workload, dtype)
    start = time.perf_counter()
    contestant.build(problem)()
    return time.perf_counter() - start


def _measure_first_call(contestant: Contestant, workload: Workload, dtype: torch.dtype) -> float:
    """Milliseconds of the first call less those of the second, in a process where the libraries are awake."""
    _wake(contestant, workload, dtype)
    call, times = contestant.build(make_problem(workload, dtype)), []
    for _ in range(2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * (times[0] - times[1])


def _main(order: dict) -> None:
    use_threads(order["threads"])
    task = {
        "memory": _measure_memory,
        "first call": _measure_first_call,
        "compile": _measure_compilation,
    }[order["task"]]
    workload = {**WORKLOADS, **TINY}[order["workload"]]
    try:
        answer = {"result": task(CONTESTANTS[order["contestant"]], workload, getattr(torch, order["dtype"]))}
    except Exception as error:  # the parent reports it
        answer = {"error": brief(error)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
