"""The CUDA kernels, run on the CPU by emulation/engine_driver.cpp: clean in every mode, and no bug planted in them is.

There is one build a mode, of a copy of the sources that has every bug in it, behind ``mutant == its number``: the
environment variable MUTANT says which one it is, without which the code is that of the kernels.
"""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import emulation
import pytest

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.xdist_group("mutants"),  # which builds once
    pytest.mark.skipif(bool(emulation.unavailable()), reason=emulation.unavailable() or "-"),
]

MODES = [None, "address", "thread"]
RUNS = {None: [["orders", 3], ["gradients"]], "address": [["orders", 0], ["gradients"]], "thread": [["once"]]}


def build(root, output, mode, flags):
    """The driver of a copy of the repository."""
    host = ["cuda/plan.cpp", "engine/program.cpp", "engine/layout.cpp"]
    files = [*(root / "csrc" / file for file in host), root / "tests/emulation/engine_driver.cpp"]
    sources = [*sorted((root / "csrc/cuda").glob("*.cu")), *files]
    defines = ["DOUBLES_ALONE"] if mode else []  # else it compiles for minutes
    return emulation.compile(sources, output, defines=defines, sanitizer=mode, flags=["-Wno-unknown-pragmas", *flags])


def run(driver, mode, *variables):
    """What the first run says that fails; None where all pass."""
    for arguments in RUNS[mode]:
        result = emulation.run(["env", *variables, driver, *arguments], sanitizer=mode)
        if result.returncode:
            return f"exit status {result.returncode}\n{result.stdout}"
    return None


@dataclass(frozen=True)
class Mutant:
    """In ``file``, the expression ``old``, the first behind ``anchor``, becomes ``new``."""

    name: str
    file: str
    anchor: str
    old: str
    new: str


PLANTED = [
    # An array too short, or read behind its end.
    Mutant("no room for the last parameter", "plan.h", "memory.parameters", "all", "all - 1"),
    Mutant("no room for the last slope", "plan.h", "memory.slope =", "plan.adapted", "plan.adapted - 1"),
    Mutant("no room for the last warp", "plan.h", "memory.sums = ", "kThreads / kWarp", "kThreads / kWarp - 1"),
    Mutant("no room for the last sample", "plan.h", "memory.values = ",
           "plan.frame * chunk", "plan.frame * (chunk - 1)"),
    Mutant("no room for the last tangents", "plan.h", "memory.tangents = ",
           "plan.frame * chunk", "plan.frame * (chunk - 1)"),
    Mutant("no room for the last gradient", "plan.h", "memory.gradients = ", "extent", "extent - 1"),
    Mutant("loads one too many", "task.h", "load_samples(", "i < count * plan.features", "i <= count * plan.features"),
    Mutant("one factor too many", "block.h", "sum[kTile][kTile]", "k < depth", "k <= depth"),
    Mutant("one task too many", "sum_tasks.cu", "T sum", "t < tasks", "t <= tasks"),
    # Two blocks on one address.
    Mutant("all losses in one place", "meta.cu", "call.loss[", "task.task", "0"),
    Mutant("all lambdas in one place", "meta.cu", "const mine", "task.task", "0"),
    Mutant("all trajectories in one place", "adapt.cu", "steps.theta[k - steps.begin]", "task.task", "0"),
    Mutant("all predictions in one place", "network.cu", "task.call.prediction[", "first", "first - task.task * count"),
    # Wrong derivatives.
    Mutant("half of a product's tangent", "../engine/dual.h", "operator*", "a.value * b.tangent", "A(0)"),
    Mutant("no second derivative of activations", "stages.h", "slope_of_activation", "jet.second", "T(0)"),
    Mutant("first order", "task.h", "step_back(", "call.first_order", "true"),
    Mutant("lambda stays", "task.h", "step_back(", "memory.slope[i]", "T(0)"),
    Mutant("theta_K throughout", "meta.cu", "task.load_parameters(k", "theta(k)", "theta(call.steps)"),
    Mutant("theta_K throughout the adjoint", "adapt.cu", "const T *theta =",
           "k - steps.begin", "steps.end - 1 - steps.begin"),
    Mutant("the rate of the first step", "task.h", "INLINE Rates rates(", "call.rate_rows > 1", "false"),
    # The update's derivative.
    Mutant("no minus", "sgd_update.cu", "group_back(", "0 - rates.at[i]", "rates.at[i]"),
    Mutant("no gradient of a rate", "sgd_update.cu", "sum_of_piece(", "lanes[i]", "0"),
    Mutant("no gradient of a column's rate", "sgd_update.cu", "sums_of_columns(", "scalar(-sum[i])", "scalar(0)"),
    Mutant("pieces of another segment", "sgd_update.cu", "finish_rate_gradient(", "batch.sums[s]", "batch.sums[0]"),
    Mutant("the last piece forgotten", "sgd_update.cu", "piece = threadIdx.x",
           "batch.pieces[s]", "batch.pieces[s] - 1"),
]  # fmt: skip
CUDA = emulation.ROOT / "csrc/cuda"
BARRIER = "__syncthreads();"
ONLY_IF = r"#if !defined(DOUBLES_ALONE)\n\1\n#endif"


def barriers():
    """The file and line of every barrier: each is a mutant without it."""
    for path in sorted([*CUDA.glob("*.h"), *CUDA.glob("*.cu")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip().startswith(BARRIER):
                yield f"{path.name}:{number}"


def plant(root):
    """Copies the sources to ``root`` and plants every bug; returns names by number, from 1 on."""
    for folder in ("csrc/cuda", "csrc/engine", "tests/emulation"):
        shutil.copytree(emulation.ROOT / folder, root / folder)
    shutil.copy(emulation.ROOT / "csrc/segment.h", root / "csrc")
    (root / "mutant.h").write_text(
        "#pragma once\n#include <cstdlib>\n"
        'inline const int mutant = [] { const char* m = std::getenv("MUTANT"); return m ? std::atoi(m) : 0; }();\n'
    )
    numbers = {}
    for m in PLANTED:
        numbers[m.name] = len(numbers) + 1
        path = root / "csrc/cuda" / m.file
        text = path.read_text()
        at = text.index(m.old, text.index(m.anchor))
        planted = f"(mutant == {numbers[m.name]} ? {m.new} : {m.old})"
        path.write_text(text[:at] + planted + text[at + len(m.old) :])
    for name in barriers():
        numbers[name] = len(numbers) + 1
        file, line = name.split(":")
        path, i = root / "csrc/cuda" / file, int(line) - 1
        lines = path.read_text().splitlines(keepends=True)
        lines[i] = lines[i].replace(BARRIER, f"if (mutant != {numbers[name]}) {BARRIER}", 1)
        path.write_text("".join(lines))
    for path in (root / "csrc/cuda").glob("*.cu"):
        text = re.sub(r"^(INSTANTIATE\(float\)|template .*<float>.*;)$", ONLY_IF, path.read_text(), flags=re.MULTILINE)
        path.write_text(text)
    return numbers


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """report(mode, name of a mutant or None): what fails, or None."""
    root = tmp_path_factory.mktemp("mutants")
    numbers = plant(root)
    with ThreadPoolExecutor(1) as pool:
        flags = ["-include", str(root / "mutant.h")]
        drivers = {mode: pool.submit(build, root, root / f"driver_{mode}", mode, flags) for mode in MODES}
        yield lambda mode, name=None: run(drivers[mode].result(), mode, f"MUTANT={numbers[name] if name else 0}")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_clean(report, mode):
    assert report(mode) is None


@pytest.mark.parametrize("name", [*(m.name for m in PLANTED), *barriers()])
def test_a_mutant_is_found(report, name):
    """The cheapest mode first."""
    assert any(report(mode, name) for mode in MODES)


@pytest.mark.parametrize("name", [next(barriers()), "all losses in one place"])
def test_races_are_found_without_comparing_results(report, name):
    assert "data race" in report("thread", name)
