"""What our engines on a GPU should cost, by a model: `python -m benchmarks.gpu_model`. No GPU is asked for or used.

Nothing here is a measurement of a GPU. Counts are exact (`gpu_counts.py`, `gpu_layers.py`, `gpu_launches.py`); times
follow from them by assumptions. For the Triton engine, which runs what the CUDA kernels do not, each launch takes as
long as its arithmetic or its bytes, see `gpu_layers.py`. For the CUDA kernels the model takes, for each phase of a
block, the work between two barriers, the longest of

    waiting   the busiest warp by itself: its instructions and the latencies between them (by kind of work)
    issue     all warp instructions of the SM's blocks, at one a cycle for each of its four schedulers
    FMA       their multiply-adds, at the SM's floating-point lanes
    shared    their accesses to shared memory in products, at 32 words a cycle, bank conflicts included

and adds a barrier. Blocks that do not fit on the device at once come in waves. To that come the launches; and where
device memory would take longer for all bytes than everything else, that counts.
"""

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch

from . import gpu_counts, gpu_launches, gpu_layers
from .gpu_layers import EAGER, LAUNCH, REPLAYED, TRITON
from .report import aligned, percent, rounded
from .workloads import TINY, WORKLOADS, Workload, gflop, make_problem


@dataclass(frozen=True)
class Device:
    """What a block and an SM may have, and how fast they are."""

    name: str
    architecture: str
    multiprocessors: int
    clock: float  # GHz, boost
    lanes: int  # fp32 multiply-adds a cycle and SM
    bandwidth: float  # of device memory, GB/s
    block_memory: int  # KiB of shared memory that a block may ask for
    memory: int  # KiB of shared memory of an SM
    threads: int  # of an SM
    blocks: int


# SMs, clocks, lanes, bandwidth: NVIDIA's whitepapers of the A100, H100 and Ada GPU architectures, and the datasheets.
# (The H100's 67 TFLOP/s are at 1.98 GHz; 1.83 GHz make 62.) Limits of blocks and SMs: CUDA C++ Programming Guide,
# technical specifications by compute capability (8.0, 9.0, 8.9).
DEVICES = (
    Device("A100", "sm_80", 108, 1.41, 64, 1555, 163, 164, 2048, 32),
    Device("H100 SXM", "sm_90", 132, 1.83, 128, 3350, 227, 228, 2048, 32),
    Device("RTX 4090", "sm_89", 128, 2.52, 128, 1008, 99, 100, 1536, 24),
)
SCHEDULERS, REGISTERS = 4, 65536  # of an SM
RESERVED = 1024  # bytes of shared memory that the system keeps for each block
# What each kernel takes, by nvcc: what a device runs whose own architecture is not recorded is taken for sm_80.
RESOURCES = Path(__file__).parent.parent / "csrc" / "cuda" / "resources.txt"

BARRIER = 40  # cycles, where all warps arrive at once: an assumption


@dataclass
class Estimate:
    """Of a meta-gradient on a device: what is counted, then what the model makes of it."""

    device: str
    misfit: str = ""
    blocks: int = 0  # on an SM, by what limits them
    limit: str = ""
    waves: int = 0
    barriers: int = 0  # a task
    kernel_us: float = 0  # without launches
    launch_us: float = 0
    memory_us: float = 0  # of all bytes at the full bandwidth
    of_peak: float = 0  # the FLOP needed, of what the device could do in that time
    bound: str = ""  # what takes most
    shares: dict = field(default_factory=dict)  # of the time in the kernels: by what it is bound, and barriers

    @property
    def microseconds(self) -> float:
        return max(self.kernel_us + self.launch_us, self.memory_us)


def kernels():
    """The emulation's module, which has the kernels' host code; built where it is not there yet."""
    folder = str(Path(__file__).parent.parent / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import emulation

    if emulation.unavailable():
        raise SystemExit(f"the layout of the kernels comes from their own code: {emulation.unavailable()}")
    from emulation import operators

    return operators.load()


def program(workload: Workload) -> tuple[list[int], list[float]]:
    """The network program with its loss, as a call of the operators has it."""
    from maml_ext import compiled
    from maml_ext.stateless import Layout

    problem = make_problem(workload, torch.float32)
    layout = Layout(problem.initial)
    call = compiled.choose(
        problem.initial, layout, layout.flatten().detach(), problem.support_x, problem.support_y, workload.loss, "auto"
    )
    if not isinstance(call, compiled.Compiled):
        raise SystemExit(f"{workload.name}: {call}")
    return call.program, call.numbers


def plan(module, workload: Workload, device: Device) -> dict | str:
    """How the kernels would run it, or why they do not: their own planner's answer."""
    samples = max(workload.support, workload.query)
    return module.plan_of_meta(*program(workload), samples, gpu_counts.NUMBER_BYTES, device.block_memory * 1024)


@cache
def registers_of_meta() -> dict[str, int]:
    """Registers a thread of the kernel, by architecture."""
    rows = (line.split() for line in RESOURCES.read_text().splitlines())
    return {row[2]: int(row[3]) for row in rows if row[:2] == ["meta.cu", "meta<float>"]}


def occupancy(layout: dict, device: Device) -> tuple[int, str]:
    """How many blocks an SM holds at a time, and what there is no more of."""
    warps = layout["threads"] // gpu_counts.WARP
    recorded = registers_of_meta()
    a_thread = recorded.get(device.architecture, recorded["sm_80"])
    registers = math.ceil(a_thread * gpu_counts.WARP / 256) * 256 * warps  # they are given out by 256 a warp
    limits = {
        "shared memory": device.memory * 1024 // (layout["shared_bytes"] + RESERVED),
        "registers": REGISTERS // registers,
        "threads": device.threads // layout["threads"],
        "blocks": device.blocks,
    }
    limit = min(limits, key=limits.get)
    return limits[limit], limit


def cycles(phase: gpu_counts.Phase, device: Device, blocks: int) -> dict[str, float]:
    """What each resource would take for this phase of so many blocks on an SM."""
    return {
        "waiting": phase.chain.total(),
        "issue": blocks * phase.instructions / SCHEDULERS,
        "FMA": blocks * phase.arithmetic * gpu_counts.WARP / device.lanes,
        "shared": blocks * phase.wavefronts,
    }


def estimate(workload: Workload, device: Device, layout: dict | str) -> Estimate:
    if isinstance(layout, str):
        return Estimate(device.name, misfit=layout)
    phases = gpu_counts.meta(layout, workload.support, workload.query, workload.steps)
    most, limit = occupancy(layout, device)
    waves = math.ceil(workload.tasks / (most * device.multiprocessors))
    blocks = min(most, math.ceil(workload.tasks / device.multiprocessors))  # the first ones go to SMs of their own
    spent = Counter()
    for phase in phases:
        by = cycles(phase, device, blocks)
        bound = max(by, key=by.get)
        spent.update(phase.chain if bound == "waiting" else {bound: by[bound]})
    spent["barriers"] = BARRIER * len(phases)
    for name in spent:
        spent[name] *= waves
    # A thread adds up an element of all tasks, four loads at a time.
    spent["sum over tasks"] = math.ceil(workload.tasks / 4) * (gpu_counts.SECOND_CACHE + 4 * gpu_counts.PASS)
    kernel = 1e-3 * spent.total() / device.clock
    shares = {name: amount / spent.total() for name, amount in spent.most_common()}
    result = Estimate(
        device.name,
        blocks=most,
        limit=limit,
        waves=waves,
        barriers=len(phases),
        kernel_us=kernel,
        launch_us=LAUNCH * gpu_counts.launches(layout, workload.steps)["single pass"],
        memory_us=1e-3 * moved(phases, layout, workload) / device.bandwidth,
        shares=shares,
    )
    peak = 2e-6 * device.multiprocessors * device.lanes * device.clock  # GFLOP in a microsecond
    result.of_peak = gflop(workload) / (peak * result.microseconds)
    parts = {name: kernel * share for name, share in shares.items()}
    parts |= {"launches": result.launch_us, "device memory": result.memory_us}
    result.bound = max(parts, key=parts.get)
    return result


def moved(phases: list[gpu_counts.Phase], layout: dict, workload: Workload) -> int:
    """Bytes that kernels read and write in device memory or its caches: of all tasks, and of the sum over them."""
    a_task = sum(phase.read + phase.written for phase in phases)
    return workload.tasks * a_task + (workload.tasks + 1) * layout["parameters"] * gpu_counts.NUMBER_BYTES


def counts(workload: Workload, layout: dict) -> dict:
    """Of a meta-gradient, whatever the device."""
    phases = gpu_counts.meta(layout, workload.support, workload.query, workload.steps)

    def total(name: str) -> int:
        return sum(getattr(phase, name) for phase in phases)

    return {
        "gflop_needed": gflop(workload),
        "gflop_executed": 2e-9 * workload.tasks * total("multiply_adds"),
        "lanes_used": total("multiply_adds") / total("lanes"),
        "bytes": moved(phases, layout, workload),
        "shared_bytes_of_a_block": layout["shared_bytes"],
        "threads_of_a_block": layout["threads"],
        "samples_at_a_time": layout["chunk"],
        "shared_memory_cycles_of_a_task": total("wavefronts"),
        "without_bank_conflicts": total("smooth"),
        "launches": gpu_counts.launches(layout, workload.steps),
    }


def by_layers(workload: Workload) -> dict | str:
    """Counts and estimates of the Triton engine, or why there are none."""
    from maml_ext.ops import cuda

    if cuda.triton_absent():
        return cuda.triton_absent()
    counted = gpu_layers.count(program(workload), make_problem(workload, torch.float32))
    least = gpu_layers.least(workload)
    return {
        "launches": len(counted.launches),
        "around": counted.eager,
        "gflop_needed": gflop(workload),
        "gflop_executed": 1e-9 * counted.flops,
        "bytes": counted.moved,
        "least_bytes": least,
        "bytes_ratio": counted.moved / least,
        "estimates": [asdict(gpu_layers.estimate(workload, counted, device)) for device in DEVICES],
    }


def model(workload: Workload, module) -> dict:
    """Everything about a workload: launches of PyTorch's ways, counts and estimates of the engine that runs it."""
    layouts = {device: plan(module, workload, device) for device in DEVICES}
    fitting = [layout for layout in layouts.values() if isinstance(layout, dict)]
    return {
        "plain": gpu_launches.plain_loop(workload),
        "torch.func": gpu_launches.torch_func_way(workload),
        "around": gpu_launches.around_ours(workload) if fitting else None,
        "counts": counts(workload, fitting[0]) if fitting else None,
        "layers": None if fitting else by_layers(workload),
        "estimates": [estimate(workload, device, layout) for device, layout in layouts.items()],
    }


CACHES = f"{gpu_counts.FIRST_CACHE} and {gpu_counts.SECOND_CACHE} cycles (caches)"
LATENCIES = f"{gpu_counts.SHARED} (shared memory), {CACHES}"
NOTE = f"""A MODEL, not a measurement: no GPU has run this. Launches, FLOP, bytes, shared memory and barriers are
counted. Times follow from assumptions: latencies of {LATENCIES}, {BARRIER} cycles
a barrier, {LAUNCH} us a launch on the device ({REPLAYED} us in a CUDA graph), {TRITON:g} us of the CPU for one of
Triton. PyTorch's own ways: at least one launch an operator, and {EAGER:g} us of the CPU for each."""
HEADINGS = ("device", "blocks/SM", "limited by", "waves", "kernel us", "+ launches", "memory us", "of peak", "mostly")
LAYER_HEADINGS = ("device", "arithmetic us", "+ memory us", "in graphs us", "without us", "of peak", "mostly")


def text(workload: Workload, found: dict) -> str:
    """The block of the table for one workload."""
    head = f"{workload.name}: {workload.tasks} tasks x ({workload.support}, {workload.query}), K = {workload.steps}"
    lines = [head, f"  launches  {_launches(found)}"]
    if found["counts"]:
        lines += _work(found["counts"], found["estimates"])
    reasons = {}
    for e in found["estimates"]:
        reasons.setdefault(e.misfit, []).append(e.device)
    for reason, devices in reasons.items():
        if reason:
            lines.append(f"  {', '.join(devices)}: not by the CUDA kernels: {reason}")
    rows = [_row(e) for e in found["estimates"] if not e.misfit]
    if rows:
        lines.append(aligned([HEADINGS, *rows], left=1))
    return "\n".join([*lines, *_layers(found["layers"])])


def _layers(found: dict | str | None) -> list[str]:
    """Of the Triton engine."""
    if not isinstance(found, dict):
        return [f"  nor by Triton: {found}"] if found else []
    rows = []
    for e in found["estimates"]:
        numbers = (f"{e[name]:.0f}" for name in ("arithmetic", "memory", "replayed", "launched"))
        rows.append((e["device"], *numbers, percent(e["of_peak"]), _most(e["shares"])))
    return [
        f"  work      {found['gflop_needed']:.3g} GFLOP needed, {found['gflop_executed']:.3g} executed; "
        f"{found['bytes'] / 2**20:.0f} MiB moved, {found['bytes_ratio']:.2f} times the least",
        aligned([LAYER_HEADINGS, *rows], left=1),
    ]


def _launches(found: dict) -> str:
    cpu = 1e-3 * EAGER * found["plain"]
    theirs = f"plain loop {found['plain']} ({cpu:.3g} ms of the CPU), torch.func {found['torch.func']}"
    if isinstance(found["layers"], dict):
        n, around = found["layers"]["launches"], found["layers"]["around"]
        more = f"the plain loop's are {found['plain'] / (n + around):.0f} times as many"
        return f"ours {n} by Triton and {around} by PyTorch; {more}\n{12 * ' '}{theirs}"
    if not found["counts"]:
        return theirs
    n = found["counts"]["launches"]
    return (
        f"ours {n['single pass']}, with {found['around']} operators of PyTorch around them; in two passes inner loop "
        f"{n['inner loop']}, query loss {n['query loss']}, adjoint {n['adjoint']}\n            {theirs}"
    )


def _work(c: dict, estimates: list[Estimate]) -> list[str]:
    barriers = max(e.barriers for e in estimates)
    conflicts = c["shared_memory_cycles_of_a_task"] / c["without_bank_conflicts"] - 1
    kib = c["shared_bytes_of_a_block"] / 1024
    return [
        f"  work      {c['gflop_needed']:.3g} GFLOP needed, {c['gflop_executed']:.3g} executed on "
        f"{c['lanes_used']:.0%} of the lanes, {c['bytes'] / 2**20:.2f} MiB moved",
        f"  a block   {c['threads_of_a_block']} threads, {kib:.1f} KiB, "
        f"{c['samples_at_a_time']} samples at a time, {barriers} barriers, bank conflicts +{conflicts:.0%} cycles",
    ]


def _most(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:3])


def _row(e: Estimate) -> tuple[str, ...]:
    numbers = f"{e.kernel_us:.0f}", f"{e.launch_us:g}", f"{e.memory_us:.1f}", percent(e.of_peak)
    return e.device, str(e.blocks), e.limit, str(e.waves), *numbers, _most(e.shares)


def main(arguments: list[str]) -> int:
    known = {**WORKLOADS, **TINY}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=__doc__.split("\n")[0])
    names = {"nargs": "+", "choices": known, "default": list(WORKLOADS)}
    parser.add_argument("--workloads", **names, help="default: the first seven")
    parser.add_argument("--output", type=Path, help="write the figures to this file, as JSON")
    options = parser.parse_args(arguments)
    module, results = kernels(), {}
    print(NOTE)
    for name in options.workloads:
        results[name] = model(known[name], module)
        print(text(known[name], results[name]), flush=True)
    if options.output:
        entries = {n: r | {"estimates": [asdict(e) for e in r["estimates"]]} for n, r in results.items()}
        meta = {"note": NOTE.replace("\n", " "), "devices": [asdict(d) for d in DEVICES]}
        options.output.write_text(json.dumps(meta | {"workloads": rounded(entries)}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
