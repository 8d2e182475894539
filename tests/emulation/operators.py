"""The CUDA kernels behind operators on CPU tensors: those of maml_ext once more, in ``torch.ops.maml_ext_emulated``."""

import fcntl
import hashlib
import importlib.util
import os
import sys
from functools import cache

import pybind11
import torch
from conftest import OPERATORS

import emulation

CSRC = emulation.ROOT / "csrc"
HOST = [CSRC / "cuda" / "plan.cpp", CSRC / "engine" / "program.cpp", CSRC / "engine" / "layout.cpp"]


@cache
def load():
    """The module of module.cpp, its operators registered; built once for each state of the sources, in ``out/``, by the
    first process that needs it.

    MAML_EXT_EMULATED_SANITIZER=address compiles it so, for a process with the sanitizer's libraries loaded before.
    """
    sanitizer = os.environ.get("MAML_EXT_EMULATED_SANITIZER")
    state = hashlib.sha256(f"{sanitizer} {torch.__version__} {sys.version}".encode())
    for path in sorted(p for folder in (CSRC, emulation.HERE) for p in folder.rglob("*.*") if p.suffix != ".pyc"):
        state.update(path.read_bytes())
    library = emulation.ROOT / "out" / "emulation" / state.hexdigest()[:16] / "emulated.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            sources = [*sorted((CSRC / "cuda").glob("*.cu")), *HOST, emulation.HERE / "module.cpp"]
            partial = library.with_suffix(".partial")
            flags = [f"-I{pybind11.get_include()}"]
            emulation.compile(sources, partial, sanitizer=sanitizer, torch=True, flags=flags).rename(library)
    schemas = torch.library.Library("maml_ext_emulated", "DEF")
    for name in (*OPERATORS, "cuda_misfit"):
        schemas.define(str(getattr(torch.ops.maml_ext, name).default._schema).removeprefix("maml_ext::"))
    spec = importlib.util.spec_from_file_location("emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.schemas = schemas  # which live as long
    return module
