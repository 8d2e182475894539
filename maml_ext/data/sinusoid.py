"""The sinusoid regression tasks of Finn, Abbeel, Levine 2017 (section 5.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .episodes import MetaBatch, MetaBatches, integer


class Sinusoid(MetaBatches):
    """Tasks ``y = amplitude * sin(x - phase)``: amplitude U[0.1, 5], phase U[0, pi], x U[-5, 5].

    ``Sinusoid(...)[i]`` is meta-batch ``i``: ``support_x``, ``support_y`` ``[T, shots, 1]`` and ``query_x``,
    ``query_y`` ``[T, queries, 1]``. The tasks are the same in every dtype and on every device. See
    `MetaBatches` for workers, resuming and ranks. The defaults are the paper's.

    Args:
        tasks: T, the tasks in a meta-batch.
        shots: support points of a task.
        queries: query points of a task.
        seed: any int.
        length: the number of meta-batches, or None: endless.
        dtype: of all tensors, floating point.
        device: of all tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong type, a number below 1.
    """

    amplitude = (0.1, 5.0)
    phase = (0.0, math.pi)
    x = (-5.0, 5.0)

    def __init__(
        self,
        tasks: int = 25,
        shots: int = 10,
        queries: int = 10,
        *,
        seed: int = 0,
        length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(tasks, seed, length)
        self.shots = integer("shots", shots, 1)
        self.queries = integer("queries", queries, 1)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
        self.dtype = dtype
        self.device = torch.device(device)

    def amplitude_phase(self, index: int) -> tuple[Tensor, Tensor]:
        """Amplitude and phase of the tasks of meta-batch ``index``, each ``[T, 1, 1]``.

        The true curves at points x are ``amplitude * torch.sin(x - phase)``.
        """
        amplitude, phase = self._curves(self._generator(index))
        return self._cast(amplitude), self._cast(phase)

    def _batch(self, generator: torch.Generator) -> MetaBatch:
        amplitude, phase = self._curves(generator)
        x = self._uniform(self.x, self.shots + self.queries, generator)
        y = amplitude * torch.sin(x - phase)
        (support_x, query_x), (support_y, query_y) = (
            self._cast(values).split([self.shots, self.queries], dim=1) for values in (x, y)
        )
        return MetaBatch(support_x, support_y, query_x, query_y)

    def _curves(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._uniform(self.amplitude, 1, generator), self._uniform(self.phase, 1, generator)

    def _uniform(self, bounds: tuple[float, float], points: int, generator: torch.Generator) -> Tensor:
        low, high = bounds
        # On the CPU in float64, cast afterwards: torch draws other numbers for another dtype or device.
        uniform = torch.rand(self.tasks, points, 1, dtype=torch.float64, generator=generator)
        return low + (high - low) * uniform

    def _cast(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)
