"""Third derivatives of normalisation, by finite differences: some of torch's own are wrong (2.13, CPU)."""

import pytest
import torch
from conftest import both_ways
from torch import nn
from torch.autograd.gradcheck import GradcheckError

import maml_ext

pytestmark = pytest.mark.usefixtures("float64")
FLAT = {"batch norm": lambda: nn.BatchNorm1d(4), "layer norm": lambda: nn.LayerNorm(4)}
DENSE = {
    "batch norm, images": lambda: nn.BatchNorm2d(3),
    "batch norm without parameters": lambda: nn.BatchNorm2d(3, affine=False, track_running_stats=False),
    "instance norm": lambda: nn.InstanceNorm2d(3, affine=True),
    "group norm": lambda: nn.GroupNorm(1, 3),
}


def network(name):
    """On vectors of 4."""
    if name in FLAT:
        return nn.Sequential(nn.Linear(4, 4), FLAT[name](), nn.Tanh(), nn.Linear(4, 1))
    first = [nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1)]
    return nn.Sequential(*first, DENSE[name](), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1))


def third_derivative_is_right(loss, theta) -> bool:
    def first(theta):
        return torch.autograd.grad(loss(theta).sum(), theta, create_graph=True)[0]

    theta = theta.detach().requires_grad_()
    return torch.autograd.gradgradcheck(first, theta, fast_mode=True, atol=1e-5)


@both_ways
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", [*FLAT, *DENSE])
def test_third_derivative(name, backend, wrap):
    module = wrap(network(name))
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 1)
    theta = maml_ext.flatten(module) + 0.1 * torch.randn(2, 1)

    def loss(theta):
        return maml_ext.task_loss(module, theta, x, y, backend=backend)

    assert third_derivative_is_right(loss, theta)


def test_a_wrong_third_derivative_would_be_seen():
    """The negative control: torch's own."""
    module, x = network("batch norm"), torch.randn(5, 4)

    def loss(theta):
        parameters = {n: p[0] for n, p in maml_ext.unflatten(module, theta[None]).items()}
        return torch.func.functional_call(module, parameters, x).square().mean()

    module[1].track_running_stats = False
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        third_derivative_is_right(loss, maml_ext.flatten(module))
