"""Building: what MAML_EXT_BUILD promises, and what an installation contains."""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import maml_ext
from maml_ext.ops import library

ROOT = Path(__file__).parent.parent


def setup(*arguments, cwd=ROOT, **environment):
    """Run setup.py; the environment variables given replace those of this process."""
    variables = {k: v for k, v in os.environ.items() if k not in ("MAML_EXT_BUILD", "CXX")} | environment
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
    )


def test_installed_packages():
    assert importlib.metadata.version("maml_ext") == maml_ext.__version__
    assert importlib.import_module("maml_ext.kernels").__doc__
    assert (Path(maml_ext.__file__).parent / "py.typed").exists()
    assert "torch" in importlib.metadata.requires("maml_ext")[0]
    assert all("extra" in r for r in importlib.metadata.requires("maml_ext")[1:]), "torch is the only dependency"


@pytest.mark.skipif(bool(library.ABSENT), reason=f"looks into the binary: {library.ABSENT}")
def test_the_binary_names_no_folder_of_the_machine_that_built_it():
    """Check messages carry __FILE__."""
    binary = Path(importlib.import_module("maml_ext._C").__file__).read_bytes()
    assert b"sgd_update" in binary
    for path in (ROOT, Path(sys.prefix), Path.home()):
        assert str(path).encode() not in binary


def test_cpu_build_insists_on_a_compiler():
    result = setup("--name", MAML_EXT_BUILD="cpu", CXX="no-such-compiler")
    assert result.returncode != 0 and "no C++ compiler found (no-such-compiler)" in result.stderr


def test_auto_build_does_without_a_compiler_and_says_so():
    result = setup("--name", CXX="no-such-compiler")
    assert result.returncode == 0 and "installing without compiled kernels" in result.stdout


def test_unknown_build_is_refused():
    result = setup("--name", MAML_EXT_BUILD="gpu")
    assert result.returncode != 0 and "expected auto, cpu or none, got 'gpu'" in result.stderr


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="there is no C++ compiler")
def test_a_compile_error_is_an_error(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("maml_ext", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "module.cpp").write_text("#error planted\n")
    result = setup("build_ext", "--inplace", cwd=tmp_path)
    assert result.returncode != 0 and "planted" in result.stdout + result.stderr
    assert not list((tmp_path / "maml_ext").glob("_C*.so"))
