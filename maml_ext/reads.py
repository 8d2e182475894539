"""What the user's code in a module reads beyond its arguments: globals, variables of enclosing functions,
attributes.

A trace takes the values of all these for constants. The functions that forward methods may reach are
searched for what they name, without running them. Numbers, strings, functions and classes, and tuples, lists,
dicts and sets of these, are watched: the trace holds as long as they stay as they are. An object of any other
kind may change in ways that cannot be seen from here, and is refused. Torch, numpy and Python's library are
taken for constant, but for what asks for a mode, a clock or random numbers.
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import random
import sys
import types
from collections.abc import Iterator
from operator import attrgetter, itemgetter

import torch
from torch import nn

DEEPEST = 8  # containers inside of one another
_CONSTANTS = (
    *(int, float, complex, bool, str, bytes, range, slice, type(None), type(...), enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType),
)
_LIBRARIES = {"torch", "numpy", *sys.stdlib_module_names}
_UNSTEADY_LIBRARIES = {"os", "posix", "nt", "time", "datetime", "secrets", "uuid"}
_UNSTEADY = {
    *(torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.is_autocast_enabled),
    *(torch.get_default_dtype, torch.is_inference),
    *(random.Random, random.SystemRandom, globals, locals, vars, eval, exec, __import__),
}
_OF_MODULES = vars(nn.Module()).keys()


def snapshot(value, depth: int = DEEPEST + 2):
    """The value, or an equal one that stays as it is when containers change in place."""
    if isinstance(value, dict) and depth:
        return {k: snapshot(v, depth - 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and depth:
        return (list if isinstance(value, list) else tuple)(snapshot(v, depth - 1) for v in value)
    return value.copy() if isinstance(value, set) and depth else value


class Reads:
    """
    Args:
        module: whose forward methods, and those of its children, are searched.

    ``refused`` says why a trace of the module would not stay true; "" where it will until ``changed()``.
    """

    def __init__(self, module: nn.Module):
        self.refused = ""
        self._children = list(module.modules())
        self._seen: set[int] = set()
        self._names = {"forward", "__getattr__", "__getattribute__"}  # what is named, and so may be run
        self._functions: list[types.FunctionType] = []
        self._watched: dict[int, tuple[dict, set[str]]] = {}
        self._cells: dict[int, types.CellType] = {}
        self._search({type(m) for m in self._children if not _is_library(type(m).__module__)})
        self._getters = [(attrgetter("cell_contents"), cell) for cell in self._cells.values()]
        self._getters += [(itemgetter(*sorted(names)), holder) for holder, names in self._watched.values()]
        self._then = snapshot(self._now())
        del self._children, self._seen, self._names, self._functions, self._watched, self._cells

    def changed(self) -> bool:
        """Whether anything that is read has another value now; an error from comparing them says so too."""
        return self._now() != self._then

    def _now(self) -> list:
        return [get(holder) for get, holder in self._getters]

    def _search(self, types_of_users: set[type]) -> None:
        classes = {c for kind in types_of_users for c in kind.__mro__}
        # What torch's layers call, which a subclass may replace.
        for c in classes - {nn.Module, object}:
            if _is_library(c.__module__):
                self._names.update(name for name in vars(c) if not name.startswith("__"))
        classes = {c for c in classes if not _is_library(c.__module__)}
        searched = set() if classes else self._names
        while searched != self._names:
            new, searched = self._names - searched, set(self._names)
            for c in classes:
                for name in new & vars(c).keys():
                    self._attribute(c, name, ())
            for m in self._children:
                for name in (new & vars(m).keys()) - _OF_MODULES:  # which the fingerprint watches
                    self._value(vars(m)[name], name)
            while self._functions:
                self._function(self._functions.pop())

    def _refuse(self, why: str) -> None:
        self.refused = self.refused or why

    def _function(self, function: types.FunctionType) -> None:
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        self._code(function.__code__, function.__globals__, cells)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if isinstance(value, (list, dict, set)):
                self._refuse(
                    f"{function.__name__} has a {type(value).__name__} for a default, which may change"
                )
            self._value(value, f"a default value of {function.__name__}")

    def _code(self, code: types.CodeType, variables: dict, cells: dict[str, types.CellType]) -> None:
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):  # a function inside of this one
                own = constant.co_freevars
                self._code(constant, variables, {n: cell for n, cell in cells.items() if n in own})
            elif isinstance(constant, str):
                self._names.add(constant)  # getattr takes such
        for operation, name, path in _accesses(code):
            self._names.update(path)
            if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
                if name in variables:
                    self._watch(id(variables), variables, name, path)
                else:
                    self._value(getattr(builtins, name, None), name, path)
            elif (
                operation in ("STORE_GLOBAL", "DELETE_GLOBAL")
                or operation in ("STORE_DEREF", "DELETE_DEREF")
                and name in cells
            ):
                self._refuse(f"{code.co_name} changes the variable {name}, which is not its own")
            elif operation == "IMPORT_NAME":
                if name in sys.modules:
                    self._value(sys.modules[name], name)
                else:  # a relative import
                    self._refuse(f"{code.co_name} imports {name}")
            elif "DEREF" in operation and name in cells:
                self._cells[id(cells[name])] = cells[name]
                try:
                    self._value(cells[name].cell_contents, name, path)
                except ValueError:  # empty as yet
                    del self._cells[id(cells[name])]

    def _watch(self, owner: int, holder: dict, name: str, path: tuple[str, ...]) -> None:
        self._watched.setdefault(owner, (holder, set()))[1].add(name)
        self._value(holder[name], name, path)

    def _attribute(self, owner, name: str, path: tuple[str, ...]) -> None:
        """Of a Python module, a class or a function."""
        for holder in owner.__mro__ if isinstance(owner, type) else (owner,):
            if name in vars(holder):
                if not _is_library(_home(holder)):
                    self._watch(id(holder), vars(holder), name, path)
                return

    def _value(self, value, name: str, path: tuple[str, ...] = (), depth: int = DEEPEST) -> None:
        """Whether ``value``, and what is read of it by ``.path``, can be seen to be the same later."""
        if isinstance(value, (types.ModuleType, type, types.FunctionType)):
            if _is_library(_home(value)):
                self._library(value, name, path)
            elif path:
                self._attribute(value, path[0], path[1:])
            elif isinstance(value, types.ModuleType):
                self._refuse(f"it reads {name}, a module, as a whole")
        if isinstance(value, types.FunctionType):
            self._follow(value)
        elif isinstance(value, types.BuiltinFunctionType):
            self._library(value, name, path)
            if not isinstance(value.__self__, (type, types.ModuleType, type(None))):
                self._value(value.__self__, name)
        elif isinstance(value, types.MethodType):
            self._value(value.__func__, name)
            self._value(value.__self__, name)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._value(part, name)
        elif isinstance(value, (staticmethod, classmethod)):
            self._value(value.__func__, name)
        elif isinstance(value, property):
            self._value(value.fget, name)
        elif isinstance(value, type) and not path and not issubclass(value, (nn.Module, BaseException)):
            for c in value.__mro__:
                for own, part in vars(c).items() if not _is_library(c.__module__) else ():
                    if isinstance(part, (types.FunctionType, staticmethod, classmethod, property)):
                        self._value(part, name)
                    elif not own.startswith("__") and not hasattr(part, "__get__"):
                        self._watch(id(c), vars(c), own, ())
        elif isinstance(value, (list, tuple, dict, set, frozenset)) and depth:
            for part in [*value, *value.values()] if isinstance(value, dict) else value:
                self._value(part, name, depth=depth - 1)
        elif hasattr(value, "__wrapped__"):
            self._value(value.__wrapped__, name)
        elif not isinstance(value, (*_CONSTANTS, type, types.ModuleType)):
            if not any(value is child for child in self._children):
                self._refuse(f"it reads {name}, a {type(value).__name__}, which may change unseen")

    def _follow(self, function: types.FunctionType) -> None:
        if id(function) not in self._seen:
            self._seen.add(id(function))
            if not _is_library(function.__globals__.get("__name__", "")):
                self._functions.append(function)
            elif hasattr(function, "__wrapped__"):
                self._value(function.__wrapped__, function.__name__)

    def _library(self, value, name: str, path: tuple[str, ...]) -> None:
        """What is read of a library is steady, but for a few."""
        found = value
        for part in path:
            found = getattr(found, part, None)
        library = _home(value).partition(".")[0]
        # Numpy's one generator, like Python's, is known after the trace to have been used or not.
        generator = getattr(found, "__name__", "") in ("default_rng", "Generator", "RandomState")
        if library in _UNSTEADY_LIBRARIES or generator or any(found is f for f in _UNSTEADY):
            self._refuse(f"it asks for {'.'.join((name, *path))}, which may say something else later")


def _accesses(code: types.CodeType) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(operation, name, attributes): ``a.b.c`` is ("LOAD_GLOBAL", "a", ("b", "c"))."""
    operation, name, path = "", "", ()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            path += (instruction.argval,)
        elif instruction.opname != "EXTENDED_ARG":
            yield operation, name, path
            operation, name, path = instruction.opname, instruction.argval, ()


def _home(value) -> str:
    """The name of the Python module in which something was defined."""
    if isinstance(value, types.FunctionType):
        return value.__globals__.get("__name__") or ""
    return (value.__name__ if isinstance(value, types.ModuleType) else value.__module__) or ""


def _is_library(name: str) -> bool:
    return name.partition(".")[0] in _LIBRARIES
