"""The operators of ``maml_ext/ops/engine.py`` by Triton kernels: what to run in which order, on memory laid out once.

A call's arguments have been checked by its ``checked_`` operator, which has also made the results. A plan, kept for
each kind of call, owns copies of what comes in (channels last, parameters in the engine's order) and all that passes
write; so a plan's ``run`` is the same launches on the same addresses each time, which is what a CUDA graph replays. It
copies in before and out behind. The inner loop keeps theta_k; its adjoint recursion runs values and tangents anew for
each.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from maml_ext.ops.engine import existing, meta_results, placed
from maml_ext.program import LossKind

from . import graphs, update
from .executor import Frame, Pass, Workspace
from .network import Network

KEPT = 16  # plans, with their memory


class Parameters:
    """Vectors of parameters: between PyTorch's order and the engine's."""

    def __init__(self, network: Network, tasks: int, like: Tensor):
        self.network, self.tasks, self.like = network, tasks, like
        self.order = network.order(fixed=False).to(like.device)
        self.inverse = torch.argsort(self.order)
        self.constants_order = network.order(fixed=True).to(like.device)
        self.constants = like.new_empty(network.constants)

    def new(self) -> Tensor:
        return self.like.new_zeros(self.tasks, self.network.parameters)

    def take(self, source: Tensor, to: Tensor) -> None:
        rows = -1 if self.network.parameters else 1  # of nothing there may be any number
        shared = source.reshape(rows, self.network.parameters).expand_as(to)
        torch.index_select(shared, 1, self.order, out=to)

    def take_constants(self, constants: Tensor | None) -> None:
        if constants is not None:
            torch.index_select(constants.reshape(-1), 0, self.constants_order, out=self.constants)

    def give(self, source: Tensor, to: Tensor) -> None:
        to.copy_(source.index_select(-1, self.inverse).view_as(to))


class Samples:
    """The samples of one set of all tasks, the memory of passes over them, and copies in and out."""

    def __init__(
        self, parameters: Parameters, x: Tensor, y: Tensor | None, weight: Tensor | None, wanted: Sequence[int] = (),
        directions: Sequence[Tensor | None] = (), dual: bool = False,
    ):  # fmt: skip
        network, tasks, like = parameters.network, parameters.tasks, parameters.like
        self.parameters, self.network, count = parameters, network, x.shape[1]
        to_x, to_y, to_weight = [*map(bool, wanted), False, False, False][:3]
        x_t, y_t, weight_t = [*(d is not None for d in directions), False, False, False][:3]
        self.frame = Frame(network, tasks, count, like, dual=dual, x_t=x_t, to_x=to_x)
        self.workspace = Workspace(network, tasks, count, like, dual)
        shape = tasks, count, *network.shapes[network.last]
        self.y = self.labels = self.weight = self.to_y = self.to_weight = None
        if y is not None and network.loss.kind == LossKind.LABELS:
            self.labels = torch.empty(shape[:-1], dtype=torch.int64, device=like.device)
        elif y is not None:
            self.y = tuple(like.new_empty(shape) for _ in range(1 + y_t))
            self.to_y = tuple(like.new_empty(shape) for _ in range(1 + dual)) if to_y else None
        if weight is not None:
            self.weight = tuple(like.new_empty(tasks, count) for _ in range(1 + weight_t))
            self.to_weight = tuple(like.new_empty(tasks, count) for _ in range(1 + dual)) if to_weight else None
        self.loss = tuple(like.new_empty(tasks) for _ in range(1 + dual))
        self.found = (self.frame.gradients[0] if to_x else None, self.to_y, self.to_weight)
        self.prediction = self.frame.values[network.last]

    def take_cotangent(self, cotangent: Tensor) -> None:
        """Of the prediction; it has no tangent."""
        gradient = self.frame.gradients.get(self.network.last)
        if gradient:
            gradient[0].copy_(self._channels_last(cotangent, gradient[0]))
            for tangent in gradient[1:]:
                tangent.zero_()

    def take(self, x, y=None, weight=None, x_t=None, y_t=None, weight_t=None) -> None:
        if weight is not None and self.to_weight is None and weight_t is None:
            x, x_t = self._leave_out(weight.reshape(x.shape[:2]) == 0, x, x_t)
        for source, to in zip((x, x_t), self.frame.values[0]):
            to.copy_(self._channels_last(source, to))
        if self.labels is not None:
            self.labels.copy_(y.reshape(self.labels.shape))
        for source, to in zip((y, y_t), self.y or ()):
            to.copy_(self._channels_last(source, to))
        for source, to in zip((weight, weight_t), self.weight or ()):
            to.copy_(source.reshape(to.shape))

    @staticmethod
    def _leave_out(absent: Tensor, *sources: Tensor | None) -> list[Tensor | None]:
        """In place of samples of weight 0, which may be anything, one that counts: all products with it are 0 times
        something finite."""
        tasks, samples = (torch.arange(n, device=absent.device) for n in absent.shape)
        present = torch.where(absent, absent.int().argmin(1, keepdim=True), samples)
        return [source if source is None else source[tasks[:, None], present] for source in sources]

    @staticmethod
    def _channels_last(source: Tensor, to: Tensor) -> Tensor:
        tasks, samples, h, w, c = to.shape
        return source.reshape(tasks, samples, c, h, w).permute(0, 1, 3, 4, 2)

    def give(self, source: Tensor, to: Tensor) -> None:
        """What is like values, from channels last."""
        to.copy_(source.permute(0, 1, 4, 2, 3).reshape(to.shape))

    def give_gradients(self, part: int, *to: Tensor) -> None:
        """By x, y and weights, as far as they are wanted; part 1: their tangents."""
        self.give_like_data((number and number[part] for number in self.found), to)

    def give_like_data(self, found: Iterable[Tensor | None], to: Sequence[Tensor]) -> None:
        for source, result in zip(found, to):
            if source is not None and source.dim() == 5:
                self.give(source, result)
            elif source is not None:
                result.copy_(source)

    def walk(self, *theta: Tensor) -> Pass:
        return Pass(self.frame, theta, self.parameters.constants, self.workspace, self.weight)

    def score(self, *theta: Tensor, back: bool = True) -> None:
        """Forth, the loss, and back: with a direction in ``theta``, values and tangents."""
        walk, parts = self.walk(*theta), len(theta)
        walk.forward()
        to_y, to_weight = (number and number[:parts] for number in (self.to_y, self.to_weight))
        walk.score(self.y, self.labels, self.loss[:parts], to_y, to_weight, back)
        if back:
            walk.backward()

    def gather(self, to: Tensor, part: int = 0) -> None:
        """The gradient by theta, or its tangent (part 1)."""
        update.gather(self.workspace.table, self.workspace.numbers[part : part + 1], (to,))


class Plan:
    """``take`` copies arguments in, ``run`` launches, ``give`` copies results out, which gets None for those that
    ``returned`` has no flag for. Constructors take the same arguments as ``take``, the tensors among them for their
    shapes."""

    returned: Sequence[int]

    def __init__(self, network: Network, theta: Tensor, tasks: int):
        self.parameters = Parameters(network, tasks, theta)
        self.theta = self.parameters.new()

    def _take(self, constants: Tensor | None, theta: Tensor) -> None:
        self.parameters.take_constants(constants)
        self.parameters.take(theta, self.theta)


class Predict(Plan):
    def __init__(self, network, constants, theta, x, prediction):
        super().__init__(network, theta, len(x))
        self.query = Samples(self.parameters, x, None, None)
        self.returned = [1]

    def take(self, constants, theta, x, prediction):
        self._take(constants, theta)
        self.query.take(x)

    def run(self):
        self.query.walk(self.theta).forward()

    def give(self, prediction):
        self.query.give(self.query.prediction[0], prediction)


class Pull(Plan):
    def __init__(self, network, constants, theta, x, cotangent, wanted):
        super().__init__(network, theta, len(x))
        self.query = Samples(self.parameters, x, None, None, wanted[1:])
        self.gradient = self.parameters.new() if wanted[0] else None
        self.returned = wanted

    def take(self, constants, theta, x, cotangent, wanted):
        self._take(constants, theta)
        self.query.take(x)
        self.query.take_cotangent(cotangent)

    def run(self):
        walk = self.query.walk(self.theta)
        walk.forward()
        walk.backward()
        if self.gradient is not None:
            self.query.gather(self.gradient)

    def give(self, to_theta, to_x):
        if self.gradient is not None:
            self.parameters.give(self.gradient, to_theta)
        self.query.give_gradients(0, to_x)


class PullTangent(Plan):
    def __init__(self, network, constants, theta, x, cotangent, theta_t, x_t):
        super().__init__(network, theta, len(x))
        self.query = Samples(self.parameters, x, None, None, [1], [x_t], dual=True)
        self.direction, self.gradient = self.parameters.new(), self.parameters.new()
        self.returned = [1, 1, 1]

    def take(self, constants, theta, x, cotangent, theta_t, x_t):
        self._take(constants, theta)
        if theta_t is not None:
            self.parameters.take(theta_t, self.direction)
        self.query.take(x, x_t=x_t)
        self.query.take_cotangent(cotangent)

    def run(self):
        walk = self.query.walk(self.theta, self.direction)
        walk.forward()
        walk.backward()
        self.query.gather(self.gradient, 1)

    def give(self, prediction_t, to_theta, to_x):
        if len(self.query.prediction) == 2:
            self.query.give(self.query.prediction[1], prediction_t)
        self.parameters.give(self.gradient, to_theta)
        self.query.give_gradients(1, to_x)


class Score(Plan):
    def __init__(self, network, constants, theta, x, y, weight, wanted):
        super().__init__(network, theta, len(x))
        self.query = Samples(self.parameters, x, y, weight, wanted[1:])
        self.gradient = self.parameters.new() if wanted[0] else None
        self.back = any(wanted)
        self.returned = [1, wanted[0], *existing(wanted[1:], y, weight)]

    def take(self, constants, theta, x, y, weight, wanted):
        self._take(constants, theta)
        self.query.take(x, y, weight)

    def run(self):
        self.query.score(self.theta, back=self.back)
        if self.gradient is not None:
            self.query.gather(self.gradient)

    def give(self, loss, to_theta, *to_data):
        loss.copy_(self.query.loss[0])
        if self.gradient is not None:
            self.parameters.give(self.gradient, to_theta)
        self.query.give_gradients(0, *to_data)


class ScoreTangent(Plan):
    def __init__(self, network, constants, theta, x, y, weight, theta_t, x_t, y_t, weight_t, wanted):
        super().__init__(network, theta, len(x))
        self.query = Samples(self.parameters, x, y, weight, wanted, [x_t, y_t, weight_t], dual=True)
        self.direction, self.gradient = self.parameters.new(), self.parameters.new()
        self.returned = [1, *existing(wanted, y, weight)]

    def take(self, constants, theta, x, y, weight, theta_t, x_t, y_t, weight_t, wanted):
        self._take(constants, theta)
        if theta_t is not None:
            self.parameters.take(theta_t, self.direction)
        self.query.take(x, y, weight, x_t, y_t, weight_t)

    def run(self):
        self.query.score(self.theta, self.direction)
        self.query.gather(self.gradient, 1)

    def give(self, to_theta, *to_data):
        self.parameters.give(self.gradient, to_theta)
        self.query.give_gradients(1, *to_data)


class Loop(Plan):
    """The inner loop and its adjoint recursion; ``thetas`` are theta_0 .. theta_K.

    Args:
        wanted: gradients of rates, x, y and weights.
    """

    def __init__(self, network, theta, lr, x, y, weight, steps, recurs, first_order=False, wanted=(0, 0, 0, 0)):
        self.parameters = Parameters(network, len(x), theta)
        # Vectors of their own, for all begin on 16 bytes then: kernels are compiled for addresses that do or do not.
        self.thetas = [theta.new_empty(len(x), network.parameters) for _ in range(steps + 1)]
        self.theta, self.steps = self.thetas[0], steps
        self.exact = recurs and not first_order
        self.support = Samples(self.parameters, x, y, weight, wanted[1:] if self.exact else (), dual=self.exact)
        self.table, self.partials = self.support.workspace.table, self.support.workspace.numbers
        self.rates, self.per_parameter = theta.new_empty(lr.shape), lr.shape[1] != 1
        self.to_rates = None
        if recurs:
            self.adjoint, self.direction = self.parameters.new(), self.parameters.new()
            self.cotangents: list[Tensor | None] = [None] * (steps + 1)
            self.sums = [number and theta.new_empty(number[0].shape) for number in self.support.found]
        if wanted[0]:  # for each task and parameter, or for each task and block of the table
            each = network.parameters if self.per_parameter else self.table.blocks
            self.to_rates = theta.new_zeros(len(lr), len(x), each)

    def _take_rates(self, lr: Tensor) -> None:
        if self.per_parameter:
            torch.index_select(lr, 1, self.parameters.order, out=self.rates)
        else:
            self.rates.copy_(lr)

    def _row(self, k: int) -> int:
        return k if len(self.rates) > 1 else 0

    def descend(self) -> None:
        for k in range(self.steps):
            self.support.score(self.thetas[k])
            rates, following = self.rates[self._row(k)], self.thetas[k + 1]
            update.step(self.table, self.partials[:1], (self.thetas[k],), rates, (following,))

    def recur(self) -> None:
        """From lambda_K in ``adjoint``, and where H counts the rates of step K - 1 times it in ``direction``."""
        for total in self.sums:
            if total is not None:
                total.zero_()
        for k in reversed(range(self.steps)):
            to_rates = None if self.to_rates is None else self.to_rates[self._row(k)]
            if self.exact:
                self.support.score(self.thetas[k], self.direction)
            elif to_rates is not None:
                self.support.score(self.thetas[k])
            elif self.cotangents[k] is not None:
                self.adjoint.add_(self.cotangents[k])
            if self.exact or to_rates is not None:
                more = self.exact and k > 0
                update.adjoint(
                    self.table, self.partials, self.adjoint, self.adjoint, cotangent=self.cotangents[k],
                    rates=self.rates[self._row(k - 1)] if more else None, direction=self.direction if more else None,
                    to_rates=to_rates, accumulate=len(self.rates) == 1 and k < self.steps - 1,
                )  # fmt: skip
            for total, found in zip(self.sums, self.support.found):
                if total is not None:
                    total.sub_(found[1])

    def _give_recursion(self, to_rates: Tensor, to_data: Sequence[Tensor]) -> None:
        if self.to_rates is not None and self.per_parameter:
            self.parameters.give(self.to_rates.sum(1), to_rates)
        elif self.to_rates is not None:
            to_rates.copy_(self.to_rates.sum((1, 2)).view_as(to_rates))
        self.support.give_like_data(self.sums, to_data)


class Adapt(Loop):
    def __init__(self, network, constants, theta, lr, x, y, weight, steps):
        super().__init__(network, theta, lr, x, y, weight, steps, recurs=False)
        self.returned = [1] * steps

    def take(self, constants, theta, lr, x, y, weight, steps):
        self._take(constants, theta)
        self._take_rates(lr)
        self.support.take(x, y, weight)

    def run(self):
        self.descend()

    def give(self, *trajectory):
        for theta, result in zip(self.thetas[1:], trajectory):
            self.parameters.give(theta, result)


class Adjoint(Loop):
    def __init__(
        self, network, constants, theta, lr, x, y, weight, trajectory, cotangents, at, first_order, wanted
    ):  # fmt: skip
        steps = len(trajectory) + 1
        super().__init__(network, theta, lr, x, y, weight, steps, True, first_order, wanted)
        self.returned = [1, wanted[0], *existing(wanted[1:], y, weight)]
        for k in at:
            self.cotangents[k + 1] = self.parameters.new()

    def take(self, constants, theta, lr, x, y, weight, trajectory, cotangents, at, first_order, wanted):
        self._take(constants, theta)
        self._take_rates(lr)
        self.support.take(x, y, weight)
        for source, to in zip(trajectory, self.thetas[1:]):
            self.parameters.take(source, to)
        for source, k in zip(cotangents, at):
            self.parameters.take(source, self.cotangents[k + 1])

    def run(self):
        if self.cotangents[-1] is None:
            self.adjoint.zero_()
        else:
            self.adjoint.copy_(self.cotangents[-1])
        if self.exact:
            torch.mul(self.adjoint, self.rates[self._row(self.steps - 1)], out=self.direction)
        self.recur()

    def give(self, to_theta, to_rates, *to_data):
        self.parameters.give(self.adjoint, to_theta)
        self._give_recursion(to_rates, to_data)


class Meta(Loop):
    def __init__(
        self, network, constants, theta, lr, support_x, support_y, support_weight, query_x, query_y, query_weight,
        steps, first_order, reduce, wanted,
    ):  # fmt: skip
        super().__init__(
            network, theta, lr, support_x, support_y, support_weight, steps, True, first_order, wanted[:4]
        )
        self.query = Samples(self.parameters, query_x, query_y, query_weight, wanted[4:])
        self.returned = meta_results(
            lr, support_x, support_y, support_weight, query_x, query_y, query_weight, steps, first_order, reduce, wanted
        )  # fmt: skip

    def take(
        self, constants, theta, lr, support_x, support_y, support_weight, query_x, query_y, query_weight, *options
    ):  # fmt: skip
        self._take(constants, theta)
        self._take_rates(lr)
        self.support.take(support_x, support_y, support_weight)
        self.query.take(query_x, query_y, query_weight)

    def run(self):
        self.descend()
        self.query.score(self.thetas[-1])
        more = self.exact and self.steps > 0
        update.gather(
            self.query.workspace.table, self.query.workspace.numbers, (self.adjoint,),
            rates=self.rates[self._row(self.steps - 1)] if more else None, direction=self.direction if more else None,
        )  # fmt: skip
        self.recur()

    def give(self, loss, to_theta, to_rates, *to_data):
        reduce, losses = loss.dim() == 0, self.query.loss[0]
        loss.copy_(losses.mean() if reduce else losses)
        self.parameters.give(self.adjoint.mean(0) if reduce else self.adjoint, to_theta)
        self._give_recursion(to_rates, to_data[:3])
        self.query.give_gradients(0, *to_data[3:])
        for gradient in (to_rates, *to_data) if reduce else ():
            if gradient is not None:
                gradient.div_(len(losses))


PLANS = {
    "predict": Predict, "pull": Pull, "pull_tangent": PullTangent, "score": Score, "score_tangent": ScoreTangent,
    "adapt": Adapt, "adjoint": Adjoint, "meta": Meta,
}  # fmt: skip
_plans: OrderedDict[tuple, tuple[Plan, graphs.Replayed]] = OrderedDict()
_lock = threading.RLock()


def _kind(argument):
    """What of an argument a plan depends on."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape)
    if isinstance(argument, (list, tuple)):
        return tuple(_kind(a) for a in argument)
    return argument


def run(name: str, checked, program: Sequence[int], numbers: Sequence[float], *arguments) -> list[Tensor]:
    """An operator by Triton kernels; ``checked`` is its ``checked_`` operator."""
    results = checked(program, numbers, *arguments)
    if name == "meta":
        constants, parts, *others = arguments
        theta = parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
        arguments = constants, theta, *others
    theta, x = arguments[1], arguments[3 if name in ("adapt", "adjoint", "meta") else 2]
    if len(x) == 0:
        return results
    device, stream = theta.device, None
    if theta.is_cuda:
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (name, tuple(program), tuple(numbers), theta.dtype, device, stream, _kind(arguments))
    guard = torch.cuda.device(device) if theta.is_cuda else nullcontext()
    with _lock, torch.no_grad(), guard:
        known = _plans.pop(key, None)
        if known is None:
            with torch.inference_mode(False):  # calls outside of it could not write to a plan's memory
                plan = PLANS[name](Network(tuple(program), tuple(numbers)), *arguments)
            known = plan, graphs.Replayed(plan.run, device)
        plan, launches = _plans[key] = known
        while len(_plans) > KEPT:
            _plans.popitem(last=False)
        plan.take(*arguments)
        launches()
        plan.give(*placed(plan.returned, results))
    return results
