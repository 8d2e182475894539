"""What can be tried of a CUDA build beside the torch at hand, without a GPU. Run by plain python: `make cuda-check`.

The installed maml_ext is the one checked. On a machine with a GPU the doctor, which comes last, runs there too.
"""

import ctypes
import os
import sys

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import maml_ext
from maml_ext import recognise
from maml_ext.doctor import doctor
from maml_ext.ops import cuda, library
from maml_ext.stateless import Layout

ENGINE = ("predict", "pull", "pull_tangent", "score", "score_tangent", "adapt", "adjoint", "meta")
COMPILED = ("sgd_update", "sgd_update_backward", *(f"cuda_{name}" for name in ENGINE))  # what the binary has for CUDA
PRIVATE = ("checked_", "cuda_", "triton_")  # names of an engine's operator, all with the same arguments and results


def check(condition: object, what: str) -> None:
    print(f"{'ok    ' if condition else 'WRONG '} {what}")
    if not condition:
        sys.exit(1)


def error_of(call) -> str:
    """What it raises, if that is a RuntimeError; anything else ends the check."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def operators_with_a_fake() -> list[str]:
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("maml_ext::"))
    find = torch._library.simple_registry.singleton.find
    return sorted(name.split("::")[1] for name in names if find(name).fake_impl.kernel is not None)


def public(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PRIVATE if name.startswith(prefix)), name)


def calls() -> dict[str, tuple]:
    """Arguments for each public operator, on the CPU."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    layout = Layout(net)
    known = recognise.network(recognise.trace(net), layout, torch.Size([4]))
    theta = layout.flatten().detach().expand(2, -1).contiguous()
    network = ([*known.program, 0, 0, -1, 0], [*known.numbers, 0.0, 0.0], None, theta)  # behind it, the loss: mse
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 2)
    direction, lr = torch.randn_like(theta), torch.full((1, 1), 0.1)
    return {
        "sgd_update": ([theta], [direction], [lr[0, 0]], []),
        "sgd_update_backward": ([theta], [direction], [theta[0]], [], True),
        "predict": (*network, x, [2]),
        "pull": (*network, x, y, [1, 1]),
        "pull_tangent": (*network, x, y, direction, None),
        "score": (*network, x, y, None, [1, 1, 1, 0]),
        "score_tangent": (*network, x, y, None, direction, None, None, None, [1, 1, 0]),
        "adapt": (*network, lr, x, y, None, 2),
        "adjoint": (*network, lr, x, y, None, [theta], [direction, direction], [0, 1], False, [1, 1, 1, 0]),
        "meta": (*network[:3], [network[3]], lr, x, y, None, x, y, None, 2, False, False, [1, 1, 1, 0, 1, 1, 0]),
    }


def on_cuda(arguments):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="cuda"), arguments)


def check_installation() -> None:
    where = os.path.dirname(maml_ext.__file__)
    check("site-packages" in where, f"the installed package, on torch {torch.__version__}")
    check(library.cuda_absent() is None, f"CUDA kernels, for {torch.ops.maml_ext.cuda_architectures()}")
    for name in (*COMPILED, *ENGINE):
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"maml_ext::{name}", "CUDA")
        check(has, f"maml_ext::{name} has a kernel on CUDA")
    libtorch = ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
    check(hasattr(libtorch, "aoti_torch_get_current_cuda_stream"), "PyTorch's current stream can be found")


def check_shapes() -> None:
    """Fake tensors on CUDA come out as real ones on the CPU do, but for the device; so do those of private names."""
    arguments, names = calls(), operators_with_a_fake()
    check({prefix + name for prefix in PRIVATE for name in ENGINE} < set(names), "private operators have fakes")
    for name in names:
        operator, given = getattr(torch.ops.maml_ext, name), arguments[public(name)]
        real = (operator if name.startswith("checked_") else getattr(torch.ops.maml_ext, public(name)))(*given)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = operator(*on_cuda(given))
        same = [(f.shape, f.dtype, f.device.type) for f in fake] == [(r.shape, r.dtype, "cuda") for r in real]
        check(same, f"maml_ext::{name} of fake CUDA tensors")


def check_errors() -> None:
    on_cuda_key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name in COMPILED:
        operator = getattr(torch.ops.maml_ext, name).default
        message = error_of(lambda: operator.redispatch(on_cuda_key, *calls()[public(name)]))  # noqa: B023
        check("CUDA device" in message, f"maml_ext::{name} refuses CPU tensors on CUDA")
    if torch.cuda.device_count():
        return
    check(torch.ops.maml_ext.cuda_devices() == 0, "no devices")
    message = error_of(lambda: torch.ops.maml_ext.cuda_shared_memory(0))
    check("cuda_shared_memory: cuda" in message, f"an error without a device: {message}")
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = on_cuda(calls()["sgd_update"])
    message = error_of(lambda: torch.ops.maml_ext.sgd_update.default.redispatch(on_cuda_key, *tensors))
    check("CUDA kernels: cuda" in message, f"a launch without a device: {message}")
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = on_cuda(calls()["predict"])
    message = error_of(lambda: torch.ops.maml_ext.predict.default.redispatch(on_cuda_key, *tensors))
    check("cuda_shared_memory: cuda" in message, "the entry asks the device whether the network fits")


def check_triton() -> None:
    """Its engine runs as far as it does without a device, which is up to the launches."""
    if cuda.triton_absent():
        print(f"       no Triton engine: {cuda.triton_absent()}")
        return
    import triton
    from maml_ext.kernels.launch import watched

    launches = []
    with watched(launches.append):  # whose answer is None: nothing is launched
        torch.ops.maml_ext.triton_meta(*calls()["meta"])
    check(launches, f"the Triton engine makes {len(launches)} launches, with triton {triton.__version__}")


if __name__ == "__main__":
    check_installation()
    check_shapes()
    check_errors()
    check_triton()
    sys.exit(doctor())
