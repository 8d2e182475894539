"""What each feature of a module means for MAML: buffers, norms, dropout, tied and frozen parameters."""

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TASKS,
    Batch,
    TaskByTask,
    Transformer,
    assert_same,
    both_ways,
    conv_net,
    gradients,
    images,
    plain_maml,
    relative_error,
    runs_at_once,
    smooth_mlp,
    unchanged,
    vectors,
    weighted_sum,
)
from torch import nn
from torch.nn.utils import parametrizations

import maml_ext

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings(
        "ignore:.*weight_norm. is deprecated", "ignore:.torch.jit.script. is deprecated"
    ),
]


def check(module, batch, loss="mse", function=F.mse_loss, steps=2, lr=0.1):
    """Losses and gradients are the oracle's, and neither pass leaves a trace on the module."""
    named = {"parameters": [p for p in module.parameters() if p.requires_grad]}
    expected = plain_maml(module, batch, lr, steps, function)[-1]
    expected = {"losses": expected, **gradients(expected, named)}
    with unchanged(module):
        maml = maml_ext.MAML(module, lr=lr, steps=steps, loss=loss)
        maml.explain(*batch[:2])
        losses = maml(*batch)
        found = {"losses": losses, **gradients(losses, named)}
        with torch.no_grad():
            evaluated = maml(*batch)
    assert_same(found, expected)
    assert relative_error(evaluated, losses) < 1e-14 and not evaluated.requires_grad
    return maml


# Buffers.


class Scaled(nn.Module):
    """Uses a buffer, and in training mode writes it too, as a running statistic is written."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.linear = nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))

    def forward(self, x):
        if self.how == "in place":
            self.scale.mul_(0.5)
        elif self.how == "from the data":
            self.scale.lerp_(x.detach().mean((0, 1)).expand(2), 0.1)
        elif self.how == "replaced":
            self.scale = 0.5 * self.scale + x.detach().mean()
        return self.linear(x) * self.scale


@both_ways
@pytest.mark.parametrize("how", ["read only", "in place", "from the data", "replaced"])
def test_buffers_are_the_same_for_every_task_and_step(wrap, how):
    check(wrap(Scaled(how)), vectors())


@both_ways
@pytest.mark.parametrize("track", [True, False], ids=["running statistics", "none"])
def test_batch_norm_in_training_mode_uses_the_batch_and_leaves_its_running_statistics(wrap, track):
    module, batch = conv_net(), images()
    module[1] = nn.BatchNorm2d(3, track_running_stats=track)
    check(wrap(module), batch, "cross_entropy", F.cross_entropy)
    if track:
        assert module[1].num_batches_tracked == 0 and not module[1].running_mean.any()
        # Not by the running statistics: they may hold anything.
        module[1].running_mean.fill_(100.0)
        check(wrap(module), batch, "cross_entropy", F.cross_entropy)


NORMS = {
    "batch norm 1d": lambda: nn.BatchNorm1d(3),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, affine=True, track_running_stats=True), nn.Flatten()
    ),
    "group norm": lambda: nn.GroupNorm(1, 3),
    "layer norm": lambda: nn.LayerNorm(3),
}


@both_ways
@pytest.mark.parametrize("norm", NORMS)
def test_other_norms(wrap, norm):
    check(wrap(nn.Sequential(nn.Linear(3, 3), NORMS[norm](), nn.Tanh(), nn.Linear(3, 2))), vectors())


@both_ways
def test_batch_norm_in_eval_mode_uses_its_running_statistics(wrap):
    module, batch = conv_net(), images()
    for _ in range(20):
        module(torch.randn(8, 1, 6, 6) + 1)
    training = maml_ext.MAML(wrap(module), lr=0.1, loss="cross_entropy")(*batch)
    check(wrap(module).eval(), batch, "cross_entropy", F.cross_entropy)
    assert (
        relative_error(maml_ext.MAML(wrap(module).eval(), lr=0.1, loss="cross_entropy")(*batch), training)
        > 0.01
    )


def test_batch_norm_in_eval_mode_without_statistics_is_refused():
    module, batch = conv_net(), images()
    maml = maml_ext.MAML(module, loss="cross_entropy")
    maml(*batch)
    maml.eval()
    for function in (lambda: maml(*batch), lambda: maml.explain(*batch[:2])):
        with pytest.raises(
            ValueError, match="module: 1 is in eval mode, but its running statistics were never"
        ):
            function()
    module[1].track_running_stats = False  # then eval mode uses the batch as well
    module[1].running_mean = module[1].running_var = module[1].num_batches_tracked = None
    maml(*batch)


# Dropout.


class Masks(nn.Module):
    """Its prediction is the mask it drew; ``p`` plays no part but to be trained."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(x) + self.p


@both_ways
def test_dropout_draws_a_mask_for_each_task_and_each_call(wrap):
    module, x = wrap(Masks()), torch.ones(TASKS, 2, 50)
    theta = maml_ext.flatten(module).detach()
    torch.manual_seed(3)
    first, second = (maml_ext.network(module, theta, x) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(maml_ext.network(module, theta, x), first)
    masks = [*first, *second]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 2 * TASKS
    assert all(0.3 < (mask == 0).double().mean() < 0.7 for mask in masks)


@both_ways
def test_dropout_draws_a_mask_for_each_step(wrap):
    """The gradient of this loss is the mask: so the updates are the masks of the steps."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(40))

        def forward(self, x):
            return F.dropout(self.weight * x, 0.5, self.training).sum(-1)

    module, x = wrap(Linear()), torch.ones(TASKS, 1, 40)
    thetas = maml_ext.inner_loop(
        module,
        maml_ext.flatten(module),
        x,
        x[..., 0],
        lr=1.0,
        steps=3,
        loss=lambda prediction, _: prediction.mean(),
    )
    steps = [thetas[k] - thetas[k + 1] for k in range(3)]
    masks = {tuple(mask.tolist()) for step in steps for mask in step}
    assert len(masks) == 3 * TASKS
    assert {value for mask in masks for value in mask} == {0.0, 2.0}


@both_ways
@pytest.mark.parametrize("mode", ["exact", "first_order"])
def test_the_backward_pass_replays_the_masks_of_the_forward_pass(wrap, mode):
    """Finite differences under one seed, of a loss that every step and the query contribute to."""
    module, batch = (
        wrap(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2))),
        vectors(),
    )
    theta = maml_ext.flatten(module).detach().requires_grad_()
    lr = torch.full((2, 1), 0.2, requires_grad=True)

    def losses(theta, lr):
        torch.manual_seed(5)
        thetas = maml_ext.inner_loop(module, theta, *batch[:2], lr=lr, steps=2, meta_gradient=mode)
        return sum(maml_ext.task_loss(module, theta, *batch[2:]) for theta in thetas)

    if mode == "exact":
        assert torch.autograd.gradcheck(losses, (theta, lr), check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(losses, (theta, lr), fast_mode=True)
    else:  # the last rate's gradient is the same in first order: no step comes after it
        found = torch.autograd.grad(losses(theta, lr).sum(), lr)[0][1, 0]
        h = torch.zeros(2, 1).index_fill(0, torch.tensor(1), 1e-6)
        numerical = (losses(theta, lr + h) - losses(theta, lr - h)).sum() / 2e-6
        assert relative_error(found, numerical.detach()) < 1e-6


@both_ways
def test_random_numbers_of_the_caller_stay_the_callers(wrap):
    """The generator moves when a network draws, by an amount that does not depend on how much it draws."""
    batch = vectors()
    with unchanged(smooth := wrap(smooth_mlp())):
        maml = maml_ext.MAML(smooth, steps=2)
        maml.explain(*batch[:2])
        torch.autograd.grad(maml(*batch).sum(), list(smooth.parameters()))
    states = []
    for p, steps in ((0.5, 2), (0.2, 5)):
        module = wrap(nn.Sequential(nn.Linear(3, 6), nn.Dropout(p), nn.Linear(6, 2)))
        torch.manual_seed(1)
        before = torch.get_rng_state()
        maml = maml_ext.MAML(module, steps=steps)
        maml.explain(*batch[:2])
        assert torch.equal(torch.get_rng_state(), before)
        losses = maml(*batch)
        moved = torch.get_rng_state()
        assert not torch.equal(moved, before)
        losses.sum().backward()
        assert torch.equal(torch.get_rng_state(), moved)
        states.append(moved)
    assert torch.equal(*states)


@both_ways
@pytest.mark.parametrize("switch", ["eval mode", "p = 0"])
def test_dropout_that_is_off_is_the_identity(wrap, switch):
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0 if switch == "p = 0" else 0.5), nn.Linear(4, 2))
    check(wrap(module).train(switch == "p = 0"), vectors())


def test_dropout_switched_on_later():
    """A schedule of p: what is remembered of a module must not outlive what it was true of."""
    module, x = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.0)), torch.ones(TASKS, 2, 3)
    theta = maml_ext.flatten(module).detach()
    target = torch.zeros(TASKS, 2, 50)
    maml_ext.task_loss(module, theta, x, target)
    module[1].p = 0.5

    def loss(theta):
        torch.manual_seed(0)
        return maml_ext.inner_loop(module, theta, x, target, lr=0.1, steps=2)[-1]

    assert torch.autograd.gradcheck(loss, theta.requires_grad_(), fast_mode=True)


# Parameters.


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@both_ways
def test_tied_weights_are_one_parameter(wrap):
    module = wrap(Tied())
    assert maml_ext.flatten(module).numel() == 9 + 3 + 3 + 6 + 2
    maml = check(module, vectors())
    assert sum("weight" in name for name in maml.adapt(*vectors()[:2]).parameters()) == 2


@both_ways
def test_frozen_parameters_are_neither_adapted_nor_given_gradients(wrap):
    module, batch = wrap(smooth_mlp()), vectors()
    first, *rest = module.parameters()
    first.requires_grad_(False)
    maml = check(module, batch)
    maml(*batch).sum().backward()
    assert first.grad is None and all(p.grad is not None for p in rest)
    assert len(maml.adapt(*batch[:2]).parameters()) == 3
    first.requires_grad_(True)  # and when it thaws, it is adapted again
    check(module, batch)


@both_ways
def test_unused_parameters_have_gradients_of_zero(wrap):
    module = smooth_mlp()
    module.register_parameter("unused", nn.Parameter(torch.ones(2)))
    module, batch = wrap(module), vectors()
    maml = maml_ext.MAML(module, lr=0.1, steps=2)
    maml(*batch).sum().backward()
    unused = dict(module.named_parameters())
    (name,) = (n for n in unused if n.endswith("unused"))
    assert not unused[name].grad.any()
    assert torch.equal(maml.adapt(*batch[:2]).parameters()[name], torch.ones(TASKS, 2))


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_parametrizations(how, training):
    module = smooth_mlp()
    getattr(parametrizations, how)(module[0])
    check(module.train(training), vectors())


def test_weight_norm_by_hooks():
    module, batch = smooth_mlp(), vectors()
    torch.nn.utils.weight_norm(module[0])
    expected = gradients(plain_maml(module, batch, 0.1, 2, F.mse_loss)[-1], {"p": list(module.parameters())})
    losses = maml_ext.MAML(module, lr=0.1, steps=2)(*batch)
    assert_same(gradients(losses, {"p": list(module.parameters())}), expected)


# Inputs.


class Embedded(nn.Module):
    """Integer inputs, and float inputs beside them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3, padding_idx=0)
        self.head = nn.Linear(3, 2)

    def forward(self, index, weights=None):
        x = self.embedding(index)
        x = x.mean(1) if weights is None else (x * weights[..., None]).sum(1)
        return self.head(torch.tanh(x))


def integers(samples):
    return torch.randint(5, (TASKS, samples, 6))


@both_ways
def test_integer_inputs(wrap):
    batch = vectors()
    check(wrap(Embedded()), batch._replace(support_x=integers(4), query_x=integers(5)))


class Two(nn.Module):
    """A module of two inputs, which ``nn.Sequential`` cannot hold."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *x):
        return self.module(*x)


@pytest.mark.parametrize("wrap", [Two, TaskByTask], ids=["at once", "looped"])
def test_tuple_inputs(wrap):
    module, batch = wrap(Embedded()), vectors()
    weights = torch.rand(TASKS, 4, 6, requires_grad=True)
    batch = batch._replace(support_x=(integers(4), weights), query_x=(integers(5), torch.rand(TASKS, 5, 6)))
    maml = check(module, batch)
    found = gradients(maml(*batch), {"weights": weights})
    assert_same(found, gradients(plain_maml(module, batch, 0.1, 2, F.mse_loss)[-1], {"weights": weights}))


class Sequence(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(1, 3, batch_first=True, **options)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.rnn(x[..., None])[0][:, -1])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_recurrent_modules(kind, training):
    """vmap has no rule for their hidden states: a loop over tasks, and the reason is told."""
    maml = check(Sequence(kind).train(training), vectors())
    batch = vectors()
    assert not runs_at_once(maml, batch)
    assert any("torch.vmap" in reason for reason in maml.explain(*batch[:2]).reasons)


@both_ways
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transformer(wrap, training):
    """In eval mode without gradients torch would take a fused path, which must change nothing."""
    check(wrap(Transformer()).train(training), vectors())


def test_transformer_with_dropout():
    module, batch = Transformer(dropout=0.3), vectors()
    theta = maml_ext.flatten(module).detach().requires_grad_()

    def losses(theta):
        torch.manual_seed(2)
        return maml_ext.inner_loop(module, theta, *batch[:2], lr=0.1, steps=2)[-1]

    assert torch.autograd.gradcheck(losses, theta, fast_mode=True)
    check(module.eval(), batch)


def test_in_place_activations_and_views():
    activations = (
        nn.ReLU(inplace=True),
        nn.Linear(4, 4),
        nn.ELU(inplace=True),
        nn.Unflatten(1, (2, 2)),
        nn.Flatten(),
    )
    check(nn.Sequential(nn.Linear(3, 4), *activations, nn.Linear(4, 2)), vectors())


@both_ways
def test_hooks_run(wrap):
    module, batch, seen = smooth_mlp(), vectors(), []
    module[0].register_forward_pre_hook(lambda module, x: (2 * x[0],))
    module[1].register_forward_hook(lambda module, x, y: y + x[0])
    module[0].register_forward_hook(lambda *_: seen.append(1))
    check(wrap(module), batch)
    assert seen


def test_backward_hooks_run():
    module, batch, seen = smooth_mlp(), vectors(), []
    module[0].register_full_backward_hook(lambda *_: seen.append(1))
    check(module, batch)
    assert seen


@both_ways
def test_predictions_of_any_structure_go_to_a_callable_loss(wrap):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.scale = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return {"mean": self.mean(x), "log_scale": self.scale(x)}

    def likelihood(prediction, target):
        scaled = (prediction["mean"] - target) * torch.exp(-prediction["log_scale"])
        return (prediction["log_scale"] + 0.5 * scaled.square()).mean()

    module = Two(Heads()) if wrap is nn.Sequential else wrap(Heads())
    check(module, vectors(), likelihood, likelihood)


def test_without_a_second_derivative_only_first_order_runs():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, cotangent):
            return 2 * ctx.saved_tensors[0] * cotangent

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return Once.apply(self.linear(x))

    module, batch = Module(), vectors()
    with pytest.raises(ValueError, match="meta_gradient: 'exact' needs second derivatives"):
        maml_ext.MAML(module, steps=2)(*batch)
    losses = maml_ext.MAML(module, lr=0.1, steps=2, meta_gradient="first_order")(*batch)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(module.linear.state_dict())
    squared = nn.Sequential(twin, Power())
    expected = plain_maml(squared, batch, 0.1, 2, F.mse_loss, first_order=True)[-1]
    found = gradients(losses, {"p": list(module.parameters())})
    assert_same(found, gradients(expected, {"p": list(twin.parameters())}))
    with torch.no_grad():
        assert relative_error(maml_ext.MAML(module, lr=0.1, steps=2)(*batch), expected) < 1e-10


class Power(nn.Module):
    def forward(self, x):
        return x.square()


# The loss.


@both_ways
def test_a_loss_that_closes_over_a_tensor_that_requires_grad_is_refused(wrap):
    """It would get no gradient, silently."""
    scale = torch.tensor(2.0, requires_grad=True)
    maml = maml_ext.MAML(wrap(smooth_mlp()), loss=lambda prediction, y: scale * F.mse_loss(prediction, y))
    with pytest.raises(ValueError, match="loss: .* uses a tensor that requires grad"):
        maml(*vectors())
    scale.requires_grad_(False)
    maml(*vectors())


# Evaluation.


@both_ways
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients_adapts_all_the_same(wrap, context):
    module, batch = wrap(smooth_mlp()), vectors()
    maml = maml_ext.MAML(module, lr=0.1, steps=3)
    expected = maml(*batch)
    with context():
        found = maml(*batch)
        after = maml.adapt(*batch[:2])
        assert relative_error(after(batch.query_x), maml.adapt(*batch[:2])(batch.query_x)) == 0
    assert relative_error(found, expected) < 1e-14 and not found.requires_grad
    assert not any(p.requires_grad for p in after.parameters().values())
    start = plain_maml(module, batch, 0.1, 0, F.mse_loss)[0]
    assert relative_error(found, start) > 1e-3


def test_the_modules_own_mode_and_attributes_are_left(monkeypatch):
    """Also where the module raises half-way."""
    module, batch = nn.Sequential(conv_net()[:2], TaskByTask(nn.Flatten()), nn.Linear(108, 3)), images()
    with unchanged(module):
        maml_ext.MAML(module, loss="cross_entropy")(*batch)
        monkeypatch.setattr(TaskByTask, "forward", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            maml_ext.MAML(module, loss="cross_entropy")(*batch)
    assert torch.backends.mha.get_fastpath_enabled()


def test_autocast_covers_the_backward_pass_too():
    """The meta-gradient in bfloat16 is near that of float32, and is that of the plain loop in bfloat16."""
    module = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 2)).float()
    batch = Batch(*(t.float() for t in vectors()))

    def loss(prediction, target):
        return F.mse_loss(prediction.float(), target)

    def meta_gradient(losses):
        return torch.autograd.grad(weighted_sum(losses), list(module.parameters()))

    maml = maml_ext.MAML(module, lr=0.1, steps=3, loss=loss)
    exact = meta_gradient(maml(*batch))
    with torch.autocast("cpu", torch.bfloat16):
        losses, plain = maml(*batch), plain_maml(module, batch, 0.1, 3, loss)[-1]
    found, expected = meta_gradient(losses), meta_gradient(plain)
    assert 1e-4 < relative_error(found, exact) < 2e-2
    assert relative_error(found, expected) < 2 * relative_error(expected, exact)
