"""Norm over the batch, activation and pooling in one kernel, with tangents, against PyTorch."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from triton_tools import device, needs_triton

pytestmark = needs_triton
block = pytest.importorskip("maml_ext.kernels.block")
from maml_ext.kernels import statistics  # noqa: E402
from maml_ext.kernels.geometry import Slice, Statistics  # noqa: E402
from triton_layers import ACTIVATIONS, Memory, adds_or_leaves_out, as_accurate, compare, derived, gradients, pair, told  # noqa: E402

EPS = 1e-2


@dataclasses.dataclass
class Case:
    norm: str | None = "batch"
    activation: str = "gelu"
    pool: str | None = None
    window: tuple = (1, 1, 1, 1)  # kh, kw, sh, sw
    shape: tuple = (2, 3, 5, 4, 3)  # T, N, h, w, c
    weight: str | None = "parameter"  # "constant"
    bias: str | None = "parameter"
    weighted: bool = False
    moving: bool = True  # x has a tangent
    turning: bool = True  # parameters have one
    dtype: torch.dtype = torch.float64

    def block(self):
        (kh, kw, sh, sw), (_, _, h, w, c) = self.window, self.shape
        out = (h - kh) // sh + 1, (w - kw) // sw + 1
        return block.Block(
            h, w, c, self.norm, EPS, ACTIVATIONS[self.activation][0], self.pool, kh, kw, sh, sw, *out, kh * kw + 1
        )

    def formula(self, x, weight, bias, mean, variance, sample_weight):
        """Values [T, N, h, w, c]; with autograd."""
        if self.norm == "batch":
            counts = torch.ones_like(x[:, :, :1, :1, :1])
            if sample_weight is not None:
                counts = (sample_weight != 0).to(x)[:, :, None, None, None]
            m = counts.sum((1, 2, 3), keepdim=True) * x.shape[2] * x.shape[3]
            mean = (x * counts).sum((1, 2, 3), keepdim=True) / m
            variance = ((x - mean).square() * counts).sum((1, 2, 3), keepdim=True) / m
        y = x
        if self.norm:
            y = (x - mean) * (variance + EPS).rsqrt()
            y = y if weight is None else y * weight[:, None, None, None]
            y = y if bias is None else y + bias[:, None, None, None]
        z = ACTIVATIONS[self.activation][1](y)
        if self.pool is None:
            return z
        (kh, kw, sh, sw), kernel = self.window, self.block()
        rows = torch.arange(kernel.out_h, device=x.device)[:, None] * sh + torch.arange(kh, device=x.device)
        columns = torch.arange(kernel.out_w, device=x.device)[:, None] * sw + torch.arange(kw, device=x.device)
        windows = z[:, :, rows[:, None, :, None], columns[None, :, None, :]].flatten(4, 5)  # T, N, oh, ow, kh kw, c
        if self.pool == "average":
            return windows.sum(4) / kernel.divisor
        return windows.gather(4, windows.argmax(4, keepdim=True)).squeeze(4)


def make(case):
    """Inputs of the formula, and the gradient at z."""
    t, n, h, w, c = case.shape
    kernel = case.block()
    x = pair(*case.shape, dtype=case.dtype, moving=case.moving)
    weight, bias = (
        pair(t if kind == "parameter" else 1, c, dtype=case.dtype, moving=case.turning and kind == "parameter")
        if kind and case.norm
        else None
        for kind in (case.weight, case.bias)
    )
    mean = torch.randn(c, dtype=case.dtype, device=device)
    variance = torch.rand(c, dtype=case.dtype, device=device)
    sample_weight = None
    if case.weighted:
        sample_weight = torch.rand(t, n, dtype=case.dtype, device=device)
        sample_weight[:, : n // 2] = 0
    dz = pair(t, n, kernel.out_h, kernel.out_w, c, dtype=case.dtype)
    return x, weight, bias, mean, variance, sample_weight, dz


def truth(case, x, weight, bias, mean, variance, sample_weight, dz, dtype=torch.float64):
    fixed = [None if s is None else s.to(dtype) for s in (mean, variance, sample_weight)]
    return derived(lambda x, weight, bias: case.formula(x, weight, bias, *fixed), x, weight, bias, dz, dtype)


def kernels(
    case, x, weight, bias, mean, variance, sample_weight, dz, plain=False, accumulate=None, with_dx=True, keep=True
):
    """The same by the kernels; ``plain``: without tangents, ``keep``: for the backward pass."""
    t, n, h, w, c = case.shape
    kernel = case.block()
    memory = Memory(case.dtype, 1 if plain else 2)
    x = memory.given(x, case.moving)
    affine = [
        memory.slice(p, kind, case.turning and kind == "parameter")
        for p, kind in ((weight, case.weight), (bias, case.bias))
    ]
    moments = saved = None
    if case.norm == "batch":
        chunks = statistics.ranges(n * h * w)
        mean, m2 = [tuple(torch.empty(t, chunks, c, dtype=case.dtype, device=device) for _ in x) for _ in range(2)]
        moments = Statistics(torch.empty(t, chunks, dtype=case.dtype, device=device), mean, m2)
        statistics.measure(x, moments, sample_weight, t, n, h * w, c)
        saved = memory.number(t, 2, c)[: len(x)]
    elif case.norm == "fixed":
        moments = (Slice((mean,), 0, 0), Slice((torch.cat([mean, variance]),), 0, c))
    z = memory.number(t, n, kernel.out_h, kernel.out_w, c)
    block.forward(kernel, x, moments, *affine, z, saved if keep else None, sample_weight, t, n)
    if not keep:
        assert memory.untouched()
        return [{"z": z[part]} for part in range(memory.parts)]

    splits = block.splits(kernel, t, n)
    targets = {
        name: memory.partials(splits, t, c) if p and kind == "parameter" else None
        for name, p, kind in (("weight", weight, case.weight), ("bias", bias, case.bias))
    }
    workspace = memory.number(2, splits, t, c) if None in targets.values() else None
    dx = memory.number(*case.shape, like=accumulate) if with_dx else None
    block.backward(
        kernel, x, saved or moments, *affine, memory.given(dz, True), dx, accumulate is not None, *targets.values(),
        workspace, sample_weight, t, n,
    )  # fmt: skip
    assert memory.untouched()
    return [
        {"z": z[part], **({"x": dx[part]} if with_dx else {}), **gradients(targets, part, splits, t)}
        for part in range(memory.parts)
    ]


POOLS = [
    (None, (1, 1, 1, 1)),
    ("max", (2, 2, 2, 2)),  # rows unread: 5 = 2 + 2 + 1
    ("max", (2, 1, 3, 2)),  # and between windows
    ("average", (2, 3, 2, 3)),
    ("average", (1, 2, 2, 4)),
]
CASES = [
    Case(norm, activation, pool, window, weighted=weighted and norm == "batch")
    for (norm, activation, weighted), (pool, window) in zip(
        itertools.product(["batch", "fixed", None], ["gelu", "none", "softplus"], [False, True]), itertools.cycle(POOLS)
    )
] + [
    Case(shape=(1, 1, 1, 1, 1)),
    Case(shape=(1, 1, 3, 3, 2), pool="max", window=(3, 3, 3, 3)),
    Case(shape=(1, 1, 1, 1, 2), norm="fixed"),
    Case(shape=(1, 3, 11, 13, 3)),  # several programs
    Case(shape=(2, 3, 22, 12, 3), pool="max", window=(2, 1, 2, 1), weighted=True),
    Case(shape=(2, 2, 2, 3, 37), pool="average", window=(2, 2, 2, 2)),  # several tiles of channels
    Case(weight=None),
    Case(bias=None),
    Case(weight=None, bias=None, pool="max", window=(2, 2, 2, 2)),
    Case(weight="constant", bias="parameter"),
    Case(weight="constant", bias="constant", turning=False),
    Case(norm="fixed", weight="parameter", bias="constant"),
    Case(norm="fixed", weight=None, bias="parameter", pool="max", window=(2, 2, 2, 2)),
    Case(norm="fixed", weight="constant", bias="constant", turning=False),
    Case(moving=False),
    Case(moving=False, pool="max", window=(2, 2, 2, 2)),
    Case(turning=False, pool="average", window=(2, 2, 2, 2)),
    Case(norm="fixed", moving=False, pool="max", window=(2, 2, 2, 2)),
    Case(activation="relu", pool="max", window=(2, 2, 2, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: told(case, dataclasses.fields(case)))
def test_values_gradients_and_tangents(case):
    inputs = make(case)
    expected, expected_t = truth(case, *inputs)
    found, found_t = kernels(case, *inputs)
    compare(found, expected)
    compare(found_t, expected_t)
    compare(kernels(case, *inputs, plain=True)[0], expected)


@pytest.mark.parametrize("norm", ["batch", "fixed", None])
def test_gradient_is_added_or_left_out(norm):
    case = Case(norm, "gelu", "max", (2, 2, 2, 2))
    inputs = make(case)
    adds_or_leaves_out(lambda **how: kernels(case, *inputs, **how), pair(*case.shape, dtype=case.dtype))


@pytest.mark.parametrize(
    "case",
    [
        Case(activation="relu", pool="max", window=(2, 2, 2, 2), shape=(2, 4, 5, 4, 32), dtype=torch.float32),
        Case(activation="gelu", pool="average", window=(2, 2, 2, 2), shape=(2, 4, 5, 4, 32), dtype=torch.float32),
        Case("fixed", "softplus", shape=(2, 4, 5, 4, 32), dtype=torch.float32),
    ],
    ids=lambda case: told(case, dataclasses.fields(case)),
)
def test_float32(case):
    """No further from the truth than twice what PyTorch is, or a rounding."""
    inputs = make(case)
    eager, expected = truth(case, *inputs, torch.float32), truth(case, *inputs)
    for results in zip(kernels(case, *inputs), eager, expected):
        as_accurate(*results)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), "tie"])
def test_max_pooling_chooses_as_pytorch(special):
    """The first of equals, also of infinities; NaN before all, and of several the last."""
    case = Case(None, "none", "max", (2, 3, 2, 3), (1, 2, 5, 7, 3))
    inputs = list(make(case))
    x, dz = inputs[0][0].round() if special == "tie" else inputs[0][0], inputs[-1][0]
    if special != "tie":
        x[torch.rand_like(x) < 0.4] = special
        x[0, 0, :2, :3] = special
    images = x[0].movedim(-1, 1).clone().requires_grad_()
    z = F.max_pool2d(images, (2, 3))
    z.backward(dz[0].movedim(-1, 1))
    found, _ = kernels(case, (x, inputs[0][1]), *inputs[1:])
    torch.testing.assert_close(found["z"][0], z.detach().movedim(1, -1), equal_nan=True, rtol=0, atol=0)
    assert torch.equal(found["x"][0], images.grad.movedim(1, -1))


def test_what_nothing_reads_still_moves_the_statistics():
    case = Case(pool="max", window=(2, 2, 2, 2), shape=(1, 2, 3, 3, 2))
    inputs = make(case)
    assert (kernels(case, *inputs)[0]["x"][:, :, 2] != 0).all()
    alone = dataclasses.replace(case, norm=None)
    assert (kernels(alone, *make(alone))[0]["x"][:, :, 2] == 0).all()


def test_repeats_to_the_bit():
    case = Case(shape=(1, 3, 11, 13, 3), dtype=torch.float32)
    inputs = make(case)
    assert block.splits(case.block(), 1, 3) > 1
    once = kernels(case, *inputs)
    for again in (kernels(case, *inputs), kernels(case, *inputs, keep=False)):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(once, again) for name in b)


@pytest.mark.parametrize("wrong", ["divisor", "weight", "window"])
def test_comparison_sees_a_wrong_term(wrong):
    case = Case(pool="average", window=(2, 2, 2, 2), weighted=True)
    inputs = list(make(case))
    found = kernels(case, *inputs)
    if wrong == "divisor":
        other = dataclasses.replace(case, pool="max")
    elif wrong == "window":
        other = dataclasses.replace(case, window=(2, 1, 2, 2))
    else:
        other, inputs[5] = case, torch.ones_like(inputs[5])  # samples of weight 0 counted
    for results, expected in zip(found, truth(other, *inputs)):
        for name in results:
            with pytest.raises(AssertionError):
                compare({name: results[name]}, expected, 1e-6)
