"""Norms over each sample with an activation in one kernel, with tangents, against PyTorch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from triton_tools import needs_triton

pytestmark = needs_triton
norm = pytest.importorskip("maml_ext.kernels.norm")
from triton_layers import ACTIVATIONS, Memory, adds_or_leaves_out, as_accurate, compare, derived, gradients, pair, told  # noqa: E402

EPS = 1e-2


@dataclasses.dataclass
class Case:
    groups: int = 2
    elementwise: bool = False
    activation: str = "gelu"
    shape: tuple = (2, 3, 3, 2, 6)  # T, N, h, w, c
    weight: str | None = "parameter"  # "constant"
    bias: str | None = "parameter"
    moving: bool = True  # x has a tangent
    turning: bool = True  # parameters have one
    dtype: torch.dtype = torch.float64

    def kernel(self):
        return norm.Norm(*self.shape[2:], self.groups, EPS, ACTIVATIONS[self.activation][0], self.elementwise)

    def formula(self, x, weight, bias):
        t, n, h, w, c = self.shape
        groups = x.view(t, n, h * w, self.groups, c // self.groups)
        distance = groups - groups.mean((2, 4), keepdim=True)
        y = (distance * (distance.square().mean((2, 4), keepdim=True) + EPS).rsqrt()).view_as(x)
        shape = (-1, 1, h, w, c) if self.elementwise else (-1, 1, 1, 1, c)
        y = y if weight is None else y * weight.view(shape)
        y = y if bias is None else y + bias.view(shape)
        return ACTIVATIONS[self.activation][1](y)


def make(case):
    t, n, h, w, c = case.shape
    affine = [
        kind
        and pair(
            t if kind == "parameter" else 1, h * w * c if case.elementwise else c, dtype=case.dtype,
            moving=case.turning and kind == "parameter",
        )
        for kind in (case.weight, case.bias)
    ]  # fmt: skip
    return pair(*case.shape, dtype=case.dtype, moving=case.moving), *affine, pair(*case.shape, dtype=case.dtype)


def kernels(case, x, weight, bias, dz, plain=False, accumulate=None, with_dx=True, keep=True):
    """z and gradients by name, and where not ``plain`` their tangents; z alone where nothing is to ``keep``."""
    t, n, h, w, c = case.shape
    kernel, memory = case.kernel(), Memory(case.dtype, 1 if plain else 2)
    x = memory.given(x, case.moving)
    affine = [
        memory.slice(p, kind, case.turning and kind == "parameter")
        for p, kind in ((weight, case.weight), (bias, case.bias))
    ]
    z, saved = memory.number(*case.shape), memory.number(t, 2, n * case.groups)[: len(x)]
    norm.forward(kernel, x, *affine, z, saved if keep else None, t, n)
    if not keep:
        assert memory.untouched()
        return [{"z": z[part]} for part in range(memory.parts)]
    splits = norm.splits(kernel, t, n)
    targets = {
        name: memory.partials(splits, t, p[0].shape[1]) if p and kind == "parameter" else None
        for name, p, kind in (("weight", weight, case.weight), ("bias", bias, case.bias))
    }
    dx = memory.number(*case.shape, like=accumulate) if with_dx else None
    norm.backward(
        kernel, x, saved, *affine, memory.given(dz, True), dx, accumulate is not None, *targets.values(), t, n
    )
    assert memory.untouched()
    return [
        {"z": z[part], **({"x": dx[part]} if with_dx else {}), **gradients(targets, part, splits, t)}
        for part in range(memory.parts)
    ]


CASES = [
    Case(),
    Case(groups=1),
    Case(groups=6),
    Case(groups=1, elementwise=True),
    Case(groups=3, elementwise=True, activation="softplus"),
    Case(groups=6, activation="none", shape=(1, 1, 3, 5, 6)),
    Case(groups=1, elementwise=True, shape=(3, 5, 1, 1, 7)),  # vectors
    Case(groups=1, shape=(1, 1, 1, 1, 1)),
    Case(groups=1, elementwise=True, shape=(1, 2, 7, 5, 19)),  # several tiles of elements, of channels
    Case(groups=1, elementwise=True, shape=(1, 515, 1, 1, 2)),  # and of groups and rows
    Case(groups=37, shape=(1, 2, 2, 3, 37)),
    Case(weight=None),
    Case(bias=None),
    Case(weight=None, bias=None, groups=3),
    Case(weight="constant"),
    Case(weight="constant", bias="constant", turning=False),
    Case(moving=False),
    Case(turning=False, activation="relu"),
]


def name(case):
    return told(case, dataclasses.fields(case))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_values_gradients_and_tangents(case):
    inputs = make(case)
    expected, expected_t = derived(case.formula, *inputs)
    found, found_t = kernels(case, *inputs)
    compare(found, expected)
    compare(found_t, expected_t)
    compare(kernels(case, *inputs, plain=True)[0], expected)


@pytest.mark.parametrize(
    "case, function",
    [
        (Case(1, True, "none"), lambda x, weight, bias: F.layer_norm(x, x.shape[1:], weight, bias, EPS)),
        (Case(3, False, "none"), lambda x, weight, bias: F.group_norm(x, 3, weight, bias, EPS)),
        (Case(6, False, "none"), lambda x, weight, bias: F.instance_norm(x, None, None, weight, bias, eps=EPS)),
    ],
    ids=["layer", "group", "instance"],
)
def test_is_the_norm_of_pytorch(case, function):
    x, weight, bias, dz = make(case)
    found = kernels(case, x, weight, bias, dz, plain=True)[0]["z"]
    for t, images in enumerate(x[0].movedim(-1, 2)):
        shape = (*case.shape[2:],) if case.elementwise else (case.shape[4],)
        affine = [p[0][t].view(shape).movedim(-1, 0) for p in (weight, bias)]
        torch.testing.assert_close(found[t], function(images, *affine).movedim(1, -1), rtol=1e-12, atol=1e-12)


def test_gradient_is_added_or_left_out():
    case = Case()
    inputs = make(case)
    adds_or_leaves_out(lambda **how: kernels(case, *inputs, **how), pair(*case.shape, dtype=case.dtype))


@pytest.mark.parametrize("case", [Case(shape=(2, 4, 5, 4, 32)), Case(1, True, "softplus", (2, 9, 1, 1, 70))], ids=name)
def test_float32(case):
    """No further from the truth than twice what PyTorch is, or a rounding."""
    case.dtype = torch.float32
    inputs = make(case)
    eager, expected = derived(case.formula, *inputs, torch.float32), derived(case.formula, *inputs)
    for results in zip(kernels(case, *inputs), eager, expected):
        as_accurate(*results)


def test_repeats_to_the_bit():
    case = Case(1, shape=(1, 515, 1, 1, 2), dtype=torch.float32)
    inputs = make(case)
    assert norm.splits(case.kernel(), 1, 515) > 1
    once = kernels(case, *inputs)
    for again in (kernels(case, *inputs), kernels(case, *inputs, keep=False)):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(once, again) for name in b)


@pytest.mark.parametrize("wrong", [{"groups": 3}, {"activation": "softplus"}], ids=str)
def test_comparison_sees_a_wrong_term(wrong):
    case = Case()
    inputs = make(case)
    for results, expected in zip(kernels(case, *inputs), derived(dataclasses.replace(case, **wrong).formula, *inputs)):
        for name in results:
            with pytest.raises(AssertionError):
                compare({name: results[name]}, expected, 1e-6)
