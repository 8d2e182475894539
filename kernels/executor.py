"""Passes over a network by the Triton kernels: forward and backward, on values alone or with their tangents.

A ``Frame`` is the memory of the samples of all tasks: a value, and its gradient, for each value of the network. A
``Pass`` walks the layers over it. With a direction of the parameters it computes values and tangents together, which
makes its backward pass a Hessian-vector product. Gradients of parameters end in ``Workspace``, in parts which the pass
over parameters adds up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maml_ext.program import Kind, Precision, Statistics

from . import block, contract, elementwise, loss, norm, pool, softmax, statistics, update
from . import geometry as g
from .network import LARGEST, Layer, Network, Slot

_PRECISIONS = {Precision.FULL: "ieee", Precision.TF32: "tf32", Precision.BFLOAT16: "bf16", Precision.FLOAT16: "fp16"}


class Frame:
    """
    Args:
        dual: whether there is room for tangents.
        x_t: whether the input has one.
        to_x: whether its gradient is wanted.
    """

    def __init__(self, network: Network, tasks: int, samples: int, like: Tensor, *, dual=False, x_t=False, to_x=False):
        self.network, self.tasks, self.samples = network, tasks, samples
        with_tangent = network.depending(x_t)
        with_gradient = network.depending(to_x)
        used = {0} | {v for layer in network.layers for v in (layer.out, layer.before) if v >= 0}

        largest = samples * max(h * w * c for h, w, c in network.shapes)
        if largest >= LARGEST:
            raise RuntimeError(f"samples: expected values of less than {LARGEST} elements a task, got {largest}")

        def numbers(v: int, parts: int) -> g.Number:
            return tuple(like.new_empty(tasks, samples, *network.shapes[v]) for _ in range(parts))

        self.values = {v: numbers(v, 2 if dual and v in with_tangent else 1) for v in used}
        gradients = with_gradient.intersection(used)
        if network.last in used:
            gradients -= {layer.out for layer in network.layers if layer.before >= 0}  # taken through the activation
        self.gradients = {v: numbers(v, 2 if dual else 1) for v in gradients}
        self.statistics: dict[int, g.Statistics] = {}
        self.saved: dict[int, g.Number] = {}
        for layer in network.layers:
            self._add_memory_of(layer, like, dual)

    def _add_memory_of(self, layer: Layer, like: Tensor, dual: bool) -> None:
        """What norms keep from forward to backward passes."""
        parts = len(self.values[layer.reads[0]])
        h, w, c = self.network.shapes[layer.reads[0]]
        if layer.norm == Statistics.BATCH:
            ranges = statistics.ranges(self.samples * h * w)

            def moments() -> g.Number:
                return tuple(like.new_empty(self.tasks, ranges, c) for _ in range(parts))

            count = like.new_empty(self.tasks, ranges)
            self.statistics[layer.reads[0]] = g.Statistics(count, moments(), moments())
            self.saved[layer.out] = tuple(like.new_empty(self.tasks, 2, c) for _ in range(parts))
        elif layer.norm == Statistics.SAMPLE:
            shape = self.tasks, 2, self.samples * layer.ints[1]
            self.saved[layer.out] = tuple(like.new_empty(shape) for _ in range(parts))


class Workspace:
    """Where layers put the gradients of their parameters, and the table by which these are added up."""

    def __init__(self, network: Network, tasks: int, samples: int, like: Tensor, dual: bool):
        uses = {slot: [] for slot in network.learned()}
        for j, layer in enumerate(network.layers):
            for name in ("weight", "bias"):
                slot = getattr(layer, name)
                if slot in uses:
                    uses[slot].append((j, name, _splits(network, layer, tasks, samples)))
        rows, self.places, end = [], {}, 0
        for slot, users in uses.items():
            rows.append((slot.at, slot.size, end, sum(splits for *_, splits in users)))
            for j, name, splits in users:
                self.places[j, name] = end, splits
                end += splits * tasks * slot.size
        self.table = update.Table.of(_complete(rows, network.parameters), like.device)
        self.numbers = tuple(like.new_empty(end) for _ in range(2 if dual else 1))
        sums = [
            2 * _splits(network, layer, tasks, samples) * tasks * network.shapes[layer.out][2]
            for layer in network.layers
            if layer.norm == Statistics.BATCH
        ]  # for norms whose weight or bias is not learned
        self.sums = tuple(like.new_empty(max(sums, default=0)) for _ in self.numbers)


def _complete(rows: list[tuple[int, int, int, int]], parameters: int) -> list[update.Slot]:
    """With what lies between them, which no layer reads."""
    slots, end = [], 0
    for row in [*rows, (parameters, 0, 0, 0)]:
        if row[0] > end:
            slots.append(update.Slot(end, row[0] - end, 0, 0))
        if row[1]:
            slots.append(update.Slot(*row))
        end = row[0] + row[1]
    return slots


def _splits(network: Network, layer: Layer, tasks: int, samples: int) -> int:
    if layer.kind == Kind.CONTRACT:
        return contract.splits(layer.window, tasks, samples)
    if layer.norm == Statistics.SAMPLE:
        return norm.splits(_norm(network, layer), tasks, samples)
    return block.splits(_block(network, layer), tasks, samples)


def _block(network: Network, layer: Layer) -> block.Block:
    h, w, c = network.shapes[layer.reads[0]]
    out_h, out_w, _ = network.shapes[layer.out]
    kind = {Statistics.BATCH: "batch", Statistics.FIXED: "fixed", None: None}[layer.norm]
    which, kh, kw, sh, sw, divisor = None, 1, 1, 1, 1, 1
    if layer.pool:
        average, kh, kw, sh, sw, *_, divisor = layer.pool[:13]
        which, divisor = "average" if average else "max", divisor or kh * kw
    eps = layer.numbers[0] if kind else 0.0
    return block.Block(h, w, c, kind, eps, layer.activation, which, kh, kw, sh, sw, out_h, out_w, divisor)


def _norm(network: Network, layer: Layer) -> norm.Norm:
    _, groups, elementwise, *_ = layer.ints
    return norm.Norm(*network.shapes[layer.reads[0]], groups, layer.numbers[0], layer.activation, bool(elementwise))


def _pool(network: Network, layer: Layer) -> pool.Pool:
    h, w, c = network.shapes[layer.reads[0]]
    out_h, out_w, _ = network.shapes[layer.out]
    if layer.kind == Kind.AVERAGE:
        return pool.Pool(c, pool.Axis(h, out_h), pool.Axis(w, out_w), average=True, adaptive=True)
    average, kh, kw, sh, sw, top, left, dh, dw, _, _, count_padding, divisor, *_ = layer.ints
    high, wide = pool.Axis(h, out_h, kh, sh, top, dh), pool.Axis(w, out_w, kw, sw, left, dw)
    return pool.Pool(c, high, wide, bool(average), False, bool(count_padding), divisor)


def _combine(layer: Layer) -> elementwise.Combine:
    return elementwise.Combine(*layer.numbers, product=bool(layer.ints[0]))


class Pass:
    """One walk forth and one back.

    Args:
        theta: ``[T, P]`` in the engine's order; with a direction, values and tangents are computed.
        weight: of samples ``[T, N]``, whose tangent concerns the loss alone.
    """

    def __init__(self, frame: Frame, theta: g.Number, constants: Tensor | None, workspace: Workspace | None, weight):
        self.frame, self.network = frame, frame.network
        self.theta, self.constants, self.workspace = theta, constants, workspace
        self.parts, self.weight = len(theta), weight
        self.sample_weight = weight[0] if weight else None
        self.size = frame.tasks, frame.samples
        self.precision = "ieee" if theta[0].dtype == torch.float64 else _PRECISIONS[frame.network.precision]

    def value(self, v: int) -> g.Number:
        return self.frame.values[v][: self.parts]

    def gradient(self, v: int) -> g.Number | None:
        gradient = self.frame.gradients.get(v)
        return gradient and gradient[: self.parts]

    @property
    def prediction(self) -> g.Number:
        return self.value(self.network.last)

    def slice(self, slot: Slot | None) -> g.Slice | None:
        if slot is None:
            return None
        if slot.fixed:
            return g.Slice((self.constants,), 0, slot.at)
        return g.Slice(self.theta, self.network.parameters, slot.at)

    def _kept(self, numbers: g.Number) -> g.Number:
        return numbers[: self.parts]

    def _statistics(self, v: int) -> g.Statistics | None:
        kept = self.frame.statistics.get(v)
        return kept and g.Statistics(kept.count, self._kept(kept.mean), self._kept(kept.m2))

    def partials(self, layer: Layer, name: str) -> g.Partials | None:
        place = self.workspace.places.get((self.network.layers.index(layer), name))
        return place and g.Partials(self._kept(self.workspace.numbers), *place)

    def _sizes(self, *values: int) -> list[tuple[int, int, int]]:
        """(channels, height, width)."""
        return [(c, h, w) for h, w, c in (self.network.shapes[v] for v in values)]

    # Forth

    def forward(self) -> None:
        for layer in self.network.layers:
            self._forward(layer)

    def _forward(self, layer: Layer) -> None:
        x, z = self.value(layer.reads[0]), self.value(layer.out)
        weight, bias = self.slice(layer.weight), self.slice(layer.bias)
        if layer.kind == Kind.CONTRACT:
            fused = layer.before >= 0
            y = self.value(layer.before) if fused else z
            wanted = self._statistics(layer.out) if layer.feeds_statistics else None
            contract.forward(
                layer.window, x, weight, bias, y, z if fused else None, layer.activation if fused else None, wanted,
                self.sample_weight, *self.size, self.precision,
            )  # fmt: skip
        elif layer.block or layer.norm in (Statistics.BATCH, Statistics.FIXED):
            if layer.norm == Statistics.BATCH and not layer.takes_statistics:
                h, w, c = self.network.shapes[layer.reads[0]]
                statistics.measure(x, self._statistics(layer.reads[0]), self.sample_weight, *self.size, h * w, c)
            block.forward(
                _block(self.network, layer), x, self._norm_arguments(layer), weight, bias, z, self._saved(layer),
                self.sample_weight, *self.size,
            )  # fmt: skip
        elif layer.kind == Kind.NORM:
            norm.forward(_norm(self.network, layer), x, weight, bias, z, self._saved(layer), *self.size)
        elif layer.kind == Kind.ACTIVATION:
            elementwise.activation_forward(layer.activation, x, z)
        elif layer.kind in (Kind.POOL, Kind.AVERAGE):
            pool.forward(_pool(self.network, layer), x, z, *self.size)
        elif layer.kind == Kind.RESHAPE:
            elementwise.reshape(*self._sizes(layer.reads[0], layer.out), x, z, False)
        elif layer.kind == Kind.SOFTMAX:
            softmax.forward(bool(layer.ints[0]), x, z)
        else:
            second = self.value(layer.reads[1]) if len(layer.reads) == 2 else None
            elementwise.combine_forward(_combine(layer), x, second, z)

    def _saved(self, layer: Layer) -> g.Number | None:
        saved = self.frame.saved.get(layer.out)
        return saved and self._kept(saved)

    def _norm_arguments(self, layer: Layer):
        if layer.norm == Statistics.BATCH:
            return self._statistics(layer.reads[0])
        return (self.slice(layer.mean), self.slice(layer.variance)) if layer.norm == Statistics.FIXED else None

    # Back

    def backward(self) -> None:
        """From the gradient of the prediction, which is there, to those of all that depend on theta or are wanted."""
        if self.network.last not in self.frame.gradients:
            return
        written = {self.network.last}
        for layer in reversed(self.network.layers):
            self._backward(layer, written)

    def _target(self, v: int, written: set[int]) -> tuple[g.Number | None, bool]:
        """Where a layer puts the gradient of what it reads, and whether it adds to what others have put there."""
        gradient = self.gradient(v)
        before = v in written
        if gradient:
            written.add(v)
        return gradient, before

    def _backward(self, layer: Layer, written: set[int]) -> None:
        source = layer.before if layer.before >= 0 else layer.out
        dz = self.gradient(source)
        if dz is None:
            return
        x, weight, bias = self.value(layer.reads[0]), self.slice(layer.weight), self.slice(layer.bias)
        to_weight, to_bias = self.partials(layer, "weight"), self.partials(layer, "bias")
        if layer.kind == Kind.CONTRACT:
            through, target = None, layer.reads[0]
            if layer.through:
                writer = self.network.writer(target)
                through, target = (self.value(writer.before), writer.activation), writer.before
            contract.backward(
                layer.window, x, weight, dz, *self._target(target, written), through, to_weight, to_bias, *self.size,
                self.precision,
            )  # fmt: skip
            return
        second, dy, accumulate_y = None, None, False
        if len(layer.reads) == 2:
            second, (dy, accumulate_y) = self.value(layer.reads[1]), self._target(layer.reads[1], written)
        dx, accumulate = self._target(layer.reads[0], written)
        if layer.kind == Kind.COMBINE:
            elementwise.combine_backward(_combine(layer), x, second, dz, dx, dy, accumulate, accumulate_y)
        elif layer.block or layer.norm in (Statistics.BATCH, Statistics.FIXED):
            kept = self._saved(layer) if layer.norm == Statistics.BATCH else self._norm_arguments(layer)
            block.backward(
                _block(self.network, layer), x, kept, weight, bias, dz, dx, accumulate, to_weight, to_bias,
                self._kept(self.workspace.sums), self.sample_weight, *self.size,
            )  # fmt: skip
        elif layer.kind == Kind.NORM:
            norm.backward(
                _norm(self.network, layer), x, self._saved(layer), weight, bias, dz, dx, accumulate, to_weight,
                to_bias, *self.size,
            )  # fmt: skip
        elif layer.kind == Kind.ACTIVATION:
            elementwise.activation_backward(layer.activation, x, dz, dx, accumulate)
        elif layer.kind in (Kind.POOL, Kind.AVERAGE):
            pool.backward(_pool(self.network, layer), x, dz, dx, accumulate, *self.size)
        elif layer.kind == Kind.RESHAPE:
            elementwise.reshape(*self._sizes(layer.out, layer.reads[0]), dz, dx, accumulate)
        elif layer.kind == Kind.SOFTMAX:
            softmax.backward(bool(layer.ints[0]), self.value(layer.out), dz, dx, accumulate)

    # The loss

    def score(self, y: g.Number | None, labels: Tensor | None, value, to_y, to_weight, back: bool) -> None:
        """The loss of each task; ``back``: with the gradient of its prediction and of what else is wanted."""
        rule = self.network.loss
        height, width, classes = self.network.shapes[self.network.last]
        loss.score(
            loss.Loss(rule.kind, rule.parameter, rule.ignore_index), self.prediction, y, labels,
            self.slice(rule.class_weight), self.weight, value, self.gradient(self.network.last) if back else None,
            to_y if back else None, to_weight if back else None, *self.size, height * width, classes,
        )  # fmt: skip
