"""CUDA kernels on the CPU: builds ``.cu`` files with g++, as executables and as modules, with or without a sanitizer.

``plain`` shows wrong results, and what divergent barriers do. ``address`` (with UndefinedBehaviorSanitizer) shows
accesses outside of arrays, ``thread`` races between threads and between blocks. No mode shows all.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILER = "g++"
SANITIZERS = {
    None: [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"],
    "thread": ["-fsanitize=thread"],
}
# Python and torch free nothing at exit.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


@cache
def unavailable() -> str:
    """Why nothing can be built or run here; empty where it can."""
    if sys.platform != "linux":
        return f"the emulation of CUDA needs Linux, not {sys.platform}"
    if not shutil.which(COMPILER):
        return f"the emulation of CUDA needs {COMPILER}, which is not there"
    version = int(subprocess.run([COMPILER, "-dumpversion"], capture_output=True, text=True).stdout.split(".")[0])
    return "" if version >= 11 else f"the emulation of CUDA needs {COMPILER} 11 for C++20, not {version}"


def compile(
    sources: Iterable[Path | str],
    output: Path,
    *,
    defines: Sequence[str] = (),
    sanitizer: str | None = None,
    flags: Sequence[str] = (),
    shared: bool = False,
    torch: bool = False,
) -> Path:
    """Compile and link ``sources`` (``.cu`` and ``.cpp``) into ``output``: an executable, or a shared library.

    ``defines`` are NAME or NAME=VALUE. ``torch`` adds what a library of operators needs: headers of torch and Python,
    and the stable ABI as setup.py uses it. Such a library loads by ``torch.ops.load_library``; with a sanitizer, only
    in a process with the ``environment`` of that sanitizer.
    """
    command = [COMPILER, "-std=c++20", "-O1", "-g1", "-fno-omit-frame-pointer", "-Wall", "-Wextra"]
    command += SANITIZERS[sanitizer]
    command += [f"-D{define}" for define in ("MAML_EMULATED", *defines)]
    command += [f"-I{folder}" for folder in (ROOT / "csrc" / "cuda", HERE)]
    if shared or torch:
        command += ["-shared", "-fPIC"]
    command += _torch_flags() if torch else []
    command += flags

    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def translate(source: Path | str) -> str:
            target = f"{folder}/{Path(source).name}.o"
            _execute([*command, "-x", "c++", "-c", str(source), "-o", target])
            return target

        objects = list(pool.map(translate, sources))
        _execute([*command, *objects, "-o", str(output), *(_torch_libraries() if torch else [])])
    return output


def _execute(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


def _torch_flags() -> list[str]:
    import sysconfig

    from torch.utils.cpp_extension import include_paths

    folders = [*include_paths(), sysconfig.get_paths()["include"]]
    return ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f for path in folders for f in ("-isystem", path))]


def _torch_libraries() -> list[str]:
    from torch.utils.cpp_extension import library_paths

    return [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]


def environment(sanitizer: str | None = None, preload: bool = False) -> dict[str, str]:
    """The environment variables to run with; ``preload`` for a Python process that loads a library so compiled."""
    variables = os.environ | OPTIONS
    libraries = {None: [], "address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}[sanitizer]
    if preload and libraries:
        find = [subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True) for name in libraries]
        variables["LD_PRELOAD"] = " ".join(found.stdout.decode().strip() for found in find)
    return variables


def run(command: Sequence[Path | str], *, sanitizer: str | None = None, preload: bool = False, timeout: float = 300):
    """Run what ``compile`` has made, or a Python process (``preload``) that loads it; the CompletedProcess."""
    command = [str(part) for part in command]

    def start(*prefix: str) -> subprocess.CompletedProcess:
        variables = environment(sanitizer, preload)
        # One text in the order in which it was written; bytes that are no text do not hide it.
        return subprocess.run(
            [*prefix, *command],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )

    result = start()
    # ThreadSanitizer wants parts of the address space that some versions of Linux give to other things, at random.
    if sanitizer == "thread" and result.returncode and "unexpected memory mapping" in result.stdout:
        result = start("setarch", platform.machine(), "-R")
    return result
