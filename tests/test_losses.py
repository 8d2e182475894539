"""Weights of samples, tasks padded to one size, and torch's own losses, against plain loops on each task alone."""

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    QUERIES,
    SHOTS,
    TASKS,
    Batch,
    Residual,
    assert_same,
    both_ways,
    conv_net,
    gradients,
    images,
    plain_maml,
    require_grad,
    runs_at_once,
    smooth_mlp,
    unchanged,
    vectors,
    weighted_sum,
)
from torch import nn

import maml_ext
from maml_ext import losses

pytestmark = pytest.mark.usefixtures("float64")
# Which samples a task has: the others are padding, which lies anywhere.
SUPPORT = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 1, 1]])
QUERY = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def norm_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def norm_conv() -> nn.Module:
    """Batch norm over sequences [N, C, L], and without parameters."""
    convolutions = [nn.Conv1d(1, 4, 2), nn.BatchNorm1d(4), nn.Tanh(), nn.Conv1d(4, 3, 1)]
    last = [nn.BatchNorm1d(3, affine=False), nn.Flatten(), nn.Linear(6, 2)]
    return nn.Sequential(nn.Unflatten(1, (1, 3)), *convolutions, *last)


def probabilities() -> Batch:
    batch = vectors()
    return batch._replace(support_y=batch.support_y.softmax(-1), query_y=batch.query_y.softmax(-1))


def pixels() -> Batch:
    """Labels of every position."""
    batch = images()
    labels = [torch.randint(-1, 3, (TASKS, n, 6, 6)) for n in (SHOTS, QUERIES)]
    return batch._replace(support_y=labels[0], query_y=labels[1])


def segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 1))


CLASSES = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
PIXEL_LOSS = functools.partial(F.cross_entropy, weight=CLASSES, ignore_index=-1, label_smoothing=0.1)
# name: (network, data, loss, the same of torch)
CASES = {
    "MLP, mse": (smooth_mlp, vectors, "mse", F.mse_loss),
    "MLP, Huber": (smooth_mlp, vectors, nn.HuberLoss(delta=0.3), nn.HuberLoss(delta=0.3)),
    "MLP, binary": (smooth_mlp, probabilities, "bce_with_logits", F.binary_cross_entropy_with_logits),
    "MLP, soft labels": (smooth_mlp, probabilities, "cross_entropy", F.cross_entropy),
    "batch norm, mse": (norm_mlp, vectors, "mse", F.mse_loss),
    "batch norm of sequences, Huber": (norm_conv, vectors, "huber", F.huber_loss),
    "conv net, labels": (conv_net, images, "cross_entropy", F.cross_entropy),
    "residual net, smoothed labels": (
        Residual,
        images,
        nn.CrossEntropyLoss(CLASSES, label_smoothing=0.2),
        nn.CrossEntropyLoss(CLASSES, label_smoothing=0.2),
    ),
    "labels of positions, some ignored": (segmenter, pixels, PIXEL_LOSS, PIXEL_LOSS),
}
each_case = pytest.mark.parametrize("case", CASES)


def with_weights(batch: Batch, support, query) -> Batch:
    return Batch(batch.support_x, (batch.support_y, support), batch.query_x, (batch.query_y, query))


def alone(batch: Batch, t: int) -> Batch:
    """A batch of task t only, without its padding."""
    support, query = SUPPORT[t].bool(), QUERY[t].bool()
    return Batch(*(d[t, keep][None] for d, keep in zip(batch, (support, support, query, query))))


def define(loss, prediction, target, weight):
    """The weighted loss of one task from its definition, sample by sample."""
    total, divisor = 0.0, 0.0
    for p, y, w in zip(prediction, target, weight):
        terms, options = loss, {}
        if isinstance(loss, functools.partial):
            terms, options = loss.func, loss.keywords
        elif isinstance(loss, nn.HuberLoss):
            terms, options = F.huber_loss, {"delta": loss.delta}
        elif isinstance(loss, nn.CrossEntropyLoss):
            terms, options = F.cross_entropy, {"weight": loss.weight, "label_smoothing": loss.label_smoothing}
        each = terms(p[None], y[None], reduction="none", **options)
        count = torch.full_like(each, 1.0)
        if not y.is_floating_point():
            ignored = y[None] == options.get("ignore_index", -100)
            classes = options.get("weight")
            count = torch.ones_like(each) if classes is None else classes[torch.where(ignored, 0, y[None])]
            count = torch.where(ignored, 0.0, count)
            total, divisor = total + w * each.sum(), divisor + w * count.sum()
        else:
            total, divisor = total + w * each.mean(), divisor + w
    return total / divisor


@each_case
@both_ways
def test_padded_tasks_are_what_each_is_alone(case, wrap):
    build, data, loss, plain = CASES[case]
    module, batch = wrap(build()), require_grad(data())
    lr = torch.tensor([[0.1], [0.2]], requires_grad=True)
    padded = with_weights(batch, SUPPORT.double(), 3.0 * QUERY)
    maml = maml_ext.MAML(module, lr=lr, steps=2, loss=loss)
    assert runs_at_once(maml, padded) == (wrap is nn.Sequential)
    wrt = {"parameters": list(module.parameters()), "lr": lr, "x": [batch.support_x, batch.query_x]}
    if batch.support_y.is_floating_point():
        wrt["y"] = [batch.support_y, batch.query_y]
    with unchanged(module):
        found = maml(*padded)
    expected = torch.cat([plain_maml(module, alone(batch, t), lr, 2, plain)[-1] for t in range(TASKS)])
    assert_same({"loss": found}, {"loss": expected}, 1e-12)
    assert_same(gradients(found, wrt), gradients(expected, wrt))


@pytest.mark.parametrize("case", ["batch norm, mse", "conv net, labels", "labels of positions, some ignored"])
@both_ways
def test_a_derivative_of_the_meta_gradient(case, wrap, monkeypatch):
    """Third derivatives, which torch's own batch norm has wrong: the plain loop gets one of plain operators."""

    def plain_norm(x, mean, variance, weight, bias, training, momentum, eps):
        variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0, keepdim=True)
        shape = (-1, *[1] * (x.dim() - 2))
        return (x - mean) / (variance + eps).sqrt() * weight.view(shape) + bias.view(shape)

    build, data, loss, plain = CASES[case]
    module, batch = wrap(build()), require_grad(data())
    maml = maml_ext.MAML(module, lr=0.1, steps=1, loss=loss)
    results = {"found": maml(*with_weights(batch, SUPPORT.double(), QUERY.double()))}
    with monkeypatch.context() as patch:
        patch.setattr(F, "batch_norm", plain_norm)
        tasks = [plain_maml(module, alone(batch, t), 0.1, 1, plain)[-1] for t in range(TASKS)]
    results["expected"] = torch.cat(tasks)
    wrt = {"parameters": list(module.parameters()), "x": [batch.support_x, batch.query_x]}
    for name, value in results.items():
        first = torch.autograd.grad(weighted_sum(value), wrt["parameters"], create_graph=True)
        results[name] = gradients(torch.cat([g.sin().reshape(-1) for g in first]), wrt)
    assert_same(results["found"], results["expected"])


@each_case
@both_ways
def test_weights_by_their_definition(case, wrap):
    """Positive ones, which leave batch norm as it is; weights learn as well."""
    build, data, loss, plain = CASES[case]
    module, batch = wrap(build()), data()
    weights = [torch.rand(TASKS, n).add(0.1).requires_grad_() for n in (SHOTS, QUERIES)]
    weighted = with_weights(batch, *weights)
    maml = maml_ext.MAML(module, lr=0.1, steps=2, loss=loss)
    wrt = {"parameters": list(module.parameters()), "weights": weights}
    found = maml(*weighted)
    expected = plain_maml(module, weighted, 0.1, 2, lambda p, t: define(plain, p, *t))[-1]
    assert_same({"loss": found}, {"loss": expected}, 1e-12)
    assert_same(gradients(found, wrt), gradients(expected, wrt))


@each_case
def test_equal_weights_change_nothing(case):
    build, data, loss, _ = CASES[case]
    module, batch = build(), data()
    maml = maml_ext.MAML(module, lr=0.1, steps=2, loss=loss)
    wrt = {"parameters": list(module.parameters())}
    ones = with_weights(batch, torch.ones(TASKS, SHOTS), torch.ones(TASKS, QUERIES))
    found, expected = maml(*ones), maml(*batch)
    assert_same({"loss": found}, {"loss": expected}, 1e-12)
    assert_same(gradients(found, wrt), gradients(expected, wrt))


def test_first_order_and_the_functional_layer():
    module, batch = norm_mlp(), vectors()
    theta, x, y, w = maml_ext.flatten(module).detach(), *batch[:2], SUPPORT.double()
    maml = maml_ext.MAML(module, lr=0.1, steps=2, meta_gradient="first_order")
    wrt = {"parameters": list(module.parameters())}
    found = maml(*with_weights(batch, w, QUERY.double()))
    tasks = [plain_maml(module, alone(batch, t), 0.1, 2, F.mse_loss, first_order=True)[-1] for t in range(TASKS)]
    assert_same(gradients(found, wrt), gradients(torch.cat(tasks), wrt))
    for t in range(TASKS):
        sx, sy, *_ = alone(batch, t)
        for name, arguments in (("task_loss", ()), ("hvp", (theta.sin(),))):
            function = getattr(maml_ext, name)
            assert_same(
                {name: function(module, theta, x, (y, w), *arguments)[t]},
                {name: function(module, theta, sx, sy, *arguments)[0]},
            )


def test_under_transforms_of_the_caller():
    """Values of weights cannot be read there: they are not looked at."""
    module, (x, y, *_) = norm_mlp(), vectors()
    theta, w = maml_ext.flatten(module).detach(), torch.rand(TASKS, SHOTS) + 0.1
    scales = torch.tensor([0.5, 2.0])

    def loss(theta, w):
        return maml_ext.task_loss(module, theta, x, (y, w)).sum()

    jacobian = torch.func.jacrev(loss, argnums=(0, 1))(theta, w)
    expected = torch.autograd.functional.jacobian(loss, (theta, w))
    assert_same({"jacrev": list(jacobian)}, {"jacrev": list(expected)})
    moved = w[None] + scales[:, None, None]
    values = torch.vmap(loss, (None, 0))(theta, moved)
    assert_same({"vmap": values}, {"vmap": torch.stack([loss(theta, m) for m in moved])})


def test_predictions_without_weights_see_all_samples():
    """Only where the target comes along does batch norm know what is padding."""
    module, batch = norm_mlp(), vectors()
    theta = maml_ext.flatten(module).detach()
    expected = torch.stack([module(x) for x in batch.support_x])
    assert_same({"prediction": maml_ext.network(module, theta, batch.support_x)}, {"prediction": expected})


def test_batch_norm_of_any_spelling():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(3, 2), nn.Parameter(torch.rand(2))

        def forward(self, x):
            x = F.batch_norm(self.linear(x), None, None, self.scale, training=True)
            return torch.batch_norm(x.sin(), None, None, None, None, True, 0.1, 1e-5, False)

    module, batch = Direct(), vectors()
    found = maml_ext.MAML(module, lr=0.1, steps=2)(*with_weights(batch, SUPPORT.double(), QUERY.double()))
    expected = torch.cat([plain_maml(module, alone(batch, t), 0.1, 2, F.mse_loss)[-1] for t in range(TASKS)])
    wrt = {"parameters": list(module.parameters())}
    assert_same(gradients(found, wrt), gradients(expected, wrt))


def test_trained_statistics_and_norms_of_a_sample():
    """Batch norm in eval mode and norms within a sample have nothing to leave out."""
    module = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Unflatten(1, (3, 2)), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3),
        nn.Tanh(), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 2),
    )  # fmt: skip
    batch = vectors()
    module(batch.support_x[0])
    module[1].eval()
    found = maml_ext.MAML(module, lr=0.1, steps=2)(*with_weights(batch, SUPPORT.double(), QUERY.double()))
    expected = torch.cat([plain_maml(module, alone(batch, t), 0.1, 2, F.mse_loss)[-1] for t in range(TASKS)])
    wrt = {"parameters": list(module.parameters())}
    assert_same(gradients(found, wrt), gradients(expected, wrt))


# Torch's losses.

RECOGNISED = {
    "nn.MSELoss": (nn.MSELoss(), "mse"),
    "F.mse_loss": (F.mse_loss, "mse"),
    "nn.HuberLoss": (nn.HuberLoss(delta=0.2), "huber"),
    "F.huber_loss": (F.huber_loss, "huber"),
    "partial of huber": (functools.partial(F.huber_loss, delta=0.2, reduction="mean"), "huber"),
    "nn.CrossEntropyLoss": (nn.CrossEntropyLoss(CLASSES, ignore_index=2, label_smoothing=0.1), "cross_entropy"),
    "F.cross_entropy": (F.cross_entropy, "cross_entropy"),
    "partial of cross_entropy": (functools.partial(F.cross_entropy, weight=CLASSES), "cross_entropy"),
    "nn.BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), "bce_with_logits"),
    "F.bce": (F.binary_cross_entropy_with_logits, "bce_with_logits"),
}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("case", RECOGNISED)
def test_torch_losses_are_recognised(case, backend):
    loss, kind = RECOGNISED[case]
    assert losses.recognise(loss).kind == kind
    module, batch = (conv_net(), images()) if kind == "cross_entropy" else (smooth_mlp(), probabilities())
    found = maml_ext.MAML(module, lr=0.1, steps=2, loss=loss, backend=backend)(*batch)
    expected = plain_maml(module, batch, 0.1, 2, loss)[-1]
    wrt = {"parameters": list(module.parameters())}
    assert_same({"loss": found}, {"loss": expected}, 1e-12)
    assert_same(gradients(found, wrt), gradients(expected, wrt))


class Own(nn.MSELoss):
    pass


def hooked() -> nn.Module:
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda module, inputs, output: 2 * output)
    return loss


UNKNOWN = {
    "subclass": Own(),
    "sum": nn.MSELoss(reduction="sum"),
    "hook": hooked(),
    "pos_weight": nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)),
    "learned class weights": functools.partial(F.cross_entropy, weight=torch.ones(3, requires_grad=True)),
    "delta 0": nn.HuberLoss(delta=1.0),
    "positional": functools.partial(F.mse_loss, torch.ones(2)),
    "another": F.l1_loss,
    "a function": lambda p, y: (p - y).square().mean(),
}
UNKNOWN["delta 0"].delta = 0.0


@pytest.mark.parametrize("case", UNKNOWN)
def test_other_losses_are_the_users_own(case):
    assert losses.recognise(UNKNOWN[case]) is None
    assert losses.resolve(UNKNOWN[case]) is UNKNOWN[case]


def test_a_callable_gets_its_target_as_it_is():
    module, batch = smooth_mlp(), vectors()
    seen = []

    def loss(prediction, target):
        y, (w, more) = target
        seen.append([tuple(t.shape) for t in (y, w, more)])
        return (w * (prediction - y).square().mean(-1) + more.sum()).sum()

    pair = lambda y: (y, (-torch.rand(y.shape[:2]), torch.zeros(TASKS, 7)))
    batch = batch._replace(support_y=pair(batch.support_y), query_y=pair(batch.query_y))
    found = maml_ext.MAML(module, lr=0.1, loss=loss)(*batch)
    assert_same({"loss": found}, {"loss": plain_maml(module, batch, 0.1, 1, loss)[-1]}, 1e-12)
    whole = [[(n, 2), (n,), (7,)] for n in (SHOTS, QUERIES)]  # beside what it is tried on
    assert all(shapes in seen for shapes in whole)


@pytest.mark.parametrize("weighted", [False, True])
def test_settings_are_those_of_the_call(weighted):
    module, batch, loss = smooth_mlp(), probabilities(), nn.CrossEntropyLoss()
    given = with_weights(batch, torch.ones(TASKS, SHOTS), torch.ones(TASKS, QUERIES)) if weighted else batch
    maml = maml_ext.MAML(module, lr=0.1, loss=loss, backend="torch")
    wrt = {"parameters": list(module.parameters())}
    for smoothing in (0.0, 0.3, 0.0):
        loss.label_smoothing = smoothing
        found, expected = maml(*given), plain_maml(module, batch, 0.1, 1, loss)[-1]
        assert_same({"loss": found}, {"loss": expected}, 1e-12)
        assert_same(gradients(found, wrt), gradients(expected, wrt))


@both_ways
def test_a_change_between_forward_and_backward_changes_nothing(wrap):
    """A backward pass that is recorded computes anew, with the settings that there were."""
    module, batch, loss = wrap(smooth_mlp()), probabilities(), nn.CrossEntropyLoss(label_smoothing=0.2)
    maml = maml_ext.MAML(module, lr=0.1, loss=loss, reduction="mean")
    parameters = list(module.parameters())

    def second(change):
        loss.label_smoothing, maml.meta_gradient, maml.reduction = 0.2, "exact", "mean"
        value = maml(*batch)
        change()
        first = torch.autograd.grad(value, parameters, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), parameters)

    def everything():
        loss.label_smoothing, maml.meta_gradient, maml.reduction = 0.7, "first_order", "none"

    assert_same({"second": list(second(everything))}, {"second": list(second(lambda: None))})


def test_settings_hold_their_class_weights():
    """Another tensor at the address of one that is gone is not the same."""
    seen = {losses.Loss("cross_entropy", class_weight=torch.ones(3)).settings for _ in range(10)}
    assert len(seen) == 10
    loss = losses.Loss("cross_entropy", class_weight=torch.ones(3))
    assert loss.settings == loss.settings and hash(loss.settings) == hash(loss.settings)


@pytest.mark.parametrize("case", ["labels", "pixels"])
def test_smoothed_class_weighted_labels_run_at_once(case):
    module, batch = (conv_net(), images()) if case == "labels" else (segmenter(), pixels())
    maml = maml_ext.MAML(module, lr=0.1, loss=PIXEL_LOSS, backend="torch")
    assert runs_at_once(maml, batch)
    wrt = {"parameters": list(module.parameters())}
    found, expected = maml(*batch), plain_maml(module, batch, 0.1, 1, PIXEL_LOSS)[-1]
    assert_same({"loss": found, **gradients(found, wrt)}, {"loss": expected, **gradients(expected, wrt)})


# Errors.


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_labels_under_transforms_of_the_caller(backend):
    """They are not looked at where they cannot be, and are where they can."""
    module, (x, y, *_) = conv_net(), images()
    theta = maml_ext.flatten(module).detach()
    options = {"loss": "cross_entropy", "backend": backend}
    found = torch.vmap(lambda y: maml_ext.task_loss(module, theta, x, y, **options))(torch.stack([y, 2 - y]))
    expected = [maml_ext.task_loss(module, theta, x, labels, **options) for labels in (y, 2 - y)]
    assert_same({"losses": found}, {"losses": torch.stack(expected)})
    for function, steps in ((maml_ext.inner_loop, 0), (maml_ext.inner_loop, 1), (maml_ext.task_loss, None)):
        more = {} if steps is None else {"lr": 0.1, "steps": steps}
        name = "y" if steps is None else "support_y"
        with pytest.raises(ValueError, match=rf"^{name}: expected labels in 0\.\.2 .* for 3 classes, got 3"):
            function(module, theta, x, y.clamp(max=0) + 3, **more, **options)
    with pytest.raises(ValueError, match=r"^y: expected labels in 0\.\.2"):
        maml_ext.hvp(module, theta, x, y - 3, theta, **options)


WEIGHTS = {
    "samples": (lambda w: w[:, 1:], ValueError, r"expected weights \[3, {n}\], one a sample, got \[3, {n-1}\]"),
    "tasks": (lambda w: w[1:], ValueError, "expected 3 tasks like {x}, got 2"),
    "shape": (lambda w: w[..., None], TypeError, "expected a tensor for loss 'mse', got tuple.*weights"),
    "a weight a task": (lambda w: w[:, 0], TypeError, "expected a tensor for loss 'mse', got tuple.*weights"),
    "nested": (lambda w: (w, w), TypeError, "expected a tensor for loss 'mse', got tuple.*weights"),
    "float32": (lambda w: w.float(), TypeError, "expected torch.float64 like the parameters, got torch.float32"),
    "integers": (lambda w: w.long(), TypeError, "expected weights in torch.float64.*got torch.int64"),
    "negative": (lambda w: w - 1.5, ValueError, "expected finite weights of 0 or more, got -0.5"),
    "NaN": (lambda w: w / w.cumsum(1).sub(1), ValueError, "expected finite weights of 0 or more, got (inf|nan)"),
    "one NaN": (lambda w: w.log().sub(1).sqrt(), ValueError, "expected finite weights of 0 or more, got nan"),
    "no sample": (
        lambda w: w * torch.tensor([1.0, 0.0, 1.0])[:, None],
        ValueError,
        "expected a weight above 0 in every task, got a task with none",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("remembered", [False, True], ids=["first call", "second call"])
@pytest.mark.parametrize("which", ["support", "query"])
def test_bad_weights(which, remembered, case):
    change, error, message = WEIGHTS[case]
    module, batch = smooth_mlp(), vectors()
    maml = maml_ext.MAML(module)
    good = {"support": torch.ones(TASKS, SHOTS), "query": torch.ones(TASKS, QUERIES)}
    if remembered:
        maml(*with_weights(batch, **good))
    n = SHOTS if which == "support" else QUERIES
    for old, new in (("{x}", f"{which}_x"), ("{n}", str(n)), ("{n-1}", str(n - 1))):
        message = message.replace(old, new)
    bad = with_weights(batch, **{**good, which: change(good[which])})
    with unchanged(module), pytest.raises(error, match=f"^{which}_y: {message}"):
        maml(*bad)


def test_weights_do_not_hide_a_bad_target():
    module, batch = conv_net(), images()
    maml, w = maml_ext.MAML(module, loss=nn.CrossEntropyLoss()), torch.ones(TASKS, SHOTS)
    x, y = batch[:2]
    for target, message in (
        (y + 3, r"expected labels in 0\.\.2"),
        (y[:, 1:], "expected 4 samples a task like support_x"),
        (y[..., None], "expected labels"),
    ):
        with pytest.raises(ValueError, match=f"^support_y: {message}"):
            maml.adapt(x, (target, w))
    with pytest.raises(TypeError, match="^support_y: expected a tensor for loss 'cross_entropy', got tuple"):
        maml.adapt(x, (y, w, w))


@pytest.mark.parametrize("weights, error, message", [
    (torch.ones(4), ValueError, r"loss: expected class weights \[3\], got \[4\]"),
    (torch.ones(3, dtype=torch.float32), TypeError, "loss: expected class weights in torch.float64"),
    (torch.ones(3, device="meta"), ValueError, "loss: expected class weights on cpu"),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_bad_class_weights(backend, weights, error, message):
    maml = maml_ext.MAML(conv_net(), loss=nn.CrossEntropyLoss(weights), backend=backend)
    with pytest.raises(error, match=f"^{message}"):
        maml(*images())


def test_batch_norm_whose_samples_are_not_first():
    module = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1), nn.BatchNorm1d(2),
                           nn.Unflatten(0, (SHOTS, 2)), nn.Flatten(1), nn.Linear(4, 2))  # fmt: skip
    x, y, *_ = vectors()
    maml = maml_ext.MAML(module)
    maml.adapt(x, y)
    with pytest.raises(ValueError, match="^support_x: .*batch norm with weights of samples needs the 4 samples"):
        maml.adapt(x, (y, torch.ones(TASKS, SHOTS)))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_huber_has_its_curvature_where_prediction_and_target_agree(backend):
    module = nn.Linear(2, 1, dtype=torch.float64)
    theta, x = torch.zeros(3, dtype=torch.float64), torch.randn(1, 4, 2, dtype=torch.float64)
    y, vector = torch.zeros(1, 4, 1, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    found = maml_ext.hvp(module, theta, x, y, vector, loss="huber", backend=backend)
    torch.testing.assert_close(found, maml_ext.hvp(module, theta, x, y, vector, loss="mse", backend=backend) / 2)
