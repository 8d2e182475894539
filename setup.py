"""Builds ``csrc/`` into ``maml_ext._C``; everything declarative is in pyproject.toml.

``MAML_EXT_BUILD`` says what is compiled:
    auto (default)  the CPU kernels, or none where there is no C++ compiler; the CUDA kernels too where torch is a CUDA
                    build and nvcc is there, whether or not a GPU is. A compile error is an error.
    cpu             the CPU kernels; no compiler is an error.
    cuda            the CPU and CUDA kernels; no compiler or no nvcc is an error. torch may be a CPU build.
    none            nothing: the pure-Python package.

nvcc is that of ``CUDA_HOME`` or ``CUDA_PATH``, else the one on the path. ``TORCH_CUDA_ARCH_LIST`` ("8.0;9.0+PTX") says
for which architectures: by default those of ``ARCHITECTURES`` that nvcc knows, with PTX of the newest for later ones.

``MAML_EXT_SANITIZE=1`` compiles with AddressSanitizer and UndefinedBehaviorSanitizer (GCC), beside it
``maml_ext._planted`` with bugs for them to find. It loads in a process that preloads libasan: see `make sanitize`.

The binary uses torch's stable ABI at target 2.10 and Python's limited API: one file serves every torch from
2.10 on, with CUDA or without, and every Python from 3.10 on.
"""

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from setuptools import setup
from setuptools.modified import newer_group
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler, include_paths

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020a000000000000"  # 2.10
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

OPTIMIZED = ["-O3", "-g0"]
# Python's own flags define overflow (-fwrapv), which would hide it.
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", "-D_GLIBCXX_ASSERTIONS"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


def without_paths(folders: list) -> list[str]:
    """Paths of this machine get into error messages and debug information otherwise."""
    return [f"-ffile-prefix-map={path}/=" for path in folders]


class Nvcc:
    """The CUDA compiler at ``path``. The .cu files know neither torch nor Python: nvcc alone makes objects of them."""

    def __init__(self, path: str):
        self.path = path

    @classmethod
    def find(cls):
        """The one of CUDA_HOME or CUDA_PATH, else the one on the path; None where there is none."""
        homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        path = shutil.which("nvcc", path=str(homes[0] / "bin")) if homes else shutil.which("nvcc")
        return cls(path) if path else None

    def ask(self, *arguments: str) -> str:
        result = subprocess.run([self.path, *arguments], capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{self.path} does not work: {(result.stdout + result.stderr).strip()}")
        return result.stdout + result.stderr

    @cached_property
    def version(self) -> str:
        return re.search(r"release (\d+\.\d+)", self.ask("--version"))[1]

    @cached_property
    def folders(self) -> dict:
        """Its folders of headers and libraries, from itself: what is on the path may be a link or a script."""
        plan = self.ask("--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
        found = {}
        for name, flag in (("INCLUDES", "-I"), ("LIBRARIES", "-L")):
            words = shlex.split(re.search(rf"^#\$ {name}=(.*)$", plan, re.MULTILINE)[1])
            found[name] = [str(Path(word[2:]).resolve()) for word in words if word.startswith(flag)]
        return found

    def runtime(self) -> str:
        """The static runtime: which torch is there, and its runtime, then make no difference."""
        for folder in self.folders["LIBRARIES"]:
            if (Path(folder) / "libcudart_static.a").exists():
                return str(Path(folder) / "libcudart_static.a")
        raise SystemExit(f"libcudart_static.a is not in the folders of {self.path}: {self.folders['LIBRARIES']}")

    def architectures(self) -> list[str]:
        """What to compile for, as in TORCH_CUDA_ARCH_LIST."""
        wanted = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,"))
        if not wanted[0]:
            known = self.ask("--list-gpu-arch").split()
            wanted = [a for a in ARCHITECTURES if "compute_" + a.replace(".", "") in known]
            wanted[-1] += "+PTX"
        for architecture in wanted:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", architecture):
                raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected the like of 8.0;9.0+PTX, got {architecture!r}")
        return wanted

    @staticmethod
    def targets(architectures: list[str]) -> list[str]:
        flags = []
        for architecture in architectures:
            number, _, ptx = architecture.replace(".", "").partition("+")
            code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
            flags.append(f"-gencode=arch=compute_{number},code={code}")
        return flags

    def command(self, architectures: list[str]) -> list[str]:
        host = ["-fPIC", "-fvisibility=hidden", "-Wall", *without_paths([ROOT, *self.folders["INCLUDES"]])]
        return [self.path, "-std=c++17", "-O3", *self.targets(architectures), *(f"-Xcompiler={flag}" for flag in host)]

    def compile(self, sources: list[str], folder: Path) -> list[str]:
        """Objects of ``sources``; those are kept that are newer than all headers and come of the same command."""
        folder.mkdir(parents=True, exist_ok=True)
        cores = int(os.environ.get("MAX_JOBS") or os.cpu_count())
        command = self.command(self.architectures())
        with ThreadPoolExecutor(min(cores, len(sources))) as pool:  # a file's architectures are jobs too
            threads = f"--threads={max(1, cores // len(sources))}"
            return list(pool.map(lambda source: compile_one([*command, threads], source, folder), sources))


def compile_one(command: list[str], source: str, folder: Path) -> str:
    target = folder / (Path(source).stem + ".cu.o")
    record = target.with_suffix(".command")
    command = [*command, "-c", source, "-o", str(target)]
    inputs = [ROOT / path for path in (source, *files("*.h"), *files("*.cuh"))]
    if record.exists() and record.read_text() == shlex.join(command):
        if target.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
            return str(target)
    record.unlink(missing_ok=True)
    print(shlex.join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
    record.write_text(shlex.join(command))
    return str(target)


class BuildWithCuda(BuildExtension):
    """Has nvcc make the objects of extensions that have ``cuda_sources``, which are then linked with the rest."""

    def build_extension(self, ext):
        if getattr(ext, "cuda_sources", None):
            target = self.get_ext_fullpath(ext.name)
            if not self.inplace and not newer_group([*ext.sources, *ext.depends], target):
                return  # put there by `make cuda-check`
            objects = ext.nvcc.compile(ext.cuda_sources, Path(self.build_temp).resolve() / "cuda")
            ext.extra_objects = objects
            ext.depends = [*ext.depends, *objects]
        super().build_extension(ext)


def extension(name: str, sources: list, sanitize: bool, nvcc=None, **options) -> CppExtension:
    includes = nvcc.folders["INCLUDES"] if nvcc else []
    result = CppExtension(
        name,
        sources,
        py_limited_api=True,
        include_dirs=list(includes),  # which CppExtension adds to
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        extra_compile_args=[
            *(SANITIZED + SANITIZERS if sanitize else OPTIMIZED),
            *("-std=c++17", "-Wall", "-Wno-psabi", "-ffp-contract=fast", "-fvisibility=hidden"),
            *without_paths([ROOT, *include_paths(), *includes]),
        ],
        extra_link_args=SANITIZERS if sanitize else [],
        **options,
    )
    if nvcc:
        result.nvcc, result.cuda_sources = nvcc, files("*.cu")
        result.define_macros.append(("MAML_EXT_CUDA_ARCHITECTURES", ",".join(nvcc.architectures())))
        result.extra_link_args += [nvcc.runtime(), "-lrt", "-ldl", "-lpthread", "-Wl,--exclude-libs,ALL"]
    return result


def wanted_nvcc(build: str):
    """The compiler of CUDA kernels; None where there shall be none."""
    if build == "cpu" or (build == "auto" and torch.version.cuda is None):
        return None
    nvcc = Nvcc.find()
    if nvcc is None:
        missing = "no nvcc found: set CUDA_HOME to the folder of the CUDA toolkit"
        if build == "cuda":
            raise SystemExit(f"MAML_EXT_BUILD=cuda: {missing}")
        print(f"maml_ext: {missing}; installing without CUDA kernels")
    return nvcc


def extensions() -> list:
    build = os.environ.get("MAML_EXT_BUILD", "auto")
    if build not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"MAML_EXT_BUILD: expected auto, cpu, cuda or none, got {build!r}")
    compiler = get_cxx_compiler()
    if build == "none":
        return []
    if not shutil.which(shlex.split(compiler)[0]):
        if build != "auto":
            raise SystemExit(f"MAML_EXT_BUILD={build}: no C++ compiler found ({compiler}); set CXX or install one")
        print(f"maml_ext: no C++ compiler found ({compiler}): installing without compiled kernels")
        return []
    sanitize = os.environ.get("MAML_EXT_SANITIZE") == "1"
    nvcc = wanted_nvcc(build)
    sources = [path for path in files("*.cpp") if nvcc or not path.startswith("csrc/cuda/")]
    depends = [path for pattern in ("*.h", "*.cuh", "*.cu", "*.cpp") for path in files(pattern)]  # sdist takes them all
    planted = [extension("maml_ext._planted", ["tests/planted.cpp"], sanitize)] if sanitize else []
    return [extension("maml_ext._C", sources, sanitize, nvcc, depends=depends), *planted]


if __name__ == "__main__":  # tests/test_cuda_build.py takes Nvcc from here
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildWithCuda},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
