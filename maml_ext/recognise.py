"""From a module to its network program, if it consists of layers that the compiled engines know.

``torch.fx`` traces the module once; the graph is then read for a shape of samples by rules of our own, without
running the module. Nothing is taken for what it only resembles: types match exactly (a subclass is traced through
instead), hooks, parametrizations, tensors that are no parameter of a known layer, and shapes that depend on the
number of samples all mean: not recognised, with the reason. ``_Reader`` has a method for each layer, named and
called like the function in ``torch.nn.functional``.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from .program import ABSENT, LAYER_INTS, VERSION, Activation, Kind, Network, Statistics
from .stateless import Layout


class Unrecognised(Exception):
    """Why a module has no network program."""


class _Samples:
    """The number of samples, which no program knows: fit only for the first argument of view and reshape."""


N = _Samples()
_CALL = nn.Module.__call__
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HOOKS = [f"_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre")]


class _Symbol(torch.fx.Proxy):
    """A value during the trace. It is no tensor, and forward methods must not find that out and act on it."""

    @property
    def __class__(self):
        frame = sys._getframe(1)
        # Whoever asks is user code, torch.is_tensor, or a torch.autograd.Function whose backward nothing records.
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

    ``refused`` is the first thing that happened which a graph does not show. It is noted, not raised, as a forward
    method may catch what is raised.
    """

    proxy_buffer_attributes = True  # else a forward method computes with their values of today
    refused = ""

    def refuse(self, why: str) -> None:
        self.refused = self.refused or f"forward {why}{_at(_user_line())}"

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
        return _is_layer(module)


class _NoOperators(TorchDispatchMode):
    """Notes what computes with tensors during the trace: a number or a branch got from it would be there for good."""

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


def _at(line: str) -> str:
    return f" ({line})" if line else ""


def trace(module: nn.Module) -> torch.fx.Graph:
    """The graph of ``module`` in its present mode; raises ``Unrecognised``."""
    if torch.compiler.is_compiling() or torch.fx._symbolic_trace.is_fx_symbolic_tracing():
        raise Unrecognised("the network is traced by another tool at the moment")
    if module_hooks._has_any_global_hook():
        raise Unrecognised("there are global module hooks")
    for name, m in module.named_modules():
        at = f"{name or 'the module'} ({type(m).__name__})"
        if any(m.__dict__.get(hooks) for hooks in _HOOKS):
            raise Unrecognised(f"{at} has hooks")
        # fx calls the forward of the outermost module, not the module.
        called = m is not module or isinstance(m, torch.fx.GraphModule) or type(m).__call__ is _CALL
        if not called or type(m)._call_impl is not nn.Module._call_impl:
            raise Unrecognised(f"{at} has a __call__ of its own")
        replaced = [n for n in m.__dict__ if inspect.isfunction(getattr(type(m), n, None))] if _is_layer(m) else ()
        if replaced and replaced != ["forward"]:
            raise Unrecognised(f"{at} has a {replaced[0]} that was set on the instance")
        if "forward" in m.__dict__:
            raise Unrecognised(f"{at} has a forward that was set on the instance")
        if torch.nn.utils.parametrize.is_parametrized(m):
            raise Unrecognised(f"{at} has parametrizations")
    arguments = list(inspect.signature(module.forward).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not arguments or arguments[0].kind not in kinds and not isinstance(module, _CONTAINERS):
        raise Unrecognised("forward does not take one input")
    if any(a.default is a.empty for a in arguments[1:]):
        raise Unrecognised("forward takes several inputs")
    defaults = None if _is_layer(module) else {a.name: a.default for a in arguments[1:]} or None
    before, tracer = _State(module), _Tracer()
    try:
        with torch.inference_mode(False), torch.enable_grad(), _NoOperators(tracer):
            graph = tracer.trace(_root(module), concrete_args=defaults)
    except Exception as error:  # whatever a user's forward raises on symbols
        if tracer.refused:
            raise Unrecognised(tracer.refused) from error
        raise Unrecognised(f"torch.fx cannot trace it: {type(error).__name__}: {_first_line(error)}") from error
    finally:
        changed = before.restore()
    if any(name.startswith("_tensor_constant") for name in changed):  # where torch.fx keeps what it found
        raise Unrecognised("it computes with a tensor that is neither parameter nor input")
    if tracer.refused:
        raise Unrecognised(tracer.refused)
    if changed:
        raise Unrecognised("its forward changes the module's attributes or buffers, or draws random numbers")
    return graph


class _State:
    """What tracing a forward method might change: attributes, values of buffers, the random generator."""

    def __init__(self, module: nn.Module):
        self.random, self.python_random = torch.random.get_rng_state(), random.getstate()
        dicts = [d for m in module.modules() for d in (m.__dict__, m._parameters, m._buffers, m._modules)]
        self.dicts = [(d, dict(d)) for d in dicts]
        self.buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in module.buffers()]

    def restore(self) -> set[str]:
        """Put it back; the names of what had changed, but for the generator."""
        torch.random.set_rng_state(self.random)
        changed: set[str] = set()
        if random.getstate() != self.python_random:
            changed.add("random numbers")
            random.setstate(self.python_random)
        for d, then in self.dicts:
            names = {name for name in {*d, *then} if name not in d or name not in then or d[name] is not then[name]}
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


def network(graph: torch.fx.Graph, layout: Layout, sample: torch.Size) -> Network:
    """The program of a traced module on samples of this shape; raises ``Unrecognised``."""
    first = next(node for node in graph.nodes if node.op == "placeholder")
    # Samples that are flattened at once are vectors from the start: no reordering of images.
    tries = [len(sample) not in (1, 2, 3)]
    if len(sample) == 3 and all(_flattens(layout.module, user) for user in first.users):
        tries = [True, False]
    for flat in tries:
        try:
            return _Reader(graph, layout, sample, flat).read()
        except Unrecognised:
            if flat is tries[-1]:
                raise


def _flattens(module: nn.Module, node: torch.fx.Node) -> bool:
    if node.op == "call_module":
        return type(_root(module).get_submodule(node.target)) is nn.Flatten
    return getattr(node.target, "__name__", node.target) in ("flatten", "view", "reshape")


def _root(module: nn.Module) -> nn.Module:
    """What is traced: a layer at the top would be traced through, and inside a container is left whole."""
    return module if not _is_layer(module) else nn.Sequential(module)


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, _CONTAINERS)


class _Value:
    """A tensor of the program: its number, and the shape PyTorch gives it without the samples."""

    def __init__(self, index: int, shape: tuple[int, ...], opaque: bool = False):
        self.index, self.shape, self.opaque = index, tuple(shape), opaque

    @property
    def chw(self) -> tuple[int, int, int]:
        """A vector is (F, 1, 1), a sequence [C, L] is (C, 1, L)."""
        if len(self.shape) == 3:
            return self.shape
        return (self.shape[0], 1, math.prod(self.shape[1:])) if self.shape else (1, 1, 1)


def _first_line(error) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _dim(dim: int, rank: int) -> int:
    if not -rank <= dim < rank:
        raise Unrecognised(f"there is no dimension {dim} of {rank}")
    return dim % rank


def _pair(value) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise Unrecognised(f"expected two sizes, got {value}")
    return pair


class _Reader:
    """Reads a graph for one shape of samples. Methods named like torch's functions add layers."""

    def __init__(self, graph: torch.fx.Graph, layout: Layout, sample: torch.Size, flat: bool):
        self.graph, self.root, self.layout = graph, _root(layout.module), layout
        self.input = _Value(0, tuple(sample), opaque=flat)
        self.header = (math.prod(sample), 1, 1) if flat else self.input.chw
        self.layers: list[list[int]] = []
        self.numbers: list[float] = []
        self.descriptions: list[str] = []
        self.sources: list[Tensor] = []
        self.offsets, at = {}, 0
        for parameter in layout.parameters.values():
            self.offsets[id(parameter)] = at
            at += parameter.numel()
        self.dtype = next(iter(layout.parameters.values())).dtype
        self.fewest_positions = 0
        self.env: dict[torch.fx.Node, object] = {}
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def read(self) -> Network:
        for node in self.graph.nodes:
            if node.op == "output":
                (result,) = node.args
                result = self.env.get(result) if isinstance(result, torch.fx.Node) else result
                if not isinstance(result, _Value):
                    raise Unrecognised("the network does not return one tensor computed from its input")
                if result.index != len(self.layers):
                    self.keep_last(result)
                break
            self.env[node] = self.evaluate(node)
        if result.opaque:
            raise Unrecognised("the network returns its input")
        program = [VERSION, self.layout.size, sum(s.numel() for s in self.sources), *self.header, len(self.layers)]
        for layer in self.layers:
            program += layer
        return Network(
            tuple(program),
            tuple(self.numbers),
            tuple(self.sources),
            torch.Size(result.shape),
            self.fewest_positions,
            tuple(self.descriptions),
        )

    def keep_last(self, result: _Value) -> None:
        """The prediction is the last value: what was traced after it (and is not used) is cut off."""
        del self.layers[result.index :], self.numbers[2 * result.index :], self.descriptions[result.index :]

    def evaluate(self, node: torch.fx.Node):
        if node.op == "placeholder":
            if not self.env:
                return self.input
            return node.args[0] if node.args else None
        if node.op == "get_attr":
            return self.attribute(node)
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        try:
            if node.op == "call_module":
                return self.call_module(node, args, kwargs)
            if node.op == "call_method":
                name, key = f"Tensor.{node.target}", node.target if node.target in _METHODS else None
            else:
                key = _FUNCTIONS.get(node.target)
                name = f"{getattr(node.target, '__module__', '') or ''}.{self.name(node)}".removeprefix("_operator.")
            if not any(isinstance(a, (_Value, _Samples)) for a in torch.utils._pytree.tree_leaves((args, kwargs))):
                return self.constant(node, name, args, kwargs)
            if key is None:
                raise Unrecognised(f"{name} has no compiled rule")
            method = getattr(self, key)
            if key.endswith("_") or inspect.signature(method).bind(*args, **kwargs).arguments.get("inplace"):
                self.check_in_place(node)
            return method(*args, **kwargs)
        except (TypeError, AttributeError, ValueError, LookupError, ArithmeticError) as error:
            raise Unrecognised(f"{self.name(node)}: {_first_line(error)}{self.where(node)}") from error
        except Unrecognised as error:
            raise Unrecognised(f"{error}{self.where(node)}") from None

    def where(self, node: torch.fx.Node) -> str:
        """Where in the user's code: the innermost line that is not torch's."""
        if node.op == "call_module":
            return f" (module {node.target})"
        return _at(node.meta.get("line", ""))

    def attribute(self, node: torch.fx.Node):
        value = self.root
        for name in str(node.target).split("."):
            value = getattr(value, name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            raise Unrecognised(f"it computes with the tensor {node.target}, which is no parameter{self.where(node)}")
        return value

    def constant(self, node, name, args, kwargs):
        """Arithmetic on sizes and numbers. Anything that makes a tensor is refused."""
        # By torch.fx, that arguments have their default.
        if node.target is torch._assert or self.name(node) == "_assert_is_none":
            return None
        if node.target in (getattr, operator.getitem) or getattr(node.target, "__module__", "") in ("_operator", "math"):
            result = node.target(*args, **kwargs)
            if not isinstance(result, Tensor):
                return result
        raise Unrecognised(f"{name} makes a tensor that is neither parameter nor input")

    def check_in_place(self, node: torch.fx.Node) -> None:
        """Writing over a value is fine where nobody reads the old one later, under this or another name."""
        writer, changed = node, node.args[0]
        while isinstance(changed, torch.fx.Node):
            if changed.op == "placeholder":
                raise Unrecognised("its input is changed in place")
            readers = [user for user in changed.users if user is not writer]
            if any(self.order[user] > self.order[node] or self.name(user) in _ALIASES for user in readers):
                raise Unrecognised("a value that is read again is changed in place")
            if self.name(changed) not in _ALIASES:
                return
            writer, changed = changed, changed.args[0]

    def name(self, node: torch.fx.Node) -> str:
        if node.op == "call_module":
            return type(self.root.get_submodule(node.target)).__name__
        return node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))

    # Building blocks.

    def layer(self, kind: Kind, x: _Value, attributes, shape, text: str, second: int = -1, numbers=(0.0, 0.0)) -> _Value:
        if not isinstance(x, _Value):
            raise Unrecognised(f"{text.split()[0]} of something that is not computed from the input")
        if x.opaque:
            raise Unrecognised(f"samples of shape {list(x.shape)} have a compiled rule only where they are flattened")
        if any(isinstance(value, Tensor) for value in (*attributes, *numbers)):
            raise Unrecognised(f"{text.split()[0]} with a parameter where a number is expected")
        layer = [int(kind), x.index, second, *map(int, attributes)]
        self.layers.append(layer + [0] * (LAYER_INTS - len(layer)))
        self.numbers += [float(number) for number in numbers]
        self.descriptions.append(f"{text:44} {list(shape)}")
        return _Value(len(self.layers), shape)

    def reference(self, tensor: Tensor | None, shape: tuple[int, ...], what: str) -> int:
        if tensor is None:
            return ABSENT
        if not isinstance(tensor, Tensor):
            raise Unrecognised(f"{what} is computed, not a parameter")
        if tuple(tensor.shape) != tuple(shape):
            raise Unrecognised(f"{what}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if id(tensor) in self.offsets:
            return self.offsets[id(tensor)]
        if tensor.requires_grad:
            raise Unrecognised(f"{what} requires grad and is no parameter of the network")
        if tensor.dtype != self.dtype:
            raise Unrecognised(f"{what} has dtype {tensor.dtype}, the parameters {self.dtype}")
        at = 0
        for source in self.sources:
            if source is tensor:
                break
            at += source.numel()
        else:
            self.sources.append(tensor)
        return -(at + 2)

    def call_module(self, node, args, kwargs):
        module = self.root.get_submodule(node.target)
        read = _MODULES.get(type(module))
        if read is None:
            raise Unrecognised(f"{node.target} ({type(module).__name__}) has no compiled rule")
        if len(args) != 1 or kwargs:
            raise Unrecognised(f"{node.target} ({type(module).__name__}) is called with more than one argument")
        if getattr(module, "inplace", False):
            self.check_in_place(node)
        return read(self, module, args[0])

    # Layers, each called like torch's function.

    def linear(self, input, weight, bias=None):
        if len(input.shape) != 1:
            raise Unrecognised(f"linear on samples of shape {list(input.shape)}, expected vectors")
        out = weight.shape[0]
        refs = self.reference(weight, (out, *input.shape), "weight"), self.reference(bias, (out,), "bias")
        return self.layer(Kind.CONTRACT, input, [out, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, *refs], (out,), f"linear {out}")

    def conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        c, h, w = self.image(input, "conv2d")
        out, _, kh, kw = weight.shape
        (sh, sw), (dh, dw) = _pair(stride), _pair(dilation)
        if padding == "same":
            total = dh * (kh - 1), dw * (kw - 1)
            top, left = total[0] // 2, total[1] // 2
            bottom, right = total[0] - top, total[1] - left
        else:
            top, left = bottom, right = (0, 0) if padding == "valid" else _pair(padding)
        if min(sh, sw, dh, dw) < 1 or min(top, left) < 0 or padding == "same" and max(sh, sw) > 1:
            raise Unrecognised(f"conv2d: stride {stride}, padding {padding!r} and dilation {dilation} are not possible")
        if c % groups or out % groups:
            raise Unrecognised(f"conv2d: {groups} groups do not divide {c} and {out} channels")
        oh = (h + top + bottom - dh * (kh - 1) - 1) // sh + 1
        ow = (w + left + right - dw * (kw - 1) - 1) // sw + 1
        if min(oh, ow) < 1:
            raise Unrecognised(f"conv2d: the kernel is larger than the padded input {[c, h, w]}")
        refs = self.reference(weight, (out, c // groups, kh, kw), "weight"), self.reference(bias, (out,), "bias")
        attributes = [out, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups, *refs]
        text = f"conv2d {out}, {kh}x{kw}, stride {sh}" + (f", {groups} groups (run as one)" if groups > 1 else "")
        return self.layer(Kind.CONTRACT, input, attributes, (out, oh, ow), text)

    def image(self, x: _Value, what: str) -> tuple[int, int, int]:
        if not isinstance(x, _Value) or len(x.shape) != 3:
            raise Unrecognised(f"{what} on samples of shape {list(getattr(x, 'shape', []))}, expected [C, H, W]")
        return x.shape

    def norm(self, x, statistics, groups, elements, weight, bias, mean, variance, eps, text):
        shape = x.shape if elements else x.shape[:1]
        refs = [self.reference(t, shape, name) for t, name in ((weight, "weight"), (bias, "bias"))]
        refs += [self.reference(t, x.shape[:1], "running statistics") for t in (mean, variance)]
        if statistics == Statistics.BATCH:
            positions = math.prod(x.shape[1:])
            self.fewest_positions = min(self.fewest_positions or positions, positions)
        attributes = [statistics, groups, int(elements), *refs]
        return self.layer(Kind.NORM, x, attributes, x.shape, text, numbers=(eps, 0.0))

    def batch_norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        if training:
            running_mean = running_var = None
        kind = Statistics.BATCH if training else Statistics.FIXED
        text = f"batch norm, statistics of the {'batch' if training else 'training'}"
        return self.norm(input, kind, 1, False, weight, bias, running_mean, running_var, eps, text)

    def layer_norm(self, input, normalized_shape, weight=None, bias=None, eps=1e-5):
        if tuple(normalized_shape) != input.shape:
            raise Unrecognised(f"layer norm over {list(normalized_shape)}, not all of {list(input.shape)}")
        return self.norm(input, Statistics.SAMPLE, 1, True, weight, bias, None, None, eps, "layer norm")

    def group_norm(self, input, num_groups, weight=None, bias=None, eps=1e-5):
        text = f"group norm, {num_groups} groups"
        if input.shape[0] % num_groups:
            raise Unrecognised(f"{text}, do not divide {input.shape[0]} channels")
        return self.norm(input, Statistics.SAMPLE, num_groups, False, weight, bias, None, None, eps, text)

    def instance_norm(
        self, input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
        momentum=0.1, eps=1e-5,
    ):  # fmt: skip
        if not use_input_stats:
            raise Unrecognised("instance norm with running statistics has no compiled rule")
        c, *_ = self.image(input, "instance norm")
        return self.norm(input, Statistics.SAMPLE, c, False, weight, bias, None, None, eps, "instance norm")

    def pool(self, x, average, kernel, stride, padding, dilation, ceil_mode, count_padding, divisor):
        c, *size = self.image(x, "pooling")
        kernel, padding, dilation = _pair(kernel), _pair(padding), _pair(dilation)
        stride = kernel if stride is None or stride == [] else _pair(stride)
        out = []
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation):
            extra = s - 1 if ceil_mode else 0
            o = (n + 2 * p - d * (k - 1) - 1 + extra) // s + 1
            if ceil_mode and (o - 1) * s >= n + p:
                o -= 1
            if o < 1 or p > k // 2:
                raise Unrecognised(f"pooling: kernel {list(kernel)} does not fit {[c, *size]}")
            out.append(o)
        attributes = [int(average), *kernel, *stride, *padding, *dilation, *out, int(count_padding), divisor or 0]
        text = f"{'average' if average else 'max'} pool {kernel[0]}x{kernel[1]}, stride {stride[0]}"
        return self.layer(Kind.POOL, x, attributes, (c, *out), text)

    def max_pool2d(
        self, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
    ):
        if return_indices:
            raise Unrecognised("max pooling that returns indices has no compiled rule")
        return self.pool(input, False, kernel_size, stride, padding, dilation, ceil_mode, True, None)

    def avg_pool2d(
        self, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
        divisor_override=None,
    ):  # fmt: skip
        return self.pool(
            input, True, kernel_size, stride, padding, 1, ceil_mode, count_include_pad, divisor_override
        )

    def adaptive_avg_pool2d(self, input, output_size):
        c, h, w = self.image(input, "adaptive pooling")
        sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
        out = tuple(n if o is None else o for n, o in zip((h, w), sizes))
        return self.layer(Kind.AVERAGE, input, out, (c, *out), f"adaptive average pool {out[0]}x{out[1]}")

    def mean(self, input, dim=None, keepdim=False):
        rank = len(input.shape) + 1
        dims = {_dim(d, rank) for d in ((dim,) if isinstance(dim, int) else tuple(dim or ()))}
        if rank < 3 or dims != set(range(2, rank)):
            raise Unrecognised(f"mean over dimensions {dim}: only over all spatial ones")
        c = input.shape[0]
        shape = (c, *[1] * (rank - 2)) if keepdim else (c,)
        return self.layer(Kind.AVERAGE, input, (1, 1), shape, "mean over positions")

    def reshaped(self, x: _Value, shape: tuple[int, ...]) -> _Value:
        if math.prod(shape) != math.prod(x.shape):
            raise Unrecognised(f"a reshape of {list(x.shape)} to {list(shape)} mixes samples")
        if not 1 <= len(shape) <= 3:
            raise Unrecognised(f"samples of shape {list(shape)} have no compiled rule")
        before = (math.prod(x.shape), 1, 1) if x.opaque else x.chw
        after = _Value(x.index, shape)
        if before == after.chw:
            return after
        x = _Value(x.index, before)
        return self.layer(Kind.RESHAPE, x, after.chw, shape, "reshape")

    def view(self, input, *shape):
        shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        first, *rest = shape
        if not all(isinstance(s, int) for s in rest) or not isinstance(first, (int, _Samples)):
            raise Unrecognised("a reshape whose sizes depend on the number of samples")
        if isinstance(first, int) and first != -1:
            raise Unrecognised(f"a reshape to a fixed number of samples, {first}")
        if -1 in rest:
            if first == -1:
                raise Unrecognised("a reshape with two unknown sizes")
            known = -math.prod(rest)
            rest[rest.index(-1)] = math.prod(input.shape) // max(known, 1)
        return self.reshaped(input, tuple(rest))

    reshape = view

    def flatten(self, input, start_dim=0, end_dim=-1):
        rank = len(input.shape) + 1
        start, end = _dim(start_dim, rank), _dim(end_dim, rank)
        if start == 0:
            raise Unrecognised("flatten from dimension 0 mixes samples")
        kept = input.shape[: start - 1], input.shape[start - 1 : end], input.shape[end:]
        return self.reshaped(input, (*kept[0], math.prod(kept[1]), *kept[2]))

    def unflatten(self, input, dim, sizes):
        d = _dim(dim, len(input.shape) + 1)
        if d == 0:
            raise Unrecognised("unflatten of dimension 0 mixes samples")
        sizes = list(sizes)
        if -1 in sizes:
            sizes[sizes.index(-1)] = input.shape[d - 1] // -math.prod(sizes)
        return self.reshaped(input, (*input.shape[: d - 1], *sizes, *input.shape[d:]))

    def same(self, x, *_, **__):
        return x

    contiguous = same

    def dropout(self, input, p=0.5, training=True, inplace=False):
        if p and training:
            raise Unrecognised(f"dropout with p = {p} in training mode draws random numbers")
        return input

    def combine(self, x, y, alpha, beta, multiply=False):
        if not isinstance(beta, (int, float)):
            raise Unrecognised("alpha is no number")
        if isinstance(x, _Value) and isinstance(y, _Value):
            if x.shape != y.shape or x.opaque or y.opaque:
                raise Unrecognised(f"shapes {list(x.shape)} and {list(y.shape)} do not match: broadcasting")
            text = "multiply" if multiply else "add"
            return self.layer(Kind.COMBINE, x, [int(multiply)], x.shape, text, y.index, (0, 0) if multiply else (alpha, beta))
        if not isinstance(x, _Value):
            x, y, alpha, beta = y, x, beta, alpha
        if isinstance(y, bool) or not isinstance(y, (int, float)) or not isinstance(x, _Value):
            raise Unrecognised("arithmetic with something that is neither a number nor computed from the input")
        numbers = (y, 0.0) if multiply else (alpha, beta * y)
        return self.layer(Kind.COMBINE, x, [0], x.shape, f"{numbers[0]:g} x + {numbers[1]:g}", numbers=numbers)

    def add(self, input, other, alpha=1):
        return self.combine(input, other, 1.0, alpha)

    def sub(self, input, other, alpha=1):
        return self.combine(input, other, 1.0, -alpha)

    def mul(self, input, other):
        return self.combine(input, other, 1.0, 1.0, multiply=True)

    def div(self, input, other):
        if isinstance(other, bool) or not isinstance(other, (int, float)) or not other:
            raise Unrecognised("division by something that is not a number")
        return self.combine(input, 1.0 / other, 1.0, 1.0, multiply=True)

    def neg(self, input):
        return self.combine(input, -1.0, 1.0, 1.0, multiply=True)

    def activation(self, x, which: Activation, *numbers: float) -> _Value:
        numbers = (*numbers, 0.0, 0.0)[:2]
        return self.layer(Kind.ACTIVATION, x, [which], x.shape, which.name.lower(), numbers=numbers)

    def relu(self, input, inplace=False):
        return self.activation(input, Activation.RELU)

    def clamp(self, input, min=None, max=None):
        if max is not None or isinstance(min, bool) or not isinstance(min, (int, float)) or min != 0:
            raise Unrecognised("clamp has a compiled rule for min=0 alone")
        return self.activation(input, Activation.RELU)

    def leaky_relu(self, input, negative_slope=0.01, inplace=False):
        return self.activation(input, Activation.LEAKY_RELU, negative_slope)

    def elu(self, input, alpha=1.0, inplace=False):
        return self.activation(input, Activation.ELU, alpha)

    def gelu(self, input, approximate="none"):
        return self.activation(input, Activation.GELU if approximate == "none" else Activation.GELU_TANH)

    def silu(self, input, inplace=False):
        return self.activation(input, Activation.SILU)

    def softplus(self, input, beta=1.0, threshold=20.0):
        return self.activation(input, Activation.SOFTPLUS, beta, threshold)

    def tanh(self, input):
        return self.activation(input, Activation.TANH)

    def sigmoid(self, input):
        return self.activation(input, Activation.SIGMOID)

    def sin(self, input):
        return self.activation(input, Activation.SIN)

    def softmax(self, input, dim=None, _stacklevel=3, dtype=None, logarithm=0):
        rank = len(input.shape) + 1
        if dim is None or _dim(dim, rank) != 1 or dtype is not None:
            raise Unrecognised(f"softmax over dimension {dim}: only over channels, dimension 1")
        text = "log softmax" if logarithm else "softmax"
        return self.layer(Kind.SOFTMAX, input, [logarithm], input.shape, text)

    def log_softmax(self, input, dim=None, _stacklevel=3, dtype=None):
        return self.softmax(input, dim, dtype=dtype, logarithm=1)

    # Sizes.

    def size(self, input, dim=None):
        shape = (N, *input.shape)
        return shape if dim is None else shape[dim]

    def getattr(self, input, name):
        if name != "shape":
            raise Unrecognised(f"the attribute {name} of a tensor has no compiled rule")
        return (N, *input.shape)

    def getitem(self, input, index):
        if isinstance(input, _Value):
            raise Unrecognised("indexing has no compiled rule")
        return input[index]

    add_, sub_, mul_, div_, neg_, clamp_, relu_ = add, sub, mul, div, neg, clamp, relu
    leaky_relu_, elu_, tanh_, sigmoid_, sin_ = leaky_relu, elu, tanh, sigmoid, sin


def _functions() -> dict[Callable, str]:
    """torch's functions, by the reader's method for them."""
    names = (
        "linear conv2d batch_norm layer_norm group_norm instance_norm max_pool2d avg_pool2d adaptive_avg_pool2d dropout "
        "leaky_relu leaky_relu_ elu elu_ gelu silu softplus tanh sigmoid softmax log_softmax relu relu_"
    ).split()
    found = {getattr(F, name): name for name in names if hasattr(F, name)}
    names = "conv2d mean reshape flatten unflatten add sub mul div neg relu relu_ clamp tanh sigmoid sin softmax log_softmax"
    found.update({getattr(torch, name): name for name in (*names.split(), "max_pool2d", "adaptive_avg_pool2d") if hasattr(torch, name)})
    found.update({f: "dropout" for f in (F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout)})
    found.update({operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div"})
    found.update({operator.iadd: "add_", operator.isub: "sub_", operator.imul: "mul_", operator.itruediv: "div_"})
    found.update({torch.true_divide: "div", torch.subtract: "sub", torch.multiply: "mul", torch.negative: "neg"})
    found.update({operator.neg: "neg", getattr: "getattr", operator.getitem: "getitem"})
    return found


_FUNCTIONS = _functions()
_METHODS = frozenset(
    "add add_ sub sub_ mul mul_ div div_ neg neg_ clamp clamp_ relu relu_ tanh tanh_ sigmoid sigmoid_ sin sin_ mean view "
    "reshape flatten unflatten contiguous softmax log_softmax size".split()
)
_ALIASES = {"view", "reshape", "flatten", "unflatten", "Flatten", "Unflatten", "contiguous", "Identity", "squeeze"}
# Dropout that does nothing returns its argument.
_ALIASES |= {"dropout", "dropout2d", "alpha_dropout", "feature_alpha_dropout"}
_ALIASES |= {"Dropout", "Dropout1d", "Dropout2d", "AlphaDropout", "FeatureAlphaDropout"}


def _batch_norm(reader: _Reader, m: nn.Module, x: _Value) -> _Value:
    rank = {nn.BatchNorm1d: (1, 2), nn.BatchNorm2d: (3,)}[type(m)]
    if len(x.shape) not in rank:
        raise Unrecognised(f"{type(m).__name__} on samples of shape {list(x.shape)}")
    batch = m.training or m.running_mean is None
    return reader.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, batch, eps=m.eps)


def _instance_norm(reader: _Reader, m: nn.Module, x: _Value) -> _Value:
    own = m.training or not m.track_running_stats
    return reader.instance_norm(x, weight=m.weight, bias=m.bias, use_input_stats=own, eps=m.eps)


def _conv2d(reader: _Reader, m: nn.Module, x: _Value) -> _Value:
    if m.padding_mode != "zeros":
        raise Unrecognised(f"padding_mode {m.padding_mode!r} has no compiled rule")
    return reader.conv2d(x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)


_MODULES: dict[type, Callable[[_Reader, nn.Module, _Value], _Value]] = {
    nn.Linear: lambda r, m, x: r.linear(x, m.weight, m.bias),
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.LayerNorm: lambda r, m, x: r.layer_norm(x, m.normalized_shape, m.weight, m.bias, m.eps),
    nn.GroupNorm: lambda r, m, x: r.group_norm(x, m.num_groups, m.weight, m.bias, m.eps),
    nn.MaxPool2d: lambda r, m, x: r.max_pool2d(
        x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AvgPool2d: lambda r, m, x: r.avg_pool2d(
        x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: lambda r, m, x: r.adaptive_avg_pool2d(x, m.output_size),
    nn.Flatten: lambda r, m, x: r.flatten(x, m.start_dim, m.end_dim),
    nn.Unflatten: lambda r, m, x: r.unflatten(x, m.dim, m.unflattened_size),
    nn.Identity: lambda r, m, x: x,
    **{
        kind: lambda r, m, x: r.dropout(x, m.p, m.training)
        for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    },
    nn.ReLU: lambda r, m, x: r.relu(x),
    nn.LeakyReLU: lambda r, m, x: r.leaky_relu(x, m.negative_slope),
    nn.ELU: lambda r, m, x: r.elu(x, m.alpha),
    nn.GELU: lambda r, m, x: r.gelu(x, m.approximate),
    nn.SiLU: lambda r, m, x: r.silu(x),
    nn.Softplus: lambda r, m, x: r.softplus(x, m.beta, m.threshold),
    nn.Tanh: lambda r, m, x: r.tanh(x),
    nn.Sigmoid: lambda r, m, x: r.sigmoid(x),
    nn.Softmax: lambda r, m, x: r.softmax(x, m.dim),
    nn.LogSoftmax: lambda r, m, x: r.log_softmax(x, m.dim),
}
