"""The peak and shares of it, and the other runs of the benchmarks (--sweep, --profile, --layers, --demo)."""

import dataclasses
import json
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import maml_ext
from benchmarks import demo, layers, machine, measure, peak, profile, report, sweep
from benchmarks.__main__ import main
from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.measure import Row
from benchmarks.workloads import TINY, WORKLOADS, gflop, layer_macs, make_problem
from maml_ext.ops import engine, library

needs_engine = pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled engine")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler"
)
DTYPES = [torch.float32, torch.float64]
META = {
    "processor": "any",
    "threads": 1,
    "dtype": "float32",
    "versions": {"torch": "2"},
    "peak": {"source": "any"},
}


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m benchmarks --quick ...` here; returns its status and what it printed."""
    monkeypatch.setattr(machine, "use_threads", lambda threads: None)  # this process keeps its cores
    monkeypatch.setattr(machine, "busy_cores", lambda seconds: 0.0)
    monkeypatch.setattr(measure, "gc", SimpleNamespace(collect=lambda: None))  # slow where much is loaded

    def run(*arguments):
        status = main(["--quick", *map(str, arguments)])
        return status, capsys.readouterr().out

    return run


# The peak.


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loop_does_the_multiply_adds_it_counts(dtype):
    """Each of its numbers takes x -> a x + b once a turn, from b, 2 b, ...: the sum is known."""
    found = peak.Peak(1, dtype)
    assert found.source == "compiled FMA loop"
    numbers = round(found._library.flop_a_turn() / 2)
    registers = 16 if numbers & (numbers - 1) == 0 else 12
    turns, a, b = 1000, 0.999, 0.5
    ends = [b * i * a**turns + b * (1 - a**turns) / (1 - a) for i in range(registers)]
    expected = numbers / registers * sum(ends)
    assert found._library.turns(turns, a, b) == pytest.approx(expected, rel=1e-4)
    bits = torch.finfo(dtype).bits
    assert numbers * bits // registers in (128, 256, 512)  # a vector register


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiler", [pytest.param(None, marks=needs_compiler), "", "false"])
def test_rates_are_plausible(dtype, compiler, monkeypatch):
    """Of the loop, and of torch.mm where there is no compiler or it fails."""
    monkeypatch.setattr(peak, "MATRIX", 128)
    found = peak.Peak(1, dtype, compiler)
    assert found.source == ("compiled FMA loop" if compiler is None else "torch.mm, no compiler")
    found.measure(0.001, 3)
    found.measure(0.001)
    assert len(found.blocks) == 5
    assert all(0.01 < rate < 1e4 for rate in found.blocks)


def test_a_block_takes_about_the_seconds_it_is_given(monkeypatch):
    """By a clock that only the work moves, at 3 GFLOP/s and then at 1: the best block is the peak."""
    found = peak.Peak(1, torch.float32, "")
    amounts, rate = [], [3e9]

    def block(amount):
        amounts.append(amount)
        return 1e6 * amount, 1e6 * amount / rate[0]

    monkeypatch.setattr(found, "_product", block)
    found.measure(0.1)
    rate[0] = 1e9
    found.measure(0.1)
    assert found.blocks == pytest.approx([3, 3, 1, 1])
    assert amounts[-4:] == [300] * 4


def test_the_loop_runs_on_all_threads():
    class Library:
        used = set()

        def turns(self, *_):
            self.used.add(threading.get_ident())
            time.sleep(0.05)

        def flop_a_turn(self):
            return 2.0

    found = peak.Peak(3, torch.float32, "")
    found._library = Library()
    flop, took = found._loop(1)
    assert len(Library.used) == 3
    assert flop == 3 * 1000 * 2.0
    assert 0.05 <= took


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100%"), (0.25, "25%"), (0.031, "3.1%"), (0.0064, "0.64%"), (0.000995, "0.10%"),
     (0.0003, "0.030%"), (0.0000347, "0.0035%"), (3e-9, "0.00000030%"), (0.0, "0.00%")],
)  # fmt: skip
def test_percent_has_two_figures(share, text):
    assert report.percent(share) == text


def test_an_unsteady_peak_is_said():
    assert "too low" in report.peak_line([100.0, 60.0, 70.0], "loop")
    steady = report.peak_line([100.0, 97.0, 99.0], "loop")
    assert steady == "peak 100 GFLOP/s (loop, best of 3 blocks, their median 1% lower)"


def test_the_picture_has_ratios_shares_and_memory(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = [
        Row("plain", "plain loop", rounds_ms=[8.0], ratio=1.0, share=0.0001, extra_mib=3.0),
        Row("slow", "ours", rounds_ms=[4.0], ratio=2.0, share=0.0002, extra_mib=1.0),
        Row("fast", "ours", rounds_ms=[2.0], ratio=4.0, share=0.0004, extra_mib=2.0),
        Row("wrong", "theirs", status="wrong", rounds_ms=[1.0], ratio=8.0, share=0.0008, extra_mib=2.0),
    ]
    panels, bars = [], report._bars

    def spy(axis, values, *arguments, **options):
        panels.append((values, options["form"]))
        bars(axis, values, *arguments, **options)

    monkeypatch.setattr(report, "_bars", spy)
    report.picture(tmp_path / "p.png", META, {"tiny_mlp": (TINY["tiny_mlp"], rows)})
    (speed, times), (shares, percent), (memory, _) = panels
    assert speed == {"tiny_mlp": {"ours": 4.0}} and times(4.0) == "4.0x"
    assert shares["tiny_mlp"] == pytest.approx({"plain loop": 0.01, "ours": 0.04})
    assert percent(0.04) == "0.040%"
    assert memory == {"tiny_mlp": {"plain loop": 3.0, "ours": 2.0}}
    assert (tmp_path / "p.png").stat().st_size > 10000


# --sweep


def test_sweep_leaves_a_json_and_a_picture(command, tmp_path):
    pytest.importorskip("matplotlib")
    status, printed = command("--sweep", "--rounds", 1, "--output", tmp_path / "s")
    assert status == 0 and "wrote s.json and s.png" in printed
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["contestant"] == ("maml_ext-torch" if library.ABSENT else "maml_ext-compiled")
    assert {name: [p["value"] for p in points] for name, points in found["panels"].items()} == sweep.values(
        1, True
    )
    for name, points in found["panels"].items():
        assert all(point["median_ms"] > 0 and len(point["rounds_ms"]) == 1 for point in points)
        for point in points:
            work = gflop(sweep.workload(name, point["value"]))
            assert point["gflop_needed"] == pytest.approx(work, rel=1e-4)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("panel", "values", "line"),
    [
        ("tasks", [1, 2, 4], [3.0, 6.0, 12.0]),
        ("steps", [1, 4], [3.0, 12.0]),
        ("width", [16, 32], [3.0, 12.0]),
        ("threads", [1, 2, 4], [30.0, 15.0, 7.5]),
    ],
)
def test_ideal_lines(panel, values, line):
    """Through the largest problem, but through one thread; tasks 1 and threads 1 took 30 ms, the last 12."""
    points = [{"value": value, "median_ms": 30.0} for value in values]
    points[-1]["median_ms"] = 12.0
    assert sweep.ideal(panel, points) == pytest.approx(line)


def test_sweep_changes_one_number():
    for panel, value in (("tasks", 7), ("steps", 3)):
        assert getattr(sweep.workload(panel, value), panel) == value
    assert layer_macs(sweep.workload("width", 16)) == [16, 256, 16]
    assert sweep.workload("threads", 2) is sweep.BASE
    assert sweep.values(6, quick=False)["threads"] == [1, 2, 4, 6]


def test_sweep_takes_the_reference_where_the_engine_refuses(monkeypatch):
    def build(problem):
        raise ValueError("refused")

    refusing = Contestant("maml_ext-compiled", "ours", "torch", build)
    monkeypatch.setitem(CONTESTANTS, "maml_ext-compiled", refusing)
    assert sweep.engine(torch.float32) == "maml_ext-torch"


# --profile


def multiply_adds(call) -> dict[str, float]:
    """By rule, what `profile` found; every row must have taken time."""
    found = {}
    for _, rule, seconds, work in engine.profile(call):
        assert seconds > 0
        found[rule] = found.get(rule, 0) + work
    return {rule: work for rule, work in found.items() if work}


@needs_engine
@pytest.mark.parametrize("name", [*TINY, "sin5", "mlp_omni"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_profile_counts_the_multiply_adds_that_are_needed(name, threads):
    """The sum over layers and rules is what `gflop` says, which test_flop_counts has by hand."""
    workload = {**WORKLOADS, **TINY}[name]
    call = CONTESTANTS["maml_ext-compiled"].build(make_problem(workload, torch.float32))
    try:
        torch.set_num_threads(threads)
        total = sum(multiply_adds(call).values())
    finally:
        torch.set_num_threads(1)
    assert 2e-9 * total == pytest.approx(gflop(workload), rel=1e-12)


@needs_engine
def test_a_profile_names_kinds_of_work():
    call = CONTESTANTS["maml_ext-compiled"].build(make_problem(TINY["tiny_conv"], torch.float32))
    rows = {(kind, rule): work for kind, rule, _, work in engine.profile(call)}
    kinds = {"linear, convolution", "norm + activation + pooling", "loss"}
    assert {kind for kind, _ in rows} == kinds | {"transposed filters", "updates of parameters"}
    assert {rule for kind, rule in rows if kind == "linear, convolution"} == set(engine.RULES)
    assert all((work > 0) == (kind == "linear, convolution") for (kind, _), work in rows.items())


@needs_engine
def test_a_profile_of_several_calls_adds_up():
    """Networks of 6 and 2 products; inner loop, loss and both derivatives by calls of their own."""
    first, second = nn.Linear(3, 2), nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    x, y = torch.randn(5, 4, 3), torch.randn(5, 4, 2)

    def predictions():
        with torch.no_grad():
            maml_ext.network(first, maml_ext.flatten(first), x, backend="compiled")
            maml_ext.network(second, maml_ext.flatten(second), x[..., :1], backend="compiled")

    assert multiply_adds(predictions) == {"forward": 20 * (6 + 2)}

    def adapted():
        tasks = maml_ext.MAML(first, lr=0.1, steps=3, backend="compiled").adapt(x, y)
        tasks.loss(x[:, :1], y[:, :1]).sum().backward()

    # Three steps on 4 samples; the same anew with tangents; and one query sample. Nothing of the inputs.
    inner, query = 5 * 3 * 4 * 6, 5 * 6
    tangents = {"tangent forward": inner, "tangent backward": inner}
    assert multiply_adds(adapted) == {"forward": 2 * inner + query, "backward": 2 * inner + query} | tangents


@needs_engine
def test_a_profile_counts_groups_and_frozen_filters():
    """A grouped convolution needs a part of a full one; a frozen filter, no gradient and no direction."""
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 1))
    x, y = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 1)
    conv, linear = 24 * 4 // 2 * 9, 24

    def hvp():
        theta = maml_ext.flatten(net).detach()
        maml_ext.hvp(net, theta, x, y, torch.ones_like(theta), backend="compiled")

    counts = [("forward", 1, 1), ("backward", 1, 2), ("tangent forward", 1, 2), ("tangent backward", 1, 4)]
    assert multiply_adds(hvp) == {rule: 6 * (c * conv + n * linear) for rule, c, n in counts}
    net[2].weight.requires_grad_(False)
    frozen = {"forward": 1, "backward": 1, "tangent forward": 1, "tangent backward": 1}
    assert multiply_adds(hvp) == {rule: 6 * (n * linear + conv) for rule, n in frozen.items()}


@needs_engine
def test_profile_prints_a_table(command):
    status, printed = command("--profile", "tiny_conv")
    assert status == 0
    heading = next(i for i, line in enumerate(printed.splitlines()) if "GFLOP/s" in line and "rule" in line)
    lines = printed.splitlines()[heading + 1 :]
    assert lines[-2].strip().startswith(profile.SURROUNDINGS) and lines[-1].strip().startswith("total")
    cells = [line.split() for line in lines]
    times = [float(c[-5]) for c in cells]
    assert times[:-2] == sorted(times[:-2], reverse=True)
    assert sum(times[:-1]) == pytest.approx(times[-1], rel=0.02)
    assert float(cells[-1][-3]) == pytest.approx(gflop(TINY["tiny_conv"]), rel=0.01)


def test_a_table_of_a_profile():
    rows = [("linear", "forward", 0.25, 1e9), ("loss", "backward", 0.5, 0.0)]
    text = profile.table(rows, took=1.0, peak=16.0)
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["loss", "backward", "500.", "50%", "-", "-", "-"],
        ["linear", "forward", "250.", "25%", "2.00", "8.00", "50%"],
        ["around", "it", "250.", "25%", "-", "-", "-"],
        ["total", "1.00e+03", "100%", "2.00", "2.00", "12%"],
    ]


def test_an_unknown_workload_is_refused(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command("--profile", "nothing")
    assert stopped.value.code == 2
    assert "--profile: invalid choice: 'nothing' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("--profile", "tiny_mlp"), ("--layers",), ("--demo",)], ids=lambda a: a[0]
)
def test_without_the_engine_there_is_a_reason(command, arguments, monkeypatch):
    monkeypatch.setattr(library, "ABSENT", "it was not built")
    with pytest.raises(SystemExit, match=f"{arguments[0]}: there is no compiled engine: it was not built"):
        command(*arguments)


def test_only_one_run_at_a_time(command, capsys):
    with pytest.raises(SystemExit):
        command("--sweep", "--layers")
    assert "not allowed with" in capsys.readouterr().err


# --layers


@needs_engine
@pytest.mark.parametrize("which", layers.PASSES)
@pytest.mark.parametrize("case", layers.QUICK_CASES, ids=lambda case: case.name)
def test_layers_compute_the_same_every_way(case, which):
    problem = layers.Problem(case, torch.float64)
    ways = [problem.ours(which), *problem.of_torch(which)]
    truth = ways[1].by_task(case.tasks)
    assert len(ways) == (3 if "linear" in case.name else 2)
    assert truth.norm() > 0.1
    for way in ways:
        assert (way.by_task(case.tasks) - truth).norm() < 1e-12 * truth.norm(), way.name
    columns = (
        problem.cotangent[0].numel()
        if which == "forward"
        else problem.x[0].numel() + problem.theta[0].numel()
    )
    assert truth.shape == (case.tasks, columns)


def test_layers_count_multiply_adds():
    """3 tasks of 4 samples, twice 8 x 8; 2 of 3, 4 channels of 3 x 3 positions, each 3 x 9 products."""
    found = [layers.Problem(case, torch.float32).multiply_adds for case in layers.QUICK_CASES]
    assert found == [3 * 4 * 2 * 64, 2 * 3 * 4 * 9 * 27, 0]


@needs_engine
def test_all_cases_of_layers_run():
    """With fewer tasks and samples; their names tell them apart."""
    for case in layers.CASES:
        small = dataclasses.replace(case, tasks=min(case.tasks, 2), samples=2)
        assert max(layers.error(small, which) for which in layers.PASSES) < 1e-12, case.name
    assert len({case.name for case in layers.CASES}) == len(layers.CASES)


@needs_engine
def test_layers_leaves_a_table_and_a_json(command, tmp_path):
    status, printed = command("--layers", "--rounds", 2, "--seconds", 0.05, "--output", tmp_path / "l")
    assert status == 0 and "wrote l.json" in printed and "WRONG" not in printed
    assert "ours/torch" in printed and "peak " in printed
    text = (tmp_path / "l.json").read_text()
    found = json.loads(text)["layers"]
    assert [(e["layer"], e["pass"]) for e in found] == [
        (c.name, w) for c in layers.QUICK_CASES for w in layers.PASSES
    ]
    for entry in found:
        assert entry["error_float64"] < 1e-9 and 0 < entry["inside"] < 1 and entry["layer"] in printed
        times = entry["rounds_ms"]
        ratios = [a / b for a, b in zip(times["ours"], times[entry["torch_way"]])]
        assert entry["ours_over_torch"] == pytest.approx(
            sum(ratios) / 2, rel=1e-4
        )  # the median of two rounds
        assert entry["ms"][entry["torch_way"]] == min(ms for way, ms in entry["ms"].items() if way != "ours")
    assert str(tmp_path) not in text


@needs_engine
def test_a_wrong_layer_is_said(command, tmp_path, monkeypatch):
    right = layers.Problem.ours

    def wrong(self, which):
        way = right(self, which)
        return layers.Way("ours", True, lambda: [1.001 * part for part in way.call()])

    monkeypatch.setattr(layers.Problem, "ours", wrong)
    monkeypatch.setattr(layers, "QUICK_CASES", layers.QUICK_CASES[:1])
    status, printed = command("--layers", "--rounds", 1, "--seconds", 0.01, "--output", tmp_path / "l")
    assert status == 1 and "WRONG: off by 1.0e-03" in printed


# --demo


@needs_engine
def test_demo_compares_both_engines(command):
    pytest.importorskip("tqdm")
    status, printed = command("--demo", "--rounds", 2, "--seconds", 0.1)
    assert status == 0
    lines = printed.splitlines()
    rates = [float(line.split()[1]) for line in lines[:2]]
    assert [line.split(":")[0] for line in lines[:2]] == ["torch", "compiled"] and min(rates) > 0
    assert float(lines[2].split()[3].rstrip(",")) > 1


@needs_engine
def test_demo_trains_on_the_backend_it_names():
    from examples.demo.training import QUICK
    from maml_ext.data import Glyphs

    letters = Glyphs("train", size=QUICK.size, examples=QUICK.examples)
    for backend in demo.BACKENDS:
        iteration, tasks = demo._iterations(QUICK, letters, backend)
        assert tasks == QUICK.tasks
        assert bool(engine.profile(iteration)) == (backend == "compiled")
