"""Pitfalls of PyTorch that were found by experiment, and the formulas the design rests on.

Batch norm in eval mode without statistics, and that a fallback leaves running statistics alone, are in
``test_modules.py``; what an installation without a binary does is in ``test_maml.py``.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TASKS,
    Batch,
    Transformer,
    assert_same,
    both_ways,
    conv_net,
    gradients,
    images,
    plain_maml,
    relative_error,
    require_grad,
    runs_at_once,
    smooth_mlp,
    vectors,
    weighted_sum,
)
from torch import nn
from torch.func import grad, jvp, vmap

import maml_ext
from maml_ext import losses, recognise
from maml_ext.ops import library
from maml_ext.stateless import Layout

pytestmark = pytest.mark.usefixtures("float64")


# Silent zeros: what the forward-mode derivative of an operator with ``register_autograd`` alone is.


def operators():
    """Every operator in torch.ops.maml_ext, those of a later version too."""
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.split("::")[1] for name in names if name.startswith("maml_ext::")}
    without_tensors = {name for name in ours if name.startswith("cuda_")} | {"vector_bytes", "record"}
    return sorted(ours - without_tensors - {"recorded"})


def example(name):
    """Arguments of an operator; an operator without an example here is one that nobody has tested."""
    rows = [torch.randn(3, 4), torch.randn(2)]
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    layout = Layout(module)
    network = recognise.network(recognise.trace(module), layout, torch.Size([3]))
    program, numbers = [*network.program, 0, 0, -1, 0], [*network.numbers, 0.0, 0.0]
    theta, lr = layout.flatten().detach(), torch.full((1, 1), 0.1)
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    shared = program, numbers, None, theta
    step = torch.randn(2, layout.size)
    return {
        "predict": (*shared, x, [2]),
        "pull": (*shared, x, y, [1, 1]),
        "pull_tangent": (*shared, x, y, step, torch.randn_like(x)),
        "score": (*shared, x, y, torch.rand(2, 5), [1, 1, 1, 1]),
        "score_tangent": (*shared, x, y, torch.rand(2, 5), step, *map(torch.randn_like, (x, y)), None, [1, 1, 1]),
        "adapt": (*shared, lr, x, y, torch.rand(2, 5), 2),
        "adjoint": (*shared, lr, x, y, None, [step], [step, step], [0, 1], False, [1, 1, 1, 0]),
        "meta": (*shared[:3], [theta], lr, x, y, None, x, y, None, 2, False, False, [0, 1, 1, 0, 1, 1, 0]),
        "sgd_update": (rows, [torch.randn_like(r) for r in rows], [torch.randn(()), torch.randn(2)], []),
        "sgd_update_backward": (
            rows,
            [torch.randn_like(r) for r in rows],
            [torch.randn(4), torch.randn(())],
            [],
            True,
        ),
    }[name.removeprefix("checked_").removeprefix("triton_")]


def flat(function, arguments):
    """``function`` of its floating-point tensors alone, with one vector as its result; and the tensors."""
    leaves, spec = torch.utils._pytree.tree_flatten(arguments)
    where = [
        i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    ]

    def call(*tensors):
        full = list(leaves)
        for i, tensor in zip(where, tensors):
            full[i] = tensor
        result = function(*torch.utils._pytree.tree_unflatten(full, spec))
        return torch.cat([r.reshape(-1) for r in torch.utils._pytree.tree_leaves(result)])

    return call, [leaves[i] for i in where]


def right_or_raises(operator, arguments):
    """Whether the forward-mode derivative is refused, or that of finite differences."""
    call, tensors = flat(operator, arguments)
    tangents = [torch.randn_like(t) for t in tensors]
    try:
        found = jvp(call, tuple(tensors), tuple(tangents))[1]
    except (RuntimeError, NotImplementedError):
        return True
    ahead, behind = (call(*(t + h * d for t, d in zip(tensors, tangents))) for h in (1e-5, -1e-5))
    return relative_error(found, (ahead - behind) / 2e-5) < 1e-6


def test_there_are_operators():
    assert {"sgd_update", "sgd_update_backward", *REFUSE} <= set(operators())


REFUSE = ("pull_tangent", "score_tangent", "adjoint", "meta")  # the ends of the chain: their results have no derivative
PRIVATE = tuple(name for name in operators() if name.startswith(("checked_", "triton_")))


@pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled engine")
@pytest.mark.parametrize("name", REFUSE)
def test_the_last_derivative_refuses_a_further_one(name):
    call, tensors = flat(getattr(torch.ops.maml_ext, name), example(name))
    with pytest.raises(RuntimeError, match="no further derivative"):
        torch.autograd.grad(weighted_sum(call(*[t.requires_grad_() for t in tensors])), tensors)


@pytest.mark.parametrize("name", operators())
def test_forward_mode_derivative_of_every_operator_is_right_or_raises(name):
    assert right_or_raises(getattr(torch.ops.maml_ext, name), example(name))


@pytest.mark.parametrize("name", operators())
def test_every_operator_has_an_autograd_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"maml_ext::{name}", "Autograd")


def runs_here(name):
    return library.ABSENT is None or name.startswith("sgd")


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_operator_refuses_a_derivative(name):
    call, tensors = flat(getattr(torch.ops.maml_ext, name), example(name))
    with pytest.raises(RuntimeError, match=f"{name} has no derivative"):
        call(*[t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("name", [n for n in operators() if n not in (*REFUSE, *PRIVATE) and runs_here(n)])
def test_every_operator_has_a_gradient(name):
    call, tensors = flat(getattr(torch.ops.maml_ext, name), example(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an operator without a rule warns, and its gradient is None
        assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in tensors])
        recorded = torch.autograd.grad(
            weighted_sum(call(*tensors)), tensors, create_graph=True, allow_unused=True
        )
    assert any(g is not None and g.requires_grad for g in recorded)


def test_the_silent_zero_would_be_caught():
    """The negative control: an operator that does what the rule forbids."""
    library = torch.library.Library("maml_ext_settled", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: 2 * x, "CompositeExplicitAutograd")
    torch.library.register_autograd("maml_ext_settled::double", lambda ctx, c: 2 * c, lib=library)
    assert not right_or_raises(torch.ops.maml_ext_settled.double, (torch.randn(3),))


# Batch norm under vmap.


@both_ways
def test_batch_norm_has_the_right_second_derivative_under_vmap(wrap):
    """With weights, the gradient of mean(vmap(f)) is wrong for it in torch 2.13 (here by 3%, without a word).

    Ours is right because derivatives are taken inside the map over tasks, never through it.
    """
    module, batch = wrap(conv_net()), images()
    maml = maml_ext.MAML(module, lr=0.1, steps=1, loss="cross_entropy", reduction="mean")
    assert runs_at_once(maml, batch) == (wrap is nn.Sequential)
    named = {"parameters": list(module.parameters())}
    expected = plain_maml(module, batch, 0.1, 1, F.cross_entropy)[-1].mean()
    assert_same(gradients(maml(*batch), named), gradients(expected, named))


def test_batch_norm_that_tracks_statistics_runs_all_at_once():
    """vmap refuses the default batch norm, which would update its statistics: ours are stateless."""
    module, batch = conv_net(), images()
    assert module[1].track_running_stats
    with pytest.raises(RuntimeError, match="running_mean"):
        vmap(module, randomness="different")(batch.support_x)
    module[1].reset_running_stats()
    assert runs_at_once(maml_ext.MAML(module, loss="cross_entropy"), batch)


# Losses.


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_named_loss_has_a_batched_forward_over_reverse_derivative(name):
    """F.mse_loss and F.huber_loss have none."""
    loss, prediction, tangent = losses.LOSSES[name], 2 * torch.randn(TASKS, 4, 3), torch.randn(TASKS, 4, 3)
    target = torch.rand(TASKS, 4, 3).softmax(-1)

    def product(prediction, tangent, target):
        return jvp(grad(lambda p: loss(p, target)), (prediction,), (tangent,))[1]

    found = vmap(product)(prediction, tangent, target)
    for p, d, y, f in zip(prediction, tangent, target, found):
        expected = torch.autograd.functional.hvp(lambda p: loss(p, y), p, d)[1]
        assert relative_error(f, expected) < 1e-10 and expected.norm() > 0


# Attention.


def test_attention_has_a_second_derivative():
    """On the CPU only the MATH kernel has one, and a caller need not know."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(2, 18)

        def forward(self, x):
            query, key, value = self.project(x).view(-1, 1, 3, 6).chunk(3, -1)
            return F.scaled_dot_product_attention(query, key, value).mean((1, 2))

    module = Attention()
    batch = Batch(*(torch.randn(TASKS, 5, 2) for _ in range(4)))
    named = {"parameters": list(module.parameters())}
    found = gradients(maml_ext.MAML(module, lr=0.1, steps=2)(*batch), named)
    assert_same(found, gradients(plain_maml(module, batch, 0.1, 2, F.mse_loss)[-1], named))


def test_attention_in_eval_mode_has_a_second_derivative_and_the_switch_is_restored():
    module, batch = Transformer().eval(), vectors()
    named = {"parameters": list(module.parameters())}
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    found = gradients(maml_ext.MAML(module, lr=0.1, steps=2)(*batch), named)
    assert_same(found, gradients(plain_maml(module, batch, 0.1, 2, F.mse_loss)[-1], named))
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


# The adjoint recursion.


class Cube(torch.autograd.Function):
    """x ** 3 whose third derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(order, x):
        return {0: x**3, 1: 3 * x**2, 2: 6 * x}[order]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.order, x = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, cotangent):
        if ctx.order == 2:
            raise AssertionError("a third derivative was taken")
        return None, cotangent * Cube.apply(ctx.order + 1, *ctx.saved_tensors)


class Cubic(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.second(Cube.apply(0, self.first(x)))


@both_ways
def test_k_steps_need_no_derivative_above_the_second(wrap):
    module, batch, steps = wrap(Cubic()), require_grad(vectors()), 4
    lr = torch.tensor(0.01, requires_grad=True)
    named = {"parameters": list(module.parameters()), "lr": lr, "x": batch.support_x, "y": batch.support_y}
    found = gradients(maml_ext.MAML(module, lr=lr, steps=steps)(*batch), named)
    assert_same(found, gradients(plain_maml(module, batch, lr, steps, F.mse_loss)[-1], named))
    losses = maml_ext.MAML(module, lr=lr, steps=steps)(*batch)
    recorded = gradients(losses, {"parameters": named["parameters"]}, create_graph=True)["parameters"]
    with pytest.raises(AssertionError, match="third"):  # the negative control
        torch.autograd.grad(recorded[0].sum(), module.parameters())


def rate(kind, module, steps):
    sizes = [p.numel() for p in module.parameters()]
    masked = torch.tensor([0.0, 0.0, 0.1, 0.1])  # the inner loop of ANIL: the head alone adapts
    return {
        "scalar": torch.tensor(0.1),
        "per tensor": 0.1 * torch.rand(len(sizes)),
        "per parameter": 0.1 * torch.rand(sum(sizes)),
        "per step": 0.1 * torch.rand(steps, 1),
        "per step and tensor": 0.1 * torch.rand(steps, len(sizes)),
        "per step and parameter": 0.1 * torch.rand(steps, sum(sizes)),
        "ANIL mask": masked,
        "ANIL mask per step": masked.expand(steps, -1).contiguous(),
    }[kind]


KINDS = ["scalar", "per tensor", "per parameter", "per step", "per step and tensor", "per step and parameter"]


@both_ways
@pytest.mark.parametrize("kind", [*KINDS, "ANIL mask", "ANIL mask per step"])
def test_the_adjoint_formulas_hold_to_rounding(wrap, kind):
    """For theta, every shape of alpha, support inputs and labels."""
    module, steps = wrap(smooth_mlp()), 3
    batch = vectors()
    batch = batch._replace(support_y=batch.support_y.softmax(-1), query_y=batch.query_y.softmax(-1))
    batch, lr = require_grad(batch), rate(kind, module, steps).requires_grad_()
    named = {"theta": list(module.parameters()), "lr": lr, "x": batch.support_x, "y": batch.support_y}
    found = gradients(maml_ext.MAML(module, lr=lr, steps=steps, loss="cross_entropy")(*batch), named)
    assert_same(found, gradients(plain_maml(module, batch, lr, steps, F.cross_entropy)[-1], named), 1e-14)
    assert all(g.abs().sum() > 0 for g in found["theta"])
