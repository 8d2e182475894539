"""The compiled engines' side of ``inner_loop``, ``network``, ``task_loss``, ``hvp`` and the single-pass meta-gradient.

``choose`` says whether the engine of the tensors' device can run a call, or why not. The Functions below compute
values and first derivatives by the operators of ``ops/engine.py``, second derivatives of the network and the loss too;
a derivative beyond that (a backward pass that is itself recorded, by ``create_graph=True``) goes the reference's way,
which is differentiable to any order: never through a gradient that was computed before and is a constant by now.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.autograd import forward_ad

from . import losses, recognise
from .fingerprint import Fingerprint
from .ops import cuda, engine, library
from .program import ABSENT, Kind, LossKind, Network, Precision
from .stateless import Layout
from .tracing import untraced

BACKENDS = ("auto", "compiled", "torch")
_ops = torch.ops.maml_ext
_KINDS = {
    "mse": LossKind.MSE,
    "huber": LossKind.HUBER,
    "bce_with_logits": LossKind.BINARY,
}
_PRECISIONS = {
    torch.float32: Precision.FULL,
    torch.bfloat16: Precision.BFLOAT16,
    torch.float16: Precision.FLOAT16,
}


@dataclass(frozen=True, eq=False)
class Compiled:
    """A call the engine can run: the program with its loss, and where its constants come from."""

    network: Network
    program: list[int]
    numbers: list[float]
    sources: tuple[Tensor, ...]
    loss: losses.Loss | None
    engine: str = "cpu"  # or "cuda", "triton"
    passed_over: str = ""  # why not the CUDA kernels, where these come first

    @property
    def constants(self) -> Tensor | None:
        if not self.sources:
            return None
        return torch.cat([source.detach().reshape(-1) for source in self.sources])

    def arguments(self, theta: Tensor | Sequence[Tensor]) -> tuple:
        return self.program, self.numbers, self.constants, theta


class _Known:
    """What is known of a module as long as its fingerprint matches."""

    def __init__(self, module: nn.Module):
        self.fingerprint = Fingerprint(module)
        self.networks: dict[torch.Size, Network | str] = {}
        self.calls: dict[tuple, object] = {}  # what single_pass.py has put together
        try:
            self.graph = recognise.trace(module)
        except recognise.Unrecognised as reason:
            self.graph = None
            self.reason = str(reason)

    def network(self, layout: Layout, sample: torch.Size) -> Network | str:
        if self.graph is None:
            return self.reason
        if sample not in self.networks:
            try:
                self.networks[sample] = recognise.network(self.graph, layout, sample)
            except recognise.Unrecognised as reason:
                self.networks[sample] = str(reason)
        return self.networks[sample]


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


@untraced
def known(module: nn.Module) -> _Known:
    found = _known.get(module)
    if found is None or not found.fingerprint.matches():
        found = _known[module] = _Known(module)
    return found


def unfit(theta: Tensor) -> str | None:
    """Why the engine cannot run now, whatever the network; None where it can."""
    if library.ABSENT:
        library.warn_if_absent()
        return f"there is no compiled engine: {library.ABSENT}"
    if theta.device.type not in ("cpu", "cuda"):
        return f"there are compiled engines for the CPU and CUDA only, the parameters are on {theta.device}"
    if theta.is_cuda and cuda.absent():
        return f"there are no CUDA kernels: {cuda.absent()}"
    if theta.dtype not in (torch.float32, torch.float64):
        return f"the compiled engine computes in float32 and float64, the parameters are {theta.dtype}"
    return transformed(theta)


def transformed(tensor: Tensor) -> str | None:
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active: the reference differentiates and batches inside it"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active, which the reference has"
    if tensor.is_cpu and torch.is_autocast_enabled("cpu"):
        return "autocast is on, the compiled engine computes in the parameters' dtype"
    return None


def precision(tensor: Tensor) -> Precision:
    """The least in which products may be computed: on CUDA devices what autocast says, or TF32 where it is allowed."""
    if not tensor.is_cuda:
        return Precision.FULL
    if torch.is_autocast_enabled("cuda"):
        return _PRECISIONS[torch.get_autocast_dtype("cuda")]
    return Precision.TF32 if torch.backends.cuda.matmul.allow_tf32 else Precision.FULL


def choose(module: nn.Module, layout: Layout, theta: Tensor, x, y, loss, backend: str) -> Compiled | str:
    """The compiled form of a call, or why there is none. ``loss`` None: predictions only."""
    if backend == "torch":
        return "backend='torch' was asked for"
    reason = unfit(theta)
    if reason:
        return reason
    if not isinstance(x, Tensor):
        return "several inputs: the compiled engine knows networks of one"
    if x.dtype != theta.dtype:
        return f"the compiled engine needs inputs in the parameters' dtype, they are {x.dtype}"
    network = known(module).network(layout, x.shape[2:])
    if isinstance(network, str):
        return f"not a network the compiled engine knows: {network}"
    if network.fewest_positions * x.shape[1] == 1:
        return "one value a channel has no batch statistics"
    call = _with_loss(network, loss, y, precision(theta))
    return _placed(call, theta) if theta.is_cuda and isinstance(call, Compiled) else call


def _placed(call: Compiled, theta: Tensor) -> Compiled | str:
    """The call with its engine: the CUDA kernels where a task fits a thread block, else the Triton engine."""
    misfit = cuda.misfit(call.program, call.numbers, theta.element_size(), theta.device.index, _ops)
    if misfit and cuda.triton_absent():
        absent = cuda.triton_absent()
        return f"not a network that the CUDA kernels run: {misfit}; and there is no Triton engine: {absent}"
    return replace(call, engine="triton" if misfit else "cuda", passed_over=misfit)


def _with_loss(network: Network, loss, y, precision: Precision) -> Compiled | str:
    if loss is None:
        ints, numbers, found, sources = [LossKind.NONE, 0, ABSENT, precision], [0.0, 0.0], None, ()
    else:
        found = losses.recognise(loss)
        if found is None:
            return "the loss is a callable of its own, which the compiled engine cannot look into"
        y, weight = losses.split(found, y)
        if not isinstance(y, Tensor):
            return f"the target is a {type(y).__name__}, the compiled engine knows tensors"
        if weight is not None and needs_reference(network, weight):
            return (
                "the gradient of weights is wanted and some of them are 0 (which depends on their values): a "
                "sample left out of the statistics of the batch still has one, which the reference computes"
            )
        kind, weights, sources = _KINDS.get(found.kind), ABSENT, ()
        if kind is None:
            kind = LossKind.SOFT_LABELS if y.is_floating_point() else LossKind.LABELS
            if found.class_weight is not None:
                sources = (found.class_weight,)
                weights = -(network.program[2] + 2)
        parameter = found.delta if kind == LossKind.HUBER else found.smoothing
        ints, numbers = [kind, found.ignore_index, weights, precision], [parameter, 0.0]
    program = list(network.program)
    program[2] += sum(s.numel() for s in sources)
    return Compiled(
        network, program + list(map(int, ints)), [*network.numbers, *numbers], (*network.sources, *sources), found
    )


def needs_reference(network: Network, weight: Tensor) -> bool:
    """Whether a sample is left out of batch norm (the engine drops it) whose weight still has a gradient."""
    if not (network.fewest_positions and weight.requires_grad and torch.is_grad_enabled()):
        return False
    return not weight.detach().all()


def _raw(operator: Callable, *arguments) -> Sequence[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _recorded(again: Callable, inputs: Sequence[Tensor], needed: Sequence[bool], cotangents: Sequence) -> list:
    """Gradients of ``again(*inputs)`` by the reference, recorded so that they differentiate further."""
    with torch.enable_grad():
        # An alias of each, so that one computed from another is a variable of its own here.
        inputs = [
            i if not n else i.view_as(i) if i.requires_grad else i.detach().requires_grad_()
            for i, n in zip(inputs, needed)
        ]
        outputs = again(*inputs)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        pairs = [(o, c) for o, c in zip(outputs, cotangents) if c is not None and o.requires_grad]
        wanted = [i for i, n in zip(inputs, needed) if n]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [c for _, c in pairs], create_graph=True, materialize_grads=True
            )
        )
        return [next(found) if n else None for n in needed]


def _or_none(needed: Sequence[bool], gradients: Sequence[Tensor | None]) -> list:
    return [g if n else None for n, g in zip(needed, gradients)]


class Predict(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Compiled, again: Callable, theta: Tensor, x: Tensor):
        ctx.call, ctx.again = call, again
        ctx.save_for_backward(theta, x)
        return _raw(_ops.predict.default, *call.arguments(theta), x, list(call.network.prediction))[0]

    @staticmethod
    def backward(ctx, cotangent):
        theta, x = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_or_none(needed, _Pull.apply(ctx.call, ctx.again, theta, x, cotangent))
        found = _raw(_ops.pull.default, *ctx.call.arguments(theta), x, cotangent, list(map(int, needed)))
        to_theta, to_x = engine.placed(needed, found)
        return None, None, engine.like_theta(to_theta, theta) if needed[0] else None, to_x


class _Pull(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Compiled, again: Callable, theta: Tensor, x: Tensor, cotangent: Tensor):
        ctx.call, ctx.again = call, again
        ctx.save_for_backward(theta, x, cotangent)
        to_theta, to_x = _raw(_ops.pull.default, *call.arguments(theta), x, cotangent, [1, 1])
        return engine.like_theta(to_theta, theta), to_x

    @staticmethod
    def backward(ctx, theta_t, x_t):
        theta, x, cotangent = ctx.saved_tensors
        if torch.is_grad_enabled():

            def again(theta, x, cotangent):
                return _recorded(ctx.again, (theta, x), (True, True), (cotangent,))

            return None, None, *_recorded(again, ctx.saved_tensors, ctx.needs_input_grad[2:], (theta_t, x_t))
        to_cotangent, to_theta, to_x = _raw(
            _ops.pull_tangent.default, *ctx.call.arguments(theta), x, cotangent, theta_t, x_t
        )
        return None, None, *_or_none(ctx.needs_input_grad[2:], (engine.like_theta(to_theta, theta), to_x, to_cotangent))


class Score(torch.autograd.Function):
    """Losses; the gradients that will be wanted are computed along with them.

    ``data``, here and below: x, y, and weights or None.
    """

    @staticmethod
    def forward(ctx, call: Compiled, again: Callable, theta: Tensor, *data: Tensor | None):
        ctx.call, ctx.again = call, again
        wanted = list(map(int, ctx.needs_input_grad[2:]))
        loss, *gradients = _raw(_ops.score.default, *call.arguments(theta), *data, wanted)
        ctx.save_for_backward(theta, *data, *gradients)
        return loss

    @staticmethod
    def backward(ctx, cotangent):
        inputs, gradients = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        computed = needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            computed = (True, True, *needed[2:])
            gradients = _ScoreGradient.apply(ctx.call, ctx.again, needed[2:], *inputs)
        gradients = engine.placed(computed, gradients)
        scaled = [engine.scaled(cotangent, g) if n else None for n, g in zip(needed, gradients)]
        if needed[0]:
            scaled[0] = engine.like_theta(scaled[0], inputs[0])
        return None, None, *scaled


class _ScoreGradient(torch.autograd.Function):
    """Gradients of the losses by theta (a task each), x, and where ``wanted``, y and weights."""

    @staticmethod
    def forward(ctx, call: Compiled, again: Callable, wanted: tuple[bool, bool], theta, *data):
        ctx.call, ctx.again, ctx.wanted = call, again, (True, True, *wanted)
        ctx.save_for_backward(theta, *data)
        ctx.set_materialize_grads(False)
        return tuple(_raw(_ops.score.default, *call.arguments(theta), *data, list(map(int, ctx.wanted)))[1:])

    @staticmethod
    def backward(ctx, *directions):
        theta, *data = inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        directions = engine.placed(ctx.wanted, directions)
        if torch.is_grad_enabled():
            return None, None, None, *_gradients_again(ctx, inputs, needed, directions)
        wanted = list(map(int, needed[1:]))
        found = _raw(_ops.score_tangent.default, *ctx.call.arguments(theta), *data, *directions, wanted)
        found = engine.like_theta(found[0], theta), *engine.placed(wanted, found[1:])
        return None, None, None, *_or_none(needed, found)


def _gradients_again(ctx, inputs, needed, directions):
    """The derivative of the gradients of the losses along ``directions``, by the reference and recorded."""

    def again(theta, *data):
        own = theta.expand(len(data[0]), -1) if theta.dim() == 1 else theta
        cotangents = (torch.ones((), dtype=theta.dtype),)
        return _recorded(lambda *i: ctx.again(*i).sum(), (own, *data), ctx.wanted, cotangents)

    return _recorded(again, inputs, needed, directions)


class Adapt(torch.autograd.Function):
    """theta_1 .. theta_K."""

    @staticmethod
    def forward(ctx, call: Compiled, again: Callable, steps: int, exact: bool, theta, lr, *data):
        ctx.call, ctx.again, ctx.exact = call, again, exact
        ctx.set_materialize_grads(False)
        thetas = _raw(_ops.adapt.default, *call.arguments(theta), lr, *data, steps)
        ctx.save_for_backward(theta, lr, *data, *thetas)
        return tuple(thetas)

    @staticmethod
    def backward(ctx, *cotangents):
        inputs, thetas = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        needed = ctx.needs_input_grad[4:]
        none = (None,) * 4
        if all(c is None for c in cotangents):
            return *none, *[None] * 5
        if torch.is_grad_enabled():
            return *none, *_recorded(ctx.again, inputs, needed, cotangents)
        theta, *others = inputs
        at = [k for k, c in enumerate(cotangents) if c is not None]
        to_theta, *found = _raw(
            _ops.adjoint.default, *ctx.call.arguments(theta), *others, thetas[:-1],
            [cotangents[k] for k in at], at, not ctx.exact, list(map(int, needed[1:])),
        )  # fmt: skip
        to_theta = engine.like_theta(to_theta, theta) if needed[0] else None
        return *none, to_theta, *engine.placed(needed[1:], found)


class Hvp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Compiled, again: Callable, theta, vector, *data):
        ctx.again = again
        ctx.save_for_backward(theta, vector, *data)
        directions = vector, None, None, None
        return _raw(_ops.score_tangent.default, *call.arguments(theta), *data, *directions, [0, 0, 0])[0]

    @staticmethod
    def backward(ctx, cotangent):
        return None, None, *_recorded(ctx.again, ctx.saved_tensors, ctx.needs_input_grad[2:], (cotangent,))


_META_DATA = 7  # tensors before the parameters


class Meta(torch.autograd.Function):
    """Losses after adaptation, with the meta-gradient computed in the same pass over each task.

    ``mean``: of the losses over tasks, and gradients of that mean come from the engine. A gradient by what all tasks
    share is not known for a loss a task before their cotangents are: without ``mean`` the parameters' gradient is kept
    a task each.
    """

    @staticmethod
    def forward(ctx, call: Compiled, again: Callable, options: tuple, *inputs):
        """inputs: lr, then x, y and weights (or None) of the support set and of the query set, then parameters."""
        data, parameters = inputs[:_META_DATA], inputs[_META_DATA:]
        wanted = ctx.needs_input_grad[3 : 3 + _META_DATA]
        with torch._C._AutoDispatchBelowAutograd():
            loss, *gradients = _ops.meta.default(*call.arguments(parameters), *data, *options, wanted)
        ctx.again = again
        ctx.save_for_backward(*inputs, *gradients)
        return loss

    @staticmethod
    def backward(ctx, cotangent):
        none, needed = (None,) * 3, ctx.needs_input_grad[3:]
        saved = ctx.saved_tensors
        inputs, to_theta, kept = saved[: len(needed)], saved[len(needed)], iter(saved[len(needed) + 1 :])
        if torch.is_grad_enabled():
            return *none, *_recorded(ctx.again, inputs, needed, (cotangent,))
        flat = cotangent @ to_theta if cotangent.dim() else cotangent * to_theta
        to_data = [engine.scaled(cotangent, next(kept)) if wish else None for wish in needed[:_META_DATA]]
        return *none, *to_data, *_unflatten_dense_tensors(flat, inputs[_META_DATA:])


def describe(call: Compiled) -> list[str]:
    """The layers of a program, a line each."""
    return [f"{j:3}  {text}" for j, text in enumerate(call.network.descriptions)]


def caveats(call: Compiled, device: torch.device) -> list[str]:
    """What of a call the engine runs, but not as fast as it could."""
    found = [f"not a network that the CUDA kernels run: {call.passed_over}"] if call.passed_over else []
    if call.engine == "triton":
        from maml_ext.kernels import graphs

        unavailable = graphs.unavailable(device)
        return found + ([f"no CUDA graphs: {unavailable}"] if unavailable else [])
    layers = [call.network.layer(j) for j in range(call.network.layers)]
    groups = [layer[3 + 11] for layer in layers if layer[0] == Kind.CONTRACT and layer[3 + 11] > 1]
    return found + [f"a convolution in {g} groups runs as a full one with zeros, {g} times the work" for g in groups]
