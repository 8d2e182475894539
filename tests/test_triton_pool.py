"""Pooling with overlap, padding, dilation, and adaptive, with tangents, against PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from triton_tools import check_layer, device, needs_triton

pytestmark = needs_triton
kernels = pytest.importorskip("maml_ext.kernels.pool")
from maml_ext.kernels.pool import Axis, Pool  # noqa: E402


def on_channels_last(f):
    """f on images, applied to [T, N, H, W, C]."""
    return lambda x: f(x.flatten(0, 1).movedim(-1, 1)).movedim(1, -1).unflatten(0, x.shape[:2])


def passes(pool, x):
    return (
        lambda x, z: kernels.forward(pool, x, z, *x[0].shape[:2]),
        lambda x, z, dz, dx, accumulate: kernels.backward(pool, x, dz, dx, accumulate, *x[0].shape[:2]),
    )


def values(*shape):
    return torch.randn(shape, dtype=torch.float64, device=device)


def axes(x, f, size, stride, padding, dilation=(1, 1)):
    h, w = on_channels_last(f)(x).shape[2:4]
    return (Axis(x.shape[2 + i], out, size[i], stride[i], padding[i], dilation[i]) for i, out in enumerate((h, w)))


# shape [T, N, H, W, C], kernel, stride, padding, dilation, ceil mode
LARGEST = [
    ((1, 1, 1, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1), False),
    ((2, 1, 7, 5, 3), (3, 2), (2, 1), (1, 0), (1, 1), False),
    ((1, 1, 2, 2, 65), (2, 2), (1, 2), (1, 0), (1, 1), False),
    ((1, 2, 6, 4, 3), (3, 3), (2, 2), (1, 1), (1, 1), True),
    ((1, 2, 6, 5, 2), (2, 3), (1, 2), (1, 1), (3, 2), True),
    ((1, 2, 5, 7, 3), (2, 2), (3, 4), (0, 1), (1, 1), True),  # gaps
]


@pytest.mark.parametrize("shape, size, stride, padding, dilation, ceil", LARGEST, ids=str)
def test_largest(shape, size, stride, padding, dilation, ceil):
    x = values(*shape)

    def f(x):
        return F.max_pool2d(x, size, stride, padding, dilation, ceil)

    pool = Pool(shape[-1], *axes(x, f, size, stride, padding, dilation))
    check_layer(on_channels_last(f), [x], *passes(pool, x))
    if x.numel() > 1:
        with pytest.raises(AssertionError):  # another element of the window wins
            check_layer(on_channels_last(lambda x: -f(-x)), [x], *passes(pool, x))


def test_averages_of_a_window_with_gaps():
    """As programs may ask for them; PyTorch has none, so that it is a sum of patches."""
    shape, size, stride, padding, dilation = (1, 2, 6, 5, 2), (2, 3), (1, 2), (1, 1), (3, 2)

    def f(x):
        def total(x):
            patches = F.unfold(x, size, dilation, padding, stride).unflatten(1, (x.shape[1], -1)).sum(2)
            return patches.unflatten(2, (5, 2))

        return total(x) / total(torch.ones_like(x))

    x = values(*shape)
    pool = Pool(2, *axes(x, f, size, stride, padding, dilation), average=True)
    check_layer(on_channels_last(f), [x], *passes(pool, x))


def test_equal_and_missing_numbers():
    """The first of equals wins, also of -inf; and NaN before all."""
    x = torch.randint(3, (1, 2, 6, 7, 5), device=device).double()
    x[0, 0, :3, :4] = -float("inf")
    x[0, 1, 2, 3] = float("nan")
    x.requires_grad_()

    def f(x):
        return F.max_pool2d(x, 3, 1, 1)

    z = on_channels_last(f)(x)
    dz = values(*z.shape)
    (expected,) = torch.autograd.grad(z, x, dz)
    pool = Pool(5, *axes(x, f, (3, 3), (1, 1), (1, 1)))
    found, gradient = torch.empty_like(z), torch.empty_like(x)
    kernels.forward(pool, (x.detach(),), (found,), 1, 2)
    kernels.backward(pool, (x.detach(),), (dz,), (gradient,), False, 1, 2)
    torch.testing.assert_close(found, z.detach(), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-14)
    assert expected[0, 1, 2, 3].abs().max() > 0 and found[0, 0, 0, 0, 0] == -float("inf")


# shape, kernel, stride, padding, ceil mode, count_include_pad, divisor
AVERAGES = [
    ((1, 1, 1, 1, 1), (1, 1), (1, 1), (0, 0), False, True, None),
    ((2, 1, 7, 5, 3), (3, 2), (2, 1), (1, 0), False, True, None),
    ((2, 1, 7, 5, 3), (3, 2), (2, 1), (1, 1), True, False, None),
    ((1, 1, 3, 3, 65), (3, 4), (2, 3), (1, 2), True, True, None),
    ((1, 2, 6, 9, 3), (3, 4), (2, 3), (1, 2), True, True, 7),
]


@pytest.mark.parametrize("shape, size, stride, padding, ceil, count, divisor", AVERAGES, ids=str)
def test_averages(shape, size, stride, padding, ceil, count, divisor):
    x = values(*shape)

    def f(x):
        return F.avg_pool2d(x, size, stride, padding, ceil, count, divisor)

    pool = Pool(shape[-1], *axes(x, f, size, stride, padding), True, False, count, divisor or 0)
    check_layer(on_channels_last(f), [x], *passes(pool, x))
    if sum(padding) and not divisor:
        with pytest.raises(AssertionError):  # the other way to count
            other = on_channels_last(lambda x: F.avg_pool2d(x, size, stride, padding, ceil, not count))
            check_layer(other, [x], *passes(pool, x))


ADAPTIVE = [((1, 1, 1, 1, 1), (1, 1)), ((2, 1, 7, 5, 3), (3, 5)), ((1, 1, 3, 3, 65), (1, 1)),
            ((2, 2, 3, 4, 2), (5, 8)), ((1, 2, 5, 6, 3), (2, 4))]  # fmt: skip


@pytest.mark.parametrize("shape, out", ADAPTIVE, ids=str)
def test_adaptive(shape, out):
    x = values(*shape)
    pool = Pool(shape[-1], Axis(shape[2], out[0]), Axis(shape[3], out[1]), adaptive=True)
    check_layer(on_channels_last(lambda x: F.adaptive_avg_pool2d(x, out)), [x], *passes(pool, x))
    if shape[2] != out[0] and out[0] > 1:
        with pytest.raises(AssertionError):
            wrong = on_channels_last(lambda x: F.interpolate(x, out))
            check_layer(wrong, [x], *passes(pool, x))
