"""Activations, sums, products and new shapes, with tangents, against PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from triton_tools import check_layer, device, guarded, needs_triton

pytestmark = needs_triton
kernels = pytest.importorskip("maml_ext.kernels.elementwise")
from maml_ext.kernels.geometry import Activation  # noqa: E402

from maml_ext.program import Activation as Kind  # noqa: E402

ACTIVATIONS = {
    Kind.RELU: (F.relu, 0.0, 0.0),
    Kind.LEAKY_RELU: (lambda x: F.leaky_relu(x, 0.3), 0.3, 0.0),
    Kind.ELU: (lambda x: F.elu(x, 0.7), 0.7, 0.0),
    Kind.GELU: (F.gelu, 0.0, 0.0),
    Kind.GELU_TANH: (lambda x: F.gelu(x, approximate="tanh"), 0.0, 0.0),
    Kind.SILU: (F.silu, 0.0, 0.0),
    Kind.SOFTPLUS: (lambda x: F.softplus(x, 1.7, 2.0), 1.7, 2.0),
    Kind.TANH: (torch.tanh, 0.0, 0.0),
    Kind.SIGMOID: (torch.sigmoid, 0.0, 0.0),
    Kind.SIN: (torch.sin, 0.0, 0.0),
}


def values(*shape):
    return torch.randn(shape, dtype=torch.float64, device=device)


def layer(forward, backward, settings):
    """A layer of one input, as ``check_layer`` takes it."""
    return (
        lambda x, z: forward(settings, x, z),
        lambda x, z, dz, dx, accumulate: backward(settings, x, dz, dx, accumulate),
    )


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_activations(kind):
    f, a, b = ACTIVATIONS[kind]
    x = torch.cat([torch.linspace(-6, 6, 83, dtype=torch.float64, device=device), 0.1 * values(38)]).view(
        1, 11, 1, 1, 11
    )
    x = torch.where(x == 0, 0.01, x)
    passes = layer(kernels.activation_forward, kernels.activation_backward, Activation(int(kind), a, b))
    check_layer(f, [x], *passes)
    with pytest.raises(AssertionError):  # a slope that is wrong by a thousandth
        check_layer(lambda x: f(x) + 0.001 * x.sin(), [x], *passes)


def combined(combine):
    """A layer of two inputs."""
    return (
        lambda x, y, z: kernels.combine_forward(combine, x, y, z),
        lambda x, y, z, dz, dx, dy, accumulate: kernels.combine_backward(
            combine, x, y, dz, dx, dy, accumulate, accumulate
        ),
    )


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 7, 11)], ids=str)
@pytest.mark.parametrize("moving", [[True, True], [True, False], [False, True]], ids=str)
def test_two_inputs(shape, moving):
    x, y = values(*shape), values(*shape)
    check_layer(lambda x, y: 0.7 * x - 1.3 * y, [x, y], *combined(kernels.Combine(0.7, -1.3)), moving)
    check_layer(torch.mul, [x, y], *combined(kernels.Combine(product=True)), moving)
    with pytest.raises(AssertionError):
        check_layer(lambda x, y: x * y * 1.001, [x, y], *combined(kernels.Combine(product=True)), moving)


def test_one_input():
    combine = kernels.Combine(0.7, -1.3)
    check_layer(
        lambda x: 0.7 * x - 1.3,
        [values(2, 3, 5, 7, 11)],
        lambda x, z: kernels.combine_forward(combine, x, None, z),
        lambda x, z, dz, dx, accumulate: kernels.combine_backward(combine, x, None, dz, dx, None, accumulate, False),
    )


@pytest.mark.parametrize("combine", [kernels.Combine(0.7, -1.3), kernels.Combine(product=True)], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_both_inputs_are_one(combine, accumulate):
    """The gradients meet in one place; and one alone may be wanted."""
    x, g = values(1, 2, 1, 1, 700), values(1, 2, 1, 1, 700)
    to, untouched = guarded(*x.shape, fill=3.0)
    kernels.combine_backward(combine, (x,), (x,), (g,), (to,), (to,), True, accumulate)
    whole = 2 * g * x if combine.product else (combine.a + combine.b) * g
    torch.testing.assert_close(to, whole + 3 * accumulate)
    kernels.combine_backward(combine, (x,), (x,), (g,), None, (to,), False, False)
    torch.testing.assert_close(to, g * x if combine.product else combine.b * g)
    assert untouched()


SHAPES = [((3, 2, 5), (30, 1, 1)), ((30, 1, 1), (5, 3, 2)), ((6, 3, 1), (2, 3, 3)), ((4, 1, 1), (4, 1, 1)),
          ((1, 37, 31), (31, 37, 1))]  # fmt: skip


@pytest.mark.parametrize("shape, new_shape", SHAPES, ids=str)
@pytest.mark.parametrize("samples", [(1, 1), (2, 17)], ids=str)
def test_new_shapes(shape, new_shape, samples):
    (c, h, w), (new_c, new_h, new_w) = shape, new_shape

    def f(x):
        return x.movedim(-1, 2).reshape(*samples, new_c, new_h, new_w).movedim(2, -1)

    def transposed(x):
        return x.reshape(*samples, new_h, new_w, new_c)

    passes = (
        lambda x, z: kernels.reshape(shape, new_shape, x, z, False),
        lambda x, z, dz, dx, accumulate: kernels.reshape(new_shape, shape, dz, dx, accumulate),
    )
    x = values(*samples, h, w, c)
    check_layer(f, [x], *passes)
    if c > 1 and h * w > 1:
        with pytest.raises(AssertionError):  # the order of memory is another
            check_layer(transposed, [x], *passes)
