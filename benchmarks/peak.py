"""The machine's peak rate of fused multiply-adds, which a meta-gradient's rate is a share of.

A few lines of C++ (independent chains of FMAs over the widest vectors there are) are compiled when first needed;
without a compiler the best rate of `torch.mm` stands in, which is a little lower.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

PIECE_S = 0.02  # seconds of one measurement
MATRIX = 1024  # rows and columns of the stand-in's matrices
# Chains: enough to fill every unit's pipeline, few enough to stay in registers.
SOURCE = """
#if defined(__AVX512F__)
enum { BYTES = 64, CHAINS = 24 };
#elif defined(__AVX__)
enum { BYTES = 32, CHAINS = 12 };
#elif defined(__aarch64__)
enum { BYTES = 16, CHAINS = 24 };
#else
enum { BYTES = 16, CHAINS = 12 };
#endif
typedef REAL vector __attribute__((vector_size(BYTES)));

extern "C" double flop(long repeats) { return 2.0 * repeats * CHAINS * (BYTES / sizeof(REAL)); }

extern "C" double chains(long repeats, double factor, double term) {
  vector x[CHAINS], a = vector{} + REAL(factor), b = vector{} + REAL(term);
  for (int i = 0; i < CHAINS; ++i) x[i] = vector{} + REAL(i);
  for (long n = 0; n < repeats; ++n)
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; ++i) x[i] = x[i] * a + b;
  for (int i = 1; i < CHAINS; ++i) x[0] += x[i];
  return x[0][0];
}
"""


class Peak:
    """Measures the peak again and again, in `dtype` and on `threads` threads; `how` says by what."""

    def __init__(self, dtype: torch.dtype, threads: int):
        self.threads = threads
        library = _compiled("float" if dtype == torch.float32 else "double")
        if library is not None:
            self.how = "FMA loop in C++"
            self._pool = ThreadPoolExecutor(threads)
            self._chains = library.chains
            self._flop = library.flop
            self._repeats = self._enough(self._run, 1 << 12)
        else:
            self.how = f"torch.mm of {MATRIX} x {MATRIX} (no C++ compiler)"
            self._left, self._right = torch.rand(2, MATRIX, MATRIX, dtype=dtype)
            self._flop = lambda repeats: 2.0 * repeats * MATRIX**3 / threads  # a thread's part
            self._run(1, self._multiply)
            self._repeats = self._enough(self._multiply, 1)

    def measure(self) -> float:
        """GFLOP/s of all threads together, over some hundredths of a second."""
        run = self._run if hasattr(self, "_chains") else self._multiply
        seconds = _seconds(run, self._repeats)
        return 1e-9 * self.threads * self._flop(self._repeats) / seconds
