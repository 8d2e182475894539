"""A function's launches as a CUDA graph: hundreds of kernels for one call of the driver.

The function takes nothing and does the same launches on the same addresses each time; what it reads and writes belongs
to the caller, and has to live as long as it does. The first call launches plainly, which compiles kernels and counts
them (who calls once pays for no graph); the second records the graph, on a stream of its own; from there on calls
replay it, on the stream that is current. Where that is impossible every call launches plainly, and ``why`` says so.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

from .launch import is_watched, watched

SWITCH = "MAML_EXT_CUDA_GRAPHS"
MOST = 4096  # launches: recording takes the time of as many, and the graph about a kilobyte each
_lock = threading.RLock()  # for all: one function's launches are counted at a time


def unavailable(device: torch.device) -> str | None:
    """Why no function on this device becomes a graph; None if there is no reason."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    return None if device.type == "cuda" else f"there are none on {device.type} tensors"


class Replayed:
    """
    Args:
        enabled: False: every call launches plainly.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, enabled: bool = True):
        self._function, self._device = function, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._launches: int | None = None  # of the first call
        self._refused = None if enabled else "they are switched off"

    @property
    def why(self) -> str | None:
        """Why a call now launches plainly; None where it does not, after the first."""
        if self._refused or unavailable(self._device):
            return self._refused or unavailable(self._device)
        if torch.compiler.is_compiling():
            return "torch.compile is tracing"
        if torch.cuda.is_current_stream_capturing():
            return "another graph is being recorded"
        return "launches are watched" if is_watched() else None

    def __call__(self) -> None:
        with _lock:
            if self.why:
                self._function()
            elif self._launches is None:
                self._count()
            elif self._graph or self._record():
                self._graph.replay()
            else:
                self._function()

    def _count(self) -> None:
        launches = 0

        def count(_):
            nonlocal launches
            launches += 1
            return True

        with watched(count):
            self._function()
        self._launches = launches
        if launches > MOST:
            self._refused = f"there are {launches} launches, more than {MOST}"

    def _record(self) -> bool:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.Stream(self._device)):
                graph.capture_begin(capture_error_mode="thread_local")  # what other threads do is no concern of it
                try:
                    self._function()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self._refused = f"recording failed: {error}"
            return False
        self._graph = graph
        return True
