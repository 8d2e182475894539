"""The machine: what it is, how many threads a run may use, and whether something else is running on it."""

import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path

import torch

PACKAGES = ("maml_ext", "torch", "numpy", "learn2learn", "higher", "torchopt", "jax", "jaxlib")


def use_threads(threads: int) -> None:
    """Keep this process to `threads` threads by torch's setting, and to as many cores for the rest."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:threads])


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def nickname() -> str:
    """The processor and its cores, fit for a file name: `epyc-2-cores`."""
    words = re.sub(r"\([^)]*\)|@.*|\d+-core", " ", processor().lower())
    plain = re.sub(r"[^a-z0-9]+", " ", words).split()
    kept = [word for word in plain if word not in ("amd", "intel", "cpu", "processor")]
    cores = os.cpu_count() or 1
    return "-".join([*kept, str(cores), "core" if cores == 1 else "cores"])


def versions() -> dict[str, str]:
    """Versions of Python and of every package here that the benchmarks use."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def busy_cores(seconds: float = 1.0) -> float:
    """Cores that others keep busy, measured while this process sleeps; without /proc, the load average."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return os.getloadavg()[0]

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # idle and waiting for a disk

    total, idle = ticks()
    time.sleep(seconds)
    total_after, idle_after = ticks()
    busy = 1 - (idle_after - idle) / max(total_after - total, 1)
    return busy * (os.cpu_count() or 1)
