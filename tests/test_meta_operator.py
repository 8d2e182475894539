"""The operator `meta`, called directly: means over tasks, what is wanted, theta in parts."""

import pytest
import torch
from conftest import relative_error
from torch import nn

from maml_ext import recognise
from maml_ext.ops import library
from maml_ext.program import ABSENT, LossKind
from maml_ext.stateless import Layout

pytestmark = pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled engine")


def vectors(device="cpu"):
    """A problem that every engine runs."""
    dtype = torch.float64
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    layout = Layout(module)
    network = recognise.network(recognise.trace(module), layout, torch.Size([3]))
    program, numbers = [*network.program, 0, 0, -1, 0], [*network.numbers, 0.0, 0.0]
    theta = layout.flatten().detach()
    tensors = theta, torch.randn(3, 4, 3, dtype=dtype), torch.randn(3, 4, 2, dtype=dtype)
    return program, numbers, *(t.to(device) for t in tensors)


def meta(program, numbers, theta, x, y, *, reduce=True, wanted=(0,) * 7, operator=torch.ops.maml_ext.meta):
    """Half of the samples each for support and query, which has weights; two steps with a rate each."""
    lr, weight = x.new_tensor([[0.3], [0.2]]), x.new_tensor([[0.5, 1.5]]).expand(len(x), 2)
    data = x[:, :2], y[:, :2], None, x[:, 2:], y[:, 2:], weight
    return operator(program, numbers, None, theta, lr, *data, 2, False, reduce, list(wanted))


def check_means(operator, device="cpu"):
    """With `reduce` a loss and gradients are of the mean of the losses without; of no tasks that is NaN, and zeros."""
    program, numbers, theta, x, y = vectors(device)
    options = {"wanted": [1] * 7, "operator": operator}
    losses, to_theta, *apart = meta(program, numbers, [theta], x, y, reduce=False, **options)
    loss, to_mean, *found = meta(program, numbers, [theta], x, y, **options)
    assert len(apart) == len(found) == 6 and loss.shape == () and to_mean.shape == theta.shape
    pairs = [(loss, losses.mean()), (to_mean, to_theta.mean(0)), *((f, a / len(x)) for f, a in zip(found, apart))]
    assert all(f.shape == e.shape and relative_error(f, e) < 1e-12 and e.any() for f, e in pairs)
    loss, *found = meta(program, numbers, [theta], x[:0], y[:0], **options)
    assert loss.shape == () and loss.isnan() and [f.shape for f in found[:2]] == [theta.shape, (2, 1)]
    assert not any(f.any() for f in found) and [len(f) for f in found[2:]] == [0] * 5


def test_means_over_tasks():
    check_means(torch.ops.maml_ext.meta)


def test_the_support_set_has_no_gradient_to_first_order():
    check_support_to_first_order(torch.ops.maml_ext.meta)


def test_what_is_not_wanted_is_not_returned():
    """And neither is what has no gradient: weights of the support set are not given here."""
    arguments = vectors()
    _, _, *everything = meta(*arguments[:2], [arguments[2]], *arguments[3:], wanted=[1] * 7)
    for which in ([0] * 7, [1, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 1], [0, 0, 1, 0, 1, 0, 0]):
        _, _, *found = meta(*arguments[:2], [arguments[2]], *arguments[3:], wanted=which)
        present = [w for i, w in enumerate(which) if i != 3]
        expected = [e for e, p in zip(everything, present, strict=True) if p]
        assert all(relative_error(f, e) < 1e-12 for f, e in zip(found, expected, strict=True))


def check_support_to_first_order(operator, device="cpu"):
    """Its gradients are zeros, also where all labels are ignored and the loss divides 0 by 0."""
    program, numbers, theta, x, _ = vectors(device)
    program = [*program[:-4], LossKind.LABELS, 0, ABSENT, 0]
    y, weight, lr = torch.zeros_like(x[..., 0], dtype=torch.int64), torch.ones_like(x[..., 0]), theta.new_ones(1, 1)
    data, wanted = (x, y, weight, x, y + 1, None), [1, 1, 1, 1, 0, 0, 0]
    loss, _, _, *found = operator(program, numbers, None, [theta], lr, *data, 1, True, True, wanted)
    assert loss.isfinite() and len(found) == 2 and not any(f.any() for f in found)


def shapes_of(theta):
    """As the parameters of `vectors`; as one tensor that is not a vector."""
    sizes = [12, 4, 8, 2]
    return {"one": [theta], "parameters": list(theta.split(sizes)), "row": [theta[None]], "column": [theta[:, None]]}


def check_parts(operator, device="cpu"):
    """Of the same elements in the same order, the same results."""
    program, numbers, theta, x, y = vectors(device)
    expected = meta(program, numbers, [theta], x, y, operator=operator)
    for parts in shapes_of(theta).values():
        found = meta(program, numbers, parts, x, y, operator=operator)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    for parts, message in (([], "expected a tensor at least"), ([theta, theta[:1]], "expected 26 elements, got 27")):
        with pytest.raises(RuntimeError, match=f"theta: {message}"):
            meta(program, numbers, parts, x, y, operator=operator)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("form", ["one", "parameters", "row", "column"])
def test_theta_in_parts(form, reduce):
    """Values, and the gradient of each part, by the operator's own rule."""
    program, numbers, theta, x, y = vectors()
    expected = meta(program, numbers, [theta], x, y, reduce=reduce)
    parts = [t.clone().requires_grad_() for t in shapes_of(theta)[form]]
    loss, to_theta = meta(program, numbers, parts, x, y, reduce=reduce)
    assert torch.equal(loss, expected[0]) and torch.equal(to_theta, expected[1])
    cotangent = torch.rand_like(loss)
    gradients = torch.autograd.grad(loss, parts, cotangent)
    slope = cotangent * expected[1] if reduce else (cotangent[:, None] * expected[1]).sum(0)
    assert [g.shape for g in gradients] == [p.shape for p in parts]
    assert torch.equal(torch.cat([g.flatten() for g in gradients]), slope)


def test_a_theta_of_each_task():
    program, numbers, theta, x, y = vectors()
    thetas = torch.stack([theta, 2 * theta, -theta]).requires_grad_()
    loss, to_theta = meta(program, numbers, [thetas], x, y, reduce=False)
    assert torch.equal(torch.autograd.grad(loss.sum(), thetas)[0], to_theta)
    with pytest.raises(RuntimeError, match="reduce: expected theta"):
        meta(program, numbers, [thetas.detach()], x, y)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda parts: [], "theta: expected a tensor at least"),
        (lambda parts: parts[:-1], "theta: expected 26 elements, got 24"),
        (lambda parts: [*parts, parts[0][:1]], "theta: expected 26 elements, got 27"),
        (lambda parts: [*parts[:-1], parts[-1].float()], "theta: expected tensors of one dtype"),
        (lambda parts: [p.long() for p in parts], "theta: expected float32 or float64"),
        (lambda parts: [*parts, parts[0][:1].expand(2**40, 1)], "theta: expected 26 elements"),
        (lambda parts: [parts[0][:1].expand(2**62)] * 2, "theta: too large"),
        (lambda parts: [parts[0]], r"theta: expected 26 elements, got 12"),
    ],
)
def test_wrong_parts_of_theta(change, message):
    program, numbers, theta, x, y = vectors()
    with pytest.raises(RuntimeError, match=message):
        meta(program, numbers, change(shapes_of(theta)["parameters"]), x, y)


def test_compiled_without_a_graph_break():
    """All results; and of the loss, which alone has one, the gradient by each part."""
    program, numbers, theta, x, y = vectors()
    call = lambda *parts: meta(program, numbers, list(parts), x, y, wanted=[1, 0, 0, 0, 0, 0, 0])  # noqa: E731
    compiled = lambda call: torch.compile(call, fullgraph=True, backend="aot_eager")  # noqa: E731
    parts = theta.split([12, 14])
    assert all(torch.equal(f, e) for f, e in zip(compiled(call)(*parts), call(*parts), strict=True))
    parts = [p.clone().requires_grad_() for p in parts]
    loss = lambda *parts: call(*parts)[0] * 2  # noqa: E731
    found, expected = (torch.autograd.grad(f(*parts), parts) for f in (compiled(loss), loss))
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_a_fake_refuses_what_the_operator_refuses():
    """That of tensors on the meta device too, to which real ones beside them go."""
    program, numbers, theta, x, y = vectors()
    first, second = theta.split([12, 14])
    with pytest.raises(RuntimeError, match="maml_ext::meta: expected tensors on one device, got .*'cpu', 'meta'"):
        meta(program, numbers, [first, second.to("meta")], x, y)
    with pytest.raises(RuntimeError, match="theta: expected a tensor at least"):
        meta(program, numbers, [], x.to("meta"), y.to("meta"))


def test_a_batch_of_calls_is_a_loop():
    program, numbers, theta, x, y = vectors()
    call = lambda first, second: meta(program, numbers, [first, second], x, y)  # noqa: E731
    first, second = theta.split([12, 14])
    found = torch.vmap(call, in_dims=(0, None))(torch.stack([first, -first]), second)
    for b, scale in enumerate((1, -1)):
        assert all(torch.equal(f[b], e) for f, e in zip(found, call(scale * first, second), strict=True))


def test_cotangents_that_differ():
    """The gradient of lr is a sum over tasks: it has one for all losses alike, and none for others."""
    program, numbers, theta, x, y = vectors()
    lr = torch.full((1, 1), 0.1, dtype=x.dtype, requires_grad=True)
    for tasks in (0, 3):
        data = x[:tasks], y[:tasks], None
        loss, _, to_lr = torch.ops.maml_ext.meta(
            program, numbers, None, [theta], lr, *data, *data, 2, False, False, [1, *[0] * 6]
        )
        (found,) = torch.autograd.grad(loss, lr, torch.full_like(loss, 2), retain_graph=True)
        assert torch.equal(found, 2 * to_lr) and found.any() == bool(tasks)
    with pytest.raises(RuntimeError, match="needs the same cotangent for every loss"):
        torch.autograd.grad(loss, lr, torch.arange(3.0, dtype=x.dtype))


def test_a_gradient_that_was_not_wanted_is_not_none():
    """It raises: nobody would see that the gradient is missing."""
    program, numbers, theta, x, y = vectors()
    x.requires_grad_()
    for which in ([0] * 7, [0, 1, 0, 0, 0, 0, 0]):
        loss, *_ = meta(program, numbers, [theta], x, y, wanted=which)
        with pytest.raises(RuntimeError, match="needed that was not wanted"):
            loss.backward()
    loss, _, *found = meta(program, numbers, [theta], x, y, wanted=[0, 1, 0, 0, 1, 0, 0])
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, torch.cat(found, 1))
