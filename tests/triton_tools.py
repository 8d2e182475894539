"""What the tests of Triton kernels share. They run on a CUDA device, or interpreted on the CPU."""

import os

import pytest
import torch

pytest.importorskip("triton")
RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not RUNS, reason="needs a CUDA device, or TRITON_INTERPRET=1")
device = "cuda" if torch.cuda.is_available() else "cpu"


def guarded(*shape, dtype=torch.float64, fill=float("nan")):
    """A tensor of NaN between two guards, and a function that says whether these are untouched."""
    extent, guard = torch.Size(shape).numel(), 64
    memory = torch.full((guard + extent + guard,), fill, dtype=dtype, device=device)
    memory[:guard] = memory[guard + extent :] = 12345.0

    def untouched():
        return bool((memory[:guard] == 12345.0).all() and (memory[guard + extent :] == 12345.0).all())

    return memory[guard : guard + extent].view(shape), untouched
