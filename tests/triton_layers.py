"""What tests of layers as Triton kernels share: derivatives of a formula, and memory with guards for kernels."""

import torch
import torch.nn.functional as F
from conftest import relative_error
from maml_ext.kernels.activation import IDENTITY
from maml_ext.kernels.geometry import Activation, Partials, Slice
from torch.func import jvp, vjp
from triton_tools import device, guarded

from maml_ext.program import Activation as Kind

ACTIVATIONS = {
    "none": (Activation(IDENTITY), lambda y: y),
    "relu": (Activation(Kind.RELU), torch.relu),
    "gelu": (Activation(Kind.GELU), F.gelu),
    "softplus": (Activation(Kind.SOFTPLUS, 2.0, 20.0), lambda y: F.softplus(y, 2.0, 20.0)),
}


def pair(*shape, dtype, moving=True):
    """A value and its tangent, which is 0 where it does not move."""
    value = torch.randn(shape, dtype=dtype, device=device)
    return value, torch.randn_like(value) if moving else torch.zeros_like(value)


def derived(formula, x, weight, bias, dz, dtype=torch.float64):
    """Of z = formula(x, weight, bias), z and gradients by name, and the tangents of all. Arguments: pairs or None."""
    present = [p for p in (x, weight, bias, dz) if p is not None]
    values, directions = (tuple(p[part].to(dtype) for p in present) for part in (0, 1))

    def passes(*values):
        def forward(x, *rest):
            rest = iter(rest)
            return formula(x, *[None if p is None else next(rest) for p in (weight, bias)])

        z, pull = vjp(forward, *values[:-1])
        return z, *pull(values[-1])

    names = ["z", "x", *[name for name, p in zip(("weight", "bias"), (weight, bias)) if p is not None]]
    return tuple(dict(zip(names, results, strict=True)) for results in jvp(passes, values, directions))


class Memory:
    """Results of kernels between guards, ``parts`` a number."""

    def __init__(self, dtype, parts):
        self.dtype, self.parts, self.guards = dtype, parts, []

    def number(self, *shape, like=None):
        made = [guarded(*shape, dtype=self.dtype) for _ in range(self.parts)]
        self.guards.extend(untouched for _, untouched in made)
        for (tensor, _), value in zip(made, like or ()):
            tensor.copy_(value)
        return tuple(tensor for tensor, _ in made)

    def partials(self, splits, tasks, size):
        return Partials(self.number(3 + splits * tasks * size), 3, splits)

    def untouched(self):
        return all(untouched() for untouched in self.guards)

    def given(self, number, moving):
        return number[: self.parts] if moving else number[:1]

    def slice(self, parameter, kind, moving):
        """A "parameter" of tasks, or a "constant", in vectors with NaN around it."""
        if parameter is None:
            return None
        wide = tuple(F.pad(p.flatten(1), (2, 3), value=float("nan")) for p in self.given(parameter, moving))
        return Slice(wide, wide[0].shape[1] if kind == "parameter" else 0, 2)


def gradients(targets, part, splits, tasks):
    """By name those that were asked for, their partial sums added up."""
    return {
        name: target.numbers[part][target.offset :].view(splits, tasks, -1).sum(0)
        for name, target in targets.items()
        if target
    }


def compare(found, expected, tolerance=1e-11):
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name].view_as(value), rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
        )


def as_accurate(found, eager, expected):
    for name, value in found.items():
        error, limit = (relative_error(v.view_as(expected[name]), expected[name]) for v in (value, eager[name]))
        assert error <= 2 * max(limit, torch.finfo(value.dtype).eps), name


def adds_or_leaves_out(run, before):
    """Whether run(accumulate=, with_dx=) adds dx to what is there, or writes none, and nothing else changes."""
    alone, added, without = run(), run(accumulate=before), run(with_dx=False)
    for part in range(2):
        torch.testing.assert_close(added[part].pop("x"), alone[part].pop("x") + before[part], rtol=1e-14, atol=1e-14)
        for others in (added[part], without[part]):
            assert others.keys() == alone[part].keys()
            assert all(torch.equal(others[name], alone[part][name]) for name in others)


def told(case, fields):
    """A case's name: what is not as by default."""
    parts = [f"{f.name} {getattr(case, f.name)}" for f in fields if getattr(case, f.name) != f.default]
    return ", ".join(parts).replace("(", "").replace(")", "") or "default"
