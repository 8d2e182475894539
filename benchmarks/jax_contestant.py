"""The JAX contestant: the torch network read layer by layer, its meta-gradient jitted one of four ways."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from torch import nn

from .workloads import Problem

jax.config.update("jax_enable_x64", True)  # for float64 problems; float32 arrays stay float32


def _pool(x: jax.Array) -> jax.Array:
    """2x2 max-pooling of `[N, H, W, C]` that drops odd rows and columns.

    By pairwise `maximum`: the derivative of `max` over an axis compares the maximum with recomputed,
    differently rounded values under jit and is silently wrong here (JAX 0.10.2 on the CPU); `reduce_window`
    is right but 1.5 times slower.
    """
    samples, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = x.reshape(samples, height // 2, 2, width // 2, 2, channels)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


def _normalize(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) * lax.rsqrt(x.var(axes) + eps) * weight + bias


def _forward(network: nn.Sequential, params: list[jax.Array], x: jax.Array) -> jax.Array:
    """What `network` computes, with `params` in torch's order and layout, but images held channels last."""
    remaining = iter(params)
    for layer in network:
        match layer:
            case nn.Linear():
                x = x @ next(remaining).T + next(remaining)
            case nn.Conv2d():
                kernel, bias = next(remaining), next(remaining)
                x = bias + lax.conv_general_dilated(
                    x,
                    kernel.transpose(2, 3, 1, 0),
                    (1, 1),
                    "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
            case nn.BatchNorm2d():
                x = _normalize(x, next(remaining), next(remaining), layer.eps)
            case nn.ReLU():
                x = jax.nn.relu(x)
            case nn.MaxPool2d():
                x = _pool(x)
            case nn.Flatten():
                x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
            case _:
                raise TypeError(f"layer: expected one that the JAX contestant knows, got {layer}")
    return x


def _loss(name: str, prediction: jax.Array, target: jax.Array) -> jax.Array:
    if name == "mse":
        return jnp.mean((prediction - target) ** 2)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(prediction), target[:, None], 1))


def meta_gradient(problem: Problem, tasks: str, steps: str) -> Callable[[], list[Any]]:
    """The jitted meta-gradient.

    `tasks`: "vmap" (one jitted call for all) or "loop" (one jitted call each). `steps`: "scan" (a loop in the
    compiled program) or "unroll".
    """
    workload, network = problem.workload, problem.initial
    params = [jnp.asarray(p.detach().numpy()) for p in network.parameters()]
    support_x, support_y, query_x, query_y = (jnp.asarray(part.numpy()) for part in problem.data)
    if workload.convolutional:
        support_x, query_x = (x.transpose(0, 1, 3, 4, 2) for x in (support_x, query_x))

    def task_loss(params, x, y):
        return _loss(workload.loss, _forward(network, params, x), y)

    def adapted_loss(params, support_x, support_y, query_x, query_y):
        def step(params, _):
            grads = jax.grad(task_loss)(params, support_x, support_y)
            return [p - workload.lr * g for p, g in zip(params, grads)], None

        if steps == "scan":
            params, _ = lax.scan(step, params, length=workload.steps)
        else:
            for _ in range(workload.steps):
                params, _ = step(params, None)
        return task_loss(params, query_x, query_y)

    data = (support_x, support_y, query_x, query_y)
    if tasks == "vmap":
        batched = jax.vmap(adapted_loss, in_axes=(None, 0, 0, 0, 0))
        compiled = jax.jit(jax.grad(lambda params, data: jnp.mean(batched(params, *data))))
        return lambda: jax.block_until_ready(compiled(params, data))

    @jax.jit
    def accumulate(total, params, task):
        grads = jax.grad(adapted_loss)(params, *task)
        return [t + g / workload.tasks for t, g in zip(total, grads)]

    each = list(zip(*data))

    def call() -> list[Any]:
        total = [jnp.zeros_like(p) for p in params]
        for task in each:
            total = accumulate(total, params, task)
        return jax.block_until_ready(total)

    return call
