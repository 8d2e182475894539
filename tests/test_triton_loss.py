"""The loss of a task and its gradients, with tangents, against PyTorch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from triton_tools import device, fenced, guarded, needs_triton

pytestmark = needs_triton
kernels = pytest.importorskip("maml_ext.kernels.loss")
from maml_ext.kernels.geometry import Slice  # noqa: E402

from maml_ext import losses  # noqa: E402
from maml_ext.program import LossKind  # noqa: E402

SHAPES = [(1, 1, 1, 1), (2, 3, 1, 5), (3, 7, 6, 4)]  # tasks, samples, positions, classes
OUTPUTS = ("value", "prediction", "y", "weight")


@dataclasses.dataclass
class Case:
    """A loss, its data, and directions of the arguments that have one."""

    loss: kernels.Loss
    arguments: dict  # prediction, y unless there are labels, maybe weight
    directions: dict
    labels: torch.Tensor | None = None
    class_weight: torch.Tensor | None = None

    def formula(self, task, prediction, y=None, weight=None):
        """Of a task, by maml_ext's losses: classes are their second axis."""
        kind = LossKind(self.loss.kind)
        name = {LossKind.MSE: "mse", LossKind.HUBER: "huber", LossKind.BINARY: "bce_with_logits"}
        if kind in name:
            loss = losses.Loss(name[kind], delta=self.loss.parameter)
            return loss(prediction, y, weight)
        options = dict(smoothing=self.loss.parameter, ignore_index=self.loss.ignore_index)
        loss = losses.Loss("cross_entropy", class_weight=self.class_weight, **options)
        target = y.movedim(-1, 1) if y is not None else self.labels[task]
        return loss(prediction.movedim(-1, 1), target, weight)

    def expected(self, dtype=torch.float64):
        """Loss and gradients of all tasks, and their derivatives along the directions."""
        names = list(self.arguments)
        rows = []
        for task in range(len(self.arguments["prediction"])):

            def score(*arguments):
                with_gradients = torch.func.grad_and_value(
                    lambda *a: self.formula(task, **dict(zip(names, a))), tuple(range(len(names)))
                )
                gradients, value = with_gradients(*arguments)
                return value, *gradients

            at = tuple(a[task].to(dtype) for a in self.arguments.values())
            along = tuple(
                self.directions[n][task].to(dtype) if n in self.directions else torch.zeros_like(a)
                for n, a in zip(names, at)
            )
            rows.append(torch.func.jvp(score, at, along))
        parts = [[torch.stack(found) for found in zip(*part)] for part in zip(*rows)]
        return {name: tuple(part[i] for part in parts) for i, name in enumerate(["value", *names])}

    def found(self, wanted=OUTPUTS, dtype=torch.float64):
        """Likewise by the kernel."""
        shape = self.arguments["prediction"].shape
        tensors = {"value": shape[:1], **{n: a.shape for n, a in self.arguments.items()}}
        made = {n: [guarded(*tensors[n], dtype=dtype) for _ in range(2)] for n in wanted if n in tensors}
        results = {n: tuple(tensor for tensor, _ in pair) for n, pair in made.items()}

        def number(name):
            parts = [source[name] for source in (self.arguments, self.directions) if name in source]
            return tuple(fenced(part.to(dtype)) for part in parts) or None

        memory = torch.full((5 + shape[-1] + 5,), float("nan"), dtype=dtype, device=device)
        if self.class_weight is not None:
            memory[5:-5] = self.class_weight
        kernels.score(
            self.loss, number("prediction"), number("y"), self.labels,
            None if self.class_weight is None else Slice((memory,), 0, 5), number("weight"),
            *(results.get(n) for n in OUTPUTS), *shape,
        )  # fmt: skip
        assert all(untouched() for pair in made.values() for _, untouched in pair)
        return results


def case(kind, shape, parameter=0.0, weighted=True, class_weighted=False, along=("prediction", "y", "weight")):
    tasks, samples, positions, classes = shape
    new = dict(dtype=torch.float64, device=device)
    arguments = {"prediction": 2 * torch.randn(shape, **new)}
    if kind != LossKind.LABELS:
        arguments["y"] = torch.rand(shape, **new) if kind == LossKind.BINARY else torch.randn(shape, **new)
    if kind == LossKind.SOFT_LABELS:
        arguments["y"] = arguments["y"].softmax(-1)
    if weighted:
        arguments["weight"] = torch.rand(shape[:2], **new) + 0.1
    labels = None
    if kind == LossKind.LABELS:
        labels = torch.randint(classes, shape[:3], device=device)
        if samples > 1:
            labels[:, 1, 0] = 1  # left out
    return Case(
        kernels.Loss(int(kind), parameter, 1 if labels is not None and samples > 1 else -100),
        arguments,
        {name: torch.randn_like(a) for name, a in arguments.items() if name in along},
        labels,
        torch.rand(classes, **new) + 0.5 if class_weighted else None,
    )


def check(found, expected, atol=1e-12):
    assert found.keys() <= expected.keys()
    for name in found:
        for mine, theirs in zip(found[name], expected[name]):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=atol, msg=lambda text: f"{name}: {text}")


KINDS = [(LossKind.MSE, 0.0), (LossKind.HUBER, 0.7), (LossKind.BINARY, 0.0), (LossKind.SOFT_LABELS, 0.0),
         (LossKind.SOFT_LABELS, 0.1), (LossKind.LABELS, 0.0), (LossKind.LABELS, 0.1)]  # fmt: skip
all_kinds = pytest.mark.parametrize("kind, parameter", KINDS, ids=[f"{k.name} {p}" for k, p in KINDS])


@all_kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_values_gradients_and_tangents(kind, parameter, shape, weighted):
    c = case(kind, shape, parameter, weighted)
    expected = c.expected()
    found = c.found()
    check(found, expected)
    assert set(found) == set(expected)
    if shape[1] > 1:  # the comparison sees a prediction that is wrong by a thousandth in one sample
        wrong = dataclasses.replace(c, arguments={n: a.clone() for n, a in c.arguments.items()})
        wrong.arguments["prediction"][:, 2] *= 1.001
        for name, parts in wrong.found(("value", "prediction", "weight")).items():
            assert (parts[0] - expected[name][0]).abs().max() > 1e-6


@pytest.mark.parametrize("parameter", [0.0, 0.1])
@pytest.mark.parametrize("kind", [LossKind.LABELS, LossKind.SOFT_LABELS], ids=lambda k: k.name)
def test_class_weights(kind, parameter):
    c = case(kind, SHAPES[2], parameter, class_weighted=True)
    check(c.found(), c.expected())
    without = dataclasses.replace(c, class_weight=None)
    assert (without.found()["value"][0] - c.found()["value"][0]).abs().max() > 1e-4


@pytest.mark.parametrize("along", [("prediction",), ("y",), ("weight",), ()], ids=str)
@pytest.mark.parametrize("kind", [LossKind.HUBER, LossKind.SOFT_LABELS], ids=lambda k: k.name)
def test_some_arguments_have_no_tangent(kind, along):
    c = case(kind, SHAPES[1], 0.4, along=along)
    check(c.found(), c.expected())


@all_kinds
def test_tiles(kind, parameter, monkeypatch):
    """More samples, positions and classes than a tile has."""
    monkeypatch.setattr(kernels, "tile", lambda *sizes: (2, 2, 4, 1))
    c = case(kind, (2, 5, 3, 7), parameter, class_weighted=kind in (LossKind.LABELS, LossKind.SOFT_LABELS))
    check(c.found(), c.expected())


@pytest.mark.parametrize("wanted", [("value",), ("prediction",), ("y", "weight")], ids=str)
def test_what_is_wanted(wanted):
    c = case(LossKind.SOFT_LABELS, SHAPES[1])
    check(c.found(wanted), c.expected())


@all_kinds
def test_float32(kind, parameter):
    c = case(kind, (2, 9, 3, 7), parameter, class_weighted=kind == LossKind.LABELS)
    c.arguments["prediction"] = c.arguments["prediction"].float().double()
    exact, eager = c.expected(), {}
    if c.class_weight is not None:
        c.class_weight = c.class_weight.float()
    eager = c.expected(torch.float32)
    found = c.found(dtype=torch.float32)
    for name in found:
        for mine, theirs, truth in zip(found[name], eager[name], exact[name]):
            size = truth.abs().max()
            assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 2e-7 * size, name


@all_kinds
def test_large_predictions(kind, parameter):
    """No exponential overflows, and small losses of sure predictions are not lost."""
    c = case(kind, SHAPES[1], parameter)
    c.arguments["prediction"] *= 400
    if kind == LossKind.BINARY:
        c.arguments["y"] = (c.arguments["prediction"] > 0).double()
    check(c.found(), c.expected(), 1e-10)


@all_kinds
def test_a_sample_of_weight_0_is_left_out(kind, parameter):
    c = case(kind, SHAPES[1], parameter, along=("prediction", "y"))
    c.arguments["weight"][:, 0] = 0
    expected = c.expected()
    for tensor in (c.arguments["prediction"], c.directions["prediction"], c.arguments.get("y"), c.directions.get("y")):
        if tensor is not None:
            tensor[:, 0] = float("nan")
    if c.labels is not None:
        c.labels[:, 0] = 1 << 40
    check(c.found(("value", "prediction", "y")), expected)
    # but not where its weight has a gradient or a direction
    assert c.found()["weight"][0].isnan().all()
    c.directions["weight"] = torch.ones_like(c.arguments["weight"])
    assert c.found(("value",))["value"][1].isnan().all()


@all_kinds
def test_nan_stays_nan(kind, parameter):
    c = case(kind, SHAPES[1], parameter)
    if c.labels is not None:
        c.labels[0, 1] = 0
    c.arguments["prediction"][0, 1] = float("nan")
    found = c.found(("value", "prediction"))
    assert found["value"][0].isnan().tolist() == [True, False]
    assert found["prediction"][0][0, 1].isnan().all()


def test_weights_of_0_have_gradients():
    c = case(LossKind.LABELS, SHAPES[2], 0.1)
    c.arguments["weight"][:, 0] = 0
    check(c.found(), c.expected())


@pytest.mark.parametrize("label", [-1, 4, -(1 << 60), 1 << 60])
@pytest.mark.parametrize("class_weighted", [False, True])
def test_a_label_that_is_no_class(label, class_weighted):
    c = case(LossKind.LABELS, SHAPES[2], class_weighted=class_weighted)
    expected = c.expected()
    c.labels[1, 2, 3] = label
    found = c.found()
    for name, parts in found.items():
        for mine, theirs in zip(parts, expected[name]):
            torch.testing.assert_close(mine[[0, 2]], theirs[[0, 2]], rtol=1e-11, atol=1e-12)
    assert found["value"][0][1].isnan() and found["prediction"][0][1].isnan().any()
    assert found["weight"][0][1].isnan().all()


def test_nothing_counts():
    """As torch: the mean of nothing."""
    c = case(LossKind.LABELS, SHAPES[1])
    c.labels[0] = c.loss.ignore_index
    assert c.found()["value"][0].isnan().tolist() == [True, False]
    target = torch.full((2,), -100)
    assert F.cross_entropy(torch.zeros(2, 3), target).isnan()
