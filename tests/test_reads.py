"""What a forward method reads from outside of its module is seen when it changes, or refused."""

import enum
import functools
import gc
import math
import random
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, gradients, vectors
from programs import Calls, check, recognised
from torch import nn

import maml_ext
from maml_ext import compiled, plan
from maml_ext.fingerprint import Fingerprint
from maml_ext.recognise import Unrecognised

pytestmark = pytest.mark.usefixtures("float64")

SCALE = 2.0
SCALES = {"all": {"a": 2.0, "b": 3.0}}
OBJECT = types.SimpleNamespace(scale=2.0)
GENERATOR = np.random.default_rng(0)
PYTHON_GENERATOR = random.Random(0)
draw = PYTHON_GENERATOR.random
asks_for_gradients = torch.is_grad_enabled
config = types.ModuleType("config")
config.scale = 2.0
config.deeper = types.ModuleType("config.deeper")
config.deeper.scale = 2.0


class Mode(enum.Enum):
    ON = 1


class Settings:
    scale = 2.0


def scaled(x):
    return x * SCALE


def twice_scaled(x):
    return scaled(scaled(x))


def counted(x):
    global COUNT
    COUNT = 1
    return x


def closed(value):
    return lambda m, x: m.anchor(x) * value


def closed_over(value):
    return lambda m, x: m.anchor(x) * value.scale


class Layered(nn.Module):
    factor = 2.0

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(5, 5), self.bend
        self.nested = {"a": [2.0]}

    @property
    def doubled(self):
        return 2 * SCALE

    def bend(self, x):
        return torch.relu(x) * self.factor

    def forward(self, x, scale=1.5):
        return self.act(self.fc(x)) * self.doubled * self.nested["a"][0] * scale


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) * SCALE


def change(monkeypatch, holder, name, value):
    """By name in a dict, a class, a Python module or this file."""
    if isinstance(holder, dict):
        monkeypatch.setitem(holder, name, value)
    else:
        monkeypatch.setattr(holder, name, value)


HERE = sys.modules[__name__]
WATCHED = {
    # name: (network, where the value is, its name, another value)
    "a global": (lambda: Calls(lambda m, x: m.anchor(x) * SCALE), HERE, "SCALE", 3.0),
    "of a helper": (lambda: Calls(lambda m, x: scaled(m.anchor(x))), HERE, "SCALE", 3.0),
    "of a helper's helper": (lambda: Calls(lambda m, x: twice_scaled(m.anchor(x))), HERE, "SCALE", 3.0),
    "of a lambda inside": (
        lambda: Calls(lambda m, x: (lambda y: y * SCALE)(m.anchor(x))),
        HERE,
        "SCALE",
        3.0,
    ),
    "of a partial": (lambda: Calls(functools.partial(lambda m, x: scaled(m.anchor(x)))), HERE, "SCALE", 3.0),
    "of a property": (Layered, HERE, "SCALE", 3.0),
    "of what a layer calls": (lambda: OwnConvolution(2, 3, 3), HERE, "SCALE", 3.0),
    "the helper": (lambda: Calls(lambda m, x: scaled(m.anchor(x))), HERE, "scaled", torch.relu),
    "a property": (Layered, Layered, "doubled", 3.0),
    "a class's attribute": (Layered, Layered, "factor", 3.0),
    "another class's": (lambda: Calls(lambda m, x: m.anchor(x) * Settings.scale), Settings, "scale", 3.0),
    "a module's": (lambda: Calls(lambda m, x: m.anchor(x) * config.scale), config, "scale", 3.0),
    "a deeper one's": (
        lambda: Calls(lambda m, x: m.anchor(x) * config.deeper.scale),
        config.deeper,
        "scale",
        3.0,
    ),
    "in a container": (lambda: Calls(lambda m, x: m.anchor(x) * SCALES["all"]["b"]), SCALES["all"], "b", 4.0),
    "of a branch": (lambda: Calls(lambda m, x: m.anchor(x) if SCALE > 2 else x), HERE, "SCALE", 3.0),
}


@pytest.mark.parametrize("name", WATCHED)
def test_a_value_that_changes_is_seen(name, monkeypatch):
    make, holder, key, value = WATCHED[name]
    module = make()
    check(module, *((2, 5, 5) if isinstance(module, nn.Conv2d) else (5,)))
    fingerprint = Fingerprint(module)
    assert fingerprint.matches()
    change(monkeypatch, holder, key, value)
    assert not fingerprint.matches()
    monkeypatch.undo()
    assert fingerprint.matches()


def test_a_closure_that_changes_is_seen():
    function = closed(2.0)
    module = Calls(function)
    check(module, 5)
    fingerprint = Fingerprint(module)
    assert fingerprint.matches()
    function.__closure__[0].cell_contents = 3.0
    assert not fingerprint.matches()


def test_attributes_are_seen_to_change_inside_of_containers():
    module = Layered()
    fingerprint = Fingerprint(module)
    assert fingerprint.matches()
    module.nested["a"][0] = 3.0
    assert not fingerprint.matches()


class Scales:
    first = 2.0


class ReadsAClass(nn.Module):
    """By way of an attribute, or of a local name."""

    def __init__(self, attribute):
        super().__init__()
        self.linear, self.attribute, self.scales = nn.Linear(2, 1), attribute, Scales

    def forward(self, x):
        scales = Scales
        return self.linear(x) * (self.scales.first if self.attribute else scales.first)


@pytest.mark.parametrize("attribute", [True, False])
def test_the_data_of_a_class_is_seen_to_change(attribute, monkeypatch):
    module, x, y = ReadsAClass(attribute), torch.randn(2, 3, 2), torch.randn(2, 3, 1)
    maml, known = maml_ext.MAML(module), maml_ext.MAML(module, backend="torch")
    before = maml(x, y, x, y)
    monkeypatch.setattr(Scales, "first", 4.0)
    after = maml(x, y, x, y)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, known(x, y, x, y))


def test_losses_follow_a_global(monkeypatch):
    module, batch = Calls(lambda m, x: m.out(x) * SCALE, out=nn.Linear(3, 2)), vectors()
    module.anchor.requires_grad_(False)
    for value in (2.0, 0.5):
        monkeypatch.setattr(HERE, "SCALE", value)
        found = {}
        for backend in ("torch", "compiled") if not compiled.library.ABSENT else ("torch", "auto"):
            losses = maml_ext.MAML(module, lr=0.1, steps=2, backend=backend)(*batch)
            found[backend] = gradients(losses, {"weight": module.out.weight})
        assert_same(*found.values())


ORDINARY = {
    "torch and math": lambda m, x: (
        F.relu(torch.tanh(m.anchor(x)) * math.pi) * math.sqrt(2) * float(np.prod(3))
    ),
    "an enumeration": lambda m, x: m.anchor(x) if Mode.ON is Mode.ON else x,
    "sizes": lambda m, x: m.anchor(x).view(x.size(0), int(np.prod(x.shape[1:]))) if False else m.anchor(x),
    "builtins": lambda m, x: m.anchor(x) * len([*range(3)]) * max(1, 2),
    "nothing": lambda m, x: m.anchor(x),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_code_is_not_refused(name):
    module = Calls(ORDINARY[name])
    check(module, 5)
    assert Fingerprint(module).matches()


def test_methods_that_do_not_run_are_not_searched():
    class Trained(Layered):
        def training_step(self, batch):
            return OBJECT.scale * GENERATOR.random()

    check(Trained(), 5)


def with_attribute(value, function):
    module = Calls(function)
    module.held = value
    return module


REFUSED = {
    # name: (network, what the reason says)
    "an object": (lambda: Calls(lambda m, x: m.anchor(x) * OBJECT.scale), "OBJECT, a SimpleNamespace"),
    "an object in an attribute": (
        lambda: with_attribute(types.SimpleNamespace(scale=2.0), lambda m, x: m.anchor(x) * m.held.scale),
        "held, a SimpleNamespace",
    ),
    "an array": (
        lambda: with_attribute(np.ones(2), lambda m, x: m.anchor(x) * float(m.held[0])),
        "held, a ndarray",
    ),
    "numpy's random numbers": (
        lambda: Calls(lambda m, x: m.anchor(x) * (2.0 if np.random.rand() < 0.5 else 3.0)),
        "random",
    ),
    "a generator of numpy": (lambda: Calls(lambda m, x: m.anchor(x) * GENERATOR.random()), "Generator"),
    "a new generator of numpy": (
        lambda: Calls(lambda m, x: m.anchor(x) * np.random.default_rng().random()),
        "default_rng",
    ),
    "Python's random numbers": (lambda: Calls(lambda m, x: m.anchor(x) * random.random()), "random"),
    "a generator of Python": (lambda: Calls(lambda m, x: m.anchor(x) * PYTHON_GENERATOR.random()), "Random"),
    "its method": (lambda: Calls(lambda m, x: m.anchor(x) * draw()), "draw, a Random"),
    "is_grad_enabled": (lambda: Calls(lambda m, x: m.anchor(x) if torch.is_grad_enabled() else x), "is_grad"),
    "by another name": (
        lambda: Calls(lambda m, x: m.anchor(x) if asks_for_gradients() else x),
        "asks_for_grad",
    ),
    "in a closure": (lambda: Calls(closed_over(OBJECT)), "value, a SimpleNamespace"),
    "a variable set": (lambda: Calls(lambda m, x: counted(m.anchor(x))), "changes the variable COUNT"),
    "a container changed": (
        lambda: Calls(lambda m, x: m.anchor(x) * float(len(SCALES.setdefault("new", [1])))),
        "changes what it reads",
    ),
    "globals()": (lambda: Calls(lambda m, x: m.anchor(x) * globals()["SCALE"]), "globals"),
    "a module passed on": (
        lambda: Calls(lambda m, x: m.anchor(x) * getattr(config, "scale")),
        "config, a module",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_watched_is_refused(name):
    make, says = REFUSED[name]
    state = np.random.get_state()[1].tolist(), random.getstate()
    try:
        with pytest.raises(Unrecognised) as error:
            recognised(make(), 5)
    finally:
        SCALES.pop("new", None)
    assert says in str(error.value)
    assert state == (np.random.get_state()[1].tolist(), random.getstate())


def test_explain_names_what_was_refused():
    module, batch = Calls(lambda m, x: m.out(x) * OBJECT.scale, out=nn.Linear(3, 2)), vectors()
    explained = maml_ext.MAML(module, lr=0.1, steps=1).explain(batch.support_x, batch.support_y)
    assert explained.engine == "torch"
    if not compiled.library.ABSENT:
        assert any("OBJECT" in reason for reason in explained.reasons)


@pytest.mark.parametrize("seen_before", [False, True])
def test_inside_of_torch_compile(seen_before):
    """The result is right, follows what changes, and being compiled leaves no mark on later calls."""
    module, batch = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), vectors()
    maml = maml_ext.MAML(module, lr=0.1, steps=2)
    plain = maml_ext.MAML(module, lr=0.1, steps=2, backend="torch")
    if seen_before:
        maml(*batch)
    torch._dynamo.reset()
    calls = torch.compile(lambda *data: maml(*data), backend="eager")
    for change in (
        lambda: None,
        lambda: module[0].weight.data.mul_(2),
        lambda: module[0].requires_grad_(False),
    ):
        change()
        wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
        assert_same(gradients(calls(*batch), wanted), gradients(plain(*batch), wanted))
    if not compiled.library.ABSENT:
        assert maml.explain(batch.support_x, batch.support_y).engine == "cpu"


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("seen_before", [False, True])
def test_other_modules_come_and_go_while_torch_compile_traces(backend, seen_before):
    """What is kept of them is in dictionaries that a trace must not read: here whenever Python collects garbage, as
    modules in cycles go then."""
    maml = maml_ext.MAML(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), lr=0.1, backend=backend)
    batch, others, kept = vectors(), [], (compiled._known, plan._plans)
    expected = maml(*batch) if seen_before else None

    def come_and_go(*_):
        others.append(nn.Identity())
        for of_modules in kept:
            of_modules[others[-1]] = {}
        if len(others) == 5:
            others.clear()

    torch._dynamo.reset()
    thresholds = gc.get_threshold()
    gc.callbacks.append(come_and_go)
    gc.set_threshold(50, 10**6, 10**6)  # the young alone, and often
    try:
        found = torch.compile(lambda *data: maml(*data), backend="eager")(*batch)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(come_and_go)
    assert torch.equal(found, maml(*batch) if expected is None else expected)


# The fingerprint itself.


def test_a_tensor_of_one_element_is_not_taken_for_its_equal():
    module = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))
    for owner, name in ((module[0], "bias"), (module[1], "num_batches_tracked")):
        fingerprint = Fingerprint(module)
        assert fingerprint.matches()
        now = getattr(owner, name)
        copy = nn.Parameter(now.detach().clone()) if isinstance(now, nn.Parameter) else now.clone()
        setattr(owner, name, copy)
        assert not fingerprint.matches()


@pytest.mark.parametrize(
    "add",
    [
        lambda module: module.append(nn.ReLU()),
        lambda module: module.register_buffer("scale", torch.ones(2)),
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.sizes.append(1),
        lambda module: module.names.update(a=1),
    ],
    ids=["child", "buffer", "hook", "list", "dict"],
)
def test_what_is_added_to_an_empty_container_is_seen(add):
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential())
    module[1].sizes, module[1].names = [], {}
    fingerprint = Fingerprint(module)
    assert fingerprint.matches()
    module[1].sizes = []  # another one, as empty
    assert fingerprint.matches()
    add(module[1])
    assert not fingerprint.matches()


@pytest.mark.parametrize("name", ["requires_grad", "shape", "dtype"])
def test_a_parameter_of_another_kind_is_seen(name):
    module = nn.Linear(3, 2)
    fingerprint = Fingerprint(module)
    assert fingerprint.matches()
    if name == "requires_grad":
        module.weight.requires_grad_(False)
    else:
        module.weight.data = module.weight.data.t() if name == "shape" else module.weight.data.float()
    assert not fingerprint.matches()
