"""Linear layers and convolutions by Triton, with tangents, against PyTorch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp, vjp
from triton_tools import device, guarded, needs_triton

pytestmark = needs_triton
contract = pytest.importorskip("maml_ext.kernels.contract")
from maml_ext.kernels import activation, statistics  # noqa: E402
from maml_ext.kernels.geometry import Activation, Partials, Slice, Statistics, Window  # noqa: E402
from maml_ext.kernels.launch import watched  # noqa: E402

CASES = {  # window, tasks, samples
    "linear": (Window(1, 1, 5, 1, 1, 3), 2, 5),
    "one sample": (Window(1, 1, 37, 1, 1, 18), 1, 1),
    "one input": (Window(5, 4, 1, 5, 4, 17, kh=3, kw=3, top=1, left=1), 1, 2),
    "stride and dilation": (Window(7, 9, 3, 3, 4, 2, kh=3, kw=2, sh=2, sw=2, dh=2, dw=1, top=1, left=0), 2, 3),
    "asymmetric": (Window(6, 5, 2, 5, 7, 3, kh=2, kw=3, sh=1, sw=1, dh=1, dw=2, top=0, left=3), 1, 3),
    "groups": (Window(3, 4, 4, 2, 4, 6, kh=2, groups=2), 2, 2),
    "whole image": (Window(2, 3, 4, 1, 1, 5, kh=2, kw=3), 1, 2),
    "wide": (Window(4, 5, 16, 4, 5, 32, kh=3, kw=3, top=1, left=1), 1, 2),
}
ACTIVATION = Activation(activation.SIGMOID.value)


def layer(window):
    """y = layer(x, weight, bias) of many tasks, x and y [T, N, H, W, C]."""
    w = window
    bottom = (w.out_h - 1) * w.sh + (w.kh - 1) * w.dh + 1 - w.in_h - w.top
    right = (w.out_w - 1) * w.sw + (w.kw - 1) * w.dw + 1 - w.in_w - w.left

    def task(x, weight, bias):
        filters = weight.view(w.kh, w.kw, w.in_c // w.groups, w.out_c).permute(3, 2, 0, 1)
        padded = F.pad(x.permute(0, 3, 1, 2), (w.left, right, w.top, bottom))
        y = F.conv2d(padded, filters, bias, stride=(w.sh, w.sw), dilation=(w.dh, w.dw), groups=w.groups)
        return y.permute(0, 2, 3, 1)

    return lambda *inputs: torch.stack([task(*each) for each in zip(*inputs)])


class Layer:
    """A layer's operands and where its results go, each with a tangent where ``parts`` says so."""

    def __init__(self, window, tasks, samples, parts=(2, 2, 2), dtype=torch.float64):
        self.window, self.tasks, self.samples, self.dtype, w = window, tasks, samples, dtype, window
        self.kinds = parts
        self.checks = []
        x_parts, parameter_parts, dy_parts = parts
        self.x = self.random(x_parts, tasks, samples, w.in_h, w.in_w, w.in_c)
        self.before = self.random(x_parts, tasks, samples, w.in_h, w.in_w, w.in_c)
        self.dy = self.random(dy_parts, tasks, samples, w.out_h, w.out_w, w.out_c)
        self.weight_size = w.kh * w.kw * (w.in_c // w.groups) * w.out_c
        stride = 3 + self.weight_size + w.out_c
        self.parameters = self.random(parameter_parts, tasks, stride)
        for numbers in self.parameters:
            numbers[:, [0, 1, 2 + self.weight_size]] = float("nan")  # between parameters
        self.weight = Slice(self.parameters, stride, 2)
        self.bias = Slice(self.parameters, stride, 3 + self.weight_size)

    def random(self, parts, *shape):
        """Between NaNs: what is read out of bounds is seen."""
        extent = torch.Size(shape).numel()
        memory = torch.full((parts, 64 + extent + 64), float("nan"), dtype=self.dtype, device=device)
        return tuple(m[64 : 64 + extent].normal_().view(shape) for m in memory)

    def empty(self, parts, *shape, fill=float("nan")):
        made = [guarded(*shape, dtype=self.dtype, fill=fill) for _ in range(parts)]
        self.checks += [untouched for _, untouched in made]
        return tuple(tensor for tensor, _ in made)

    def operands(self):
        """x, weight, bias and their tangents."""
        sizes = [2, self.weight_size, 1, self.window.out_c]
        _, w, _, b = zip(*(p.split(sizes, 1) for p in self.parameters))
        operands = [self.x, w, b]
        return tuple(o[0] for o in operands), tuple(o[1] if len(o) == 2 else torch.zeros_like(o[0]) for o in operands)

    def forward(self, activation=None, kept=None, sample_weight=None, bias=True, precision="ieee"):
        w, parts = self.window, max(self.kinds[:2])
        shape = (self.tasks, self.samples, w.out_h, w.out_w, w.out_c)
        y, z = self.empty(parts, *shape), self.empty(parts, *shape) if activation else None
        contract.forward(
            w, self.x, self.weight, self.bias if bias else None, y, z, activation, kept, sample_weight, self.tasks,
            self.samples, precision,
        )  # fmt: skip
        assert all(untouched() for untouched in self.checks)
        return y, z

    def backward(self, splits=1, through=None, accumulate=False, wanted=(True, True, True), precision="ieee"):
        """The gradients at x, weight and bias; the Partials of these stand at 1 and 2 in memory of their own."""
        parts, sizes = max(self.kinds), (self.weight_size, self.window.out_c)
        dx = self.empty(parts, *self.x[0].shape, fill=0.5 if accumulate else float("nan"))
        made = [self.empty(parts, i + splits * self.tasks * size) for i, size in enumerate(sizes, 1)]
        to_weight, to_bias = (Partials(numbers, i, splits) for i, numbers in enumerate(made, 1))
        contract.backward(
            self.window, self.x, self.weight, self.dy, dx if wanted[0] else None, accumulate,
            through and (self.before, through), to_weight if wanted[1] else None, to_bias if wanted[2] else None,
            self.tasks, self.samples, precision,
        )  # fmt: skip
        assert all(untouched() for untouched in self.checks)
        assert all(number[:i].isnan().all() for i, numbers in enumerate(made, 1) for number in numbers)
        sums = [
            tuple(n[i:].view(splits, self.tasks, size).sum(0) for n in numbers)
            for (i, numbers), size in zip(enumerate(made, 1), sizes)
        ]
        return [dx, *sums]

    def expected_forward(self):
        return jvp(layer(self.window), *self.operands())

    def expected_backward(self, through=None, accumulate=False):
        def gradients(x, weight, bias, dy, before):
            dx, dw, db = vjp(layer(self.window), x, weight, bias)[1](dy)
            if through:
                s = torch.sigmoid(before)
                dx = dx * s * (1 - s)
            return dx + 0.5 * accumulate, dw, db

        values, tangents = self.operands()
        more = [self.dy, self.before]
        values += tuple(m[0] for m in more)
        tangents += tuple(m[1] if len(m) == 2 else torch.zeros_like(m[0]) for m in more)
        values, tangents = jvp(gradients, values, tangents)
        return [(v, t + 0.5 * accumulate * (i == 0)) for i, (v, t) in enumerate(zip(values, tangents))]


def close(found, expected, tolerance=1e-12):
    for f, e in zip(found, expected):  # no tangent is expected of what has none
        torch.testing.assert_close(f, e.reshape(f.shape).to(f.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_forward(case):
    made = Layer(*CASES[case])
    y, z = made.forward(ACTIVATION)
    expected = made.expected_forward()
    close(y, expected)
    close(z, jvp(torch.sigmoid, expected[:1], expected[1:]))


@pytest.mark.parametrize("case", CASES)
def test_backward(case):
    made = Layer(*CASES[case])
    for found, expected in zip(made.backward(), made.expected_backward()):
        close(found, expected)


@pytest.mark.parametrize("parts", [(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 1, 2), (1, 1, 2)], ids=str)
def test_what_has_no_tangent(parts):
    made = Layer(*CASES["groups"], parts)
    close(made.forward()[0], made.expected_forward())
    for found, expected in zip(made.backward(), made.expected_backward()):
        close(found, expected)


@pytest.mark.parametrize("parts", [(1, 1, 1), (1, 2, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_work(case, parts):
    """The products that are not with padding, twice, once for each pair of parts but of two tangents; and the bytes."""
    made, launches = Layer(*CASES[case], parts), []
    with watched(lambda launched: launches.append(launched)):
        made.forward()
        made.backward()
    x, weight, bias = made.operands()[0]
    y = layer(made.window)(torch.ones_like(x), torch.ones_like(weight), torch.zeros_like(bias))
    pairs, (of_x, of_weight, of_dy) = 2 * int(y.sum()), parts
    most = max(parts)
    assert launches[0].flops == pairs * (of_x + of_weight - 1)
    assert launches[1].flops == pairs * (of_dy + of_weight - 1 + of_dy + of_x - 1)
    x, weight, bias, y = (tensor.nbytes for tensor in (x, weight, bias, y))
    assert launches[0].moved == x * of_x + (weight + bias) * of_weight + y * most
    assert launches[1].moved == x * (of_x + most) + weight * (of_weight + most) + bias * most + y * of_dy


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)], ids=str)
def test_some_gradients(wanted):
    made = Layer(*CASES["stride and dilation"])
    expected = made.expected_backward()
    for there, found, right in zip(wanted, made.backward(wanted=wanted), expected):
        if there:
            close(found, right)
        else:
            assert all(f.isnan().all() for f in found)


@pytest.mark.parametrize("splits", [2, 5])
def test_through_accumulate_and_splits(splits):
    """There are fewer rows than five parts of a tile would have."""
    made = Layer(replace(CASES["asymmetric"][0], in_h=9, out_h=8), 2, 2)
    found = made.backward(splits, ACTIVATION, accumulate=True)
    for f, e in zip(found, made.expected_backward(ACTIVATION, accumulate=True)):
        close(f, e)
    assert (found[0][1] - made.expected_backward(ACTIVATION)[0][1]).abs().max() > 0.4  # which has not accumulated


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_statistics(groups, weighted):
    made = Layer(Window(6, 7, 4, 5, 7, 6, kh=2, groups=groups), 2, 4)
    weight = torch.rand(2, 4, dtype=torch.float64, device=device) if weighted else None
    if weighted:
        weight[1, 2] = 0
    chunks = statistics.ranges(4 * 5 * 7)
    count, mean, m2 = made.empty(1, 2, chunks)[0], made.empty(2, 2, chunks, 6), made.empty(2, 2, chunks, 6)
    y, _ = made.forward(kept=Statistics(count, mean, m2), sample_weight=weight)
    close(y, made.expected_forward())
    assert chunks == 3
    rows = y[0].view(2, -1, 6), y[1].view(2, -1, 6)
    counted = torch.ones(2, 4, dtype=torch.bool, device=device) if weight is None else weight != 0
    counted = counted[:, :, None].expand(2, 4, 35).reshape(2, -1)
    span = statistics.rows_of_range(140)
    for task in range(2):
        for chunk in range(chunks):
            some = torch.arange(140, device=device)[chunk * span : (chunk + 1) * span]
            some = some[counted[task, some]]

            def moments(y):
                return y.mean(0), (y - y.mean(0)).square().sum(0)

            values, tangents = jvp(moments, (rows[0][task, some],), (rows[1][task, some],))
            assert count[task, chunk] == len(some)
            for found, value, direction in zip((mean, m2), values, tangents):
                close([found[0][task, chunk], found[1][task, chunk]], [value, direction], 1e-11)


def error(found, expected):
    return max((f.double() - e.reshape(f.shape)).norm() / e.norm() for f, e in zip(found, expected))


@pytest.mark.parametrize("precision, tolerance", [("ieee", None), ("fp16", 2e-3), ("bf16", 1e-2)])
def test_float32(precision, tolerance, monkeypatch):
    """ieee: at most twice eager's error. Small gradients, and tangents, are no less precise in float16."""
    window, tasks, samples = CASES["wide"]
    monkeypatch.setattr(contract, "PROCESSORS", 1)  # tiles as for many tasks
    made = Layer(window, tasks, samples, dtype=torch.float32)
    for number, by in ((made.x[1], 1e-9), (made.parameters[1], 1e-9), (made.dy[0], 1e-6), (made.dy[1], 1e-15)):
        number.mul_(by)
    exact = Layer(window, tasks, samples)
    exact.x, exact.dy, exact.parameters = ([n.double() for n in m] for m in (made.x, made.dy, made.parameters))
    pairs = zip(
        [made.forward(precision=precision)[0], *made.backward(precision=precision)],
        [made.expected_forward(), *made.expected_backward()],
        [exact.expected_forward(), *exact.expected_backward()],
    )
    for found, eager, right in pairs:
        limit = tolerance or 2 * error(eager, right) + 1e-8
        assert error(found, right) < limit
    assert tolerance is None or error(made.forward(precision=precision)[0], exact.expected_forward()) > 1e-5


def test_splits():
    conv = CASES["wide"][0]
    assert contract.splits(Window(1, 1, 64, 1, 1, 5), 4, 5) == 1
    assert contract.splits(replace(conv, in_h=84, in_w=84, out_h=84, out_w=84), 1, 5) == 32
    assert contract.splits(replace(conv, in_h=84, in_w=84, out_h=84, out_w=84), 1000, 5) == 1


@pytest.mark.parametrize("term", ["x", "weight", "bias", "dy"])
def test_a_lost_tangent_is_seen(term):
    """A negative control: the comparison sees each of the products."""
    made = Layer(*CASES["linear"])
    expected = [made.expected_forward(), *made.expected_backward()]
    if term in ("x", "dy"):
        getattr(made, term)[1].zero_()
    else:
        at = getattr(made, term).offset
        made.parameters[1][:, at : at + (made.weight_size if term == "weight" else 3)] = 0
    found = [made.forward()[0], *made.backward()]
    wrong = [error(f[1:], e[1:]) > 0.01 for f, e in zip(found, expected)]
    assert wrong == {
        "x": [True, False, True, False], "weight": [True, True, False, False], "bias": [True, False, False, False],
        "dy": [False, True, True, True],
    }[term]  # fmt: skip
