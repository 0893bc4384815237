"""A test that loses the CUDA context fails, and only that one: whole pytest runs with a stand-in for the device."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

_CONFTEST = """
import sys
import pytest
sys.path.insert(0, {tests!r})
from cuda_fault import CudaFault

lost = []

def synchronise():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def pytest_configure(config):
    config.pluginmanager.register(CudaFault(config, synchronise))

@pytest.fixture
def fault():
    return lambda: lost.append(True)

@pytest.fixture(autouse=True)
def as_in_the_library():
    yield
    synchronise()

@pytest.fixture(scope="session", autouse=True)
def server(tmp_path_factory):
    yield
    with open({stopped!r}, "a") as file:
        file.write("stopped ")
"""

_FILE = """
import pytest

@pytest.mark.parametrize("n", range(4))
def test_before(n):
    pass

def test_faults(fault):
    fault()
    assert 0, "the text of this test"

@pytest.mark.parametrize("n", range(4))
def test_after(n):
    pass

def test_merely_fails():
    assert 0, "nothing to do with the device"
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    where = tmp_path / "t"
    where.mkdir()
    text = _CONFTEST.format(tests=str(TESTS), stopped=str(tmp_path / "stopped"))
    (where / "conftest.py").write_text(text)
    return where


def _pytest(folder: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *arguments, str(folder)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=folder)
    return done.returncode, done.stdout + done.stderr


def _outcomes(printed: str, outcome: str) -> list[str]:
    return sorted(re.findall(rf"^{outcome} \S*?(\w+\.py::\S+)", printed, re.MULTILINE))


@pytest.mark.parametrize("dist", ["loadfile", "load"])
def test_another_worker_runs_the_rest(folder, dist):
    pytest.importorskip("xdist")
    files = ("test_a.py", "test_b.py", "test_c.py")
    for name in files:
        (folder / name).write_text(_FILE)
    status, printed = _pytest(folder, "-n", "2", "--dist", dist)
    assert status == 1, printed
    names = [f"{f}::{t}" for f in files for t in ("test_faults", "test_merely_fails")]
    assert _outcomes(printed, "FAILED") == sorted(names), printed
    assert not _outcomes(printed, "ERROR"), printed
    rest = [f"{f}::test_{w}[{n}]" for f in files for w in ("before", "after") for n in range(4)]
    assert _outcomes(printed, "PASSED") == sorted(rest), printed
    assert "6 failed, 24 passed" in printed
    assert printed.count("E       AssertionError: the text of this test") == len(files)
    assert printed.count("the worker ended: its CUDA context is lost") == len(files)
    assert "maximum crashed workers" not in printed


def test_more_workers_may_end_than_xdist_allows_by_itself(folder):
    pytest.importorskip("xdist")
    (folder / "test_many.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(6))\n"
        "def test_faults(n, fault):\n    fault()\n    assert 0\n"
    )
    status, printed = _pytest(folder, "-n", "1", "--dist", "loadfile")
    assert status == 1 and "6 failed in" in printed, printed


def test_without_workers_the_session_stops(folder, tmp_path):
    (folder / "test_a.py").write_text(_FILE)
    status, printed = _pytest(folder, "-p", "no:xdist")
    assert status == 2, printed
    assert _outcomes(printed, "FAILED") == ["test_a.py::test_faults"]
    assert not _outcomes(printed, "ERROR")
    assert "1 failed, 4 passed" in printed and "the text of this test" in printed
    assert printed.count("the session ended: its CUDA context is lost") >= 2  # in the report, and at the end
    assert (tmp_path / "stopped").read_text() == "stopped "


def test_a_context_lost_in_a_teardown_is_that_tests_fault(folder):
    (folder / "test_a.py").write_text("def test_faults(fault):\n    fault()\ndef test_after(): pass\n")
    status, printed = _pytest(folder, "-p", "no:xdist")
    assert status == 2 and _outcomes(printed, "ERROR") == ["test_a.py::test_faults"], printed
    assert "test_after" not in printed


def test_failures_that_leave_the_device_alone_change_nothing(folder):
    (folder / "test_a.py").write_text(_FILE.replace("    fault()\n", ""))
    status, printed = _pytest(folder, "-p", "no:xdist")
    assert status == 1 and "2 failed, 8 passed" in printed, printed
    assert "CUDA" not in printed
