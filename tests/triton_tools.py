"""What the tests of Triton kernels share. They run on a CUDA device, or interpreted on the CPU."""

import os

import pytest
import torch

pytest.importorskip("triton")
import interpreter  # noqa: E402
from conftest import OPERATORS  # noqa: E402

RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not RUNS, reason="needs a CUDA device, or TRITON_INTERPRET=1")
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu" and RUNS:
    interpreter.quicken()


class Operators:
    """maml_ext's, with those of the Triton engine in the place of the CPU engine's."""

    def __getattr__(self, name):
        return getattr(torch.ops.maml_ext, f"triton_{name}" if name in OPERATORS else name)


def guarded(*shape, dtype=torch.float64, fill=float("nan")):
    """A tensor of NaN between two guards, and a function that says whether these are untouched."""
    extent, guard = torch.Size(shape).numel(), 64
    memory = torch.full((guard + extent + guard,), fill, dtype=dtype, device=device)
    memory[:guard] = memory[guard + extent :] = 12345.0

    def untouched():
        return bool((memory[:guard] == 12345.0).all() and (memory[guard + extent :] == 12345.0).all())

    return memory[guard : guard + extent].view(shape), untouched


def fenced(tensor):
    """A copy amid NaN, which who reads too far gets."""
    memory = tensor.new_full((tensor.numel() + 128,), float("nan"))
    memory[64:-64] = tensor.flatten()
    return memory[64:-64].view(tensor.shape)


def derivatives(f, inputs, inputs_t, dz, dz_t):
    """z = f(*inputs) and the gradients at the inputs, each with its tangent."""

    def pull(*arguments):
        return torch.func.vjp(f, *arguments[:-1])[1](arguments[-1])

    z = torch.func.jvp(f, inputs, inputs_t)
    return [z, *zip(*torch.func.jvp(pull, (*inputs, dz), (*inputs_t, dz_t)))]


def check_layer(f, inputs, forward, backward, moving=None):
    """A layer without parameters against the formula f, in value, gradient and both their tangents.

    ``forward(*numbers, z)``, and ``backward(*numbers, z, dz, *to, accumulate)`` where ``to`` are the numbers of the
    gradients at the inputs. ``moving`` says which inputs have a tangent in the pass that has any.
    """
    moving = moving or [True] * len(inputs)
    directions = [torch.randn_like(x) if moves else torch.zeros_like(x) for x, moves in zip(inputs, moving)]
    shape = f(*inputs).shape
    given = [*inputs, *directions, *(torch.randn(shape, dtype=torch.float64, device=device) for _ in range(2))]
    given = [t.float().double() for t in given]
    n = len(inputs)
    for dtype in (torch.float64, torch.float32):
        x, x_t, (dz, dz_t) = (
            [fenced(t.to(dtype)) for t in part] for part in (given[:n], given[n : 2 * n], given[2 * n :])
        )
        exact = derivatives(f, tuple(given[:n]), tuple(given[n : 2 * n]), *given[2 * n :])
        eager = derivatives(f, tuple(x), tuple(x_t), dz, dz_t)
        for parts in (1, 2):
            for accumulate in (False, True) if dtype == torch.float64 else (False,):
                numbers = [(a, b)[: parts if moves else 1] for a, b, moves in zip(x, x_t, moving)]
                made = [[guarded(*t.shape, dtype=dtype) for _ in range(parts)] for t in (dz, *x)]
                z, *to = results = [tuple(tensor for tensor, _ in number) for number in made]
                forward(*numbers, z)
                for number in to if accumulate else ():
                    for tensor in number:
                        tensor.fill_(3.0)
                backward(*numbers, z, (dz, dz_t)[:parts], *to, accumulate)
                assert all(untouched() for number in made for _, untouched in number)
                for i, found in enumerate(results):
                    for mine, theirs, truth in zip(found, eager[i], exact[i]):
                        mine = mine.double() - (3.0 if accumulate and i > 0 else 0.0)
                        size = truth.abs().max() + 3.0
                        allowed = 2 * (theirs - truth).abs().max() + 2e-7 * size
                        allowed = 1e-13 * size if dtype == torch.float64 else allowed
                        error = (mine - truth).abs().max()
                        assert error <= allowed, (dtype, parts, accumulate, i, error, allowed)
