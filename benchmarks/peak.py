"""The machine's peak: multiply-adds that wait for nothing, on all threads, timed between the rounds of a run.

The best block counts, so a share of the peak errs to the low side: where others or a lower clock slow the
rows down, the peak stays that of an undisturbed block. `blocks` keeps them all: how steady the machine was.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

# Independent accumulators, named one by one so that they stay in registers (an array might not). AVX and AVX2
# have 16 registers, the two factors take two of them.
SOURCE = """
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define TWELVE(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)
#if defined(__AVX512F__) || defined(__aarch64__)
#define EACH(M) TWELVE(M) M(12) M(13) M(14) M(15)
#else
#define EACH(M) TWELVE(M)
#endif
typedef REAL V __attribute__((vector_size(BYTES)));
#define COUNT(i) + 1
extern "C" double flop_a_turn() { return 2.0 * (0 EACH(COUNT)) * (BYTES / sizeof(REAL)); }
extern "C" double turns(long n, double factor, double term) {
  const V a = V{} + REAL(factor), b = V{} + REAL(term);
#define DECLARE(i) V x##i = b * REAL(i);
  EACH(DECLARE)
#define STEP(i) x##i = x##i * a + b;
  for (long k = 0; k < n; k++) { EACH(STEP) }
#define TOTAL(i) + x##i
  const V total = V{} EACH(TOTAL);
  double sum = 0;
  for (unsigned i = 0; i < BYTES / sizeof(REAL); i++) sum += total[i];
  return sum;
}
"""
NATIVE = ("-march=native", "-mcpu=native")  # whichever the compiler knows
MATRIX = 1024
BLOCK, QUICK_BLOCK = 0.05, 0.005  # seconds


def _compile(real: str, compiler: str) -> ctypes.CDLL | None:
    """The loop as a library; None where the compiler cannot make one."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.cpp", Path(folder) / "peak.so"
        source.write_text(SOURCE)
        for native in NATIVE:
            command = [compiler, "-O3", native, "-ffp-contract=fast", f"-DREAL={real}", "-shared", "-fPIC"]
            made = subprocess.run([*command, source, "-o", library], capture_output=True, check=False)
            if made.returncode == 0:
                loaded = ctypes.CDLL(str(library))
                loaded.turns.argtypes = [ctypes.c_long, ctypes.c_double, ctypes.c_double]
                loaded.turns.restype = loaded.flop_a_turn.restype = ctypes.c_double
                return loaded
    return None


class Peak:
    """Rates of multiply-adds in `dtype`: `blocks`, in GFLOP/s.

    `source` says what is timed: a loop of fused multiply-adds compiled here, on `threads` threads, or matrix
    products on torch's threads where there is no compiler. `compiler`: its command; "" for none.
    """

    def __init__(self, threads: int, dtype: torch.dtype, compiler: str | None = None):
        self.threads, self.dtype = threads, dtype
        if compiler is None:
            names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
            compiler = next((name for name in names if name and shutil.which(name)), "")
        real = {torch.float32: "float", torch.float64: "double"}[dtype]
        self._library = _compile(real, compiler) if compiler else None
        self.source = "compiled FMA loop" if self._library else "torch.mm, no compiler"
        self.blocks: list[float] = []
        self._amount_a_second = 0.0

    def measure(self, seconds: float, repeats: int = 2) -> None:
        """Time `repeats` further blocks of about `seconds` each."""
        block = self._loop if self._library else self._product
        if not self._amount_a_second:
            amount, took = 1, 0.0
            while took < seconds / 4:
                amount *= 2
                _, took = block(amount)
            self._amount_a_second = amount / took
        amount = max(1, int(self._amount_a_second * seconds))
        self.blocks += [1e-9 * flop / took for flop, took in (block(amount) for _ in range(repeats))]

    def _loop(self, amount: int) -> tuple[float, float]:
        """(floating-point operations, seconds) of the loop in every thread; ctypes releases the GIL."""
        turns = 1000 * amount
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(lambda _: time.sleep(0.001), range(self.threads)))  # start the threads
            start = time.perf_counter()
            list(pool.map(lambda _: self._library.turns(turns, 0.999, 0.001), range(self.threads)))
            took = time.perf_counter() - start
        return self._library.flop_a_turn() * turns * self.threads, took

    def _product(self, amount: int) -> tuple[float, float]:
        """The same of square matrix products."""
        a = torch.ones(MATRIX, MATRIX, dtype=self.dtype)
        result = torch.empty_like(a)
        start = time.perf_counter()
        for _ in range(amount):
            torch.mm(a, a, out=result)
        return 2.0 * MATRIX**3 * amount, time.perf_counter() - start
