"""Passes over vectors of parameters against PyTorch."""

import pytest
import torch
from triton_tools import device, guarded, needs_triton

pytestmark = needs_triton
update = pytest.importorskip("maml_ext.kernels.update")
from maml_ext.kernels.update import Slot, Table  # noqa: E402

# Offset, size, partials, splits: a tensor longer than a block, one alone, one that nobody gives a gradient.
TASKS = 3
SLOTS = [Slot(1, 2, 9, 32), Slot(3, 1030, 200, 5), Slot(0, 1, 3, 1), Slot(1033, 7, 0, 0)]
PARAMETERS = 1040
EXTENT = 200 + 5 * TASKS * 1030


def table():
    return Table.of(SLOTS, device)


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, device=device)


def of_slot(slot, numbers):
    end = slot.partials + slot.splits * TASKS * slot.size
    return numbers[slot.partials : end].view(slot.splits, TASKS, slot.size)


def partials(parts, dtype=torch.float64):
    """With NaN wherever nothing belongs to a slot."""
    numbers = tuple(torch.full((EXTENT,), float("nan"), dtype=dtype, device=device) for _ in range(parts))
    for n in numbers:
        for slot in SLOTS:
            of_slot(slot, n).normal_()
    return numbers


def gradients(numbers):
    """Of each part, [T, P]."""
    return [torch.cat([of_slot(slot, n).sum(0) for slot in sorted(SLOTS)], 1) for n in numbers]


def results(*shapes, dtype=torch.float64):
    """Tensors to write, and a function that says whether nothing else was written."""
    made = [guarded(*shape, dtype=dtype) for shape in shapes]
    return [tensor for tensor, _ in made], lambda: all(untouched() for _, untouched in made)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


each_kind_of_rate = pytest.mark.parametrize("rates", [1, PARAMETERS])


@pytest.mark.parametrize("parts", [1, 2])
def test_gather(parts):
    numbers = partials(parts)
    out, untouched = results(*[(TASKS, PARAMETERS)] * parts)
    update.gather(table(), numbers, tuple(out))
    assert untouched()
    for found, expected in zip(out, gradients(numbers)):
        close(found, expected)


@each_kind_of_rate
def test_gather_starts_the_recursion(rates):
    numbers, rates = partials(1), random(rates)
    (out, direction), untouched = results(*[(TASKS, PARAMETERS)] * 2)
    update.gather(table(), numbers, (out,), rates=rates, direction=direction)
    assert untouched()
    close(out, gradients(numbers)[0])
    close(direction, rates * out)


@each_kind_of_rate
@pytest.mark.parametrize("shared", [False, True])
def test_step(rates, shared):
    numbers, rates = partials(1), random(rates)
    theta = random(*[PARAMETERS] if shared else [TASKS, PARAMETERS])
    (following,), untouched = results((TASKS, PARAMETERS))
    update.step(table(), numbers, (theta,), rates, (following,))
    assert untouched()
    close(following, theta - rates * gradients(numbers)[0])


def test_step_of_a_number():
    numbers, rates = partials(2), random(1)
    theta = random(TASKS, PARAMETERS), random(TASKS, PARAMETERS)
    following, untouched = results(*[(TASKS, PARAMETERS)] * 2)
    update.step(table(), numbers, theta, rates, tuple(following))
    assert untouched()
    for found, part, gradient in zip(following, theta, gradients(numbers)):
        close(found, part - rates * gradient)


@each_kind_of_rate
@pytest.mark.parametrize("parts", [1, 2])  # to first order, exactly
@pytest.mark.parametrize("accumulate", [False, True])
def test_adjoint(rates, parts, accumulate):
    numbers, rates = partials(parts), random(rates)
    incoming, cotangent = random(2, TASKS, PARAMETERS)
    last = PARAMETERS if len(rates) > 1 else table().blocks
    (outgoing, direction, memory), untouched = results(*[(TASKS, PARAMETERS)] * 2, (TASKS, 2, last))
    to_rates = memory[:, 0]  # of one step of two
    if accumulate:
        to_rates.normal_()
    before = to_rates.clone() if accumulate else torch.zeros_like(to_rates)
    update.adjoint(
        table(), numbers, incoming, outgoing,
        cotangent=cotangent, rates=rates, direction=direction, to_rates=to_rates, accumulate=accumulate,
    )  # fmt: skip
    assert untouched() and memory[:, 1].isnan().all()
    value, *along = gradients(numbers)
    close(outgoing, incoming + cotangent - (along[0] if along else 0))
    close(direction, rates * outgoing)
    change = -incoming * value
    if len(rates) == 1:
        change, to_rates, before = change.sum(1), to_rates.sum(1), before.sum(1)
    close(to_rates, before + change)


def test_adjoint_in_place_reads_no_values():
    """Without a gradient of the rates."""
    value, along = partials(2)
    vector = random(TASKS, PARAMETERS)
    expected = vector - gradients([along])[0]
    update.adjoint(table(), (torch.full_like(value, float("nan")), along), vector, vector)
    close(vector, expected)


def test_two_steps_and_back():
    """The recursion gives the meta-gradient, with the loss of a task x^T H x / 2, and half a squared distance for the
    query."""
    size, steps = 5, 2
    root, rates, theta, goal = random(TASKS, size, size), random(steps, 1), random(size), random(TASKS, size)
    hessian = root + root.mT

    def slope(x):
        return (hessian @ x.expand(TASKS, size)[..., None]).squeeze(-1)

    theta.requires_grad_(), rates.requires_grad_()
    adapted = theta
    for rate in rates:
        adapted = adapted - rate * slope(adapted)
    expected, expected_rates = torch.autograd.grad((adapted - goal).square().sum() / 2, [theta, rates])
    theta, rates = theta.detach(), rates.detach()

    one = Table.of([Slot(0, size, 0, 1)], device)
    trajectory = [theta, *torch.empty(steps, TASKS, size, dtype=theta.dtype, device=device)]
    for k in range(steps):
        update.step(one, (slope(trajectory[k]).view(-1),), (trajectory[k],), rates[k], (trajectory[k + 1],))
    adjoint, direction = torch.empty(2, TASKS, size, dtype=theta.dtype, device=device)
    to_rates = torch.empty(TASKS, steps, one.blocks, dtype=theta.dtype, device=device)
    update.gather(one, ((trajectory[-1] - goal).view(-1),), (adjoint,), rates=rates[-1], direction=direction)
    for k in reversed(range(steps)):
        update.adjoint(
            one, (slope(trajectory[k]).view(-1), slope(direction).view(-1)), adjoint, adjoint, to_rates=to_rates[:, k],
            rates=rates[k - 1] if k else None, direction=direction if k else None,
        )  # fmt: skip
    close(adjoint.sum(0), expected)
    close(to_rates.sum((0, 2))[:, None], expected_rates)
    assert (adjoint.sum(0) - expected + hessian.sum(0) @ theta).abs().max() > 1e-3  # one more term would be seen


def test_float32():
    numbers = partials(1, torch.float32)
    theta, rates = random(TASKS, PARAMETERS, dtype=torch.float32), random(PARAMETERS, dtype=torch.float32)
    (following,), untouched = results((TASKS, PARAMETERS), dtype=torch.float32)
    update.step(table(), numbers, (theta,), rates, (following,))
    assert untouched()
    exact = theta.double() - rates.double() * gradients([n.double() for n in numbers])[0]
    eager = theta - rates * gradients(numbers)[0]
    assert (following - exact).abs().max() <= 2 * (eager - exact).abs().max()


@pytest.mark.parametrize("slots", [[Slot(1, 2, 0, 1)], [Slot(0, 2, 0, 1), Slot(3, 1, 0, 1)], [Slot(0, 2, 0, 1)] * 2])
def test_slots_that_do_not_cover_the_parameters(slots):
    with pytest.raises(ValueError, match="slots: expected one that begins at "):
        Table.of(slots, device)
