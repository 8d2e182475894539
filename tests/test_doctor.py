"""``python -m maml_ext doctor`` reports what runs here and fails where it computes the wrong thing."""

import subprocess
import sys

import pytest
import torch

import maml_ext
from maml_ext import doctor, reference
from maml_ext.ops import cuda, library


def test_doctor_runs_from_the_command_line():
    command = [sys.executable, "-m", "maml_ext", "doctor"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert maml_ext.__version__ in result.stdout and torch.__version__ in result.stdout
    for name in (name for name, check in doctor.CHECKS.items() if check.runs_on("cpu")):
        assert result.stdout.count(name) >= len(doctor.TOLERANCE)
    assert "WRONG" not in result.stdout and "FAILED" not in result.stdout


def test_doctor_reports_a_wrong_meta_gradient(monkeypatch, capsys):
    """A recursion without its Hessian term is first-order MAML under the name of exact."""
    vjp = reference.Problem.gradient_vjp

    def without_hessian(self, *args):
        gradient, pullback = vjp(self, *args)
        return gradient, lambda v: tuple(torch.zeros_like(p) for p in pullback(v))

    monkeypatch.setattr(reference.Problem, "gradient_vjp", without_hessian)
    assert doctor.doctor() == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if "WRONG" in line]
    assert wrong and wrong == [line for line in lines if line.startswith("meta-gradient, torch")]


def test_doctor_survives_an_engine_that_raises(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(reference, "expand_rate", broken)
    assert doctor.doctor() == 1
    out = capsys.readouterr().out
    assert "FAILED RuntimeError: planted" in out and "sgd_update" in out


def test_checks_run_where_they_can():
    on_cpu = {name for name, check in doctor.CHECKS.items() if check.runs_on("cpu")}
    on_cuda = {name for name, check in doctor.CHECKS.items() if check.runs_on("cuda:0")}
    by_triton = {name for name in doctor.CHECKS if "Triton" in name}
    compiled = {name for name in doctor.CHECKS if "compiled engine" in name}
    assert on_cpu == doctor.CHECKS.keys() - by_triton - (compiled if library.ABSENT else set())
    absent = (compiled if cuda.absent() else set()) | (by_triton if cuda.triton_absent() else set())
    assert on_cuda == doctor.CHECKS.keys() - absent and by_triton and compiled


def test_doctor_says_what_there_is_of_triton(monkeypatch):
    if not cuda.triton_absent():
        import triton

        assert doctor._triton().startswith(triton.__version__)
        assert ("needs a CUDA device" in doctor._triton()) == (not torch.cuda.device_count())
        monkeypatch.setitem(sys.modules, "triton", None)
        assert doctor._triton().startswith("does not load: ModuleNotFoundError")
    monkeypatch.setattr(cuda, "triton_absent", lambda: "triton is not installed")
    assert doctor._triton() == "absent: triton is not installed"
    assert not doctor.CHECKS["meta-gradient, Triton engine"].runs_on("cuda:0")


@pytest.mark.skipif(bool(library.ABSENT), reason=f"no binary: {library.ABSENT}")
def test_the_check_of_triton_is_not_passed_by_another_engine(monkeypatch):
    check = doctor.CHECKS["meta-gradient, Triton engine"]
    with pytest.raises(RuntimeError, match="for the Triton engine, what runs it is cpu"):
        check.error("cpu", torch.float64)
    monkeypatch.setattr(maml_ext.MAML, "explain", lambda *_: maml_ext.maml.Explanation("triton", [], ""))
    assert check.error("cpu", torch.float64) < 1e-12


def test_doctor_says_what_there_is_for_cuda(monkeypatch):
    if library.cuda_absent():
        expected = f"absent: {library.cuda_absent()}"
        assert doctor._compiled_for_cuda() == expected and ("MAML_EXT_BUILD" in expected or library.ABSENT in expected)
        return
    assert torch.ops.maml_ext.cuda_architectures() in doctor._compiled_for_cuda()
    assert f"{torch.ops.maml_ext.cuda_devices()} devices" in doctor._compiled_for_cuda()
    assert "fewer than torch sees" not in doctor._compiled_for_cuda()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 9)
    assert "fewer than torch sees" in doctor._compiled_for_cuda()


@pytest.mark.skipif(bool(library.ABSENT), reason=f"no binary: {library.ABSENT}")
def test_a_build_without_cuda_kernels_is_named(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    assert doctor._compiled_for_cuda() == f"absent: {library.CUDA_ABSENT}"
    assert "MAML_EXT_BUILD=cuda" in library.CUDA_ABSENT
