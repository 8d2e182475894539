"""Whether a module is still what it was when it was traced."""

from __future__ import annotations

from operator import is_

from torch import nn

_TENSORS = ("_parameters", "_buffers", "_modules")


class Fingerprint:
    """All attributes of a module and its children: settings, modes, hooks, and which tensors and children it has.

    It holds the modules' attribute dictionaries, not the module, which may be collected. What a forward method
    reads from elsewhere (globals, closures) is not seen.
    """

    def __init__(self, module: nn.Module):
        modules = list(module.modules())
        self._settings = [(m.__dict__, [_copied(k, v) for k, v in m.__dict__.items()]) for m in modules]
        held = [m.__dict__[name] for m in modules for name in _TENSORS]
        self._held = [(d, list(d.values())) for d in held if d]
        self._parameters = [p for _, p in module.named_parameters()]
        self._kinds = self._kinds_now()

    def matches(self) -> bool:
        try:
            return (
                all([[*d.values()] == then for d, then in self._settings])
                and all([len(d) == len(then) and all(map(is_, d.values(), then)) for d, then in self._held])
                and self._kinds_now() == self._kinds
            )
        except Exception:  # attributes that refuse comparison have been replaced
            return False

    def _kinds_now(self) -> list[tuple]:
        return [(p.requires_grad, p.dtype, p.shape) for p in self._parameters]


def _copied(name: str, value):
    """As it is now, where it may change in place. (Dictionaries of tensors compare by identity, on their own.)"""
    if name in _TENSORS:
        return value
    return value.copy() if isinstance(value, (dict, list, set)) else value
