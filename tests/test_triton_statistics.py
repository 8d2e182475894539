"""Statistics of the batch, with tangents, against PyTorch."""

import pytest
import torch
from triton_tools import device, guarded, needs_triton

pytestmark = needs_triton
statistics = pytest.importorskip("maml_ext.kernels.statistics")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from maml_ext.kernels.geometry import Statistics  # noqa: E402
from maml_ext.kernels.launch import launch  # noqa: E402
from maml_ext.kernels.numbers import store  # noqa: E402


@triton.jit
def whole(counts, means, m2s, out, chunks, channels, C: tl.constexpr):
    task = tl.program_id(0)
    channel = tl.arange(0, C)
    mask = channel < channels
    count, mean, m2 = statistics.collect(counts, means, m2s, task, channel, mask, chunks, channels, tl.float64)
    store(out, task * 2 * channels + channel, mean, mask)
    store(out, task * 2 * channels + channels + channel, m2, mask)


def measured(x, x_t, weight):
    tasks, samples, positions, channels = x.shape
    chunks = statistics.ranges(samples * positions)
    shapes = [(tasks, chunks)] + 4 * [(tasks, chunks, channels)] + 2 * [(tasks, 2, channels)]
    made = [guarded(*shape) for shape in shapes]
    count, mean, mean_t, m2, m2_t, out, out_t = (tensor for tensor, _ in made)
    kept = Statistics(count, (mean, mean_t), (m2, m2_t))
    statistics.measure((x, x_t), kept, weight, tasks, samples, positions, channels)
    width = triton.next_power_of_2(channels)
    launch(whole, tasks, count, kept.mean, kept.m2, (out, out_t), chunks, channels, C=width, flops=0, moved=0)
    assert all(untouched() for _, untouched in made)
    return out, out_t, count.sum(1)


def expected(x, weight):
    counted = (torch.ones_like(x[:, :, 0, 0]) if weight is None else (weight != 0).to(x))[:, :, None, None]
    n = counted.sum((1, 2)) * x.shape[2]
    mean = (x * counted).sum((1, 2)) / n
    m2 = ((x - mean[:, None, None]).square() * counted).sum((1, 2))
    return torch.stack([mean, m2], 1)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 3), (1, 7, 430, 2), (3, 2, 1, 67)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_moments(shape, weighted):
    x = torch.randn(shape, dtype=torch.float64, device=device) + 100
    x_t = torch.randn_like(x)
    weight = torch.rand(shape[:2], dtype=torch.float64, device=device) if weighted else None
    if weighted and shape[1] > 1:
        weight[:, 1] = 0
    value, direction = torch.func.jvp(lambda x: expected(x, weight), (x,), (x_t,))
    found, found_t, count = measured(x, x_t, weight)
    torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_t, direction, rtol=1e-10, atol=1e-10)
    assert (count == shape[2] * (shape[1] if weight is None else (weight != 0).sum(1))).all()
    if weighted and shape[1] > 1:  # a sample of weight 0 that counted would be seen
        assert (found - expected(x, None)).abs().max() > 1e-6
