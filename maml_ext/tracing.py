"""From a module to a graph of what its forward method does, by ``torch.fx``; what no graph shows is refused.

Types match exactly (a subclass of a layer is traced through instead). Hooks, parametrizations, methods set
on an instance, tensors that are no parameter, random numbers, gradient modes and side effects all mean: no
graph, with the reason.
"""

from __future__ import annotations

import functools
import inspect
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from .reads import Reads


class Unrecognised(Exception):
    """Why a module has no network program."""


_CALL = nn.Module.__call__
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HOOKS = [f"_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre")]


class _Symbol(torch.fx.Proxy):
    """A value during the trace. It is no tensor, and forward methods must not find that out and act on it."""

    @property
    def __class__(self):
        frame = sys._getframe(1)
        # Whoever asks is user code, torch.is_tensor, or an autograd.Function whose backward nothing records.
        if not _is_torch(frame) or frame.f_code.co_name == "is_tensor" or _is_function(frame):
            self.tracer.refuse("asks for the type of a value, or hands one to a torch.autograd.Function")
        return type(self)

    def __getattr__(self, name):
        if not hasattr(Tensor, name):  # so that hasattr tells what it would of a tensor
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return super().__getattr__(name)


class _Tracer(torch.fx.Tracer):
    """Leaves torch's layers whole, and notes the line of user code behind each node.

    (``record_stack_traces`` does that too, but imports torch's compiler: 1.4 s at the first call.)

    ``refused`` is the first thing that happened which a graph does not show. It is noted, not raised, as a
    forward method may catch what is raised.
    """

    proxy_buffer_attributes = True  # else a forward method computes with their values of today
    refused = ""

    def refuse(self, why: str) -> None:
        self.refused = self.refused or f"forward {why}{at_line(_user_line())}"

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Symbol(node, self)

    def create_node(self, *args, **kwargs) -> torch.fx.Node:
        node = super().create_node(*args, **kwargs)
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            self.refuse("turns off gradients")
        if torch.is_autocast_enabled("cpu"):
            self.refuse("turns on autocast")
        line = _user_line()
        if line:
            node.meta["line"] = line
        return node

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return is_layer(module)


class _NoOperators(TorchDispatchMode):
    """Notes what computes with tensors during the trace: what is got from it would be there for good."""

    def __init__(self, tracer: _Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.tracer.refuse(f"computes with tensors other than its input ({func})")
        return func(*args, **(kwargs or {}))


def _is_torch(frame) -> bool:
    return f"{os.sep}torch{os.sep}" in frame.f_code.co_filename


def _is_function(frame) -> bool:
    return frame.f_code.co_filename == torch.autograd.function.__file__


def _user_line() -> str:
    """The innermost line that is neither torch's nor ours, as "file:line"."""
    frame = inspect.currentframe()
    while frame and (_is_torch(frame) or frame.f_code.co_filename == __file__):
        if frame.f_code.co_filename == __file__ and frame.f_code.co_name == "trace":
            return ""
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""


def at_line(line: str) -> str:
    return f" ({line})" if line else ""


def traced_by_another_tool() -> bool:
    return torch.compiler.is_compiling() or torch.fx._symbolic_trace.is_fx_symbolic_tracing()


def untraced(function: Callable) -> Callable:
    """``function``, which torch.compile calls and does not look into.

    For what reads a dictionary by module: torch.compile would watch all of it, other modules too, compile anew when one
    is added, and fail when one is collected while it reads.
    """
    apart = torch._disable_dynamo(function)  # imports torch's compiler, but at its first call

    @functools.wraps(function)
    def call(*arguments):
        return apart(*arguments) if torch.compiler.is_dynamo_compiling() else function(*arguments)

    return call


def trace(module: nn.Module) -> torch.fx.Graph:
    """The graph of ``module`` in its present mode; raises ``Unrecognised``."""
    if traced_by_another_tool():
        raise Unrecognised("the network is traced by another tool at the moment")
    if module_hooks._has_any_global_hook():
        raise Unrecognised("there are global module hooks")
    for name, m in module.named_modules():
        _check_plain(m, f"{name or 'the module'} ({type(m).__name__})", outermost=m is module)
    defaults = _defaults(module)
    before, reads, tracer = _State(module), Reads(module), _Tracer()
    try:
        with torch.inference_mode(False), torch.enable_grad(), _NoOperators(tracer):
            graph = tracer.trace(root(module), concrete_args=defaults)
    except Exception as error:  # whatever a user's forward raises on symbols
        reason = f"torch.fx cannot trace it: {type(error).__name__}: {first_line(error)}"
        raise Unrecognised(tracer.refused or reason) from error
    finally:
        changed = before.restore()
    if any(name.startswith("_tensor_constant") for name in changed):  # where torch.fx keeps what it found
        raise Unrecognised("it computes with a tensor that is neither parameter nor input")
    if tracer.refused:
        raise Unrecognised(tracer.refused)
    if changed:
        raise Unrecognised("its forward changes the module's attributes or buffers, or draws random numbers")
    if reads.refused:
        raise Unrecognised(reads.refused)
    if reads.changed():
        raise Unrecognised("its forward changes what it reads from outside of the module")
    return graph


def _check_plain(m: nn.Module, at: str, outermost: bool) -> None:
    """Refuse a module that is more than its class's forward method."""
    if any(m.__dict__.get(hooks) for hooks in _HOOKS):
        raise Unrecognised(f"{at} has hooks")
    # torch.fx calls the forward of the outermost module, not the module.
    called = not outermost or isinstance(m, torch.fx.GraphModule) or type(m).__call__ is _CALL
    if not called or type(m)._call_impl is not nn.Module._call_impl:
        raise Unrecognised(f"{at} has a __call__ of its own")
    methods = [n for n in m.__dict__ if inspect.isfunction(getattr(type(m), n, None))] if is_layer(m) else []
    for name in [*methods, *m.__dict__.keys() & {"forward"}]:
        raise Unrecognised(f"{at} has a {name} that was set on the instance")
    if torch.nn.utils.parametrize.is_parametrized(m):
        raise Unrecognised(f"{at} has parametrizations")


def _defaults(module: nn.Module) -> dict | None:
    """The defaults of all arguments of forward but the first; None where there are no such arguments."""
    arguments = list(inspect.signature(module.forward).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not arguments or arguments[0].kind not in kinds and not isinstance(module, _CONTAINERS):
        raise Unrecognised("forward does not take one input")
    if any(a.default is a.empty for a in arguments[1:]):
        raise Unrecognised("forward takes several inputs")
    return None if is_layer(module) else {a.name: a.default for a in arguments[1:]} or None


class _State:
    """What tracing a forward method might change: attributes, values of buffers, random generators."""

    def __init__(self, module: nn.Module):
        self.random, self.python_random = torch.random.get_rng_state(), random.getstate()
        self.numpy = sys.modules.get("numpy.random")
        self.numpy_random = self.numpy and self.numpy.get_state()
        dicts = [d for m in module.modules() for d in (m.__dict__, m._parameters, m._buffers, m._modules)]
        self.dicts = [(d, dict(d)) for d in dicts]
        self.buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in module.buffers()]

    def restore(self) -> set[str]:
        """Put it back; the names of what had changed, but for torch's generator."""
        torch.random.set_rng_state(self.random)
        changed: set[str] = set()
        if random.getstate() != self.python_random:
            changed.add("random numbers")
            random.setstate(self.python_random)
        if self.numpy and str(self.numpy.get_state()) != str(self.numpy_random):
            changed.add("random numbers")
            self.numpy.set_state(self.numpy_random)
        for d, then in self.dicts:
            names = d.keys() ^ then.keys() | {
                name for name in d.keys() & then.keys() if d[name] is not then[name]
            }
            if names:
                changed |= names
                d.clear()
                d.update(then)
        with torch.no_grad():
            for buffer, version, then in self.buffers:
                if buffer._version != version:
                    changed.add("buffers")
                    buffer.copy_(then)
        return changed


def root(module: nn.Module) -> nn.Module:
    """What is traced: a layer at the top would be traced through, and inside a container is left whole."""
    return module if not is_layer(module) else nn.Sequential(module)


def is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, _CONTAINERS)


def first_line(error) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
