"""What anybody may pass to the CUDA engine's operators, run on the CPU: the CPU engine's answer, or an error that names
what is wrong. As tests/test_engine_fuzz.py, with programs that the kernels run."""

import math

import pytest
import torch
from test_engine_fuzz import ARGUMENTS, Problem, Writer, bend, copied, fuzz, outcome, run, same, summed
from torch import Tensor
from torch.utils import _pytree as pytree

from maml_ext.ops import library
from maml_ext.program import ABSENT, Activation, Kind, LossKind, Statistics

pytestmark = pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled package beside it")


class Chain(Writer):
    """A program of layers that the kernels know, one behind the other."""

    def layer(self):
        random, j = self.random, len(self.layers)
        kind = random.choice([Kind.CONTRACT, Kind.CONTRACT, Kind.NORM, Kind.ACTIVATION, Kind.RESHAPE, Kind.COMBINE])
        (c, h, w), size = self.shapes[j], math.prod(self.shapes[j])
        out = self.shapes[j]
        if kind in (Kind.CONTRACT, Kind.NORM) and h * w > 1:
            kind = Kind.RESHAPE
        if kind == Kind.CONTRACT:
            out = (random.randint(1, 7), 1, 1)
            weight = self.slot(c * out[0], 1, 1, c, out[0], 1, absent=False)
            attributes = [out[0], 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, weight, self.slot(out[0], out[0])]
        elif kind == Kind.NORM:
            groups = random.choice([d for d in range(1, c + 1) if c % d == 0])
            attributes = [Statistics.SAMPLE, groups, 0, self.slot(c, c), self.slot(c, c), ABSENT, ABSENT]
        elif kind == Kind.ACTIVATION:
            attributes = [random.choice(list(Activation))]
        elif kind == Kind.RESHAPE:
            attributes = out = (size, 1, 1)
        else:
            attributes = [0]
        self.append(kind, j, ABSENT, attributes, out)


@pytest.fixture
def kernels(emulated):
    emulated.shared_memory(227 * 1024)
    emulated.order("shuffled", 0)
    return torch.ops.maml_ext_emulated


def problem(random, **options) -> Problem:
    while True:
        p = Problem(random, writer=Chain, **options)
        classes = p.writer.loss[0] in (LossKind.LABELS, LossKind.SOFT_LABELS)
        if not classes or math.prod(p.writer.shapes[-1][1:]) == 1:  # the kernels know one position a sample
            return p


def close(found, expected, tolerance) -> bool:
    return len(found) == len(expected) and all(
        f.shape == e.shape and torch.allclose(f, e, rtol=tolerance, atol=tolerance * 10, equal_nan=True)
        for f, e in zip(found, expected)
    )


@pytest.mark.parametrize("name", ARGUMENTS)
@fuzz(60)
def test_any_program_gives_the_cpu_engines_answer(name, kernels, random):
    p = problem(random, dtype=torch.float64, parts=True)
    arguments = p.arguments(name)
    assert close(run(name, arguments, kernels), run(name, arguments), 1e-8)


@pytest.mark.parametrize("name", ARGUMENTS)
@fuzz(40)
def test_bent_arguments_raise_or_give_an_answer(name, kernels, random):
    """Not always the CPU engine's: on a device nobody looks at labels and weights before the kernel does."""
    arguments = problem(random, tasks=random.choice([0, 1, 2, 3]), parts=True).arguments(name)
    for _ in range(random.choice([1, 1, 2])):
        bend(random, arguments)
    found = outcome(name, arguments, kernels)
    usual = all(
        not isinstance(t, Tensor) or (t.layout == torch.strided and t.device.type == "cpu" and t.numel() < 10**6)
        for t in pytree.tree_leaves(list(arguments.values()))
    )
    if usual:
        assert same(found, outcome(name, copied(arguments), kernels))


@pytest.mark.parametrize("name", ARGUMENTS)
@fuzz(20)
def test_nan_reaches_its_task_and_no_other(name, kernels, random):
    p = problem(random, tasks=2)
    plain = p.arguments(name)
    if plain["theta"].dim() == 1:
        plain["theta"] = torch.stack([plain["theta"]] * 2)
    plain["reduce"] = False
    plain = {n: plain[n] for n in p.arguments(name)}
    arguments = copied(plain)
    x = next(n for n in ("support_x", "query_x") if n in arguments)
    arguments[x][0].view(-1)[0] = random.choice([math.nan, math.inf, 1e38])
    found, expected = (run(name, a, kernels) for a in (arguments, plain))
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        if i not in summed(name, arguments):
            assert same([f[1]], [e[1]])
