"""What is installed, which engines can run here, and whether each computes the right meta-gradient.

Its output is meant to be pasted into a bug report: it names versions and errors, no paths.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

import maml_ext

from .ops import cuda, library

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def doctor() -> int:
    """Print the report; return 0 where everything that can run is right, else 1."""
    print(f"maml_ext   {maml_ext.__version__}")
    print(f"python     {platform.python_version()}, {platform.system()} {platform.machine()}")
    threads, instructions = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    print(f"torch      {torch.__version__}, {threads} threads, {instructions}")
    print(f"cuda       {_cuda()}")
    print(f"compiled   {_compiled()}")
    print(f"on cuda    {_compiled_for_cuda()}")
    print(f"triton     {_triton()}")
    print()
    failed = 0
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        for dtype, tolerance in TOLERANCE.items():
            for name, check in CHECKS.items():
                if not check.runs_on(device):
                    continue
                try:
                    error = check.error(device, dtype)
                    word = "ok    " if error <= tolerance else "WRONG "
                    verdict = f"{word} error {error:.1e}, at most {tolerance:.0e}"
                    failed += not error <= tolerance
                except Exception as problem:  # a broken engine must not hide the others
                    verdict = f"FAILED {type(problem).__name__}: {problem}"
                    failed += 1
                print(f"{name:32} {device:7} {str(dtype).removeprefix('torch.'):8} {verdict}")
    return 1 if failed else 0


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without it"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ", ".join(names) or "no device"
    return f"{torch.version.cuda}, {devices}"


def _compiled() -> str:
    if library.ABSENT:
        return f"absent: {library.ABSENT}"
    lanes = torch.ops.maml_ext.vector_bytes()
    kernels = f"the CPU engine and sgd_update, float32 and float64, vectors of {lanes} bytes"
    return f"{kernels}; stable ABI of torch 2.10 and later"


def _compiled_for_cuda() -> str:
    absent = library.cuda_absent()
    if absent:
        return f"absent: {absent}"
    architectures, usable = torch.ops.maml_ext.cuda_architectures(), torch.ops.maml_ext.cuda_devices()
    kernels = f"the CUDA engine and sgd_update, float32 and float64, for {architectures}; {usable} devices"
    if usable < torch.cuda.device_count():
        return f"{kernels}, fewer than torch sees: the driver may be older than the CUDA these kernels were built with"
    return kernels


def _triton() -> str:
    absent = cuda.triton_absent()
    if absent:
        return f"absent: {absent}"
    try:
        import triton
    except Exception as problem:  # made for another Python, say
        return f"does not load: {type(problem).__name__}: {problem}"
    where = "" if torch.cuda.device_count() else ", which needs a CUDA device"
    return f"{triton.__version__}: the engine of networks that the CUDA kernels do not run{where}"


@dataclass(frozen=True)
class Check:
    """``error(device, dtype)`` is the relative error of a result by an engine: "torch", "compiled", "triton"."""

    error: Callable[[str, torch.dtype], float]
    engine: str = "torch"

    def runs_on(self, device: str) -> bool:
        if self.engine == "triton":
            return device != "cpu" and not cuda.triton_absent()
        absent = library.ABSENT if device == "cpu" else cuda.absent()
        return not (self.engine == "compiled" and absent)


def _mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """A network and the shape of a sample."""
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)), (3,)


def _conv_net() -> tuple[nn.Module, tuple[int, ...]]:
    block = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False), nn.Tanh(), nn.MaxPool2d(2)
    return nn.Sequential(*block, nn.Flatten(), nn.Linear(12, 2)), (1, 4, 4)


def _meta_gradient(meta_gradient: str, engine: str, network: Callable = _mlp) -> Check:
    def error(device: str, dtype: torch.dtype) -> float:
        """Relative error of the gradient against ``create_graph=True`` in float64."""
        torch.manual_seed(0)
        net, sample = network()
        net.double()
        data = [torch.randn(4, 5, *shape, dtype=torch.float64) for shape in (sample, (2,), sample, (2,))]
        expected = _plain_loop(net, *data, lr=0.1, steps=3, create_graph=meta_gradient == "exact")
        net.to(device, dtype)
        backend = "torch" if engine == "torch" else "compiled"
        maml = maml_ext.MAML(net, lr=0.1, steps=3, meta_gradient=meta_gradient, reduction="mean", backend=backend)
        data = [d.to(device, dtype) for d in data]
        found = maml.explain(*data[:2]).engine
        if engine == "triton" and found != "triton":
            raise RuntimeError(f"this network is for the Triton engine, what runs it is {found}")
        return _error(torch.autograd.grad(maml(*data), list(net.parameters())), expected)

    return Check(error, engine)


def _update(device: str, dtype: torch.dtype) -> float:
    """Relative error of the update and its three gradients against their formulas in float64."""
    torch.manual_seed(0)
    theta, grad, cotangent = torch.randn(3, 7, 1003, dtype=torch.float64)
    lr = torch.rand(1003, dtype=torch.float64)
    expected = theta - lr * grad, cotangent, -lr * cotangent, -(cotangent * grad).sum(0)
    arguments = [x.to(device, dtype).requires_grad_() for x in (theta, grad, lr)]
    result = maml_ext.sgd_update(*arguments)
    return _error((result, *torch.autograd.grad(result, arguments, cotangent.to(device, dtype))), expected)


CHECKS = {
    "meta-gradient, torch engine": _meta_gradient("exact", "torch"),
    "first-order, torch engine": _meta_gradient("first_order", "torch"),
    "meta-gradient, compiled engine": _meta_gradient("exact", "compiled"),
    "first-order, compiled engine": _meta_gradient("first_order", "compiled"),
    "meta-gradient, Triton engine": _meta_gradient("exact", "triton", _conv_net),
    "first-order, Triton engine": _meta_gradient("first_order", "triton", _conv_net),
    "sgd_update, compiled" if library.ABSENT is None else "sgd_update, formula": Check(_update),
}


def _plain_loop(net, support_x, support_y, query_x, query_y, lr, steps, create_graph) -> tuple[Tensor, ...]:
    """What everyone writes first; shares nothing with the engines."""
    parameters = dict(net.named_parameters())
    total = 0
    for sx, sy, qx, qy in zip(support_x, support_y, query_x, query_y):
        weights = parameters
        for _ in range(steps):
            loss = (functional_call(net, weights, (sx,)) - sy).square().mean()
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph)
            weights = {name: w - lr * g for (name, w), g in zip(weights.items(), gradients)}
        total = total + (functional_call(net, weights, (qx,)) - qy).square().mean() / len(support_x)
    return torch.autograd.grad(total, list(parameters.values()))


def _error(actual, expected) -> float:
    difference = torch.cat([(a.detach().cpu().double() - e).flatten() for a, e in zip(actual, expected)])
    return float(difference.norm() / torch.cat([e.flatten() for e in expected]).norm())
