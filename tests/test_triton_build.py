"""The Triton kernels that workloads launch as ptxas compiles them: no GPU is needed to see what they need there."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import resource_table

pytest.importorskip("triton")
from maml_ext.ops import library  # noqa: E402

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "kernels" / "resources.txt"
SHARED = 99 * 1024  # what a block can have on sm_86 and sm_89, the least of those from sm_80 on


def compiled(path, *arguments):
    """In a process in which kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, ROOT / "tests" / "triton_aot.py", path, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return resource_table.read(path)[1]


def spilling(rows):
    """float64, which is for gradcheck, is only held to the table."""
    return {row for row, resources in rows.items() if row[1] == "fp32" and resources.stack}


def test_recorded_kernels_neither_spill_nor_want_too_much_memory():
    _, recorded = resource_table.read(TABLE)
    assert recorded
    assert not spilling(recorded)
    assert not {row: resources.shared for row, resources in recorded.items() if resources.shared > SHARED}


def test_every_kernel_is_recorded():
    """Those that a wrapper names where it launches."""
    sources = {path.stem: path.read_text() for path in TABLE.parent.glob("*.py")}
    launched = {f"{file}.{name}" for file, text in sources.items() for name in re.findall(r"launch\(\s*(_\w+),", text)}
    assert {"contract._backward", "softmax._forward"} <= launched
    assert not launched - {row[0] for row in resource_table.read(TABLE)[1]}


@pytest.mark.thorough
@pytest.mark.skipif(library.ABSENT is not None, reason="networks need the compiled package")
def test_kernels_need_no_more_than_recorded(tmp_path):
    """Registers decide how many warps hide each other's latency; a new number is looked at, then recorded."""
    compiler, recorded = resource_table.read(TABLE)
    if compiler != version("triton"):
        pytest.skip(f"resources.txt is of triton {compiler}, here is {version('triton')}")
    found = compiled(tmp_path / "resources.txt")
    assert found.keys() == recorded.keys(), "make triton-resources"
    assert not resource_table.more_than(recorded, found)


def test_what_is_looked_for_is_found(tmp_path):
    planted = compiled(tmp_path / "planted.txt", "planted")
    assert spilling(planted) == planted.keys() and planted
    less = {row: resources._replace(registers=resources.registers - 1) for row, resources in planted.items()}
    assert len(resource_table.more_than(less, planted)) == len(planted)
    assert not resource_table.more_than(planted, planted)
