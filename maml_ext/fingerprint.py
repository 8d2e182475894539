"""Whether a module is still what it was when it was traced. Asked at every call: microseconds count here."""

from __future__ import annotations

from collections import OrderedDict
from operator import attrgetter

from torch import Tensor, nn

from .reads import Reads, snapshot
from .tracing import traced_by_another_tool

_TENSORS = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (dict, OrderedDict, list, set)
_kind = attrgetter("requires_grad", "dtype", "shape")


class Fingerprint:
    """All attributes of a module and its children (settings, modes, hooks, which tensors and children it
    has), and what its forward methods read beyond them (``reads.py``).

    It holds the modules' attribute dictionaries, not the module, which may be collected.
    """

    def __init__(self, module: nn.Module):
        modules = list(module.modules())
        held = [d for m in modules for d in map(m.__dict__.get, _TENSORS) if d]
        # Python tries identity before equality. Tensors that are not identical raise then, and so differ, but
        # for those of one element, which may be equal and are compared once more.
        self._dicts = [*held, *[m.__dict__ for m in modules]]
        self._then = [*map(dict, held), *[{k: _copied(k, v) for k, v in m.__dict__.items()} for m in modules]]
        # Most hooks are none: an empty container stands for itself, and is looked at for being empty still.
        self._empty = [v for d in self._then for v in d.values() if type(v) in _CONTAINERS and not v]
        tensors = [(d, k, t) for d in held for k, t in d.items() if isinstance(t, Tensor)]
        self._single = [(d, k, t) for d, k, t in tensors if t.numel() == 1]
        self._parameters = list(module.parameters())
        self._kinds = [*map(_kind, self._parameters)]
        self._reads = Reads(module)
        if traced_by_another_tool():  # what is found out now holds for no other call
            self._then = None

    def matches(self) -> bool:
        try:
            return (
                self._dicts == self._then
                and [*map(_kind, self._parameters)] == self._kinds
                and not any(self._empty)
                and all([d[k] is t for d, k, t in self._single])
                and not self._reads.changed()
            )
        except Exception:  # attributes that refuse comparison have been replaced
            return False


def _copied(name: str, value):
    """As it is now, where it may change in place. (What has tensors or children is held for itself.)"""
    held = name in _TENSORS and value or type(value) in _CONTAINERS and not value
    return value if held else snapshot(value)
