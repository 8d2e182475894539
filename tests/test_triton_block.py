"""Norm over the batch, activation and pooling in one kernel, with tangents, against PyTorch."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp, vjp
from triton_tools import device, guarded, needs_triton

pytestmark = needs_triton
block = pytest.importorskip("maml_ext.kernels.block")
from maml_ext.kernels import statistics  # noqa: E402
from maml_ext.kernels.activation import IDENTITY  # noqa: E402
from maml_ext.kernels.geometry import Activation, Partials, Slice, Statistics  # noqa: E402
from maml_ext.program import Activation as Kind  # noqa: E402

ACTIVATIONS = {
    "none": (Activation(IDENTITY), lambda y: y),
    "relu": (Activation(Kind.RELU), torch.relu),
    "gelu": (Activation(Kind.GELU), F.gelu),
    "softplus": (Activation(Kind.SOFTPLUS, 2.0, 20.0), lambda y: F.softplus(y, 2.0, 20.0)),
}
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
    """Inputs of the formula and their tangents, and those of z's gradient."""
    t, n, h, w, c = case.shape

    def number(*shape, moving):
        value = torch.randn(shape, dtype=case.dtype, device=device)
        return value, torch.randn_like(value) if moving else torch.zeros_like(value)

    kernel = case.block()
    x = number(*case.shape, moving=case.moving)
    affine = [
        kind and number(t if kind == "parameter" else 1, c, moving=case.turning and kind == "parameter")
        for kind in (case.weight if case.norm else None, case.bias if case.norm else None)
    ]
    mean = torch.randn(c, dtype=case.dtype, device=device)
    variance = torch.rand(c, dtype=case.dtype, device=device)
    sample_weight = None
    if case.weighted:
        sample_weight = torch.rand(t, n, dtype=case.dtype, device=device)
        sample_weight[:, : n // 2] = 0
    return x, affine, mean, variance, sample_weight, number(t, n, kernel.out_h, kernel.out_w, c, moving=True)


def truth(case, x, affine, mean, variance, sample_weight, dz, dtype):
    """z, gradients at x, weight and bias; and the tangents of all."""
    inputs = [x, *[a for a in affine if a]]
    values, directions = ([number[i].to(dtype) for number in (*inputs, dz)] for i in (0, 1))
    wide = [None if s is None else s.to(dtype) for s in (mean, variance, sample_weight)]

    def passes(*values):
        def forward(x, *rest):
            rest = list(rest)
            return case.formula(x, *[rest.pop(0) if a else None for a in affine], *wide)

        z, pull = vjp(forward, *values[:-1])
        return z, *pull(values[-1])

    found, found_t = jvp(passes, tuple(values), tuple(directions))

    def named(results):
        names = ["z", "x", *[name for name, a in zip(("weight", "bias"), affine) if a]]
        return dict(zip(names, results, strict=True))

    return named(found), named(found_t)


def kernels(case, x, affine, mean, variance, sample_weight, dz, plain=False, accumulate=None, with_dx=True):
    """The same by the kernels; ``plain``: without tangents."""
    t, n, h, w, c = case.shape
    kernel, guards = case.block(), []
    tangents = not plain and (case.moving or case.turning)

    def number(*shape, like=None):
        made = [guarded(*shape, dtype=case.dtype) for _ in range(2 if tangents else 1)]
        guards.extend(untouched for _, untouched in made)
        if like is not None:
            for (tensor, _), value in zip(made, like):
                tensor.copy_(value)
        return tuple(tensor for tensor, _ in made)

    def given(number, moving):
        return number if moving and not plain else number[:1]

    x = given(x, case.moving)
    slices = []
    for kind, a in zip((case.weight, case.bias), affine):
        if a is None:
            slices.append(None)
        elif kind == "parameter":  # in a vector with something before and behind
            wide = tuple(F.pad(v, (2, 3), value=float("nan")) for v in given(a, case.turning))
            slices.append(Slice(wide, c + 5, 2))
        else:
            slices.append(Slice((F.pad(a[0], (4, 0), value=float("nan")),), 0, 4))
    moments = saved = workspace = None
    if case.norm == "batch":
        chunks = statistics.ranges(n * h * w)
        pair = [tuple(torch.empty(t, chunks, c, dtype=case.dtype, device=device) for _ in x) for _ in range(2)]
        moments = Statistics(torch.empty(t, chunks, dtype=case.dtype, device=device), *pair)
        statistics.measure(x, moments, sample_weight, t, n, h * w, c)
        saved = number(t, 2, c)[: len(x)]
    elif case.norm == "fixed":
        moments = (Slice((mean,), 0, 0), Slice((torch.cat([mean, variance]),), 0, c))
    z = number(t, n, kernel.out_h, kernel.out_w, c)
    block.forward(kernel, x, moments, *slices, z, saved, sample_weight, t, n)

    splits = block.splits(kernel, t, n)
    targets = []
    for kind, a in zip((case.weight, case.bias), affine):
        sums = number(3 + splits * t * c)
        targets.append(Partials(sums, 3, splits) if a and kind == "parameter" else None)
    if None in targets:
        workspace = number(2 * splits * t * c)
    dx = number(*case.shape, like=accumulate) if with_dx else None
    block.backward(
        kernel, x, saved or moments, *slices, given(dz, True), dx, accumulate is not None, *targets, workspace, sample_weight, t, n
    )
    assert all(untouched() for untouched in guards)

    def results(part):
        found = {"z": z[part]}
        if with_dx:
            found["x"] = dx[part]
        for name, target in zip(("weight", "bias"), targets):
            if target:
                found[name] = target.numbers[part][3:].view(splits, t, c).sum(0)
        return found

    return results(0), results(1) if tangents else None


def compare(found, expected, tolerance=1e-11):
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


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


def name(case):
    told = [f"{f.name} {getattr(case, f.name)}" for f in dataclasses.fields(case) if getattr(case, f.name) != f.default]
    return ", ".join(told).replace("(", "").replace(")", "") or "default"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_values_gradients_and_tangents(case):
    inputs = make(case)
    expected, expected_t = truth(case, *inputs, torch.float64)
    found, found_t = kernels(case, *inputs)
    compare(found, expected)
    compare(found_t, expected_t)
    without, _ = kernels(case, *inputs, plain=True)
    compare(without, expected)
