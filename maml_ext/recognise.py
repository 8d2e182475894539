"""From a module to its network program, if it consists of layers that the compiled engines know.

``trace`` has ``torch.fx`` trace the module once (``tracing.py``); ``network`` reads the graph for a shape of
samples, without running the module: ``spellings.py`` says which of torch's functions and modules are known,
``layers.py`` what each adds to the program. Nothing is taken for what it only resembles.
"""

from __future__ import annotations

import inspect

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .layers import Layers, Samples, Value
from .program import Network
from .spellings import ALIASES, FUNCTIONS, METHODS, MODULES
from .stateless import Layout
from .tracing import Unrecognised, at_line, first_line, root, trace

__all__ = ["Unrecognised", "network", "trace"]


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
        return type(root(module).get_submodule(node.target)) is nn.Flatten
    return getattr(node.target, "__name__", node.target) in ("flatten", "view", "reshape")


class _Reader:
    """Reads a graph for one shape of samples."""

    def __init__(self, graph: torch.fx.Graph, layout: Layout, sample: torch.Size, flat: bool):
        self.graph, self.root = graph, root(layout.module)
        self.layers = Layers(layout, sample, flat)
        self.env: dict[torch.fx.Node, object] = {}
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def read(self) -> Network:
        *nodes, output = self.graph.nodes
        for node in nodes:
            self.env[node] = self.evaluate(node)
        result = torch.fx.node.map_arg(output.args[0], lambda node: self.env[node])
        if not isinstance(result, Value):
            raise Unrecognised("the network does not return one tensor computed from its input")
        return self.layers.program(result)

    def evaluate(self, node: torch.fx.Node):
        if node.op == "placeholder":
            if not self.env:
                return self.layers.input()
            return node.args[0] if node.args else None
        if node.op == "get_attr":
            return self.attribute(node)
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        try:
            if node.op == "call_module":
                return self.call_module(node, args, kwargs)
            if node.op == "call_method":
                name, key = f"Tensor.{node.target}", node.target if node.target in METHODS else None
            else:
                key = FUNCTIONS.get(node.target)
                name = f"{getattr(node.target, '__module__', '') or ''}.{self.name(node)}"
                name = name.removeprefix("_operator.")
            leaves = pytree.tree_leaves((args, kwargs))
            if not any(isinstance(leaf, (Value, Samples)) for leaf in leaves):
                return self.constant(node, name, args, kwargs)
            if key is None:
                raise Unrecognised(f"{name} has no compiled rule")
            method = getattr(self.layers, key)
            if key.endswith("_") or inspect.signature(method).bind(*args, **kwargs).arguments.get("inplace"):
                self.check_in_place(node)
            return method(*args, **kwargs)
        except (TypeError, AttributeError, ValueError, LookupError, ArithmeticError) as error:
            raise Unrecognised(f"{self.name(node)}: {first_line(error)}{self.where(node)}") from error
        except Unrecognised as error:
            raise Unrecognised(f"{error}{self.where(node)}") from None

    def call_module(self, node: torch.fx.Node, args, kwargs):
        module = self.root.get_submodule(node.target)
        read = MODULES.get(type(module))
        if read is None:
            raise Unrecognised(f"{node.target} ({self.name(node)}) has no compiled rule")
        if len(args) != 1 or kwargs:
            raise Unrecognised(f"{node.target} ({self.name(node)}) is called with more than one argument")
        if getattr(module, "inplace", False):
            self.check_in_place(node)
        return read(self.layers, module, args[0])

    def where(self, node: torch.fx.Node) -> str:
        """Where in the user's code: the innermost line that is not torch's."""
        if node.op == "call_module":
            return f" (module {node.target})"
        return at_line(node.meta.get("line", ""))

    def attribute(self, node: torch.fx.Node):
        value = self.root
        for name in str(node.target).split("."):
            value = getattr(value, name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            at = self.where(node)
            raise Unrecognised(f"it computes with the tensor {node.target}, which is no parameter{at}")
        return value

    def constant(self, node, name, args, kwargs):
        """Arithmetic on sizes and numbers. Anything that makes a tensor is refused."""
        # By torch.fx, that arguments have their default.
        if node.target is torch._assert or self.name(node) == "_assert_is_none":
            return None
        module = getattr(node.target, "__module__", "")
        if node.target is getattr or module in ("_operator", "math"):
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
            if any(self.order[user] > self.order[node] or self.name(user) in ALIASES for user in readers):
                raise Unrecognised("a value that is read again is changed in place")
            if self.name(changed) not in ALIASES:
                return
            writer, changed = changed, changed.args[0]

    def name(self, node: torch.fx.Node) -> str:
        if node.op == "call_module":
            return type(self.root.get_submodule(node.target)).__name__
        return node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
