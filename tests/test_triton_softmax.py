"""Softmax and its logarithm, with tangents, against PyTorch."""

import pytest
import torch
from triton_tools import check_layer, device, needs_triton

pytestmark = needs_triton
kernels = pytest.importorskip("maml_ext.kernels.softmax")


def passes(logarithm):
    return (
        lambda x, z: kernels.forward(logarithm, x, z),
        lambda x, z, dz, dx, accumulate: kernels.backward(logarithm, z, dz, dx, accumulate),
    )


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (1, 1, 1, 1, 5), (2, 3, 5, 7, 3), (1, 3, 1, 1, 300)], ids=str)
@pytest.mark.parametrize("logarithm", [False, True])
def test_softmax(shape, logarithm):
    f = torch.log_softmax if logarithm else torch.softmax
    x = 2 * torch.randn(shape, dtype=torch.float64, device=device)
    check_layer(lambda x: f(x, -1), [x], *passes(logarithm))
    if shape[-1] > 1:
        with pytest.raises(AssertionError):  # over another axis
            check_layer(lambda x: f(x, 1), [x], *passes(logarithm))


@pytest.mark.parametrize("logarithm", [False, True])
def test_tiles(logarithm, monkeypatch):
    """More rows and channels than a tile has, and arguments whose exponentials overflow."""
    monkeypatch.setattr(kernels, "tile", lambda *sizes: (2, 4))
    f = torch.log_softmax if logarithm else torch.softmax
    x = 200 * torch.randn(1, 3, 1, 1, 9, dtype=torch.float64, device=device)
    check_layer(lambda x: f(x, -1), [x], *passes(logarithm))
