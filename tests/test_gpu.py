"""On a real CUDA device, `pytest -m gpu`: the CUDA kernels against the CPU engine, finite differences; memory errors.

For the Triton engine see test_gpu_triton.py.
"""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import Batch, require_grad
from test_cuda_engine import NETWORKS, SMOOTH, check_derivatives, made
from test_engine import assert_close, float32_errors, results

import maml_ext
from maml_ext import single_pass
from maml_ext.ops import cuda, library

NO_CUDA = library.cuda_absent() or (None if torch.ops.maml_ext.cuda_devices() else "there is no CUDA device")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_CUDA), reason=f"runs CUDA kernels: {NO_CUDA}")]
SANITIZER = shutil.which("compute-sanitizer")


def on_device(batch, device="cuda"):
    return Batch(*(t.detach().to(device).requires_grad_(t.requires_grad) for t in batch))


def check_with_the_cpu_engine(module, batch, device="cuda", calls=1, **options):
    """That so many calls give what one gives there, of the same kind."""
    expected = results(module, batch, "compiled", **options)
    module, batch = module.to(device), on_device(batch, device)
    for _ in range(calls):
        assert_close([f.cpu() for f in results(module, batch, "compiled", **options)], expected)


def check_meta_gradient(monkeypatch, single, module, batch, **options):
    if not single:
        monkeypatch.setattr(single_pass, "meta_losses", lambda *_: None)
    check_with_the_cpu_engine(module, require_grad(batch), **options)


def check_float32(make):
    def way(device):
        return lambda module, batch: results(module.to(device), on_device(batch, device), "compiled")

    ours, theirs = float32_errors(make, [way("cuda"), way("cpu")])
    assert ours < 2 * theirs


ways = pytest.mark.parametrize("single", [True, False], ids=["single pass", "two passes"])
orders = pytest.mark.parametrize("meta_gradient", ["exact", "first_order"])


@ways
@orders
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradient(name, meta_gradient, single, monkeypatch):
    check_meta_gradient(monkeypatch, single, *made(name), meta_gradient=meta_gradient)


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_as_near_to_float64_as_the_cpu_engine(name):
    check_float32(lambda seed: made(name, seed=seed))


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name):
    module, batch = made(name, tasks=1, support=2, query=2)
    check_derivatives(module.cuda(), on_device(batch))


def test_the_same_bits_again():
    module, batch = made("sinusoids", torch.float32, 500, 10, 10)
    module, batch = module.cuda(), on_device(batch)
    first = results(module, batch, "compiled", reduction="mean")
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(module, batch, "compiled", reduction="mean")))


def test_explain_names_the_engine_and_what_does_not_fit():
    module, batch = made("sinusoids", torch.float32, 4, 10, 10)
    batch = on_device(batch)
    assert maml_ext.MAML(module.cuda(), steps=5).explain(*batch[:2]).engine == "cuda"
    wide = torch.nn.Sequential(torch.nn.Linear(1, 2000), torch.nn.ReLU(), torch.nn.Linear(2000, 2000)).cuda()
    report = maml_ext.MAML(wide, steps=5).explain(batch.support_x, torch.zeros(4, 10, 2000, device="cuda"))
    assert report.engine == ("torch" if cuda.triton_absent() else "triton")
    assert "too many parameters for shared memory" in str(report)


def test_on_the_current_stream_and_in_a_graph():
    module, batch = made("Tanh", torch.float32)
    module, batch = module.cuda(), on_device(batch)
    theta = maml_ext.flatten(module).detach()
    call = lambda: maml_ext.inner_loop(module, theta, *batch[:2], lr=0.1, steps=3, backend="compiled")[-1]  # noqa: E731
    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = call()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_another_device_than_the_current():
    check_with_the_cpu_engine(*made("Tanh"), device="cuda:1")


PROBLEM = """
import torch, maml_ext
from torch import nn
for dtype in (torch.float32, torch.float64):
    net = nn.Sequential(nn.Linear(3, 33), nn.LayerNorm(33), nn.SiLU(), nn.Linear(33, 2)).to("cuda", dtype)
    data = [torch.randn(5, n, w, dtype=dtype, device="cuda", requires_grad=True) for n, w in ((7, 3), (7, 2)) * 2]
    lr = torch.tensor(0.1, dtype=dtype, device="cuda", requires_grad=True)
    for meta_gradient in ("exact", "first_order"):
        maml = maml_ext.MAML(net, lr=lr, steps=3, backend="compiled", reduction="mean", meta_gradient=meta_gradient)
        maml(*data).backward()
        maml.adapt(*data[:2]).loss(*data[2:]).sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
    command = [SANITIZER, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", PROBLEM]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
