"""What anybody may pass to the engine's operators: an error that names what is wrong, or the right answer.

Programs are drawn from everything the format can say, arguments are then bent out of shape. MAML_EXT_FUZZ=n runs n
examples of each test, new ones each time; `make sanitize` runs the file in a build that reports what a crash hides.
"""

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from maml_ext.ops import library
from maml_ext.ops.engine import meta_results, placed
from maml_ext.program import ABSENT, LAYER_INTS, VERSION, Activation, Kind, LossKind, Statistics

pytestmark = pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled engine")
CAMPAIGN = int(os.environ.get("MAML_EXT_FUZZ", "0"))


def fuzz(examples):
    """With a random generator that hypothesis draws from."""

    def decorate(test):
        options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
        chosen = settings(max_examples=CAMPAIGN or examples, derandomize=not CAMPAIGN, **options)
        return chosen(given(random=st.randoms(use_true_random=False))(test))

    return decorate


# Random problems: a program of any layers, and arguments for every operator.


class Writer:
    """Writes a valid program layer by layer; ``parameters`` and ``constants`` count what it refers to."""

    def __init__(self, random):
        self.random, self.layers, self.numbers = random, [], []
        self.parameters, self.constants, self.known = 0, 0, {}
        image = random.random() < 0.6
        self.shapes = [tuple(random.randint(1, n) for n in ((4, 6, 6) if image else (20, 1, 1)))]
        for _ in range(random.randint(0, 6)):
            self.layer()
        self.batch_statistics = any(layer[0] == Kind.NORM and layer[3] == Statistics.BATCH for layer in self.layers)
        c = self.shapes[-1][0]
        kind = random.choice(list(LossKind)[1:])
        weighted = kind in (LossKind.LABELS, LossKind.SOFT_LABELS) and random.random() < 0.5
        self.loss = [kind, random.choice([-100, 0]), self.constant(c) if weighted else ABSENT, 0]
        self.program = [VERSION, self.parameters, self.constants, *self.shapes[0], len(self.layers)]
        self.program += [i for layer in self.layers for i in layer] + self.loss
        self.numbers += [random.choice([0.1, 0.5]), 0.0]

    def constant(self, extent):
        self.constants += extent
        return -(self.constants - extent + 2)

    def slot(self, extent, *shape, absent=True):
        """Where a tensor is: new, one of this shape that was there before, constant, or absent."""
        chance = self.random.random()
        if absent and chance < 0.2:
            return ABSENT
        if chance < 0.3:
            return self.constant(extent)
        if chance < 0.5 and shape in self.known:
            return self.known[shape]
        self.known[shape] = self.parameters
        self.parameters += extent + self.random.choice([0, 0, 1])
        return self.known[shape]

    def layer(self):
        random, j = self.random, len(self.layers)
        i = random.choice([j, j, j, random.randint(0, j)])
        kind, second, out = random.choice(list(Kind)), ABSENT, self.shapes[i]
        (c, h, w), pick = out, lambda low, high: random.randint(low, high)
        divisors = [d for d in range(1, c + 1) if c % d == 0]
        if kind == Kind.CONTRACT:
            groups = random.choice([1, 1, *divisors])
            outputs, padding = groups * pick(1, 7 if groups == 1 else 2), [pick(0, 2) for _ in range(4)]
            kernel, out_size, stride, dilation = [], [], [], []
            for size, pads in ((h, padding[:2]), (w, padding[2:])):
                d, room = pick(1, 2), size + sum(pads)
                kernel.append(pick(1, min(3, (room - 1) // d + 1)))
                stride.append(pick(1, 4))
                dilation.append(d)
                out_size.append((room - d * (kernel[-1] - 1) - 1) // stride[-1] + 1)
            out = (outputs, *out_size)
            weight = self.slot(math.prod(kernel) * c // groups * outputs, *kernel, c, outputs, groups, absent=False)
            attributes = [outputs, *kernel, *stride, *padding, *dilation, groups, weight, self.slot(outputs, outputs)]
        elif kind == Kind.NORM:
            statistics = random.choice(list(Statistics))
            sample = statistics == Statistics.SAMPLE
            elements = sample and random.random() < 0.5
            shape = (c * h * w, c, h, w) if elements else (c, c)
            fixed = [self.constant(c), self.constant(c)] if statistics == Statistics.FIXED else [ABSENT, ABSENT]
            groups = random.choice(divisors) if sample else 1
            attributes = [statistics, groups, int(elements), self.slot(*shape), self.slot(*shape), *fixed]
        elif kind == Kind.ACTIVATION:
            attributes = [random.choice(list(Activation))]
        elif kind == Kind.POOL:
            kernel, stride, padding, dilation, size = [], [], [], [], []
            for room in (h, w):
                k, d = pick(1, min(3, room)), pick(1, 2)
                p = pick(0, k // 2)
                if d * (k - 1) + 1 > room + 2 * p:
                    d = 1
                kernel.append(k), stride.append(pick(1, 3)), padding.append(p), dilation.append(d)
                size.append((room + 2 * p - d * (k - 1) - 1) // stride[-1] + 1)
            out = (c, *size)
            attributes = [pick(0, 1), *kernel, *stride, *padding, *dilation, *size, pick(0, 1), pick(0, 2)]
        elif kind == Kind.AVERAGE:
            out = (c, pick(1, 4), pick(1, 4))
            attributes = out[1:]
        elif kind == Kind.RESHAPE:
            out = random.choice([(c * h * w, 1, 1), (h, w, c), (1, c, h * w)])
            attributes = out
        elif kind == Kind.COMBINE:
            others = [v for v, shape in enumerate(self.shapes) if shape == out]
            second = random.choice([ABSENT, *others])
            attributes = [pick(0, 1) if second != ABSENT else 0]
        else:
            attributes = [pick(0, 1)]
        self.append(kind, i, second, attributes, out)

    def append(self, kind, first, second, attributes, out):
        self.layers.append([*([kind, first, second, *attributes] + [0] * LAYER_INTS)[:LAYER_INTS]])
        self.numbers += [self.random.choice([0.3, 1.0, 1.7]), self.random.choice([0.2, 1.0])]
        self.shapes.append(out)


# By operator, its arguments after theta.
ARGUMENTS = {
    "predict": "query_x prediction",
    "pull": "query_x cotangent wanted2",
    "pull_tangent": "query_x cotangent theta_t x_t",
    "score": "query_x query_y query_weight wanted4",
    "score_tangent": "query_x query_y query_weight theta_t x_t y_t weight_t wanted3",
    "adapt": "lr support_x support_y support_weight steps",
    "adjoint": "lr support_x support_y support_weight trajectory cotangents at first_order wanted4",
    "meta": "lr support_x support_y support_weight query_x query_y query_weight steps first_order reduce wanted7",
}
RATES = {"adjoint": 1, "meta": 2}  # where the gradient of rates is among all results, which is a sum over tasks


class Problem:
    """Arguments for every operator, by their names in ``ARGUMENTS``."""

    def __init__(self, random, tasks=2, dtype=None, writer=Writer, operators=torch.ops.maml_ext, parts=False):
        writer = writer(random)
        self.writer, self.random, self.operators = writer, random, operators
        self.parts = parts and random.random() < 0.5  # of theta, as `meta` takes it
        self.dtype = dtype or random.choice([torch.float32, torch.float64])
        generator = torch.Generator().manual_seed(random.randint(0, 2**31))
        normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)  # noqa: E731
        positive = lambda *shape: normal(*shape).abs() + 0.5  # noqa: E731
        p, shape, prediction = writer.parameters, writer.shapes[0], writer.shapes[-1]
        labels, classes = writer.loss[0] == LossKind.LABELS, prediction[0]
        given = self.given = {"program": writer.program, "numbers": writer.numbers}
        given["constants"] = positive(writer.constants) if writer.constants else None
        shared = given["shared"] = random.random() < 0.5
        given["theta"] = 0.5 * (normal(p) if shared else normal(tasks, p))
        for name in ("support", "query"):
            n = random.randint(1, 4)
            given[f"{name}_x"] = normal(tasks, n, *shape)
            y = (tasks, n, *(prediction[1:] if labels else prediction))
            given[f"{name}_y"] = (
                torch.randint(classes, y, generator=generator) if labels else normal(*y).sigmoid()
            )
            weights = [None, positive(tasks, n), positive(tasks, n)]
            weights[2][:, 1:] *= normal(tasks, n - 1) > 0
            given[f"{name}_weight"] = random.choice(weights[: 2 if writer.batch_statistics else 3])
        directions = (("theta_t", "theta"), ("x_t", "query_x"), ("y_t", "query_y"), ("weight_t", "query_weight"))
        for name, of in directions:
            like = None if of == "query_y" and labels or random.random() < 0.3 else given[of]
            given[name] = None if like is None else normal(*like.shape)
        steps = given["steps"] = random.randint(0, 3)
        rows = random.choice([1, max(1, steps), steps + 2])
        given["lr"] = 0.1 * positive(rows, random.choice([1, p]))
        given["prediction"] = list(prediction)
        given["cotangent"] = normal(tasks, n, *prediction)
        given["trajectory"] = [0.5 * normal(tasks, p) for _ in range(max(0, steps - 1))]
        given["at"] = random.sample(range(max(1, steps)), random.randint(1, max(1, steps)))
        given["cotangents"] = [normal(tasks, p) for _ in given["at"]]
        given["first_order"] = random.random() < 0.3
        given["reduce"] = shared and random.random() < 0.5
        for n in (2, 3, 4, 7):
            given[f"wanted{n}"] = [random.randint(0, 1) for _ in range(n)]

    def arguments(self, name, **changed) -> dict:
        names = ["program", "numbers", "constants", "theta", *ARGUMENTS[name].split()]
        found = {n: {**self.given, **changed}[n] for n in names}
        if name == "meta" and self.parts and found["theta"].dim() == 1:
            found["theta"] = in_parts(self.random, found["theta"])
        return found

    def __call__(self, name, **changed) -> list[Tensor]:
        return run(name, self.arguments(name, **changed), self.operators)


def run(name, arguments, operators=torch.ops.maml_ext) -> list[Tensor]:
    if name == "meta" and isinstance(arguments["theta"], Tensor):
        arguments = arguments | {"theta": [arguments["theta"]]}
    return getattr(operators, name)(*arguments.values())


def summed(name, arguments) -> tuple[int, ...]:
    """Results that are sums over tasks."""
    wanted = arguments["wanted7" if name == "meta" else "wanted4"] if name in RATES else [0]
    return (RATES[name],) if wanted[0] else ()


def in_parts(random, theta: Tensor) -> list[Tensor]:
    """The same numbers in several tensors, or in one of another shape."""
    ends = [0, *sorted(random.randint(0, len(theta)) for _ in range(random.randint(0, 3))), len(theta)]
    parts = [theta[a:b] for a, b in zip(ends, ends[1:])]
    return [p.view(*random.choice([(-1,), (1, -1), (-1, 1)])) if len(p) else p for p in parts]


NAMES = r"program|numbers|constants|theta\w*|lr|steps|at|wanted|prediction|reduce|trajectory|cotangents?|\w*[xy](_t)?"
NAMED = re.compile(rf"^(maml_ext\w*::|.*\b({NAMES}|\w*weight\w*): )", re.DOTALL)
NO_MEMORY = re.compile("memory|overflow|[Ss]torage")


def outcome(name, arguments, operators=torch.ops.maml_ext) -> list[Tensor] | str:
    """The results, or the error, which has to say what it is about."""
    try:
        return run(name, arguments, operators)
    except MemoryError as error:
        return f"memory: {error}"
    except (RuntimeError, TypeError) as error:
        assert NAMED.match(str(error)) or NO_MEMORY.search(str(error)), str(error)
        return str(error).splitlines()[0]


def same(found, expected) -> bool:
    """To the bit, with NaN where there is NaN."""
    if isinstance(found, str) or isinstance(expected, str):
        return found == expected
    return len(found) == len(expected) and all(
        f.shape == e.shape and torch.equal(f.nan_to_num(1e30), e.nan_to_num(1e30)) for f, e in zip(found, expected)
    )


def copied(arguments):
    """Contiguous tensors that share no memory."""
    return pytree.tree_map_only(Tensor, lambda t: t.clone(memory_format=torch.contiguous_format), arguments)


# The properties.


def agrees(value, slope, at: dict, along: dict) -> bool:
    """Whether slope is the derivative of value(**at) in the direction, as far as finite differences are sharp."""
    found = []
    for size in (1e-4, 1e-5):
        ends = [value(**{n: t + s * size * along[n] for n, t in at.items()}) for s in (1, -1)]
        found.append((ends[0] - ends[1]) / (2 * size))
    scale = 1e-3 + slope.abs().max() if slope.numel() else 0
    if not all(f.isfinite().all() for f in (*found, slope)):
        return True
    kink = (found[0] - found[1]).abs() > 1e-4 * scale
    return bool((((found[1] - slope).abs() < 2e-3 * scale) | kink).all())


@fuzz(150)
def test_any_program_has_the_derivatives_of_its_values(random):
    p = Problem(random, dtype=torch.float64)
    direction = lambda *names: {n: torch.randn_like(p.given[n]) for n in names}  # noqa: E731

    def dot(gradients, along):
        return sum((g * d).flatten(1).sum(1) for g, d in zip(gradients, along.values()))

    at = {n: p.given[n] for n in ("theta", "query_x")}
    along = direction(*at)
    cotangent = p.given["cotangent"]
    value = lambda **at: (p("predict", **at)[0] * cotangent).flatten(1).sum(1)  # noqa: E731
    pulled = p("pull", wanted2=[1, 1])
    assert agrees(value, dot(pulled, along), at, along)
    tangents = p("pull_tangent", theta_t=along["theta"], x_t=along["query_x"])
    for i, gradient in enumerate(tangents[1:]):
        assert agrees(lambda i=i, **at: p("pull", wanted2=[1, 1], **at)[i], gradient, at, along)
    assert agrees(lambda **at: p("predict", **at)[0].flatten(), tangents[0].flatten(), at, along)

    names = ["query_y"] * (p.writer.loss[0] != LossKind.LABELS)
    names += ["query_weight"] * (p.given["query_weight"] is not None)
    at |= {n: p.given[n] for n in names}
    along = direction(*at)
    loss, *gradients = p("score", wanted4=[1] * 4)
    assert len(gradients) == len(along)
    assert agrees(lambda **at: p("score", **at, wanted4=[0] * 4)[0], dot(gradients, along), at, along)
    named = {"theta_t": along["theta"], "x_t": along["query_x"], "y_t": along.get("query_y")}
    tangents = p("score_tangent", **named, weight_t=along.get("query_weight"), wanted3=[1] * 3)
    for i, gradient in enumerate(tangents):
        assert agrees(lambda i=i, **at: p("score", **at, wanted4=[1] * 4)[1 + i], gradient, at, along)

    exact = {"first_order": False, "reduce": False, "wanted7": [1] * 7}
    at = {n: p.given[n] for n in ("theta", "support_x", "query_x")}
    along = direction(*at)
    flags = meta_results(*[*p.arguments("meta", **exact).values()][4:])
    losses, to_theta, to_lr, to_x, _, _, to_query, *_ = placed(flags, together := p("meta", **exact))
    value = lambda **at: p("meta", **exact, **at)[0]  # noqa: E731
    assert agrees(value, dot([to_theta, to_x, to_query], along), at, along)
    rates = torch.randn_like(p.given["lr"])
    assert agrees(lambda lr: value(lr=lr).sum(), (to_lr * rates).sum(), {"lr": p.given["lr"]}, {"lr": rates})
    if not (steps := p.given["steps"]):
        return
    # The same in three calls.
    thetas = p("adapt")
    score = p("score", theta=thetas[-1], wanted4=[1] * 4)
    recursion = {"trajectory": thetas[:-1], "cotangents": [score[1]], "at": [steps - 1], "first_order": False}
    apart = [score[0], *p("adjoint", **recursion, wanted4=[1] * 4), *score[2:]]
    for a, b in zip(apart, together, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9, equal_nan=True)


def shown_otherwise(random, t: Tensor) -> Tensor:
    """The same values, differently in memory."""
    ways = {
        "transposed": lambda: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
        "spread": lambda: torch.stack([t, t + 1], -1)[..., 0],
        "offset": lambda: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
        "negated": lambda: torch._neg_view(-t),
        "expanded": lambda: t[:1].expand(t.shape) if t.dim() and len(t) else t,
    }
    if not t.is_floating_point():
        del ways["negated"]
    return ways[random.choice(list(ways))]()


@pytest.mark.parametrize("name", ARGUMENTS)
@fuzz(40)
def test_how_tensors_lie_in_memory_does_not_matter(name, random):
    arguments = Problem(random, parts=True).arguments(name)
    arguments = pytree.tree_map_only(Tensor, lambda t: shown_otherwise(random, t), arguments)
    tensors = [n for n, t in arguments.items() if isinstance(t, Tensor)]
    for n in tensors:
        form = lambda n: (arguments[n].shape, arguments[n].dtype)  # noqa: E731
        alike = [m for m in tensors if form(m) == form(n)]
        arguments[n] = arguments[random.choice(alike)]
    found = outcome(name, arguments)
    assert not isinstance(found, str), found
    assert same(found, run(name, copied(arguments)))


@pytest.mark.parametrize("name", ARGUMENTS)
@fuzz(40)
def test_nan_reaches_its_task_and_no_other(name, random):
    """NaN, infinities and weights of 0 in task 0."""
    p = Problem(random, tasks=2)
    plain = p.arguments(name)
    if plain["theta"].dim() == 1:
        plain["theta"] = torch.stack([plain["theta"]] * 2)
    plain["reduce"] = False
    plain = {n: plain[n] for n in p.arguments(name)}
    arguments = copied(plain)
    x = next(n for n in ("support_x", "query_x") if n in arguments)
    if name in ("predict", "score", "adapt"):  # whatever depends on x
        different, spoiled = (run(name, plain | {x: f * plain[x]}) for f in (1.7, math.nan))
        for d, s, f in zip(different[:1], spoiled, run(name, plain)):
            assert s[d != f].isnan().all()
    arguments[x][0].view(-1)[random.randrange(arguments[x][0].numel())] = random.choice([math.nan, math.inf, 1e38])
    for n in [n for n in arguments if n.endswith("_weight") and arguments[n] is not None]:
        if random.random() < 0.5:
            arguments[n][0, random.randint(0, 1) :] = 0
    found, expected = outcome(name, arguments), run(name, plain)
    if isinstance(found, str):
        assert "weight: expected one that is not 0" in found or (
            p.writer.batch_statistics and "weight: expected none of 0" in found
        )
        return
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        if i not in summed(name, arguments):
            assert same([f[1]], [e[1]])


ODD = [0, 1, 2, 3, 5, -1, -2, -3, 17, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]


def bent_tensor(random, t: Tensor) -> Tensor:
    ways = [
        lambda: torch.atleast_1d(t)[..., :0],
        lambda: torch.atleast_1d(t)[:0],
        lambda: torch.atleast_1d(t)[1:],
        lambda: t.unsqueeze(random.randint(0, t.dim())),
        lambda: t.reshape(-1),
        lambda: t.reshape(*t.shape[:1], -1) if t.numel() else t,
        lambda: t.sum(),
        lambda: torch.atleast_1d(t).repeat(*[2] * max(1, t.dim())),
        lambda: t.double() if t.dtype == torch.float32 else t.float(),
        lambda: t.to(random.choice([torch.float16, torch.int32, torch.bool, torch.complex64])),
        lambda: t.to(random.choice([torch.float16, torch.int64])),
        lambda: t.new_empty(2**31, 2**20, 0),
        lambda: t.new_empty(0, 2**40, 3),
        lambda: t.new_zeros(1).expand(2**40, 3, 2**10),
        lambda: t.detach().to_sparse(),
        lambda: t * math.nan,
        lambda: t + random.choice(ODD[:12]),
        lambda: t.requires_grad_() if t.is_floating_point() else t,
    ]
    return random.choice(ways)() if t.numel() < 10**6 and t.layout == torch.strided else t


def bent_list(random, values: list, odd) -> list:
    values = list(values)
    for _ in range(random.choice([1, 1, 2, 4])):
        at = random.randint(0, max(0, len(values) - 1))
        way = random.random()
        if way < 0.7 and values:
            values[at] = odd(values[at])
        elif way < 0.8:
            values.insert(at, values[at] if values else 0)
        elif way < 0.9 and values:
            del values[at]
        else:
            values += values[-LAYER_INTS:]
    return values


def bend(random, arguments) -> None:
    """Change one argument into anything its type allows."""
    name = random.choice([n for n in arguments if arguments[n] is not None] + ["program"] * 4)
    value = arguments[name]
    if isinstance(value, Tensor):
        value = random.choice([None, bent_tensor(random, value), bent_tensor(random, value)])
    elif isinstance(value, bool):
        value = not value
    elif isinstance(value, int):
        value = random.choice(ODD)
    elif name == "numbers":
        value = bent_list(random, value, lambda _: random.choice([0.0, -1.0, math.nan, math.inf, 1e300, -1e-300]))
    elif name in ("trajectory", "cotangents", "theta"):
        value = bent_list(random, value, lambda t: bent_tensor(random, t) if isinstance(t, Tensor) else t)
        value = [v for v in value if isinstance(v, Tensor)]
    else:
        bend = lambda i: i + random.choice([-1, 1]) if random.random() < 0.4 else random.choice(ODD)  # noqa: E731
        value = bent_list(random, value, bend)
    arguments[name] = value


def repaired(text, arguments) -> bool:
    """Give the tensor that an error names the number of elements it asks for, so that a bent program goes further."""
    wish = re.match(r"(?:.*\b)?(\w+): expected (\d+) (?:elements|labels|values), got", text)
    if not wish or int(wish[2]) > 10000:
        return False
    count, name = int(wish[2]), wish[1]
    for name in (wish[1], f"support_{wish[1]}", f"query_{wish[1]}"):
        t = arguments.get(name)
        if isinstance(t, Tensor) and t.is_floating_point() and t.layout == torch.strided and t.dim() < 9:
            lead = t.shape[: 1 if name == "theta" and t.dim() > 1 else 2 if name.endswith("x") else 0]
            if math.prod(lead) and count % math.prod(lead) == 0:
                arguments[name] = torch.randn(*lead, count // math.prod(lead)).to(t.dtype)
                return True
    return False


@pytest.mark.parametrize("name", ARGUMENTS)
@fuzz(120)
def test_bent_arguments_raise_or_give_an_answer(name, random):
    arguments = Problem(random, tasks=random.choice([0, 1, 2, 3]), parts=True).arguments(name)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        bend(random, arguments)
    found = outcome(name, arguments)
    for _ in range(4):
        if not isinstance(found, str) or not repaired(found, arguments):
            break
        found = outcome(name, arguments)
    usual = all(
        not isinstance(t, Tensor) or (t.layout == torch.strided and t.device.type == "cpu" and t.numel() < 10**6)
        for t in pytree.tree_leaves(list(arguments.values()))
    )
    if usual:
        assert same(found, outcome(name, copied(arguments)))


def test_a_layer_nobody_reads_leaves_its_parameters_alone():
    """The adjoint recursion hands cotangents of parameters that do nothing through, whether or not a layer has them."""
    head, dead = [VERSION, 3, 0, 1, 1, 1], [Kind.NORM, 0, ABSENT, Statistics.SAMPLE, 1, 0, 2, *[ABSENT] * 3]
    live, loss = [Kind.NORM, 0, ABSENT, Statistics.SAMPLE, 1, 0, 0, 1, *[ABSENT] * 2], [LossKind.MSE, 0, ABSENT, 0]
    pad = lambda layer: layer + [0] * (LAYER_INTS - len(layer))  # noqa: E731
    x, y, cotangent = torch.ones(1, 2, 1), torch.ones(1, 2, 1), torch.ones(1, 3)
    for layers in ([live], [dead, live]):
        program = [*head, len(layers), *(i for layer in layers for i in pad(layer)), *loss]
        found = torch.ops.maml_ext.adjoint(
            program, [0.1, 0.0] * (len(layers) + 1), None, torch.ones(3), torch.full((1, 1), 0.1), x, y, None, [],
            [cotangent], [0], False, [0] * 4,
        )  # fmt: skip
        assert found[0][0, 2] == 1


@pytest.mark.skipif(os.environ.get("MAML_EXT_SANITIZE") != "1", reason="make sanitize runs it")
@pytest.mark.parametrize(
    "function, report", [("overrun", "heap-buffer-overflow"), ("overflow", "signed integer overflow")]
)
def test_the_sanitizers_report(function, report):
    """Planted bugs, in a library compiled like the engine; and the engine that is tested here is the sanitized one."""
    engine = Path(importlib.import_module("maml_ext._C").__file__)
    assert b"__asan_report" in engine.read_bytes() and b"__ubsan_handle" in engine.read_bytes()
    code = f"import ctypes, torch; ctypes.CDLL({str(engine.with_stem('_planted.abi3'))!r}).{function}(4)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode != 0 and report in run.stderr
