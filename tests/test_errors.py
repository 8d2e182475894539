"""Bad input: a ValueError or TypeError that names the argument, what was expected and what came."""

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import QUERIES, SHOTS, TASKS, conv_net, images, smooth_mlp, unchanged, vectors
from torch import nn

import maml_ext

pytestmark = pytest.mark.usefixtures("float64")
NAN, INF = float("nan"), float("inf")
P = 3 * 5 + 5 + 5 * 2 + 2  # of smooth_mlp
LIKE = "like the parameters"
META = "meta"  # a device that is here and is not the parameters'


def meta(tensor):
    return tensor.to(META)


def raises(error, message, function, module=None):
    """``message`` is literal text with ``...`` for anything."""
    pattern = ".*".join(map(re.escape, message.split("...")))
    with unchanged(module or nn.Module()), pytest.raises(error) as caught:
        function()
    assert type(caught.value) in (ValueError, TypeError)
    assert re.search(f"^{pattern}", str(caught.value), re.DOTALL), str(caught.value)


# Data of the tasks, for every function that takes them.

DATA = {
    "no task dimension": (
        lambda x, y: (x[0, 0], y),
        ValueError,
        "{x}: expected [tasks, samples, ...], got [3]",
    ),
    "tasks disagree": (lambda x, y: (x, y[:-1]), ValueError, "{y}: expected 3 tasks like {x}, got 2"),
    "samples disagree": (
        lambda x, y: (x[:, 1:], y),
        ValueError,
        "{y}: expected {n-1} samples a task like {x}, got [3, {n}, 2]",
    ),
    "scalar target": (
        lambda x, y: (x, torch.zeros(())),
        ValueError,
        "{y}: expected 3 tasks like {x}, got a scalar",
    ),
    "no samples": (
        lambda x, y: (x[:, :0], y[:, :0]),
        ValueError,
        "{x}: expected at least one task and one sample, got [3, 0, 3]",
    ),
    "no target samples": (
        lambda x, y: (x, y[:, :0]),
        ValueError,
        "{y}: expected at least one task and one sample, got",
    ),
    "no tasks": (
        lambda x, y: (x[:0], y[:0]),
        ValueError,
        "{x}: expected at least one task and one sample, got [0, {n}, 3]",
    ),
    "features": (
        lambda x, y: (x[..., :2], y),
        ValueError,
        "{x}: the module failed on one task, float64 [{n}, 2]: RuntimeError: ",
    ),
    "target shape": (
        lambda x, y: (x, y[..., :1]),
        ValueError,
        "{y}: expected shape ['T', {n}, 2] like the predictions, got [3, {n}, 1]",
    ),
    "target without its last dimension": (
        lambda x, y: (x, y[..., 0]),
        ValueError,
        "{y}: expected shape ['T', {n}, 2] like the predictions, got [3, {n}]",
    ),
    "float32": (
        lambda x, y: (x.float(), y),
        TypeError,
        f"{{x}}: expected torch.float64 {LIKE}, got torch.float32",
    ),
    "float32 target": (
        lambda x, y: (x, y.float()),
        TypeError,
        f"{{y}}: expected torch.float64 {LIKE}, got torch.float32",
    ),
    "integer target": (
        lambda x, y: (x, y.long()),
        TypeError,
        f"{{y}}: expected torch.float64 {LIKE}, got torch.int64",
    ),
    "device": (lambda x, y: (meta(x), y), ValueError, f"{{x}}: expected a tensor on cpu {LIKE}, got meta"),
    "target device": (
        lambda x, y: (x, meta(y)),
        ValueError,
        f"{{y}}: expected a tensor on cpu {LIKE}, got meta",
    ),
    "array": (
        lambda x, y: (x.numpy(), y),
        TypeError,
        "{x}: expected a tensor or a tuple of tensors, got ndarray",
    ),
    "nothing": (lambda x, y: ((), y), ValueError, "{x}: expected a tensor or a tuple of tensors, got none"),
    "None": (lambda x, y: (None, y), TypeError, "{x}: expected a tensor or a tuple of tensors, got NoneType"),
    "None target": (
        lambda x, y: (x, None),
        TypeError,
        "{y}: expected a tensor or a tuple of tensors, got NoneType",
    ),
    "pair as target of a named loss": (
        lambda x, y: (x, (y, y)),
        TypeError,
        "{y}: expected a tensor for loss 'mse', got tuple",
    ),
}


def calls(module, theta, batch):
    """Every function of a batch (x, y) by its name, with what it calls them."""
    maml = maml_ext.MAML(module, steps=2)
    vector = torch.zeros(P)
    return {
        "adapt": (maml.adapt, "support_x", "support_y"),
        "explain": (maml.explain, "support_x", "support_y"),
        "MAML, support": (lambda x, y: maml(x, y, *batch[2:]), "support_x", "support_y"),
        "MAML, query": (lambda x, y: maml(*batch[:2], x, y), "query_x", "query_y"),
        "loss": (maml.adapt(*batch[:2]).loss, "query_x", "query_y"),
        "inner_loop": (
            lambda x, y: maml_ext.inner_loop(module, theta, x, y, lr=0.1, steps=2),
            "support_x",
            "support_y",
        ),
        "task_loss": (lambda x, y: maml_ext.task_loss(module, theta, x, y), "x", "y"),
        "hvp": (lambda x, y: maml_ext.hvp(module, theta, x, y, vector), "x", "y"),
    }


FUNCTIONS = list(calls(smooth_mlp(), torch.zeros(P), (x := torch.zeros(TASKS, SHOTS, 3), x[..., :2])))


@pytest.mark.parametrize("case", DATA)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_data(function, case):
    module, batch = smooth_mlp(), vectors()
    call, x, y = calls(module, maml_ext.flatten(module).detach(), batch)[function]
    change, error, message = DATA[case]
    query = x == "query_x"
    n = QUERIES if query else SHOTS
    message = message.replace("{x}", x).replace("{y}", y).replace("{n}", str(n)).replace("{n-1}", str(n - 1))
    raises(error, message, lambda: call(*change(*(batch[2:] if query else batch[:2]))), module)


@pytest.mark.parametrize(
    "case", ["no task dimension", "no samples", "no tasks", "features", "float32", "device", "None"]
)
def test_data_of_predictions(case):
    module, (x, y, *_) = smooth_mlp(), vectors()
    theta, tasks = maml_ext.flatten(module).detach(), maml_ext.MAML(module).adapt(x, y)
    change, error, message = DATA[case]
    for name, call in (("x", lambda x: maml_ext.network(module, theta, x)), ("query_x", tasks)):
        expected = message.replace("{x}", name).replace("{n}", str(SHOTS))
        raises(error, expected, lambda: call(change(x, y)[0]), module)


def test_number_of_query_tasks():
    """Other than the number of tasks that were adapted."""
    module, batch = smooth_mlp(), vectors()
    tasks = maml_ext.MAML(module).adapt(*batch[:2])
    for call in (lambda: tasks.loss(batch[2][:2], batch[3][:2]), lambda: tasks(batch[2][:2])):
        raises(ValueError, "query_x: expected 3 tasks...got 2", call, module)


# Labels.

LABELS = {
    "above": (
        lambda y: y.fill_(3),
        ValueError,
        "expected labels in 0..2 (or -100, which is left out) for 3 classes, got 3",
    ),
    "one above": (
        lambda y: y.index_fill_(0, torch.tensor(2), 7),
        ValueError,
        "expected labels in 0..2...got 7",
    ),
    "below": (lambda y: y.fill_(-1), ValueError, "expected labels in 0..2...got -1"),
    "int32": (
        lambda y: y.int(),
        TypeError,
        "expected int64 labels (or soft labels in torch.float64), got torch.int32",
    ),
    "bool": (
        lambda y: y.bool(),
        TypeError,
        "expected int64 labels (or soft labels in torch.float64), got torch.bool",
    ),
    "one-hot integers": (
        lambda y: F.one_hot(y, 3),
        ValueError,
        "expected labels ['T', {n}], got [3, {n}, 3]",
    ),
    "soft labels of 2 classes": (
        lambda y: torch.ones(*y.shape, 2),
        ValueError,
        "expected shape ['T', {n}, 3] like the predictions, got [3, {n}, 2]",
    ),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("remembered", [False, True], ids=["first call", "second call"])
@pytest.mark.parametrize("which", ["support_y", "query_y"])
def test_labels(which, remembered, case):
    module, batch = conv_net(), images()
    maml = maml_ext.MAML(module, loss="cross_entropy")
    if remembered:
        maml(*batch)
    change, error, message = LABELS[case]
    message = message.replace("{n}", str(SHOTS if which == "support_y" else QUERIES))
    bad = batch._replace(**{which: change(getattr(batch, which).clone())})
    raises(error, f"{which}: {message}", lambda: maml(*bad), module)


def test_cross_entropy_needs_classes():
    module = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    maml, x = maml_ext.MAML(module, loss="cross_entropy"), vectors().support_x
    message = "loss: 'cross_entropy' needs predictions [N, classes, ...], got [4] a task"
    labels = torch.zeros(TASKS, SHOTS, dtype=torch.int64)
    raises(ValueError, message, lambda: maml.adapt(x, labels), module)


# theta and vector.

VECTORS = {
    "not a tensor": (lambda v: v.tolist(), TypeError, "expected a tensor, got list"),
    "length": (
        lambda v: v[1:],
        ValueError,
        f"expected [..., {P}], one value for each trainable parameter, got [{P - 1}]",
    ),
    "scalar": (
        lambda v: v[0],
        ValueError,
        f"expected [..., {P}], one value for each trainable parameter, got []",
    ),
    "tasks": (lambda v: v.expand(2, -1), ValueError, f"expected [{P}] or [3, {P}] for 3 tasks, got [2, {P}]"),
    "dimensions": (
        lambda v: v.expand(1, 3, -1),
        ValueError,
        f"expected [{P}] or [3, {P}] for 3 tasks, got [1, 3, {P}]",
    ),
    "integers": (lambda v: v.long(), TypeError, "expected ...torch.int64"),
    "device": (meta, ValueError, "expected a tensor on cpu...got meta"),
}


@pytest.mark.parametrize("case", VECTORS)
@pytest.mark.parametrize("function", ["inner_loop", "task_loss", "network", "hvp", "vector of hvp"])
def test_theta_and_vector(function, case):
    module, (x, y, *_) = smooth_mlp(), vectors()
    change, error, message = VECTORS[case]
    theta = maml_ext.flatten(module).detach()
    bad = change(theta)
    call, name = {
        "inner_loop": (lambda: maml_ext.inner_loop(module, bad, x, y, lr=0.1, steps=1), "theta"),
        "task_loss": (lambda: maml_ext.task_loss(module, bad, x, y), "theta"),
        "network": (lambda: maml_ext.network(module, bad, x), "theta"),
        "hvp": (lambda: maml_ext.hvp(module, bad, x, y, theta), "theta"),
        "vector of hvp": (lambda: maml_ext.hvp(module, theta, x, y, bad), "vector"),
    }[function]
    raises(error, f"{name}: {message}", call, module)


def test_vector_of_another_dtype():
    module, (x, y, *_) = smooth_mlp(), vectors()
    theta = maml_ext.flatten(module).detach()
    call = lambda: maml_ext.hvp(module, theta, x, y, theta.float())  # noqa: E731
    raises(TypeError, "vector: expected torch.float64, got torch.float32", call, module)


def test_unflatten():
    module = smooth_mlp()
    raises(
        ValueError, f"theta: expected [..., {P}]", lambda: maml_ext.unflatten(module, torch.zeros(3)), module
    )
    raises(TypeError, "theta: expected a tensor, got list", lambda: maml_ext.unflatten(module, [0.0]), module)


# Options.

SHAPES = f"expected shape [], [4] (per tensor), [{P}] (per parameter), or such a row for each step"
OPTIONS = [
    ({"lr": NAN}, ValueError, "lr: expected a finite rate, got nan"),
    ({"lr": INF}, ValueError, "lr: expected a finite rate, got inf"),
    ({"lr": torch.tensor(NAN)}, ValueError, "lr: expected finite rates, got NaN or infinity"),
    (
        {"lr": torch.tensor([0.1, 0.1, INF, 0.1])},
        ValueError,
        "lr: expected finite rates, got NaN or infinity",
    ),
    ({"lr": True}, TypeError, "lr: expected a float or a tensor, got bool"),
    ({"lr": "0.1"}, TypeError, "lr: expected a float or a tensor, got str"),
    ({"lr": None}, TypeError, "lr: expected a float or a tensor, got NoneType"),
    ({"lr": [0.1] * 4}, TypeError, "lr: expected a float or a tensor, got list"),
    ({"lr": torch.tensor(1)}, TypeError, "lr: expected a real floating dtype, got torch.int64"),
    ({"lr": torch.tensor(1j)}, TypeError, "lr: expected a real floating dtype, got torch.complex"),
    (
        {"lr": torch.full((4,), 0.1, dtype=torch.float32)},
        TypeError,
        "lr: expected torch.float64...got torch.float32",
    ),
    ({"lr": torch.ones(5)}, ValueError, f"lr: {SHAPES} ([steps, 1], [steps, 4], [steps, {P}]), got [5]"),
    ({"lr": torch.ones(0)}, ValueError, f"lr: {SHAPES}...got [0]"),
    ({"lr": torch.ones(2, 5)}, ValueError, f"lr: {SHAPES}...got [2, 5]"),
    ({"lr": torch.ones(1, 1, 1)}, ValueError, f"lr: {SHAPES}...got [1, 1, 1]"),
    ({"lr": torch.ones(1, 4), "steps": 2}, ValueError, "lr: expected a row for each of 2 steps, got 1 rows"),
    ({"lr": torch.ones((), device=META)}, ValueError, f"lr: expected a tensor on cpu {LIKE}, got meta"),
    ({"steps": -1}, ValueError, "steps: expected 0 or more, got -1"),
    ({"steps": True}, TypeError, "steps: expected an int, got bool"),
    ({"steps": 2.0}, TypeError, "steps: expected an int, got float"),
    ({"steps": None}, TypeError, "steps: expected an int, got NoneType"),
    (
        {"loss": "l2"},
        ValueError,
        "loss: expected one of 'mse', 'huber', 'cross_entropy', 'bce_with_logits' or a callable, got 'l2'",
    ),
    ({"loss": 3}, TypeError, "loss: expected a name or a callable (prediction, target) -> scalar, got int"),
    (
        {"loss": None},
        TypeError,
        "loss: expected a name or a callable (prediction, target) -> scalar, got NoneType",
    ),
    (
        {"loss": lambda p, y: p - y},
        ValueError,
        "loss: expected a scalar tensor for one task, got float64 [4, 2]",
    ),
    ({"loss": lambda p, y: 1.0}, ValueError, "loss: expected a scalar tensor for one task, got float"),
    (
        {"loss": lambda p, y: p @ y},
        ValueError,
        "support_y: the loss failed on one task, prediction float64 [4, 2]",
    ),
    (
        {"meta_gradient": "second"},
        ValueError,
        "meta_gradient: expected one of 'exact', 'first_order', got 'second'",
    ),
    ({"meta_gradient": None}, ValueError, "meta_gradient: expected one of 'exact', 'first_order', got None"),
    ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'compiled', 'torch', got 'cuda'"),
    (
        {"backend": "compiled", "loss": lambda p, y: (p - y).square().mean()},
        ValueError,
        "backend: 'compiled' was asked for, but ",
    ),
]


@pytest.mark.parametrize(
    "options, error, message", OPTIONS, ids=[m.split("...")[0][:60] for _, _, m in OPTIONS]
)
@pytest.mark.parametrize("function", ["MAML", "inner_loop"])
def test_options(function, options, error, message):
    """MAML raises when it is made, where it can be known by then."""
    module, (x, y, *_) = smooth_mlp(), vectors()
    if function == "MAML":
        late = options.get("backend") == "compiled" or hasattr(options.get("loss"), "__code__")
        maml = maml_ext.MAML(module, **options) if late else None
        raises(error, message, lambda: maml.adapt(x, y) if late else maml_ext.MAML(module, **options), module)
    else:
        options = {"lr": 0.1, "steps": 1, **options}
        theta = maml_ext.flatten(module).detach()
        raises(error, message, lambda: maml_ext.inner_loop(module, theta, x, y, **options), module)


@pytest.mark.parametrize("options, error, message", [o for o in OPTIONS if o[0].keys() & {"loss", "backend"}])
def test_options_of_the_functional_layer(options, error, message):
    module, (x, y, *_) = smooth_mlp(), vectors()
    theta = maml_ext.flatten(module).detach()
    message = message.replace("support_y", "y")
    raises(error, message, lambda: maml_ext.task_loss(module, theta, x, y, **options), module)
    raises(error, message, lambda: maml_ext.hvp(module, theta, x, y, theta, **options), module)
    if options.keys() == {"backend"}:
        raises(error, message, lambda: maml_ext.network(module, theta, x, **options), module)


def test_reduction():
    module = smooth_mlp()
    for value in ("sum", None):
        message = f"reduction: expected one of 'none', 'mean', got {value!r}"
        raises(ValueError, message, lambda: maml_ext.MAML(module, reduction=value), module)  # noqa: B023


def test_rate_that_is_computed():
    """A MAML lives longer than the graph of a rate."""
    module, rate = smooth_mlp(), torch.tensor(0.1, requires_grad=True).exp()
    message = "lr: expected a leaf tensor, got the result of a computation"
    raises(ValueError, message, lambda: maml_ext.MAML(module, lr=rate), module)


def test_rate_that_becomes_nan():
    module, batch = smooth_mlp(), vectors()
    maml = maml_ext.MAML(module, lr=nn.Parameter(torch.tensor(0.1)))
    maml(*batch)
    with torch.no_grad():
        maml.lr.fill_(NAN)
    raises(ValueError, "lr: expected finite rates", lambda: maml(*batch), module)


def test_steps_of_one_call():
    module, batch = smooth_mlp(), vectors()
    maml = maml_ext.MAML(module, lr=torch.full((2, 1), 0.1), steps=2)
    for call in (lambda steps: maml.adapt(*batch[:2], steps=steps), lambda steps: maml(*batch, steps=steps)):
        raises(ValueError, "steps: expected 0 or more, got -2", lambda: call(-2), module)  # noqa: B023
        raises(TypeError, "steps: expected an int, got bool", lambda: call(False), module)  # noqa: B023
        raises(ValueError, "lr: expected a row for each of 3 steps, got 2 rows", lambda: call(3), module)  # noqa: B023


@pytest.mark.parametrize("steps", [-1, 3, True, 1.0, None])
def test_steps_of_after(steps):
    tasks = maml_ext.MAML(smooth_mlp(), steps=2).adapt(*vectors()[:2])
    raises(
        ValueError,
        f"steps: expected 0 to 2, the steps that were taken, got {steps}",
        lambda: tasks.after(steps),
    )


# Modules.


class Mixed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 3), nn.Linear(3, 2).float())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x), x


MODULES = {
    "no module": (lambda: F.relu, TypeError, "module: expected a torch.nn.Module, got function"),
    "no parameters": (
        nn.ReLU,
        ValueError,
        "module: expected at least one parameter with requires_grad=True, ReLU has 0 parameters",
    ),
    "all frozen": (
        lambda: smooth_mlp().requires_grad_(False),
        ValueError,
        "module: expected at least one parameter with requires_grad=True, ...has 4 parameters, none of them",
    ),
    "mixed dtypes": (
        Mixed,
        TypeError,
        "module: expected trainable parameters of one...torch.float32 on cpu, torch.float64 on cpu",
    ),
    "mixed devices": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, device=META)),
        TypeError,
        "module: expected trainable parameters of one real dtype on one device, found...on cpu...on meta",
    ),
    "complex": (
        lambda: nn.Linear(3, 2, dtype=torch.complex64),
        TypeError,
        "module: expected trainable parameters of one real dtype",
    ),
    "lazy": (lambda: nn.LazyLinear(2), ValueError, "module: ...uninitialized"),
}


@pytest.mark.parametrize("case", MODULES)
def test_module(case):
    build, error, message = MODULES[case]
    module, (x, y, *_) = build(), vectors()
    theta = torch.zeros(P)
    for call in (
        lambda: maml_ext.MAML(module),
        lambda: maml_ext.flatten(module),
        lambda: maml_ext.unflatten(module, theta),
        lambda: maml_ext.inner_loop(module, theta, x, y, lr=0.1, steps=1),
        lambda: maml_ext.network(module, theta, x),
        lambda: maml_ext.task_loss(module, theta, x, y),
        lambda: maml_ext.hvp(module, theta, x, y, theta),
    ):
        raises(error, message, call)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_module_that_returns_no_tensor(loss):
    """As nn.LSTM by itself."""
    module, (x, y, *_) = Pair(), vectors()
    y = y if loss == "mse" else torch.zeros(TASKS, SHOTS, dtype=torch.int64)
    raises(
        TypeError,
        "module: expected to return a tensor...got tuple",
        lambda: maml_ext.MAML(module, loss=loss).adapt(x, y),
        module,
    )
    theta = maml_ext.flatten(module).detach()
    raises(
        TypeError,
        "module: expected to return a tensor, got tuple",
        lambda: maml_ext.network(module, theta, x),
        module,
    )


def test_theta_of_another_dtype_than_the_module():
    """Its frozen parameters and buffers would not fit; the data decide which of the two is wrong."""
    module, (x, *_) = smooth_mlp(), vectors()
    theta = maml_ext.flatten(module).detach().float()
    raises(
        TypeError,
        f"x: expected torch.float32 {LIKE}, got torch.float64",
        lambda: maml_ext.network(module, theta, x),
    )


def test_one_sample_with_batch_norm():
    module, batch = conv_net()[:2].append(nn.Flatten()).append(nn.Linear(3, 3)), images()
    one = batch.support_x[:, :1, :, :1, :1]
    module[0] = nn.Conv2d(1, 3, 1)
    call = lambda: maml_ext.MAML(module, loss="cross_entropy").adapt(one, batch.support_y[:, :1])  # noqa: E731
    raises(
        ValueError,
        "support_x: the module failed on one task...Expected more than 1 value per channel",
        call,
        module,
    )


def test_a_loss_need_not_be_hashable():
    class Scaled:
        def __init__(self, scale):
            self.scale = scale

        def __eq__(self, other):
            return self.scale == other.scale

        def __call__(self, prediction, target):
            return self.scale * F.mse_loss(prediction, target)

    module, batch = smooth_mlp(), vectors()
    assert Scaled.__hash__ is None
    found = maml_ext.MAML(module, loss=Scaled(2.0))(*batch)
    assert torch.allclose(
        maml_ext.MAML(module, loss=Scaled(3.0), lr=0.0)(*batch),
        1.5 * maml_ext.MAML(module, loss=Scaled(2.0), lr=0.0)(*batch),
    )
    assert found.shape == (TASKS,)


def test_raises_helper_wants_the_whole_beginning():
    def bad():
        raise ValueError("lr: expected a finite rate, got nan")

    raises(ValueError, "lr: ...got nan", bad)
    for wrong in ("rate", "steps: expected"):
        with pytest.raises(AssertionError):
            raises(ValueError, wrong, bad)
    with pytest.raises(AssertionError):
        raises(ValueError, "", lambda: (_ for _ in ()).throw(UnicodeError("a subclass says something else")))
