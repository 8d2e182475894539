"""sgd_update and the two raw operators: values, derivatives of every kind, bad operands, threads, strides."""

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck

from maml_ext import sgd_update
from maml_ext.ops import library
from maml_ext.ops import sgd as implementation

update, backward = torch.ops.maml_ext.sgd_update, torch.ops.maml_ext.sgd_update_backward
needs_kernels = pytest.mark.skipif(bool(library.ABSENT), reason=f"no kernels here: {library.ABSENT}")
NO_CUDA = library.cuda_absent() or (None if torch.ops.maml_ext.cuda_devices() else "there is no CUDA device")
needs_cuda = pytest.mark.skipif(bool(NO_CUDA), reason=f"runs CUDA kernels: {NO_CUDA}")

# One shape: flat parameters, of tensors that lie along the last dimension. A list of shapes: a list.
LAYOUTS = {
    "flat": (17,),
    "tasks": (3, 17),
    "one task": (1, 17),
    "list": [(3, 4), (5,), (), (0, 2), (2, 1, 3)],
    "list of one": [(2, 3)],
}
SIZES = [3, 1, 0, 13]
RATES = ["float", "scalar", "per tensor", "per parameter", "step", "step per tensor", "step per parameter"]
EVERY = list(itertools.product(LAYOUTS, RATES))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def example(layout, rate, dtype=torch.float64, seed=0):
    """theta, grad, lr and the keywords of a call; every tensor requires its gradient."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    shapes = LAYOUTS[layout]
    flat = isinstance(shapes, tuple)
    theta, grad = (tensor(*shapes) if flat else [tensor(*shape) for shape in shapes] for _ in range(2))
    keywords = {"sizes": SIZES} if flat else {}
    leading = (4,) if "step" in rate else ()
    if leading:
        keywords["step"] = 2
    if rate == "float":
        return theta, grad, 0.3, keywords
    if "parameter" in rate:
        lr = tensor(*leading, 17) if flat else [tensor(*leading, *shape) for shape in shapes]
    else:
        lr = tensor(*leading, *[len(SIZES) if flat else len(shapes)] * ("tensor" in rate))
    return theta, grad, lr, keywords


def plain(theta, grad, lr, sizes=None, step=None):
    """theta - lr * grad as one would write it."""
    if step is not None:
        lr = [r[step] for r in lr] if isinstance(lr, list) else lr[step]
    if isinstance(theta, list):
        rates = lr if isinstance(lr, list) or isinstance(lr, torch.Tensor) and lr.dim() else [lr] * len(theta)
        return [t - r * g for t, g, r in zip(theta, grad, rates)]
    if isinstance(lr, torch.Tensor) and lr.dim() and sizes and len(lr) == len(sizes) != theta.shape[-1]:
        lr = torch.repeat_interleave(lr, torch.tensor(sizes))
    return theta - lr * grad


def leaves(*arguments):
    return [t for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor)]


def rebuilt(function, arguments, **keywords):
    """``function`` of the arguments' tensors alone, as gradcheck and torch.func want it; and the tensors."""
    flat, spec = torch.utils._pytree.tree_flatten(arguments)
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)]

    def call(*tensors):
        full = list(flat)
        for place, tensor in zip(places, tensors):
            full[place] = tensor
        result = function(*torch.utils._pytree.tree_unflatten(full, spec), **keywords)
        return tuple(result) if isinstance(result, list) else result

    return call, [flat[i] for i in places]


def double(tree):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().double(), tree)


def assert_as_accurate(results, eager, truth):
    """An error of at most twice the eager formula's, or a few roundings of the largest result."""
    for r, e, t in zip(leaves(results), leaves(eager), leaves(truth), strict=True):
        assert r.shape == t.shape and r.dtype == e.dtype
        if r.numel():
            roundings = 2 if r.dtype == torch.float32 else 16  # in float64 the truth is rounded too
            allowed = max(2 * (e - t).abs().max(), roundings * torch.finfo(r.dtype).eps * t.abs().max())
            assert (r - t).abs().max() <= allowed


def assert_close(results, expected, tolerance=1e-12):
    for r, e in zip(leaves(results), leaves(expected), strict=True):
        torch.testing.assert_close(r, e, rtol=tolerance, atol=tolerance)


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout, rate", EVERY)
def test_values_and_gradients_are_as_accurate_as_the_eager_formula(layout, rate, dtype):
    theta, grad, lr, keywords = example(layout, rate, dtype)
    result, eager = sgd_update(theta, grad, lr, **keywords), plain(theta, grad, lr, **keywords)
    lr64 = torch.tensor(lr, dtype=dtype).double() if rate == "float" else double(lr)
    assert isinstance(result, list) == isinstance(theta, list)
    assert_as_accurate(result, eager, plain(double(theta), double(grad), lr64, **keywords))

    inputs = leaves(theta, grad, lr)
    weights = [torch.randn_like(r) for r in leaves(result)]
    gradients = torch.autograd.grad(leaves(result), inputs, weights)
    eager = torch.autograd.grad(leaves(eager), inputs, weights)
    function, inputs = rebuilt(plain, (double(theta), double(grad), double(lr)), **keywords)
    inputs = [x.requires_grad_() for x in inputs]
    truth = torch.autograd.grad(leaves(function(*inputs)), inputs, double(weights))
    assert_as_accurate(gradients, eager, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("size", [1, 7, 17, 1023, 1025, 100003])
def test_odd_sizes(size, tasks, dtype):
    theta, grad = torch.randn(2, tasks, size, dtype=dtype)
    sizes = [size // 3, size - size // 3]
    for rate in (torch.rand((), dtype=dtype), torch.rand(2, dtype=dtype), torch.rand(size, dtype=dtype)):
        truth = plain(double(theta), double(grad), double(rate), sizes=sizes)
        assert_as_accurate(sgd_update(theta, grad, rate, sizes=sizes), plain(theta, grad, rate, sizes), truth)
        products = -double(theta) * double(grad)
        to_grad, result = backward([theta], [grad], [rate], sizes, True)
        assert torch.equal(to_grad, update([], [theta], [rate], sizes)[0])
        truth, magnitude = (summed(p, rate, sizes) for p in (products, products.abs()))
        assert result.dtype == dtype and result.shape == rate.shape
        assert ((result - truth).abs() <= 2 * torch.finfo(dtype).eps * magnitude).all()


def summed(products, rate, sizes):
    if rate.dim() == 0 or rate.shape == products.shape[-1:]:
        return products.sum_to_size(rate.shape)
    return torch.stack([piece.sum() for piece in products.split(sizes, -1)])


def strided(t, how):
    """A tensor equal to t whose memory is laid out differently."""
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "every other":
        return torch.stack([t, t + 1], -1)[..., 0]
    if how == "offset":
        return torch.cat([t.new_zeros(5), t.reshape(-1)])[5:].view(t.shape)
    if how == "negated view":  # float memory that holds minus the value, marked so
        return torch.imag(torch.complex(t, -t).conj())
    return t[:1].expand_as(t)  # expanded


@pytest.mark.parametrize("how", ["transposed", "every other", "offset", "negated view", "expanded"])
def test_any_memory_layout(how):
    theta, grad = (strided(torch.randn(3, 17), how) for _ in range(2))
    for lr in (torch.rand(()), strided(torch.rand(1, 17), how)[0], strided(torch.rand(1, 4), how)[0]):
        result = sgd_update(theta, grad, lr, sizes=SIZES)
        assert result.is_contiguous()
        assert_close(result, plain(theta, grad, lr, SIZES), 1e-6)
        results = backward([theta], [grad], [lr], SIZES, True)
        contiguous = backward([theta.clone()], [grad.clone()], [lr.clone()], SIZES, True)
        assert all(torch.equal(r, c) for r, c in zip(results, contiguous, strict=True))


def test_aliases_and_new_memory():
    theta = torch.randn(3, 17)
    before = theta.clone()
    result = sgd_update(theta, theta, theta[0])
    assert_close(result, before - before[0] * before, 1e-6)
    zero = sgd_update([theta, theta], [theta, theta], 0.0)
    assert torch.equal(theta, before) and all(torch.equal(z, theta) for z in zero)
    assert len({t.untyped_storage().data_ptr() for t in [theta, result, *zero]}) == 4


def test_theta_may_change_in_place_before_the_backward_pass():
    theta, grad, lr = (torch.randn(3, requires_grad=True) for _ in range(3))
    moving = theta * 1
    result = sgd_update(moving, grad, lr)
    moving.data.add_(1)
    with torch.no_grad():
        moving.add_(1)
    gradients = torch.autograd.grad(result.sum(), (theta, grad, lr))
    assert_close(gradients, (torch.ones(3), -lr, -grad), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_the_formula(dtype):
    theta, grad, lr, keywords = example("tasks", "per tensor", dtype)
    result = sgd_update(theta, grad, lr, **keywords)
    assert torch.equal(result, plain(theta, grad, lr, **keywords))
    assert all(g.dtype == dtype for g in torch.autograd.grad(result.sum(), (theta, grad, lr)))


def test_empty_operands():
    assert sgd_update([], [], 0.1) == []
    assert sgd_update(torch.ones(0, 5), torch.ones(0, 5), torch.ones(5)).shape == (0, 5)
    for lr, sizes in ((torch.ones(5), []), (torch.ones(2), [2, 3]), (torch.ones(()), [])):
        to_grad, to_lr = backward([torch.ones(0, 5)], [torch.ones(0, 5)], [lr], sizes, True)
        assert to_grad.shape == (0, 5) and torch.equal(to_lr, torch.zeros_like(lr))
    empty = [torch.ones(3, 0)]
    assert torch.equal(backward(empty, empty, [torch.ones(2)], [0, 0], False)[0], torch.zeros(2))
    assert backward(empty, empty, [torch.ones(0)], [], True)[1].shape == (0,)


# Derivatives


@pytest.mark.parametrize("layout, rate", EVERY)
def test_first_and_second_derivatives(layout, rate):
    theta, grad, lr, keywords = example(layout, rate)
    function, inputs = rebuilt(sgd_update, (theta, grad, lr), **keywords)
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3))[1:])
def test_only_what_is_needed_is_computed(needed, monkeypatch):
    """The gradients of grad and lr come from one pass over the cotangent; that of theta is the cotangent."""
    calls = []
    for name in ("_update", "_backward"):
        right = getattr(implementation, name)
        monkeypatch.setattr(
            implementation, name, lambda *args, name=name, right=right: calls.append((name, args)) or right(*args)
        )
    theta, grad, lr = (t.detach().requires_grad_(n) for t, n in zip(example("tasks", "per tensor")[:3], needed))
    inputs = [t for t in (theta, grad, lr) if t.requires_grad]
    result = sgd_update(theta, grad, lr, sizes=SIZES)
    calls.clear()
    found = torch.autograd.grad(result, inputs, torch.ones_like(result))
    assert_close(found, torch.autograd.grad(plain(theta, grad, lr, SIZES).sum(), inputs))
    expected = [("_backward", needed[1])] if needed[2] else [("_update", [])] if needed[1] else []
    assert [(name, args[-1] if name == "_backward" else args[0]) for name, args in calls] == expected


def samples(dtype=torch.float64, requires_grad=True):
    """Operands of both raw operators, of every kind: an empty list of thetas is one of zeros."""
    for (layout, rate), zeros in itertools.product(EVERY, (False, True)):
        if "step" in rate or rate == "float":
            continue
        theta, grad, lr, keywords = example(layout, rate, dtype)
        if not isinstance(theta, list):
            theta, grad, lr = [theta], [grad], [lr]
        elif not isinstance(lr, list):
            lr = list(lr.expand(len(theta)).unbind())
        lists = [[t.detach().clone().requires_grad_(requires_grad) for t in x] for x in (theta, grad, lr)]
        yield ([] if zeros else lists[0]), *lists[1:], keywords.get("sizes", [])
    shared = [torch.randn(3, 2, 5, dtype=dtype, requires_grad=requires_grad) for _ in range(2)]
    rates = [torch.randn(2, 5, dtype=dtype, requires_grad=requires_grad)]
    yield shared[:1], shared[1:], rates, []


def calls(operator, **keywords):
    """Arguments of an operator, of every kind."""
    for operands in samples(**keywords):
        if operator is update:
            yield operands
        elif operands[0]:
            yield from ((*operands, to_grad) for to_grad in (False, True))


each_operator = pytest.mark.parametrize("operator", [update, backward], ids=["update", "backward"])


@each_operator
def test_raw_operators_under_autograd(operator):
    for operands in calls(operator):
        function, inputs = rebuilt(operator, operands)
        assert gradcheck(function, inputs, check_forward_ad=True)
        assert gradgradcheck(function, inputs)
        for test in ("test_schema", "test_autograd_registration", "test_faketensor"):
            torch.library.opcheck(operator.default, operands, test_utils=test)


@each_operator
def test_opcheck_traces_forward_and_backward(operator):
    for operands in list(calls(operator))[::5]:
        torch.library.opcheck(operator.default, operands)


@each_operator
def test_raw_operators_under_transforms_are_right_or_raise(operator):
    """Silent zeros are what must not be."""
    for operands in calls(operator, requires_grad=False):
        function, inputs = rebuilt(operator, operands)

        def loss(*xs):
            return sum(y.sin().sum() for y in function(*xs))

        tangents = tuple(torch.randn_like(x) for x in inputs)
        truth = [x.clone().requires_grad_() for x in inputs]
        truth = torch.autograd.grad(loss(*truth), truth, allow_unused=True, materialize_grads=True)
        for transform in (
            lambda: torch.func.grad(loss, argnums=tuple(range(len(inputs))))(*inputs),
            lambda: torch.func.jvp(loss, tuple(inputs), tangents)[1],
        ):
            try:
                result = transform()
            except RuntimeError:
                continue
            slope = sum((g * t).sum() for g, t in zip(truth, tangents))
            assert_close(result, truth if isinstance(result, tuple) else slope)


def test_every_operator_has_an_autograd_kernel():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("maml_ext::")}
    assert {"maml_ext::sgd_update", "maml_ext::sgd_update_backward"} <= names
    for name in names:
        for key in ("AutogradCPU", "AutogradCUDA"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key), (name, key)


@pytest.mark.parametrize("layout, rate", [(x, y) for x, y in EVERY if y != "float" and x != "one task"])
def test_functional_transforms(layout, rate):
    theta, grad, lr, keywords = double(example(layout, rate))
    function, inputs = rebuilt(sgd_update, (theta, grad, lr), **keywords)
    expected, _ = rebuilt(plain, (theta, grad, lr), **keywords)
    every = tuple(range(len(inputs)))
    tangents = tuple(torch.randn_like(x) for x in inputs)

    def pairs(xs):
        return [torch.stack([x, -x]) for x in xs]

    def loss(f):
        return lambda *xs: sum((y * y).sum() for y in leaves(f(*xs)))

    for transform in (
        lambda f: torch.func.grad(loss(f), argnums=every)(*inputs),
        lambda f: torch.func.jvp(f, tuple(inputs), tangents),
        lambda f: torch.func.jvp(torch.func.grad(loss(f), argnums=every), tuple(inputs), tangents),
        lambda f: torch.func.jacrev(f, argnums=every)(*inputs),
        lambda f: torch.func.jacfwd(f, argnums=every)(*inputs),
        lambda f: torch.vmap(torch.func.grad(loss(f), argnums=every))(*pairs(inputs)),
        lambda f: torch.func.grad(loss(lambda *xs: torch.vmap(f)(*pairs(xs))), argnums=every)(*inputs),
    ):
        assert_close(transform(function), transform(expected))


@pytest.mark.parametrize("call", ["api", "raw update", "raw backward"])
@pytest.mark.parametrize("in_dims", list(itertools.product((None, 0, -1), repeat=3))[1:])
def test_vmap_is_a_loop(in_dims, call):
    sizes = [2, 0, 3]
    for rate in ((), (3,), (5,)):
        shapes = [(2, 5), (2, 5), rate]
        function = {
            "api": lambda t, g, r: sgd_update(t, g, r, sizes=sizes),
            "raw update": lambda t, g, r: update([t], [g], [r], sizes)[0],
            "raw backward": lambda c, g, r: tuple(backward([c], [g], [r], sizes, True)),
        }[call]
        batches = [() if d is None else (4,) for d in in_dims]
        tensors = [torch.randn(b + s, dtype=torch.float64) for b, s in zip(batches, shapes)]
        batched = [t if d is None else t.movedim(0, d) for t, d in zip(tensors, in_dims)]
        slices = [function(*[t if d is None else t[b] for t, d in zip(tensors, in_dims)]) for b in range(4)]
        stacked = [torch.stack(x) for x in zip(*map(leaves, slices))]
        assert_close(torch.vmap(function, in_dims)(*batched), stacked)


def test_vmap_of_lists_and_nested():
    theta, grad, lr, _ = double(example("list", "per parameter"))
    batch = [torch.stack([t, 2 * t, 3 * t]) for t in theta]
    for rates in (lr, 0.3, torch.rand(len(theta), dtype=torch.float64)):
        function = lambda t: sgd_update(t, grad, rates)  # noqa: E731
        expected = [torch.stack(c) for c in zip(*[function([t[b] for t in batch]) for b in range(3)])]
        assert_close(torch.vmap(function)(batch), expected)
    x, y, r = torch.randn(3, 2, 5, 7, dtype=torch.float64).unbind()
    nested = torch.vmap(torch.vmap(sgd_update), in_dims=(1, 1, 1), out_dims=1)(x, y, r)
    assert_close(nested, x - r * y)


# Fake tensors and the compiler


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device):
    with FakeTensorMode():
        t, g, r = (torch.empty(shape, device=device) for shape in ((3, 17), (3, 17), (4,)))
        assert update([], [t.mT], [torch.empty((), device=device)], [])[0].stride() == (3, 1)
        for result in (sgd_update(t, g, r, sizes=SIZES), sgd_update([t, g], [g, t], 0.1)[1]):
            assert result.shape == (3, 17) and result.device.type == device
        for to_grad, shapes in ((False, [(4,)]), (True, [(3, 17), (4,)])):
            results = backward([t], [torch.empty(17, 3, device=device).mT], [r], SIZES, to_grad)
            assert [x.shape for x in results] == shapes and {x.device.type for x in results} == {device}
            assert all(x.is_contiguous() for x in results)
        with pytest.raises(RuntimeError, match="sizes"):
            update([t], [g], [r], [1, 2])
        with pytest.raises(RuntimeError, match="lr"):
            backward([t], [g], [r], [], True)
        with pytest.raises(RuntimeError, match="grad"):
            update([t], [torch.empty(2, 17, device=device)], [r], SIZES)
        with pytest.raises(ValueError, match="lr"):
            sgd_update(t, g, r)


@pytest.mark.parametrize("rate", ["float", "per tensor", "step per parameter"])
@pytest.mark.parametrize("layout", ["tasks", "list"])
def test_compiles_whole(layout, rate):
    theta, grad, lr, keywords = example(layout, rate)
    function, inputs = rebuilt(sgd_update, (theta, grad, lr), **keywords)

    def loss(*xs):
        return sum((y * y).sum() for y in leaves(function(*xs)))

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(*(torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss)))


# Kernels


def formula_of(operator):
    return implementation._update_formula if operator is update else implementation._backward_formula


def disagreement(operator, formula, operands):
    results, expected = operator(*operands), formula(*operands)
    return max((r - e).abs().max().item() for r, e in zip(results, expected, strict=True) if r.numel())


@needs_kernels
@each_operator
def test_kernels_agree_with_the_formula(operator):
    for operands in calls(operator, requires_grad=False):
        assert disagreement(operator, formula_of(operator), operands) < 1e-13


@pytest.mark.gpu
@needs_cuda
@each_operator
def test_cuda_kernels_agree_with_the_formula_and_repeat_their_bits(operator):
    n, double = 100003, torch.float64
    large = [  # more tensors than a launch takes
        (*([torch.randn(tasks, n, dtype=double)] * 60 for _ in range(2)), [rate] * 60, [9, n - 9])
        for tasks in (1, 40)
        for rate in (torch.rand((), dtype=double), torch.rand(2, dtype=double), torch.rand(n, dtype=double))
    ]
    if operator is backward:
        large = [(*operands, to_grad) for operands in large for to_grad in (False, True)]
    for operands in [*calls(operator, requires_grad=False), *large]:
        there = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), operands)
        results, again = operator(*there), operator(*there)
        for result, repeated, expected in zip(results, again, formula_of(operator)(*operands), strict=True):
            assert torch.equal(result, repeated)
            torch.testing.assert_close(result.cpu(), expected, rtol=1e-12, atol=1e-10)


def test_a_wrong_order_of_rates_is_seen():
    operands = [x for x in samples(requires_grad=False) if x[0] and x[2][0].dim() == 1]
    assert len(operands) > 3
    for first, grad, lr, sizes in operands:
        wrong = update(first, grad, [r.flip(0) for r in lr], sizes)
        assert disagreement(lambda *_: wrong, implementation._update_formula, (first, grad, lr, sizes)) > 1e-3


def without_last_segment(to_grad, to_lr):
    return [to_grad, to_lr * torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=to_lr.dtype)]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda to_grad, to_lr: [-to_grad, to_lr],
        lambda to_grad, to_lr: [to_grad, -to_lr],
        lambda to_grad, to_lr: [to_grad, 0 * to_lr],
        lambda to_grad, to_lr: [to_grad, 1.01 * to_lr],
        without_last_segment,
    ],
    ids=["no minus by grad", "no minus by lr", "zero by lr", "a little too large", "a segment forgotten"],
)
def test_wrong_derivatives_are_seen(wrong, monkeypatch):
    function, inputs = rebuilt(sgd_update, example("tasks", "per tensor")[:3], sizes=SIZES)
    assert gradcheck(function, inputs)
    right = implementation._backward
    monkeypatch.setattr(implementation, "_backward", lambda *args: wrong(*right(*args)))
    with pytest.raises(GradcheckError):
        gradcheck(function, inputs)


@needs_kernels
def test_bits_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    theta, grad = torch.randn(2, 5, 40009)
    rates = [torch.rand(()), torch.rand(2), torch.rand(40009)]
    pieces = [theta[:, :39998].reshape(5, -1, 7), theta[:, 3:].mT]
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append([])
            for operator, constants in ((update, []), (backward, [False]), (backward, [True])):
                results[-1] += [operator([theta], [grad], [r], [9, 40000], *constants) for r in rates]
                results[-1] += operator(pieces, pieces, rates[:1] * 2, [], *constants)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(leaves(results[0]), leaves(other), strict=True))


# Bad operands


@pytest.mark.parametrize(
    "arguments, keywords, error, match",
    [
        ((torch.ones(3), [torch.ones(3)], 0.1), {}, TypeError, "grad"),
        (([torch.ones(3)], torch.ones(3), 0.1), {}, TypeError, "grad"),
        ((None, None, 0.1), {}, TypeError, "theta"),
        (([torch.ones(3)], [None], 0.1), {}, TypeError, "grad"),
        (([torch.ones(3)], [], 0.1), {}, ValueError, "grad"),
        (([], [torch.ones(3)], 0.1), {}, ValueError, "grad"),
        ((torch.ones(()), torch.ones(()), 0.1), {}, ValueError, "theta"),
        ((torch.ones(3), torch.ones(4), 0.1), {}, ValueError, "grad"),
        ((torch.ones(3), torch.ones(3).double(), 0.1), {}, TypeError, "grad"),
        ((torch.ones(3).int(), torch.ones(3).int(), 0.1), {}, TypeError, "theta"),
        ((torch.ones(3) + 0j, torch.ones(3) + 0j, 0.1), {}, TypeError, "theta"),
        ((torch.ones(3), torch.ones(3, device="meta"), 0.1), {}, ValueError, "grad"),
        ((torch.ones(3), torch.ones(3), "0.1"), {}, TypeError, "lr"),
        ((torch.ones(3), torch.ones(3), None), {}, TypeError, "lr"),
        ((torch.ones(3), torch.ones(3), True), {}, TypeError, "lr"),
        ((torch.ones(3), torch.ones(3), [0.1]), {}, TypeError, "lr"),
        ((torch.ones(3), torch.ones(3), float("nan")), {}, ValueError, "lr"),
        ((torch.ones(3), torch.ones(3), torch.ones(())), {"step": 0}, ValueError, "step"),
        ((torch.ones(3), torch.ones(3), torch.ones(2)), {"step": 2}, ValueError, "step"),
        ((torch.ones(3), torch.ones(3), torch.ones(2)), {"step": -1}, ValueError, "step"),
        ((torch.ones(3), torch.ones(3), torch.ones(2)), {"step": 0.5}, ValueError, "step"),
        ((torch.ones(3), torch.ones(3), 0.1), {"step": 0}, ValueError, "step"),
        ((torch.ones(3), torch.ones(3), torch.ones(2)), {}, ValueError, "lr"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)), {}, ValueError, "lr"),
        ((torch.ones(3), torch.ones(3), torch.ones(()).double()), {}, TypeError, "lr"),
        ((torch.ones(3), torch.ones(3), torch.ones((), device="meta")), {}, ValueError, "lr"),
        ((torch.ones(3), torch.ones(3), torch.ones(2)), {"sizes": [1, 1]}, ValueError, "sizes"),
        ((torch.ones(3), torch.ones(3), torch.ones(2)), {"sizes": [4, -1]}, ValueError, "sizes"),
        ((torch.ones(3), torch.ones(3), torch.ones(2)), {"sizes": [1.0, 2.0]}, ValueError, "sizes"),
        ((torch.ones(3), torch.ones(3), torch.ones(0)), {"sizes": []}, ValueError, "lr"),
        (([torch.ones(3)] * 2, [torch.ones(3)] * 2, torch.ones(3)), {}, ValueError, "lr"),
        (([torch.ones(3)] * 2, [torch.ones(3)] * 2, [torch.ones(3)]), {}, ValueError, "lr"),
        (([torch.ones(3)] * 2, [torch.ones(3)] * 2, [torch.ones(3), torch.ones(2)]), {}, ValueError, "lr"),
        (([torch.ones(3), torch.ones(3).double()], [torch.ones(3)] * 2, 0.1), {}, TypeError, "theta"),
    ],
)
def test_bad_arguments_are_named(arguments, keywords, error, match):
    with pytest.raises(error, match=f"^{match}: expected"):
        sgd_update(*arguments, **keywords)


def operands_of_fuzz():
    """Anything like operands: mostly wrong in length, shape, dtype, device or sizes; sometimes right."""
    shapes = st.sampled_from([(), (0,), (1,), (2,), (5,), (3, 5), (3, 0), (2, 3, 5), (5, 3)])
    dtypes = [torch.float64, torch.float16, torch.int64, torch.complex64]
    dtypes = st.sampled_from([torch.float32] * 6 + dtypes)
    devices = st.sampled_from(["cpu"] * 9 + ["meta"])
    tensor = st.builds(lambda s, d, v: torch.ones(s, dtype=d, device=v), shapes, dtypes, devices)
    numbers = torch.linspace(-1, 1, 15)
    sane = [numbers[:5], numbers.view(3, 5), numbers.view(5, 3).mT, numbers[1].expand(3, 5)]
    sane = st.sampled_from(sane)
    rate = st.sampled_from([numbers[3], numbers[4:6], numbers[6:11]])
    lists = st.lists(sane | tensor, max_size=3)
    equal = st.builds(lambda t, n: ([t] * n, [t] * n), sane | tensor, st.integers(1, 3))
    size = st.sampled_from([0, 1, 2, 3, 5, -1, 2**31, 2**62, 2**63 - 1, -(2**63), 2**64])
    sizes = st.sampled_from([[], [2, 3], [0, 5], [5]]) | st.lists(size, max_size=4)
    pair = equal | st.tuples(lists, lists)
    return st.tuples(pair, st.lists(rate | tensor, max_size=3), sizes, st.booleans())


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(operands_of_fuzz())
def test_raw_operators_raise_or_are_right_whatever_comes(drawn):
    (first, grad), lr, sizes, zeros = drawn
    for operator, constants in ((update, []), (backward, [False]), (backward, [True])):
        operands = [] if zeros else first, grad, lr, sizes, *constants
        try:
            results = operator(*operands)
        except RuntimeError as error:
            assert str(error)
            continue
        expected = formula_of(operator)(*operands)  # where this raises, the operator let a wrong thing pass
        for r, e in zip(results, expected, strict=True):
            assert r.shape == e.shape and r.dtype == e.dtype and r.device == e.device
            if r.device.type == "cpu":
                torch.testing.assert_close(r, e, rtol=1e-5, atol=1e-5)


def test_absence_is_said_once(monkeypatch):
    monkeypatch.setattr(library, "ABSENT", "no compiler")
    monkeypatch.setattr(library, "_warned", False)
    with pytest.warns(UserWarning, match="no compiler"):
        sgd_update(torch.ones(3), torch.ones(3), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgd_update(torch.ones(3), torch.ones(3), 0.1)
