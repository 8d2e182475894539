"""What nvcc makes of every kernel in csrc/cuda: registers, spills, shared memory, and how its PTX reaches memory.

``python tests/cuda_resources.py`` (`make cuda-resources`) writes the table that tests/test_cuda_build.py holds kernels
to. It needs nvcc and no GPU.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import resource_table
from resource_table import ARCHITECTURES, short

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "csrc" / "cuda" / "resources.txt"


def setup_script():
    """setup.py as a module: it builds nothing when it is imported."""
    specification = importlib.util.spec_from_file_location("maml_ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


class Resources(NamedTuple):
    """Of a kernel: registers a thread, then bytes."""

    registers: int
    spills: int
    stack: int
    shared: int


class Compiled(NamedTuple):
    resources: dict[str, Resources]  # by name of the kernel: "update<float>"
    ptx: dict[str, str]  # likewise: its body
    shared_arrays: list[str]  # names of dynamic shared memory


def compile_one(source: Path, architecture: str) -> Compiled:
    """The kernels of one file as setup.py compiles them, for one architecture."""
    nvcc = setup_script().Nvcc.find()
    with tempfile.TemporaryDirectory() as folder:
        keep = ["-Xptxas=-v", "--keep", "--keep-dir", folder, "-cubin", "-o", f"{folder}/kernels.cubin"]
        command = [*nvcc.command([architecture]), *keep, str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{source.name}: {result.stdout}{result.stderr}")
        text = (Path(folder) / f"{source.stem}.ptx").read_text()
    bodies = dict(re.findall(r"\.entry\s+(\w+)\(.*?^\{(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    found = resources_of(result.stdout + result.stderr)
    names = readable(sorted(found))
    return Compiled(
        {names[name]: resources for name, resources in found.items()},
        {names[name]: body for name, body in bodies.items()},
        re.findall(r"^\.extern \.shared .*?(\w+)\[\];", text, re.MULTILINE),
    )


def resources_of(log: str) -> dict[str, Resources]:
    """What ``ptxas -v`` says of each kernel, by mangled name."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part).groups()
        registers = re.search(r"Used (\d+) registers", part)[1]
        shared = re.search(r"(\d+) bytes smem", part)
        sizes = int(stores) + int(loads), int(stack), int(shared[1]) if shared else 0
        found[part.split("'")[0]] = Resources(int(registers), *sizes)
    return found


def readable(names: list[str]) -> dict[str, str]:
    """Mangled names, which depend on the folder of the file, to names without namespaces and parameters."""
    output = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = [re.sub(r"(\(anonymous namespace\)|\w+)::|\s", "", line) for line in output.stdout.splitlines()]
    assert len(set(short)) == len(names), f"kernels of one file need names of their own: {short}"
    return dict(zip(names, short))


STATE_SPACES = {"const", "global", "local", "param", "shared"}
ACCESS = re.compile(r"^\s*(?:@!?%\w+\s+)?((?:ld|st|atom|red)(?:\.[\w:]+)+)\s.*$", re.MULTILINE)


def generic_accesses(ptx: str) -> list[str]:
    """Loads, stores and atomics that do not say in which memory they are, and shared addresses made to forget it.

    PTX names the state space in the instruction (ld.shared.f32) wherever the compiler has proved it. Without one
    (ld.f32) the processor finds out at each access, and nothing is known not to alias shared memory, which keeps
    values out of registers. For a kernel whose pointers are arguments and whose shared memory is carved by offsets the
    proof always succeeds: one generic access means that an address went through something the compiler can't follow.
    """
    accesses = [match for match in ACCESS.finditer(ptx) if not spaces(match[1]) & STATE_SPACES]
    return [match[0].strip() for match in accesses] + re.findall(r"cvta\.shared\S*.*", ptx)


def spaces(instruction: str) -> set[str]:
    return {part.split("::")[0] for part in instruction.split(".")}


def uses_shared_memory(compiled: Compiled, kernel: str) -> tuple[bool, bool]:
    """Whether a kernel names dynamic shared memory, and whether it loads or stores there."""
    body = compiled.ptx[kernel]
    named = any(re.search(rf"\b{array}\b", body) for array in compiled.shared_arrays)
    return named, any("shared" in spaces(match[1]) for match in ACCESS.finditer(body))


def compile_all(architecture: str) -> dict[str, Compiled]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = sources()
        return dict(zip((f.name for f in files), pool.map(lambda source: compile_one(source, architecture), files)))


def read_table() -> tuple[str, dict[tuple[str, str, str], Resources]]:
    """nvcc's version, and resources by file, kernel and architecture."""
    return resource_table.read(TABLE)


def write_table() -> None:
    found = {
        (file, kernel, short(architecture)): resources
        for architecture in ARCHITECTURES
        for file, compiled in compile_all(architecture).items()
        for kernel, resources in compiled.resources.items()
    }
    origin = f"by `make cuda-resources`, with nvcc {setup_script().Nvcc.find().version}"
    resource_table.write(TABLE, origin, ("file", "kernel"), found)


if __name__ == "__main__":
    if setup_script().Nvcc.find() is None:
        sys.exit("no nvcc found: set CUDA_HOME to the folder of the CUDA toolkit")
    write_table()
    print(TABLE.read_text(), end="")
