"""Building: what MAML_EXT_BUILD promises, and what an installation contains."""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from cuda_resources import setup_script

import maml_ext
from maml_ext.ops import library

ROOT = Path(__file__).parent.parent
VARIABLES = ("MAML_EXT_BUILD", "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")


def setup(*arguments, cwd=ROOT, **environment):
    """Run setup.py; the environment variables given replace those of this process."""
    variables = {k: v for k, v in os.environ.items() if k not in VARIABLES} | environment
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
    )


def test_installed_packages():
    assert importlib.metadata.version("maml_ext") == maml_ext.__version__
    assert importlib.import_module("maml_ext.kernels").__doc__
    assert (Path(maml_ext.__file__).parent / "py.typed").exists()
    assert "torch" in importlib.metadata.requires("maml_ext")[0]
    assert all("extra" in r for r in importlib.metadata.requires("maml_ext")[1:]), "torch is the only dependency"


USED = """
import torch, maml_ext, maml_ext.kernels
from maml_ext import compiled
from maml_ext.ops import cuda
net = torch.nn.Linear(2, 1)
x, y = torch.ones(3, 4, 2), torch.zeros(3, 4, 1)
maml_ext.MAML(net, steps=2)(x, y, x, y).sum().backward()
maml_ext.sgd_update(torch.ones(2), torch.ones(2), 0.1)
assert net.weight.grad.norm() > 0
"""


@pytest.mark.parametrize("installed", [True, False], ids=["installed or not", "not installed"])
def test_the_package_does_without_triton(installed):
    """Unless there is a CUDA device and something to be run there, it doesn't import triton even where it could."""
    if installed:
        script = f"import sys\n{USED}\nassert not [name for name in sys.modules if name.split('.')[0] == 'triton']"
    else:
        script = f"import sys\nsys.modules['triton'] = None\n{USED}\nassert cuda.triton_absent()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(bool(library.ABSENT), reason=f"no binary: {library.ABSENT}")
def test_an_operator_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(library, "triton_absent", lambda: "triton is not installed")
    with pytest.raises(RuntimeError, match="maml_ext::predict: there is no Triton engine: triton is not installed"):
        torch.ops.maml_ext.triton_predict([], [], None, torch.ones(1), torch.ones(1), [])


def test_distributions_have_the_kernels(tmp_path):
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    egg = ("egg_info", "--egg-base", str(tmp_path))
    source = setup("--quiet", *egg, "sdist", "--dist-dir", str(tmp_path), MAML_EXT_BUILD="cpu")
    assert source.returncode == 0, source.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"kernels/{name}" for name in kernels} <= names and "csrc/engine/checked_ops.cpp" in names
    built = setup("--quiet", *egg, "build_py", "--build-lib", str(tmp_path), MAML_EXT_BUILD="none")
    assert built.returncode == 0, built.stderr
    assert {path.name for path in (tmp_path / "maml_ext" / "kernels").iterdir()} == kernels


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


def test_cuda_build_insists_on_nvcc(tmp_path):
    result = setup("--name", MAML_EXT_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert result.returncode != 0 and "no nvcc found: set CUDA_HOME" in result.stderr


def test_cuda_build_insists_on_a_compiler():
    result = setup("--name", MAML_EXT_BUILD="cuda", CXX="no-such-compiler")
    assert result.returncode != 0 and "MAML_EXT_BUILD=cuda: no C++ compiler found" in result.stderr


@pytest.mark.parametrize("cuda, finds, expected", [("13.0", True, True), ("13.0", False, False), (None, True, False)])
def test_auto_builds_cuda_kernels_for_cuda_builds_of_torch_where_there_is_nvcc(
    cuda, finds, expected, monkeypatch, tmp_path, capsys
):
    """Whether a GPU is plugged in is not asked."""
    module = setup_script()
    monkeypatch.setattr(module.torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path) if finds else tmp_path))
    assert (module.wanted_nvcc("auto") is not None) == expected
    assert ("installing without CUDA kernels" in capsys.readouterr().out) == (cuda is not None and not finds)


def fake_nvcc(folder: Path) -> Path:
    """A toolkit whose nvcc knows two of the architectures that are wanted, and one that is not."""
    (folder / "bin").mkdir()
    (folder / "bin" / "nvcc").write_text("#!/bin/sh\necho compute_80\necho compute_87\necho compute_90\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    return folder


@pytest.mark.parametrize(
    "wanted, expected",
    [
        (None, ["8.0", "9.0+PTX"]),
        ("", ["8.0", "9.0+PTX"]),
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("8.0 8.6", ["8.0", "8.6"]),
        ("9.0a", ["9.0a"]),
        ("Hopper", None),
        ("90", None),
    ],
)
def test_architectures(wanted, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path)))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if wanted is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    nvcc = setup_script().Nvcc.find()
    if expected is None:
        with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected"):
            nvcc.architectures()
    else:
        assert nvcc.architectures() == expected


def test_ptx_is_beside_the_code_of_its_architecture():
    expected = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_120,code=[sm_120,compute_120]"]
    assert setup_script().Nvcc.targets(["8.0", "12.0+PTX"]) == expected


def test_auto_build_does_without_a_compiler_and_says_so():
    result = setup("--name", CXX="no-such-compiler")
    assert result.returncode == 0 and "installing without compiled kernels" in result.stdout


def test_unknown_build_is_refused():
    result = setup("--name", MAML_EXT_BUILD="gpu")
    assert result.returncode != 0 and "expected auto, cpu, cuda or none, got 'gpu'" in result.stderr


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
