"""What anybody may pass to the Triton engine's operators: the CPU engine's answer, or an error that names what is
wrong.

As tests/test_engine_fuzz.py, interpreted on the CPU: a call takes a tenth of a second, so that most are `thorough`.
"""

import math
import random as python_random

import pytest
import torch
from test_cuda_fuzz import close
from test_engine import problem
from test_engine_fuzz import ARGUMENTS, Problem, bend, copied, fuzz, outcome, run, same, summed
from torch import Tensor
from torch.utils import _pytree as pytree
from triton_tools import Operators, needs_triton

from maml_ext.ops import library

pytestmark = [
    needs_triton,
    pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled package"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only: kernels take long to compile"),
]
TRITON = Operators()
by_operator = pytest.mark.parametrize("name", ARGUMENTS)


def amounts(few, many):
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.thorough)])


@amounts(6, 60)
@by_operator
def test_any_program_gives_the_cpu_engines_answer(name, examples):
    @fuzz(examples)
    def check(random):
        arguments = Problem(random, dtype=torch.float64, parts=True).arguments(name)
        assert close(run(name, arguments, TRITON), run(name, arguments), 1e-8)

    check()


@amounts(15, 150)
@by_operator
def test_bent_arguments_raise_or_give_an_answer(name, examples):
    """Not always the CPU engine's: on a device nobody looks at labels and weights before the kernel does."""

    @fuzz(examples)
    def check(random):
        arguments = Problem(random, tasks=random.choice([0, 1, 2]), parts=True).arguments(name)
        for _ in range(random.choice([1, 1, 2])):
            bend(random, arguments)
        tensors = [t for t in pytree.tree_leaves(list(arguments.values())) if isinstance(t, Tensor)]
        if not all(t.layout == torch.strided for t in tensors):
            return  # no such tensor is handed to the private operators
        if 2**31 - 1 in (arguments["program"] or ()):
            return  # pooling goes through a window of so many elements one by one
        found = outcome(name, arguments, TRITON)
        if all(t.numel() < 10**6 for t in tensors):
            assert same(found, outcome(name, copied(arguments), TRITON))

    check()


@amounts(4, 20)
@by_operator
def test_nan_reaches_its_task_and_no_other(name, examples):
    @fuzz(examples)
    def check(random):
        plain = Problem(random, tasks=2).arguments(name)
        if plain["theta"].dim() == 1:
            plain["theta"] = torch.stack([plain["theta"]] * 2)
        if "reduce" in plain:
            plain["reduce"] = False
        arguments = copied(plain)
        x = next(n for n in ("support_x", "query_x") if n in arguments)
        arguments[x][0].view(-1)[0] = random.choice([math.nan, math.inf, 1e38])
        found, expected = (run(name, a, TRITON) for a in (arguments, plain))
        for i, (f, e) in enumerate(zip(found, expected, strict=True)):
            if i not in summed(name, arguments):
                assert same([f[1]], [e[1]])

    check()


@pytest.mark.parametrize(
    "name", ["score", *(pytest.param(n, marks=pytest.mark.thorough) for n in ARGUMENTS if n != "score")]
)
def test_opcheck(name):
    """The private operators: schema, shapes and dtypes without data, and in compiled graphs."""
    p = Problem(python_random.Random(5), dtype=torch.float64)
    operator = getattr(torch.ops.maml_ext, f"triton_{name}").default
    arguments = p.arguments(name)
    if name == "meta":
        arguments["theta"] = list(arguments["theta"].flatten().split(7))
    torch.library.opcheck(operator, tuple(arguments.values()))


def test_compiled_without_a_graph_break():
    program, numbers, theta, x, y = problem(torch.float32)
    call = lambda theta: TRITON.score(program, numbers, None, theta, x, y, None, [1, 0, 0, 0])[0] * 2  # noqa: E731
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(theta), call(theta))
