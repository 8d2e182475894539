"""The Triton engine against the reference: whole networks, every operator, sizes, orders, precisions.

Its operators take the place of those of the CPU engine, so that what is tested is the whole package on top of them.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import Batch, relative_error, require_grad
from test_engine import LOSSES, NETWORKS, SMOOTH, assert_close, float32_errors, made, results
from torch import nn
from triton_tools import device, needs_triton

import maml_ext
from maml_ext import compiled, single_pass
from maml_ext.ops import library

pytestmark = [needs_triton, pytest.mark.skipif(library.ABSENT is not None, reason="needs the compiled package")]


class Operators:
    """maml_ext's, with those of the Triton engine in the place of the CPU engine's."""

    def __getattr__(self, name):
        return getattr(torch.ops.maml_ext, f"triton_{name}")


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    monkeypatch.setattr(compiled, "_ops", Operators())


def small(name, dtype=torch.float64, seed=0):
    module, batch = made(name, dtype, tasks=2, support=2, query=2, seed=seed)
    return module.to(device), Batch(*(t.to(device) for t in batch))


@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradient(name):
    """In one pass, and in two with gradients by the data, against the reference in float64."""
    module, batch = small(name)
    expected = results(module, batch, "torch", steps=1)
    assert_close(results(module, batch, "compiled", steps=1), expected)
    first_order = results(module, batch, "torch", steps=1, meta_gradient="first_order")
    if name != "linear":  # of least squares the Hessian is there all the same
        assert max(relative_error(f, e) for f, e in zip(first_order[1:], expected[1:])) > 1e-6  # the orders differ
