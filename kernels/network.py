"""A network program as the Triton engine executes it: stages, each a kernel or two, over values in channels last.

A program arrives here checked (``checked_*``, see ``ops/cuda.py``); what is left to do is to read it. Layers
that nobody reads are dropped, and what a kernel can do along the way is fused: an activation into the contraction
before it, where a contraction reads it (which then takes the gradient through it); batch statistics into the
contraction they come from; norm over the batch, activation and pooling into one; a flatten into the linear layer behind
it, whose weight is then a filter as large as the image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maml_ext.program import HEADER_INTS, LAYER_INTS, Kind, LossKind, Statistics

from .activation import IDENTITY
from .geometry import Activation, Window

_NO_ACTIVATION = Activation(IDENTITY)
LARGEST = 2**30  # elements of a task's value, positions a window may reach: kernels index these by 32 bits


@dataclass(frozen=True)
class Slot:
    """A parameter tensor: where it starts in theta, or in the constants where it is fixed, and its shape in PyTorch.

    ``order`` says how its axes lie in the engine: channels last, see ``geometry.py``.
    """

    fixed: bool
    at: int
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Layer:
    """A layer of the program, or several that are one stage. Values are numbers of the program's."""

    kind: Kind
    reads: tuple[int, ...]
    out: int
    ints: tuple[int, ...]
    numbers: tuple[float, float]
    weight: Slot | None = None
    bias: Slot | None = None
    mean: Slot | None = None
    variance: Slot | None = None
    window: Window | None = None
    activation: Activation = _NO_ACTIVATION
    before: int = -1  # contraction: the value before its activation, which it keeps
    block: bool = False  # norm over the batch, activation and pooling: `norm` and `pool` say which there are
    norm: Statistics | None = None
    pool: tuple[int, ...] | None = None
    feeds_statistics: bool = False  # contraction: its epilogue prepares the norm that reads it
    takes_statistics: bool = False  # norm: finds them there
    through: bool = False  # contraction: takes the gradient at its input through the activation of who put it out


@dataclass(frozen=True)
class Loss:
    kind: LossKind
    ignore_index: int
    class_weight: Slot | None
    parameter: float


class Network:
    """``shapes[v]`` is (height, width, channels) of value v; ``layers`` are in order; ``last`` is the prediction."""

    def __init__(self, program: tuple[int, ...], numbers: tuple[float, ...]):
        self.parameters, self.constants, c, h, w, count = program[1:HEADER_INTS]
        self._check("parameters", self.parameters + self.constants)
        self.shapes = [(h, w, c)]
        self.layers: list[Layer] = []
        for j in range(count):
            ints = program[HEADER_INTS + LAYER_INTS * j :][:LAYER_INTS]
            self._read(ints, tuple(numbers[2 * j : 2 * j + 2]))
        self.last = count
        kind, ignore_index, class_weight, self.precision = program[HEADER_INTS + LAYER_INTS * count :]
        of_classes = kind in (LossKind.LABELS, LossKind.SOFT_LABELS)
        weight = self._slot(class_weight, self.shapes[-1][2:]) if of_classes else None
        self.loss = Loss(LossKind(kind), ignore_index, weight, numbers[-2])
        self._drop_unread()
        self._fuse_flattens()
        self._fuse_blocks()
        self._fuse_into_contractions()

    # Reading

    def _slot(self, reference: int, shape: tuple[int, ...], order: tuple[int, ...] | None = None) -> Slot | None:
        if reference == -1:
            return None
        at = reference if reference >= 0 else -(reference + 2)
        return Slot(reference < 0, at, shape, order or tuple(range(len(shape))))

    def _read(self, ints: tuple[int, ...], numbers: tuple[float, float]) -> None:
        kind, first, second, *a = ints
        h, w, c = self.shapes[first]
        layer = Layer(Kind(kind), (first,) if second < 0 else (first, second), len(self.shapes), tuple(a), numbers)
        shape = (h, w, c)
        if kind == Kind.CONTRACT:
            out_c, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups, weight, bias, *_ = a
            out_h = (h + top + bottom - (kh - 1) * dh - 1) // sh + 1
            out_w = (w + left + right - (kw - 1) * dw - 1) // sw + 1
            reach = h + top + bottom, w + left + right
            self._check(f"layer {len(self.layers)}: its input with padding", max(reach))
            shape = (out_h, out_w, out_c)
            layer = replace(
                layer,
                window=Window(h, w, c, out_h, out_w, out_c, kh, kw, sh, sw, top, left, dh, dw, groups),
                weight=self._slot(weight, (out_c, c // groups, kh * kw), (2, 1, 0)),
                bias=self._slot(bias, (out_c,)),
            )
        elif kind == Kind.NORM:
            statistics, _, elements, weight, bias, mean, variance, *_ = a
            of, order = ((c, h, w), (1, 2, 0)) if elements else ((c,), None)
            layer = replace(layer, norm=Statistics(statistics), weight=self._slot(weight, of, order))
            layer = replace(layer, bias=self._slot(bias, of, order))
            if statistics == Statistics.FIXED:
                layer = replace(layer, mean=self._slot(mean, (c,)), variance=self._slot(variance, (c,)))
        elif kind == Kind.ACTIVATION:
            layer = replace(layer, activation=Activation(a[0], *numbers))
        elif kind == Kind.POOL:
            shape = (a[9], a[10], c)
            reach = (a[1] - 1) * a[7] + 2 * a[5] + h, (a[2] - 1) * a[8] + 2 * a[6] + w
            self._check(f"layer {len(self.layers)}: what its window reaches", max(reach))
        elif kind == Kind.AVERAGE:
            shape = (a[0], a[1], c)
        elif kind == Kind.RESHAPE:
            shape = (a[1], a[2], a[0])
        self.shapes.append(shape)
        self.layers.append(layer)

    @staticmethod
    def _check(what: str, size: int) -> None:
        if size >= LARGEST:
            raise RuntimeError(f"program: {what}: expected less than {LARGEST} for the Triton engine, got {size}")

    def _drop_unread(self) -> None:
        live = {self.last}
        for layer in reversed(self.layers):
            if layer.out in live:
                live.update(layer.reads)
        self.layers = [layer for layer in self.layers if layer.out in live]

    # Fusing

    def _readers(self, value: int) -> list[Layer]:
        return [layer for layer in self.layers if value in layer.reads]

    def writer(self, value: int) -> Layer | None:
        return next((layer for layer in self.layers if layer.out == value), None)

    def _follower(self, value: int) -> Layer | None:
        """The only reader of a value that nothing else needs."""
        readers = self._readers(value)
        return readers[0] if len(readers) == 1 and value != self.last else None

    def _replace(self, old: Layer, new: Layer, *absorbed: Layer) -> Layer:
        self.layers = [new if layer is old else layer for layer in self.layers if layer not in absorbed]
        return new

    def _fuse_flattens(self) -> None:
        for flatten in list(self.layers):
            follower = self._follower(flatten.out)
            h, w, c = self.shapes[flatten.reads[0]]
            if flatten.kind != Kind.RESHAPE or follower is None or follower.kind != Kind.CONTRACT:
                continue
            window, weight = follower.window, follower.weight
            shared = sum(layer.weight == weight for layer in self.layers) > 1
            if shared or window != Window(1, 1, h * w * c, 1, 1, window.out_c):
                continue
            whole = Window(h, w, c, 1, 1, window.out_c, h, w)
            weight = replace(weight, shape=(window.out_c, c, h * w))
            self._replace(follower, replace(follower, reads=flatten.reads, window=whole, weight=weight), flatten)

    def _fuse_blocks(self) -> None:
        """As many as there are of: norm over the batch, activation, pooling that reads each position once at most."""
        for layer in list(self.layers):
            if layer not in self.layers or not self._begins_block(layer):
                continue
            block = replace(layer, block=True)
            if layer.kind == Kind.POOL:
                block = replace(block, pool=layer.ints)
            block = self._replace(layer, block)
            while block.pool is None and (follower := self._follower(block.out)):
                if follower.kind == Kind.ACTIVATION and block.activation is _NO_ACTIVATION:
                    joined = replace(block, out=follower.out, activation=follower.activation)
                elif self._is_simple_pool(follower):
                    joined = replace(block, out=follower.out, pool=follower.ints)
                else:
                    break
                block = self._replace(block, joined, follower)

    def _begins_block(self, layer: Layer) -> bool:
        if layer.kind == Kind.NORM:
            return layer.norm != Statistics.SAMPLE
        if layer.kind == Kind.ACTIVATION:
            follower = self._follower(layer.out)
            return follower is not None and self._is_simple_pool(follower)
        return self._is_simple_pool(layer)

    def _is_simple_pool(self, layer: Layer) -> bool:
        if layer.kind != Kind.POOL:
            return False
        _, kh, kw, sh, sw, top, left, dh, dw, out_h, out_w, *_ = layer.ints
        h, w, _ = self.shapes[layer.reads[0]]
        inside = (out_h - 1) * sh + kh <= h and (out_w - 1) * sw + kw <= w
        return not (top or left) and dh == dw == 1 and sh >= kh and sw >= kw and inside

    def _fuse_into_contractions(self) -> None:
        for layer in list(self.layers):
            if layer.kind != Kind.CONTRACT:
                continue
            layer = next(now for now in self.layers if now.out == layer.out)
            follower = self._follower(layer.out)
            if follower is None:
                continue
            if follower.norm == Statistics.BATCH:
                self._replace(layer, replace(layer, feeds_statistics=True))
                self._replace(follower, replace(follower, takes_statistics=True))
            reader = self._follower(follower.out)
            if follower.kind == Kind.ACTIVATION and not follower.block and reader and reader.kind == Kind.CONTRACT:
                fused = replace(layer, before=layer.out, out=follower.out, activation=follower.activation)
                self._replace(layer, fused, follower)
                self._replace(reader, replace(reader, through=True))
        for layer in list(self.layers):
            if layer.kind == Kind.NORM and not layer.block and (follower := self._follower(layer.out)):
                if follower.kind == Kind.ACTIVATION and not follower.block:  # norms over a sample take it along
                    fused = replace(layer, out=follower.out, activation=follower.activation)
                    self._replace(layer, fused, follower)

    # Parameters

    def learned(self) -> list[Slot]:
        """The parameter tensors in theta that layers read, each once."""
        slots = (slot for layer in self.layers for slot in (layer.weight, layer.bias))
        return sorted({slot for slot in slots if slot and not slot.fixed}, key=lambda slot: slot.at)

    def order(self, fixed: bool) -> Tensor:
        """For each element of the engine's vector of parameters (or of constants), where PyTorch has it."""
        order = torch.arange(self.constants if fixed else self.parameters)
        for layer in self.layers:
            for slot in (layer.weight, layer.bias):
                if slot and slot.fixed == fixed:
                    places = slot.at + torch.arange(slot.size).view(slot.shape)
                    order[slot.at : slot.at + slot.size] = places.permute(slot.order).reshape(-1)
        return order

    # What depends on what

    def depending(self, on_input: bool) -> set[int]:
        """The values that theta has an influence on, or with ``on_input`` the input too."""
        found = {0} if on_input else set()
        for layer in self.layers:
            learns = any(slot and not slot.fixed for slot in (layer.weight, layer.bias))
            if learns or found.intersection(layer.reads):
                found.update(v for v in (layer.before, layer.out) if v >= 0)
        return found
