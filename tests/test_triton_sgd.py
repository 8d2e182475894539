"""The operators of the SGD update in Triton against their formulas."""

import contextlib

import pytest
import torch
from triton_tools import device, guarded, needs_triton

pytestmark = needs_triton
sgd = pytest.importorskip("maml_ext.kernels.sgd")
from maml_ext.ops.sgd import _by_triton  # noqa: E402

# The shapes of tensors and of their rates, and sizes.
FORMS = {
    "scalars": ([(3, 5), (1030,), ()], [(), (), ()], []),
    "per parameter": ([(5,), (2, 3, 4), (18, 1025)], [(5,), (3, 4), (1025,)], []),
    "per tensor": ([(18, 1033)], [(3,)], [1, 1030, 2]),
    "all kinds": ([(2, 7), (2, 7), (2, 7)], [(2,), (7,), ()], [3, 4]),
    "no elements": ([(0,), (0, 3), (2, 0)], [(), (3,), (0,)], []),
    "no elements of one rate": ([(2, 3)], [(3,)], [1, 0, 2]),
    "many": ([(2,)] * 70, [()] * 70, []),
}
each_form = pytest.mark.parametrize("form", FORMS)


def made(form, dtype=torch.float64):
    shapes, rates, sizes = FORMS[form]
    return *([torch.randn(s, dtype=dtype, device=device) for s in of] for of in (shapes, shapes, rates)), sizes


@pytest.fixture(autouse=True)
def results_are_guarded(monkeypatch):
    checks = []

    def empty_like(tensor):
        result, untouched = guarded(*tensor.shape, dtype=tensor.dtype)
        checks.append(untouched)
        return result

    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield
    assert checks and all(untouched() for untouched in checks)


def expanded(lr, grad, sizes):
    """Rates as what multiplies grad, from which autograd gets their gradient."""
    per_tensor = sizes and lr.shape == (len(sizes),) and lr.shape != grad.shape[-1:]
    return torch.cat([r.expand(n) for r, n in zip(lr, sizes)]) if per_tensor else lr


def stepped(theta, grad, lr, sizes):
    return [x - expanded(r, g, sizes) * g for x, g, r in zip(theta, grad, lr)]


def close(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@each_form
def test_update(form):
    theta, grad, lr, sizes = made(form)
    close(sgd.update(theta, grad, lr, sizes), stepped(theta, grad, lr, sizes))


def test_update_of_zeros():
    _, grad, lr, sizes = made("all kinds")
    close(sgd.update([], grad, lr, sizes), stepped([torch.zeros(())] * len(grad), grad, lr, sizes))


@each_form
def test_backward(form):
    cotangent, grad, lr, sizes = made(form)
    for tensor in grad + lr:
        tensor.requires_grad_()
    expected = torch.autograd.grad(stepped(cotangent, grad, lr, sizes), grad + lr, cotangent)
    with torch.no_grad():
        found = sgd.backward(cotangent, grad, lr, sizes, True)
        close(found, expected)
        close(sgd.backward(cotangent, grad, lr, sizes, False), found[len(grad) :])


def test_transposed_tensors():
    theta, grad = torch.randn(2, 3, 5, dtype=torch.float64, device=device)
    lr = torch.randn(3, dtype=torch.float64, device=device)
    close(sgd.update([theta.T], [grad.T], [lr], []), [theta.T - lr * grad.T])


def test_float32():
    """A sum in float64 is the exact one, rounded."""
    cotangent, grad, lr, sizes = made("per tensor", torch.float32)
    exact = -(cotangent[0].double() * grad[0].double())
    exact = torch.stack([piece.sum() for piece in exact.split(sizes, 1)]).float()
    product, to_lr = sgd.backward(cotangent, grad, lr, sizes, True)
    assert (to_lr == exact).all()
    close([product], [-expanded(lr[0], grad[0], sizes) * cotangent[0]])


@pytest.mark.parametrize("capturing", [False, True])
def test_the_formula_stands_in_where_a_graph_is_captured(monkeypatch, capturing):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    formulas = []

    def formula(*arguments):
        formulas.append(arguments)
        return sgd.update(*arguments)

    theta, grad, lr, sizes = made("per tensor")
    close(_by_triton("update", "theta", formula)(theta, grad, lr, sizes), stepped(theta, grad, lr, sizes))
    assert len(formulas) == capturing
