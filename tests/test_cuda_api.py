"""The package on CUDA tensors, as far as it goes without a device: on fake ones, which have shapes and no values.

A fake tensor raises where its value is looked at: so these tests show too that no call waits for the device.
"""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import maml_ext
from maml_ext import compiled
from maml_ext.ops import cuda, library

pytestmark = pytest.mark.skipif(bool(library.ABSENT), reason=f"no binary: {library.ABSENT}")
needs_kernels = pytest.mark.skipif(bool(library.cuda_absent()), reason=f"asks CUDA kernels: {library.cuda_absent()}")
NOT_INSTALLED = "triton is not installed"


class H100:
    """The operators, on a device that is not there."""

    def cuda_shared_memory(self, index):
        assert index == 0
        return 227 * 1024

    def __getattr__(self, name):
        return getattr(torch.ops.maml_ext, name)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(compiled, "_ops", H100())
    # torch records no graph on devices that it was not built for.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


def on_cuda(module):
    for m in module.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            setattr(m, name, nn.Parameter(torch.empty(p.shape, device="cuda")))
    return module


def sinusoids():
    return on_cuda(nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)))


@pytest.fixture(params=[None, NOT_INSTALLED], ids=["triton", "no triton"])
def without_triton(request, monkeypatch):
    """Why there is no Triton engine; both ways, whatever is installed: nothing is run."""
    monkeypatch.setattr(cuda, "triton_absent", lambda: request.param)
    return request.param


@needs_kernels
def test_what_fits_runs_on_the_kernels(fake, without_triton):
    maml = maml_ext.MAML(sinusoids(), lr=0.01, steps=5, loss="mse")
    x = torch.empty(25, 10, 1, device="cuda")
    report = maml.explain(x, x)
    assert report.engine == "cuda" and not report.reasons and "a thread block each" in str(report)
    for losses in (maml(x, x, x, x), maml.adapt(x, x).loss(x, x)):
        assert losses.shape == (25,) and losses.device.type == "cuda"
    assert maml.adapt(x, x)(x).shape == (25, 10, 1)


@needs_kernels
@pytest.mark.parametrize(
    "module, reason",
    [
        (nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 5)), "too many parameters for shared memory"),
        (nn.Sequential(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 5, 28), nn.Flatten()), "a convolution has no rule"),
    ],
    ids=["too large", "convolution"],
)
def test_what_does_not_goes_to_triton_or_says_why(module, reason, fake, without_triton):
    maml = maml_ext.MAML(on_cuda(module), steps=1, loss="cross_entropy", backend="compiled")
    x, y = torch.empty(4, 5, 784, device="cuda"), torch.zeros(4, 5, dtype=torch.int64, device="cuda")
    reason = f"not a network that the CUDA kernels run: {reason}"
    if without_triton:
        with pytest.raises(ValueError, match=f"{reason}.*; and there is no Triton engine: {NOT_INSTALLED}"):
            maml.adapt(x, y)
        return
    report = maml.explain(x, y)
    assert report.engine == "triton" and "all at once, layer by layer" in str(report)
    assert len(report.reasons) == 1 and report.reasons[0].startswith(reason)
    assert maml(x, y, x, y).shape == maml.adapt(x, y).loss(x, y).shape == (4,)


def test_without_kernels_all_goes_to_triton_or_says_why(fake, without_triton, monkeypatch):
    monkeypatch.setattr(library, "cuda_absent", lambda: library.CUDA_ABSENT)
    maml = maml_ext.MAML(sinusoids(), steps=1, backend="compiled")
    x = torch.empty(4, 5, 1, device="cuda")
    reason = "there are no CUDA kernels: the installed package was built without"
    if without_triton:
        with pytest.raises(ValueError, match=f"{reason}.*; nor the Triton engine: {NOT_INSTALLED}"):
            maml.adapt(x, x)
        return
    report = maml.explain(x, x)
    assert report.engine == "triton" and len(report.reasons) == 1 and reason in report.reasons[0]
    assert maml(x, x, x, x).shape == (4,)
    monkeypatch.setenv("MAML_EXT_CUDA_GRAPHS", "0")
    assert maml.explain(x, x).reasons[1:] == ["no CUDA graphs: MAML_EXT_CUDA_GRAPHS=0"]


@needs_kernels
@pytest.mark.parametrize("shape", [(), (6,), (5, 1)], ids=str)
def test_rates_labels_and_weights_are_not_looked_at(shape, fake):
    head = on_cuda(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    maml = maml_ext.MAML(head, lr=torch.empty(shape, device="cuda"), steps=5, loss="cross_entropy", backend="compiled")
    x, y = torch.empty(4, 5, 3, device="cuda"), torch.zeros(4, 5, dtype=torch.int64, device="cuda")
    weight = torch.ones(4, 5, device="cuda")
    assert maml(x, (y, weight), x, (y, weight)).shape == (4,)
