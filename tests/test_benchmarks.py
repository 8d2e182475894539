"""The benchmarks count right, find wrong gradients, and leave their files."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import isolated, measure, report
from benchmarks.contestants import CONTESTANTS, Contestant, plain
from benchmarks.measure import Row
from benchmarks.workloads import TINY, WORKLOADS, gflop
from maml_ext.ops import library

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("name", "convention", "needed"),
    [
        ("sin1", 0.010, 0.010),
        ("sin5", 0.040, 0.040),
        ("sin10", 0.078, 0.077),
        ("long100", 0.759, 0.749),
        ("mlp_omni", 7.09, 4.52),
        ("omni_conv", 35.3, 34.6),
        ("mini_conv", 49.2, 44.3),
    ],
)
def test_flop_counts(name, convention, needed):
    """By hand, from the layer shapes; mlp_omni and mini_conv tell the two counts apart."""
    assert gflop(WORKLOADS[name], needed=False) == pytest.approx(convention, rel=0.01)
    assert gflop(WORKLOADS[name]) == pytest.approx(needed, rel=0.01)


@pytest.mark.parametrize("workload", TINY.values(), ids=TINY)
@pytest.mark.parametrize("contestant", [c for c in CONTESTANTS.values() if c.float64], ids=lambda c: c.name)
def test_contestants_agree_with_the_float64_loop(contestant, workload):
    """In float64, to rounding: 1e-9 is far above it and far below any wrong formula."""
    if not contestant.installed:
        pytest.skip("not installed")
    if reason := contestant.skip(workload):
        pytest.skip(reason)
    if contestant.name == "maml_ext-compiled" and library.ABSENT:
        pytest.skip("needs the compiled engine")
    row, _ = measure.check(contestant, workload, measure.reference(workload), torch.float64)
    assert row.status == "ok", row.note
    assert row.error < 1e-9


@pytest.mark.parametrize("workload", TINY.values(), ids=TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_first_order_gradient_is_found_wrong(workload, dtype):
    planted = Contestant("planted", "planted", "torch", partial(plain, create_graph=False))
    row, _ = measure.check(planted, workload, measure.reference(workload), dtype)
    assert row.status == "wrong"
    row.rounds_ms, row.ratio = [1.0], 2.0
    assert "WRONG" in report.table(workload, [row])


def test_float32_alone_is_judged_too():
    """A contestant that is right in float64 only: a bug in its float32 kernel, say."""
    workload = TINY["tiny_mlp"]
    planted = Contestant(
        "planted", "planted", "torch", lambda p: plain(p, create_graph=p.support_x.dtype == torch.float64)
    )
    row, _ = measure.check(planted, workload, measure.reference(workload), torch.float32)
    assert row.error_float64 < 1e-9
    assert row.status == "wrong"


def test_not_a_number_is_wrong():
    truth = torch.ones(2, dtype=torch.float64)
    assert measure.relative_error([torch.tensor([math.nan, 1.0])], truth) == math.inf


def test_a_contestant_that_raises_is_a_row():
    def build(problem):
        raise OSError("no such file: /some/where/else.so")

    row, call = measure.check(
        Contestant("broken", "broken", "torch", build), TINY["tiny_mlp"], None, torch.float32
    )
    assert (row.status, call) == ("failed", None)
    assert row.note == "OSError: no such file: else.so"


def test_rounds_interleave_and_ratios_are_of_the_same_round(monkeypatch):
    """A clock that only the calls move, a machine that slows down, a contestant 3 times as fast as plain."""
    now, order = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def caller(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds * (1 + len(order))

        return call

    rows = [Row("plain", "plain loop"), Row("fast", "fast")]
    measure.interleave(
        [(rows[0], caller("plain", 300.0)), (rows[1], caller("fast", 100.0))], rounds=9, seconds=1.0
    )
    assert order == ["plain", "fast"] + [
        "plain",
        "fast",
        "fast",
        "plain",
        "plain",
        "fast",
    ]  # 3 rounds at least
    assert rows[0].ratio == 1
    assert rows[1].ratio == pytest.approx(3, rel=0.5)


def test_a_child_past_its_limit_is_stopped():
    contestant = CONTESTANTS["torch.func-compiled"]
    with pytest.raises(isolated.NoAnswer, match="no answer in 0 s"):
        isolated.compile_time(contestant, TINY["tiny_mlp"], 1, torch.float32, limit_s=0.2)


@pytest.mark.thorough
def test_quick_run_leaves_a_table_a_json_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--workloads", "tiny_mlp"]
        + ["--contestants", "plain,maml_ext-torch,maml_ext-compiled,torch.func-compiled"]
        + ["--output", str(tmp_path / "trial")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "maml_ext-torch" in run.stdout
    text = (tmp_path / "trial.json").read_text()
    found = json.loads(text)
    workload = found["workloads"]["tiny_mlp"]
    contestants, blocks = workload["contestants"], workload["peak_blocks_gflop_per_s"]
    assert len(blocks) == 2 * (3 + 1)  # before each round and after the last
    assert workload["peak_gflop_per_s"] == max(blocks)
    right = ["plain", "maml_ext-torch"]
    if library.ABSENT:
        assert contestants["maml_ext-compiled"]["status"] == "refused"
    else:
        right.append("maml_ext-compiled")
    for name in right:
        assert contestants[name]["status"] == "ok"
        rate = 1e3 * workload["gflop_needed"] / contestants[name]["median_ms"]
        assert contestants[name]["share"] == pytest.approx(rate / max(blocks), rel=1e-2)
        assert (contestants[name]["first_call_ms"] is None) == (name == "plain")
        assert contestants[name]["median_ms"] > 0
        assert contestants[name]["error_float64"] < 1e-9
        assert contestants[name]["extra_mib"] >= 0
    assert contestants["torch.func-compiled"]["status"] == "not tried"
    assert found["meta"]["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in text and os.uname().nodename not in text
    assert (tmp_path / "trial.png").read_bytes().startswith(b"\x89PNG")
