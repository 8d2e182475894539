"""Time maml_ext and its peers, interleaved: `python -m benchmarks` in the repository root."""

import argparse
import os
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import demo, isolated, layers, machine, measure, profile, report, sweep
from .contestants import BASELINE, CONTESTANTS, Contestant
from .measure import Row
from .peak import BLOCK, QUICK_BLOCK, Peak
from .workloads import TINY, WORKLOADS, Workload, gflop

RESULTS = Path(__file__).parent / "results"
BUSY_LIMIT = 0.1  # cores that others may keep busy
SPREAD_LIMIT = 0.1


def _choice(text: str, known: list[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SystemExit(f"{what}: expected names among {', '.join(known)}; got {text!r}")
    return [name for name in known if name in names]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; names become lists of names, in table order."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = list(WORKLOADS) + list(TINY)
    parser.add_argument(
        "--workloads", help=f"comma-separated, of {', '.join(known)}; default: the first seven"
    )
    parser.add_argument("--contestants", help=f"comma-separated, of {', '.join(CONTESTANTS)}; default: all")
    parser.add_argument("--rounds", type=int, help="rounds of timing at most; default 9, or 3 with --quick")
    parser.add_argument(
        "--seconds",
        type=float,
        help="seconds of timing a workload, or all of another run; default 40, or 0.3 with --quick",
    )
    parser.add_argument(
        "--threads", type=int, help="threads (and cores); default: all, or 1 with --quick or --demo"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="of the timed run; default: float32",
    )
    parser.add_argument(
        "--compile-limit", type=float, default=120, help="seconds for one torch.compile; default 120"
    )
    parser.add_argument("--try-all", action="store_true", help="try what is known to take very long, too")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory measurements")
    parser.add_argument("--allow-busy", action="store_true", help="run even if the machine is not quiet")
    parser.add_argument(
        "--quick", action="store_true", help="tiny workloads, no torch.compile, seconds: a trial run"
    )
    parser.add_argument(
        "--output",
        help="write NAME.json and NAME.png; default: benchmarks/results/DATE, MACHINE-sweep or -layers",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--sweep", action="store_true", help="instead: cost against tasks, steps, width and threads"
    )
    instead.add_argument(
        "--profile",
        metavar="WORKLOAD",
        choices=known,
        help="instead: time by kind of layer in the engine, on one thread",
    )
    instead.add_argument(
        "--layers", action="store_true", help="instead: the engine's layers against torch's own operators"
    )
    instead.add_argument(
        "--demo", action="store_true", help="instead: the demo's training on the engine and on the reference"
    )
    options = parser.parse_args(arguments)
    if options.workloads is None:
        options.workloads = ",".join(TINY if options.quick else WORKLOADS)
    options.workloads = _choice(options.workloads, known, "--workloads")
    if options.contestants is None:
        options.contestants = ",".join(CONTESTANTS)
    chosen = _choice(options.contestants, list(CONTESTANTS), "--contestants")
    # The baseline always runs: ratios need it.
    options.contestants = [name for name in CONTESTANTS if name in (BASELINE, *chosen)]
    # A trial run may share the machine, where a second thread that waits spinning can cost a hundredfold.
    cores = machine.available_cores()
    usual = {"rounds": 9, "seconds": 40.0, "threads": 1 if options.demo else cores}
    if options.quick:
        usual = {"rounds": 3, "seconds": 0.3, "threads": 1}
    for name in ("rounds", "threads", "seconds"):
        if getattr(options, name) is None:
            setattr(options, name, usual[name])
        elif getattr(options, name) <= 0:
            parser.error(f"--{name}: expected a positive number, got {getattr(options, name)}")
    if options.threads > cores:
        parser.error(f"--threads: expected at most the {cores} cores there are, got {options.threads}")
    return options


def _prepare(contestant: Contestant, workload: Workload, options: argparse.Namespace) -> Row:
    """The row before the contestant has run here: not ok if it is missing, left out, or compiles too long."""
    row = Row(contestant.name, contestant.family)
    if not contestant.installed:
        row.status, row.note = "not installed", "not installed"
    elif options.quick and contestant.limited:
        row.status, row.note = "not tried", "not tried with --quick"
    elif not options.try_all and (reason := contestant.skip(workload)):
        row.status, row.note = "not tried", reason
    elif contestant.limited:
        try:
            row.compile_s = isolated.compile_time(
                contestant, workload, options.threads, getattr(torch, options.dtype), options.compile_limit
            )
        except isolated.NoAnswer as error:
            row.status, row.note = "no answer", str(error)
        except RuntimeError as error:
            row.status, row.note = "failed", str(error)
    return row


def run_workload(
    workload: Workload, options: argparse.Namespace, peak: Peak
) -> tuple[list[Row], list[float]]:
    """All contestants on one workload: check the gradients, time in turn, measure first calls and memory.

    Returns their rows and the machine's multiply-adds, in GFLOP/s: a few blocks from each round.
    """
    dtype = getattr(torch, options.dtype)
    truth = measure.reference(workload)
    rows, entries = [], []
    for contestant in (CONTESTANTS[name] for name in options.contestants):
        row = _prepare(contestant, workload, options)
        if row.status == "ok":
            compile_s = row.compile_s
            row, call = measure.check(contestant, workload, truth, dtype)
            row.compile_s = compile_s
            if call is not None:
                entries.append((row, call))
        rows.append(row)
    earlier = len(peak.blocks)
    block = QUICK_BLOCK if options.quick else BLOCK
    measure.interleave(entries, options.rounds, options.seconds, between=lambda: peak.measure(block))
    blocks = peak.blocks[earlier:]
    for row, _ in entries:
        row.share = 1e3 * gflop(workload) / row.median_ms / max(blocks)
        if CONTESTANTS[row.contestant].is_ours:
            try:
                row.first_call_ms = isolated.first_call(
                    CONTESTANTS[row.contestant], workload, options.threads, dtype
                )
            except (isolated.NoAnswer, RuntimeError) as error:
                row.note = f"{row.note} (first call: {error})".strip()
    if not options.no_memory:
        for row, _ in entries:
            try:
                row.extra_mib = isolated.peak_memory(
                    CONTESTANTS[row.contestant], workload, options.threads, dtype
                )
            except (isolated.NoAnswer, RuntimeError) as error:
                row.note = f"{row.note} (memory: {error})".strip()
    return rows, blocks


def _meta(options: argparse.Namespace, arguments: list[str], busy: float) -> dict:
    """What a reader needs to judge the figures; nothing that names this computer or its folders."""
    command = " ".join(
        Path(word).name if options.output and options.output in word else word for word in arguments
    )
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks {command}".strip(),
        "processor": machine.processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "busy_cores_before": round(busy, 3),
        "versions": machine.versions(),
    }


def main(arguments: list[str]) -> int:
    """Run; returns 0, 1 if a gradient was wrong, or 2 if the machine was not quiet."""
    options = parse(arguments)
    busy = machine.busy_cores(0.2 if options.quick else 2.0)
    if busy > BUSY_LIMIT:
        print(f"others keep {busy:.2f} cores busy (limit {BUSY_LIMIT}): the figures would be worthless")
        if not (options.allow_busy or options.quick):
            print("wait until it is quiet, or give --allow-busy")
            return 2
    if options.profile:
        machine.use_threads(1)
        workload = {**WORKLOADS, **TINY}[options.profile]
        return profile.run(workload, getattr(torch, options.dtype), options.quick)
    machine.use_threads(options.threads)
    meta = _meta(options, arguments, busy)
    if options.demo:
        return demo.run(options.rounds, options.seconds, options.quick)
    if options.layers:
        stem = Path(options.output) if options.output else RESULTS / f"{machine.nickname()}-layers"
        return layers.run(meta, stem, options.rounds, options.seconds, options.quick)
    if options.sweep:
        stem = Path(options.output) if options.output else RESULTS / f"{machine.nickname()}-sweep"
        return sweep.run(meta, stem, options.rounds, options.seconds, options.quick)
    peak = Peak(options.threads, getattr(torch, options.dtype))
    results, peaks = {}, {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty: compilations are timed cold, then reused
        for workload in (({**WORKLOADS, **TINY})[name] for name in options.workloads):
            rows, blocks = run_workload(workload, options, peak)
            results[workload.name], peaks[workload.name] = (workload, rows), blocks
            warning = report.spread_warning(rows, SPREAD_LIMIT)
            said = report.peak_line(blocks, peak.source)
            print(report.table(workload, rows, said), warning, sep="\n", flush=True)
    stem = Path(options.output) if options.output else RESULTS / datetime.now().strftime("%Y-%m-%d-%H%M")
    meta["peak"] = {"source": peak.source, "gflop_per_s": round(max(peak.blocks), 1)}
    report.write_json(stem.with_name(stem.name + ".json"), meta, results, peaks)
    report.picture(stem.with_name(stem.name + ".png"), meta, results)
    print(f"wrote {stem.name}.json and {stem.name}.png")
    return int(any(row.status == "wrong" for _, rows in results.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
