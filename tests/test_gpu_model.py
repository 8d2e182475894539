"""benchmarks/gpu_model.py: what it counts, against the kernels run on the CPU and against counts by hand.

What the Triton engine launches and moves is held to its limits here.
"""

import dataclasses
import json

import pytest
import torch

from benchmarks import gpu_counts, gpu_launches, gpu_layers, gpu_model
from benchmarks.contestants import ours
from benchmarks.workloads import TINY, WORKLOADS, Workload, make_problem, mlp
from maml_ext import compiled, single_pass
from maml_ext.ops import cuda, library

pytestmark = pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled package beside it")

A100, H100, RTX4090 = gpu_model.DEVICES
SIN5 = WORKLOADS["sin5"]
LABELS = Workload("labels", lambda: mlp(3, 8, 5), (3,), 2, 4, 6, 2, "cross_entropy", 0.1)


def with_frozen_layers():
    network = mlp(1, 8, 8, 1)
    for p in (*network[0].parameters(), *network[2].parameters()):
        p.requires_grad_(False)
    return network


FROZEN = Workload("frozen", with_frozen_layers, (1,), 2, 4, 6, 2, "mse", 0.1)


def changed(workload, **changes):
    return dataclasses.replace(workload, **changes)


def layout_of(emulated, workload, shared=H100.block_memory * 1024):
    return emulated.plan_of_meta(*gpu_model.program(workload), max(workload.support, workload.query), 4, shared)


@pytest.fixture
def run(emulated, monkeypatch):
    """Runs our way on the kernels: how many launches there were, and barriers of a block at most."""
    monkeypatch.setattr(compiled, "_ops", torch.ops.maml_ext_emulated)
    emulated.order("forward", 0)

    def run(workload, shared=H100.block_memory * 1024):
        emulated.shared_memory(shared)
        call = ours(make_problem(workload, torch.float32), "compiled")
        emulated.barriers()
        before = emulated.launches()
        call()
        return emulated.launches() - before, emulated.barriers()

    yield run
    emulated.shared_memory(H100.block_memory * 1024)


@pytest.mark.parametrize("shared", [H100.block_memory * 1024, 36 * 1024], ids=["all samples", "chunks"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("workload", [SIN5, TINY["tiny_mlp"], LABELS, FROZEN], ids=lambda w: w.name)
def test_launches_and_barriers_are_those_of_the_kernels(workload, steps, shared, run, emulated):
    workload = changed(workload, tasks=2, steps=steps)
    layout = layout_of(emulated, workload, shared)
    phases = gpu_counts.meta(layout, workload.support, workload.query, steps)
    assert run(workload, shared) == (gpu_counts.launches(layout, steps)["single pass"], len(phases))


def test_a_small_device_makes_chunks(emulated):
    assert layout_of(emulated, SIN5, 36 * 1024)["chunk"] < SIN5.support == layout_of(emulated, SIN5)["chunk"]


@pytest.mark.parametrize("steps", [1, 2, 70])
def test_launches_of_two_passes(steps, run, emulated, monkeypatch):
    workload = changed(TINY["tiny_mlp"], tasks=1, steps=steps, lr=1e-3)
    monkeypatch.setattr(single_pass, "meta_losses", lambda *_: None)
    counted = gpu_counts.launches(layout_of(emulated, workload), steps)
    assert run(workload)[0] == counted["inner loop"] + counted["query loss"] + counted["adjoint"]
    assert counted["inner loop"] == (1 if steps <= 64 else 2)


def test_flop_of_sin5_by_hand(emulated):
    forward = 1 * 40 + 40 * 40 + 40 * 1
    weights = forward + 40 + 40 + 1  # a bias is the weight of one more input
    inputs = 40 * 40 + 40 * 1  # nobody wants a gradient of the network's input
    gradient = forward + weights + inputs
    with_tangents = 3 * gradient  # of a product of Duals: a b, a' b, a b'
    by_hand = 2 * 25 * (5 * 10 * (gradient + with_tangents) + 10 * gradient)
    found = gpu_model.counts(SIN5, layout_of(emulated, SIN5))
    assert found["gflop_executed"] == pytest.approx(1e-9 * by_hand)
    assert found["gflop_needed"] < found["gflop_executed"] < 1.5 * found["gflop_needed"]


def test_bytes_of_sin5_by_hand(emulated):
    theta = 1761
    vectors = 1 + 5 + 1 + 5 * 4  # theta_0; theta_1 .. theta_5; lambda; a step back: theta, lambda twice, lambda anew
    data = 3 * 10 + (5 + 1 + 5) * 10  # x stays from step to step, y does not
    by_hand = 4 * (25 * (vectors * theta + data) + 25 * theta + theta)
    assert gpu_model.counts(SIN5, layout_of(emulated, SIN5))["bytes"] == by_hand


def test_work_is_linear_in_steps_and_launches_do_not_depend_on_them(emulated):
    found = [gpu_model.counts(changed(SIN5, steps=k), layout_of(emulated, SIN5)) for k in (1, 2, 3)]
    one, two, three = (c["gflop_executed"] for c in found)
    assert three - two == pytest.approx(two - one) and two > one
    assert found[0]["launches"] == found[1]["launches"] == found[2]["launches"]


def test_launches_of_the_plain_loop_are_linear_in_steps_and_tasks():
    def plain(steps, tasks):
        return gpu_launches.plain_loop(changed(TINY["tiny_mlp"], steps=steps, tasks=tasks))

    # The first step differs: nothing has been adapted before it.
    steps = [plain(k, 3) for k in (2, 3, 4)]
    assert steps[2] - steps[1] == steps[1] - steps[0] > 3 * 20
    whole = gpu_launches.count(gpu_launches.plain, changed(TINY["tiny_mlp"], tasks=4))
    assert plain(TINY["tiny_mlp"].steps, 4) == whole.eager
    ways = [gpu_launches.torch_func_way(changed(TINY["tiny_mlp"], steps=k)) for k in (1, 3)]
    assert ways[0] < ways[1] < steps[1]


def test_views_and_allocations_launch_nothing():
    x = torch.ones(2, 3)
    with gpu_launches.Counting() as counting:
        y = x.view(3, 2).t()[0].detach().expand(4, 3)
        torch.empty_like(y)
    assert counting.eager == 0
    with gpu_launches.Counting() as counting:
        x.add_(1).sum()
    assert counting.eager == 2


def test_bank_conflicts_are_seen():
    assert gpu_counts.wavefronts(64, 2, 41, 1) == 4  # neighbours in neighbouring banks; all lanes read one column
    assert gpu_counts.wavefronts(64, 2, 32, 1) == 2 * 32 + 2  # all rows in one bank


def test_what_does_not_run_says_why(emulated):
    for name, reason in {"omni_conv": "convolution", "mini_conv": "sample", "mlp_omni": "parameters"}.items():
        layout = gpu_model.plan(emulated, WORKLOADS[name], H100)
        assert reason in layout
        assert gpu_model.estimate(WORKLOADS[name], H100, layout).misfit == layout
    assert "shared memory" in layout_of(emulated, SIN5, 16 * 1024)


def test_more_tasks_than_fit_take_more_waves(emulated):
    layout = gpu_model.plan(emulated, SIN5, A100)
    blocks, limit = gpu_model.occupancy(layout, A100)
    assert (blocks, limit) == (2, "registers")
    few, full, more = (
        gpu_model.estimate(changed(SIN5, tasks=tasks), A100, layout)
        for tasks in (1, blocks * A100.multiprocessors, blocks * A100.multiprocessors + 1)
    )
    assert (few.waves, full.waves, more.waves) == (1, 1, 2)
    assert few.kernel_us < full.kernel_us < more.kernel_us / 1.8
    assert sum(few.shares.values()) == pytest.approx(1) and few.of_peak < full.of_peak < 1


def test_the_table_says_that_it_is_a_model(emulated, tmp_path, capsys):
    output = tmp_path / "model.json"
    assert gpu_model.main(["--workloads", "tiny_mlp", "tiny_conv", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A MODEL, not a measurement") and "not by the CUDA kernels: a convolution" in printed
    assert all(device.name in printed for device in gpu_model.DEVICES)
    assert ("by Triton" in printed) and ("times the least" in printed) == (not cuda.triton_absent())
    written = json.loads(output.read_text())
    assert "not a measurement" in written["note"]
    assert written["workloads"]["tiny_mlp"]["counts"]["launches"]["single pass"] == 2
    assert written["workloads"]["tiny_conv"]["counts"] is None


# The Triton engine

needs_triton = pytest.mark.skipif(bool(cuda.triton_absent()), reason=f"counts its launches: {cuda.triton_absent()}")
LAYERED = [WORKLOADS[name] for name in ("mlp_omni", "omni_conv", "mini_conv")]


def layered(workload):
    return gpu_layers.count(gpu_model.program(workload), make_problem(workload, torch.float32))


@needs_triton
@pytest.mark.parametrize("workload", LAYERED, ids=lambda w: w.name)
def test_launches_work_and_bytes_by_triton(workload):
    found = layered(workload)
    assert len(found.launches) + found.eager <= 300
    assert gpu_model.gflop(workload) < 1e-9 * found.flops < 1.3 * gpu_model.gflop(workload)
    assert 1 < found.moved / gpu_layers.least(workload) <= 1.5


@needs_triton
@pytest.mark.parametrize("name", ["omni_conv", "mini_conv"])
def test_launches_by_triton_do_not_depend_on_the_number_of_tasks(name):
    one, many = (layered(changed(WORKLOADS[name], tasks=tasks)) for tasks in (1, 7))
    assert [w.kernel for w in one.launches] == [w.kernel for w in many.launches] and one.eager == many.eager
    assert 6 < many.flops / one.flops < 8


@needs_triton
def test_launches_by_triton_are_linear_in_steps():
    counts = [len(layered(changed(TINY["tiny_conv"], steps=steps)).launches) for steps in (1, 2, 3)]
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


def test_the_least_bytes_by_hand():
    workload = Workload("by hand", lambda: mlp(2, 3, 1), (2,), 2, 4, 6, 1, "mse", 0.1)
    values = (2 + 3) + (3 + 1) + (2 + 1) + (1 + 3 + 3) + (3 + 2)  # of a sample: forth, the loss, back
    duals = (2 + 6) + (6 + 2) + (4 + 1) + (2 + 6 + 6) + (6 + 2)
    theta, behind = 3 * 2 + 3 + 3 + 1, 3 + 1  # all of it, and what a gradient goes back through
    inner = 2 * 4 * values + theta + behind + 2 * 2 * theta + theta + 2 * theta  # theta_0 is one for both tasks
    query = 2 * 6 * values + 2 * (theta + behind) + 2 * 2 * theta + 2 * 2 * theta
    adjoint = 2 * 4 * duals + theta + behind + 2 * (theta + behind) + 2 * 2 * theta + 2 * 2 * theta
    assert gpu_layers.least(workload) == 4 * (inner + query + adjoint + 2 * theta + theta)


def test_the_least_of_a_norm_by_hand():
    def network():
        block = torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
        return torch.nn.Sequential(*block, torch.nn.Flatten(), torch.nn.Linear(8, 5))

    image, convolved, behind, out = 36, 2 * 16, 2 * 4, 5
    forth = image + convolved + convolved + behind + behind + out
    back = out + behind + behind + 2 * (convolved + behind) + convolved + convolved + image
    theta, handing_back = 20 + 4 + 45, 4 + 45
    by_hand = 4 * (forth + 2 * out + 1 + back) + theta + handing_back + 3 * theta + 2 * theta
    workload = Workload("by hand", network, (1, 6, 6), 1, 4, 4, 0, "cross_entropy", 0.1)
    assert gpu_layers.least(workload) == 4 * by_hand
    pooled = changed(workload, network=lambda: torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.MaxPool2d(2)))
    with pytest.raises(NotImplementedError, match="MaxPool2d"):
        gpu_layers.least(pooled)


def test_bytes_of_operators_are_those_of_memory():
    x, y = torch.ones(3, 4), torch.ones(4)
    with gpu_layers.Copying() as copying:
        x.copy_(y.expand(3, 4))
    assert copying.eager == 1 and copying.moved == 4 * (12 + 4)


def test_a_launch_takes_as_long_as_its_arithmetic_or_its_bytes():
    def busy(*launches):
        counts = gpu_layers.Counts([gpu_layers.Work("", *launch) for launch in launches], 0, 0)
        return gpu_layers.estimate(SIN5, counts, A100)

    product = (108, 2 * 64 * 108 * 1410, 0)  # a microsecond on all SMs
    copy = (108, 0, 1555 * 1000)
    assert busy(product).arithmetic == pytest.approx(1) and busy(copy).memory == pytest.approx(1)
    assert busy((1, *product[1:])).arithmetic == pytest.approx(108)
    both = busy(product, copy)
    assert both.replayed == pytest.approx(2 + 2 * gpu_layers.REPLAYED)
    assert both.launched == pytest.approx(2 * gpu_layers.TRITON)
