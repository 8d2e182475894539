"""Builds ``csrc/`` into ``maml_ext._C``; everything declarative is in pyproject.toml.

``MAML_EXT_BUILD`` says what is compiled:
    auto (default)  the CPU kernels, or none where there is no C++ compiler. A compile error is an error.
    cpu             the CPU kernels; no compiler is an error.
    none            nothing: the pure-Python package.

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
    return [
        CppExtension(
            "maml_ext._C",
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
            py_limited_api=True,
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
            # Paths of this machine get into error messages and debug information otherwise.
            extra_compile_args=["-O3", "-std=c++17", "-Wall", "-Wno-psabi", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"]
            + [f"-ffile-prefix-map={path}/=" for path in (ROOT, *include_paths())],
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
