"""Builds ``csrc/`` into ``maml_ext._C``; everything declarative is in pyproject.toml.

``MAML_EXT_BUILD`` says what is compiled:
    auto (default)  the CPU kernels, or none where there is no C++ compiler. A compile error is an error.
    cpu             the CPU kernels; no compiler is an error.
    none            nothing: the pure-Python package.

``MAML_EXT_SANITIZE=1`` compiles with AddressSanitizer and UndefinedBehaviorSanitizer (GCC), beside it
``maml_ext._planted`` with bugs for them to find. It loads in a process that preloads libasan: see `make sanitize`.

The binary uses torch's stable ABI at target 2.10 and Python's limited API: one file serves every torch from
2.10 on and every Python from 3.10 on.
"""

import os
import shlex
import shutil
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler, include_paths

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020a000000000000"  # 2.10

OPTIMIZED = ["-O3", "-g0"]
# Python's own flags define overflow (-fwrapv), which would hide it.
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", "-D_GLIBCXX_ASSERTIONS"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def extension(name: str, sources: list, sanitize: bool, **options) -> CppExtension:
    return CppExtension(
        name,
        sources,
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        extra_compile_args=[
            *(SANITIZED + SANITIZERS if sanitize else OPTIMIZED),
            *("-std=c++17", "-Wall", "-Wno-psabi", "-ffp-contract=fast", "-fvisibility=hidden"),
            # Paths of this machine get into error messages and debug information otherwise.
            *(f"-ffile-prefix-map={path}/=" for path in (ROOT, *include_paths())),
        ],
        extra_link_args=SANITIZERS if sanitize else [],
        **options,
    )


def extensions() -> list:
    build = os.environ.get("MAML_EXT_BUILD", "auto")
    if build not in ("auto", "cpu", "none"):
        raise SystemExit(f"MAML_EXT_BUILD: expected auto, cpu or none, got {build!r}")
    compiler = get_cxx_compiler()
    if build == "none":
        return []
    if not shutil.which(shlex.split(compiler)[0]):
        if build == "cpu":
            raise SystemExit(f"MAML_EXT_BUILD=cpu: no C++ compiler found ({compiler}); set CXX or install one")
        print(f"maml_ext: no C++ compiler found ({compiler}): installing without compiled kernels")
        return []
    sanitize = os.environ.get("MAML_EXT_SANITIZE") == "1"
    sources, headers = (
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern)) for pattern in ("*.cpp", "*.h")
    )
    sources = [source for source in sources if not source.startswith("csrc/cuda/")]
    planted = [extension("maml_ext._planted", ["tests/planted.cpp"], sanitize)] if sanitize else []
    return [extension("maml_ext._C", sources, sanitize, depends=headers), *planted]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
