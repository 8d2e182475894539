"""The loss of a task with all its gradients, and on numbers with a tangent the derivative of everything: one launch.

With l_n the loss of sample n (the sum of its terms), w_n its weight and z_n its share of what divides (how many terms
it has; for labels the class weights of those that count)

    L = sum w_n l_n / Z        Z = sum w_n z_n        dL/dw_n = (l_n - L z_n) / Z

One program a task: it first sums up Z, then passes over tiles [samples, positions, classes], with losses and gradients
in registers. Cross entropy goes over its classes several times (``exponentials`` of softmax.py, masses, gradients), of
which only the first reads memory, the others the cache: so there may be more classes than a tile has. A sample of
weight 0 is left out, whatever is in it, except where the gradient by its weight is asked for. A label that is no class
makes all of its task NaN, and is never an index.

It moves predictions and targets once and each gradient once, with about 10 operations an element.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from maml_ext.program import LossKind

from .activation import log1p_exp, sigmoid
from .geometry import Number, Slice
from .launch import launch, size
from .numbers import (
    add,
    advance,
    chain,
    divide,
    expand,
    exponential,
    load,
    logarithm,
    multiply,
    scale,
    select,
    shift,
    store,
    subtract,
    total,
    zeros_like,
)
from .softmax import exponentials

_MSE, _HUBER, _LABELS, _SOFT_LABELS, _BINARY = (tl.constexpr(int(kind)) for kind in LossKind if kind >= 0)


@dataclass(frozen=True)
class Loss:
    kind: int  # of LossKind
    parameter: float = 0.0  # delta of Huber's loss, smoothing of cross entropy
    ignore_index: int = -100


@triton.jit
def _term(p, y, DELTA: tl.constexpr, KIND: tl.constexpr):
    """A term of a loss of single elements, and its derivatives by prediction and target."""
    difference = subtract(p, y)
    if KIND == _MSE:
        return multiply(difference, difference), scale(difference, 2.0), scale(difference, -2.0)
    elif KIND == _HUBER:
        side = tl.where(difference[0] < 0, -1.0, tl.zeros_like(difference[0]) + 1.0)
        distance = scale(difference, side)
        near = (distance[0] < DELTA) | (distance[0] != distance[0])  # NaN too, and stays NaN
        square = scale(multiply(difference, difference), 0.5)
        slope = select(near, difference, (DELTA * side,))
        return select(near, square, scale(shift(distance, -0.5 * DELTA), DELTA)), slope, scale(slope, -1.0)
    else:
        tl.static_assert(KIND == _BINARY)
        s = sigmoid(p[0])
        up = (p[0] > 0).to(s.dtype)
        # The difference first: where a sure prediction is right it is 0, and the small rest is not lost.
        linear = subtract(chain(p, p[0] * up, up), multiply(p, y))
        rest = chain(p, log1p_exp(-tl.abs(p[0])), s - up)
        return add(linear, rest), subtract(chain(p, s, s * (1.0 - s)), y), scale(p, -1.0)


@triton.jit
def _elements(
    prediction, y, to_prediction, to_y, place, inside, counted, factor, loss, classes,
    PARAMETER: tl.constexpr, KIND: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Adds up the losses of a tile of samples and stores gradients, times ``factor``, 0 where nothing counts."""
    dtype: tl.constexpr = prediction[0].dtype.element_ty
    zero = tl.zeros([], dtype)
    for first in range(0, classes, CLASSES):
        k = first + tl.arange(0, CLASSES)
        at = place + k
        read = counted & (k < classes)
        term, by_prediction, by_target = _term(
            load(prediction, at, read, dtype), load(y, at, read, dtype), PARAMETER, KIND
        )
        loss = add(loss, total(total(select(read, term, (zero,)), 2), 1))
        if to_prediction is not None:
            store(to_prediction, at, select(read, multiply(factor, by_prediction), (zero,)), inside & (k < classes))
        if to_y is not None:
            store(to_y, at, select(read, multiply(factor, by_target), (zero,)), inside & (k < classes))
    return loss


@triton.jit
def _mass(y, class_weight, right, at, k, read, classes, dtype: tl.constexpr, SHARP: tl.constexpr, SMOOTH: tl.constexpr):
    """Class weights, and what is asked of each class times its weight."""
    weight = (k < classes).to(dtype)
    if class_weight is not None:
        weight = tl.load(class_weight + k, k < classes, 0.0).to(dtype)
    if y is None:
        return weight, (weight * ((k == right).to(dtype) * SHARP + SMOOTH),)
    else:
        return weight, scale(shift(scale(load(y, at, read, dtype), SHARP), SMOOTH), weight)


@triton.jit
def _cross_entropy(
    prediction, y, class_weight, right, to_prediction, to_y, place, inside, counted, factor, loss, classes,
    SHARP: tl.constexpr, SMOOTH: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Like ``_elements``; a term is - sum_k m_k log p_k, with masses m. ``right``: the class that is the label."""
    dtype: tl.constexpr = prediction[0].dtype.element_ty
    zero = tl.zeros([], dtype)
    top, sums = exponentials(prediction, place, counted, classes, CLASSES)
    log_sum, masses = logarithm(sums), (tl.zeros(place.shape, dtype),)
    if y is not None:
        masses = zeros_like(y, place.shape, dtype)
    for first in range(0, classes, CLASSES):
        k = first + tl.arange(0, CLASSES)
        read = counted & (k < classes)
        weight, mass = _mass(y, class_weight, right, place + k, k, read, classes, dtype, SHARP, SMOOTH)
        masses = add(masses, expand(total(mass, 2), 2))
    for first in range(0, classes, CLASSES):
        k = first + tl.arange(0, CLASSES)
        at, read = place + k, counted & (k < classes)
        log_p = subtract(shift(load(prediction, at, read, dtype), -top), log_sum)
        weight, mass = _mass(y, class_weight, right, at, k, read, classes, dtype, SHARP, SMOOTH)
        loss = subtract(loss, total(total(select(read, multiply(mass, log_p), (zero,)), 2), 1))
        if to_prediction is not None:
            g = multiply(factor, subtract(multiply(masses, exponential(log_p)), mass))
            store(to_prediction, at, select(read, g, (zero,)), inside & (k < classes))
        if to_y is not None:
            g = multiply(factor, scale(log_p, -SHARP * weight))
            store(to_y, at, select(read, g, (zero,)), inside & (k < classes))
    return loss


@triton.jit
def _weight(weight, at, inside, dtype: tl.constexpr, LEAVE_OUT: tl.constexpr):
    """Of samples, and whether they count."""
    if weight is None:
        return (tl.zeros(at.shape, dtype) + 1.0,), inside
    else:
        w = load(weight, at, inside, dtype)
        if LEAVE_OUT:
            return w, inside & (w[0] != 0)
        else:
            return w, inside


@triton.jit
def _share(
    labels, class_weight, sample, counted, positions, classes, terms, dtype: tl.constexpr,
    IGNORED: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """z of a tile of samples."""
    share = tl.zeros(sample.shape, dtype)
    if labels is None:
        share += terms
    else:
        for first in range(0, positions, POSITIONS):
            position = first + tl.arange(0, POSITIONS)[None, :]
            read = counted[:, None] & (position < positions)
            label = tl.load(labels + sample[:, None] * positions + position, read, IGNORED)
            known = (label >= 0) & (label < classes) & (label != IGNORED)
            one = tl.where(known, 1.0, tl.zeros(known.shape, dtype))
            if class_weight is not None:
                one = tl.load(class_weight + label, known, 0.0).to(dtype)
            share += tl.sum(tl.where(known | (label == IGNORED), one, float("nan")), 1)
    return tl.where(counted, share, 0.0)


@triton.jit
def _score(
    prediction, y, labels, class_weight, weight, value, to_prediction, to_y, to_weight,
    samples, positions, classes, terms, class_stride, class_offset,
    PARAMETER: tl.constexpr, SHARP: tl.constexpr, SMOOTH: tl.constexpr, IGNORED: tl.constexpr, KIND: tl.constexpr,
    SAMPLES: tl.constexpr, POSITIONS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = prediction[0].dtype.element_ty
    leave_out: tl.constexpr = weight is not None and to_weight is None and len(weight) == 1
    task = tl.program_id(0).to(tl.int64)
    of_task = task * samples * positions * classes
    prediction, y = advance(prediction, of_task), advance(y, of_task)
    to_prediction, to_y = advance(to_prediction, of_task), advance(to_y, of_task)
    weight, to_weight = advance(weight, task * samples), advance(to_weight, task * samples)
    if labels is not None:
        labels += task * samples * positions
    if class_weight is not None:
        class_weight += task * class_stride + class_offset
    loss, normaliser = zeros_like(prediction, [SAMPLES], dtype), (tl.zeros([], dtype),)
    if y is not None:
        loss = add(loss, zeros_like(y, [SAMPLES], dtype))
    if weight is not None:
        normaliser = zeros_like(weight, [], dtype)
    whole = add(total(loss, 0), normaliser)

    for first in range(0, samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        w, counted = _weight(weight, sample, sample < samples, dtype, leave_out)
        z = _share(labels, class_weight, sample, counted, positions, classes, terms, dtype, IGNORED, POSITIONS)
        normaliser = add(normaliser, total(scale(w, z), 0))
    each = divide((tl.zeros([], dtype) + 1.0,), normaliser)

    for first in range(0, samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        w, counted = _weight(weight, sample, sample < samples, dtype, leave_out)
        factor = multiply(w, each)
        factors = expand(expand(factor, 1), 2)
        losses = scale(loss, 0.0)
        for start in range(0, positions, POSITIONS):
            position = start + tl.arange(0, POSITIONS)[None, :]
            place = sample[:, None] * positions + position
            inside = (sample[:, None] < samples) & (position < positions)
            counts = inside & counted[:, None]
            if KIND == _LABELS or KIND == _SOFT_LABELS:
                right = place
                if labels is not None:
                    right = tl.load(labels + place, counts, IGNORED)
                    counts = counts & (right != IGNORED)
                losses = _cross_entropy(
                    prediction, y, class_weight, right[:, :, None], to_prediction, to_y, place[:, :, None] * classes,
                    inside[:, :, None], counts[:, :, None], factors, losses, classes, SHARP, SMOOTH, CLASSES,
                )  # fmt: skip
            else:
                losses = _elements(
                    prediction, y, to_prediction, to_y, place[:, :, None] * classes, inside[:, :, None],
                    counts[:, :, None], factors, losses, classes, PARAMETER, KIND, CLASSES,
                )  # fmt: skip
        whole = add(whole, total(multiply(factor, losses), 0))
        if to_weight is not None:
            store(to_weight, sample, multiply(losses, each), sample < samples)
    if value is not None:
        store(value, task, whole, True)
    if to_weight is not None:
        tl.debug_barrier()  # other threads read what has been stored
        common = multiply(whole, each)
        for first in range(0, samples, SAMPLES):
            sample = first + tl.arange(0, SAMPLES)
            inside = sample < samples
            z = _share(labels, class_weight, sample, inside, positions, classes, terms, dtype, IGNORED, POSITIONS)
            store(to_weight, sample, subtract(load(to_weight, sample, inside, dtype), scale(common, z)), inside)


def tile(samples: int, positions: int, classes: int, itemsize: int) -> tuple[int, int, int, int]:
    """Samples, positions and classes of a tile, and warps: 4 float32 elements a thread and 8 warps at most."""
    of_warp = 512 // itemsize
    c = min(triton.next_power_of_2(classes), of_warp)
    p = min(triton.next_power_of_2(positions), 8 * of_warp // c)
    s = min(triton.next_power_of_2(samples), 8 * of_warp // c // p)
    return s, p, c, max(1, s * p * c // of_warp)


def score(
    loss: Loss,
    prediction: Number,
    y: Number | None,
    labels: Tensor | None,
    class_weight: Slice | None,
    weight: Number | None,
    value: Number | None,
    to_prediction: Number | None,
    to_y: Number | None,
    to_weight: Number | None,
    tasks: int,
    samples: int,
    positions: int,
    classes: int,
):
    """The loss and what is wanted of its gradients.

    Args:
        prediction, y: ``[T, N, positions, classes]``, and so are their gradients.
        labels: int64 ``[T, N, positions]``; exactly one of ``y`` and ``labels`` is given.
        weight: ``[T, N]``.
        value: ``[T]``.
    """
    apart = loss.kind not in (LossKind.LABELS, LossKind.SOFT_LABELS)
    elements = tasks * samples * positions * classes
    if apart:  # elements that know nothing of each other
        positions, classes = 1, positions * classes
    s, p, c, warps = tile(samples, positions, classes, prediction[0].element_size())
    parts = max(len(number) for number in (prediction, y, weight) if number is not None)
    results = value, to_prediction, to_y, to_weight
    of_classes = 0 if class_weight is None else classes * prediction[0].element_size()
    launch(
        _score, tasks, prediction, y, labels, class_weight and class_weight.numbers[0], weight, *results,
        samples, positions, classes, classes if apart else positions,
        class_weight.stride if class_weight else 0, class_weight.offset if class_weight else 0,
        PARAMETER=loss.parameter, SHARP=1.0 - loss.parameter, SMOOTH=loss.parameter / classes,
        IGNORED=loss.ignore_index, KIND=int(loss.kind), SAMPLES=s, POSITIONS=p, CLASSES=c, warps=warps,
        flops=10 * elements * parts, moved=size(prediction, y, labels, weight, *results) + of_classes,
    )  # fmt: skip
