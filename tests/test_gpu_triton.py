"""The Triton engine on a real CUDA device, `pytest -m gpu`: what shows nowhere else.

tests/test_triton_*.py run there too, compiled instead of interpreted. Here calls go the way that users' calls go, by
the entry of CUDA tensors, which is told that no network fits the CUDA kernels; what they give is compared with the CPU
engine.
"""

import pytest
import torch
from conftest import Batch, relative_error
from test_cuda_engine import check_derivatives
from test_engine import NETWORKS, SMOOTH, results
from test_engine import made as made_on_cpu
from test_gpu import check_float32, check_meta_gradient, check_with_the_cpu_engine, on_device, orders, ways
from torch import nn

import maml_ext
from maml_ext.ops import cuda

ABSENT = cuda.triton_absent() or (None if torch.cuda.device_count() else "there is no CUDA device")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(ABSENT), reason=f"runs Triton kernels: {ABSENT}")]
CALLS = 3  # launched one by one, recorded, replayed


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setattr(cuda, "misfit", lambda *_: "not in this test")
    monkeypatch.delenv("MAML_EXT_CUDA_GRAPHS", raising=False)


def made(name, dtype=torch.float64, **sizes):
    return made_on_cpu(name, dtype, **sizes)


def there(module, batch):
    return module.cuda(), on_device(batch)


@ways
@orders
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradient(name, meta_gradient, single, monkeypatch):
    module, batch = made(name)
    check_meta_gradient(monkeypatch, single, module, batch, calls=CALLS, meta_gradient=meta_gradient)
    assert maml_ext.MAML(module).explain(*on_device(batch)[:2]).engine == "triton"


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_as_near_to_float64_as_the_cpu_engine(name):
    check_float32(lambda seed: made(name, seed=seed))


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name):
    check_derivatives(*there(*made(name, tasks=1, support=2, query=2)))


# Large enough that sums are cut into parts, tiles are many, and processors are all at work.
def large(tasks=6):
    torch.manual_seed(0)
    layers = []
    for inputs in (3, 48):
        layers += [nn.Conv2d(inputs, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 49, 5))
    x, y = torch.randn(2, tasks, 20, 3, 28, 28), torch.randn(2, tasks, 20, 5)
    return there(module, Batch(x[0], y[0], x[1], y[1]))


def test_the_same_bits_again_with_and_without_graphs(monkeypatch):
    from maml_ext.kernels import engine

    module, batch = large()
    other = Batch(*(t.flip(0) for t in batch))
    call = lambda batch: results(module, batch, "compiled", reduction="mean")  # noqa: E731
    monkeypatch.setenv("MAML_EXT_CUDA_GRAPHS", "0")
    expected = [call(batch), call(other)]
    monkeypatch.delenv("MAML_EXT_CUDA_GRAPHS")
    for _ in range(CALLS):
        for data, result in zip((batch, other), expected):
            assert all(torch.equal(a, b) for a, b in zip(call(data), result))
    assert not torch.equal(expected[0][1], expected[1][1])
    _, launches = next(reversed(engine._plans.values()))
    assert launches.why is None, "graphs were to be replayed"


UNITS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, "tf32": 2**-10}  # of rounding a factor; TF32 may cut it off


@pytest.mark.parametrize("precision", UNITS, ids=str)
def test_products_in_less_precision(precision, monkeypatch):
    """Under autocast and with TF32 allowed; what is not a factor of a product stays float32.

    In the meta-gradient of one step through two layers, 12 products follow one another at most: forth and back for the
    support and the query set, 4 more for the tangents. Two factors of each are rounded.
    """
    module = nn.Sequential(nn.Conv2d(2, 40, 3), nn.Tanh(), nn.Flatten(), nn.Linear(40 * 36, 3))
    x, y = torch.randn(2, 3, 10, 2, 8, 8), torch.randn(2, 3, 10, 3)
    module, batch = there(module, Batch(x[0], y[0], x[1], y[1]))
    call = lambda: results(module, batch, "compiled", steps=1)  # noqa: E731
    expected = call()
    if precision == "tf32":
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
        found = call()
    else:
        with torch.autocast("cuda", precision):
            found = call()
    assert all(f.dtype == torch.float32 for f in found)
    error = max(relative_error(f, e) for f, e in zip(found, expected))
    assert UNITS[precision] / 32 < error < 24 * UNITS[precision]


def test_on_the_current_stream_and_in_a_graph_of_ones_own():
    """Which is recorded on a stream on which such a call has been before: the first one lays out memory."""
    module, batch = there(*made("convolution", torch.float32))
    theta = maml_ext.flatten(module).detach()
    call = lambda: maml_ext.inner_loop(module, theta, *batch[:2], lr=0.1, steps=3, backend="compiled")[-1]  # noqa: E731
    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [call() for _ in range(CALLS)]
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(f, expected) for f in found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = call()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_no_call_waits_for_the_device():
    module, batch = there(*made("max pool", torch.float32))
    lr = torch.full((), 0.05, device="cuda")
    call = lambda: results(module, batch, "compiled", lr=lr)  # noqa: E731
    for _ in range(CALLS):
        call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        maml_ext.MAML(module, lr=lr, steps=3, backend="compiled")(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_another_device_than_the_current():
    check_with_the_cpu_engine(*made("max pool"), device="cuda:1", calls=CALLS)
