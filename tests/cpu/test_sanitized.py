"""The shared suite over the C++ backend built with AddressSanitizer and UBSan, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def gcc_file(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    path = found.stdout.strip()
    if not os.path.isabs(path):  # the bare name: not installed
        pytest.skip(f"g++ has no {name}")
    return os.path.realpath(path)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package with the sanitized extension."""
    gcc_file("libasan.so")
    base = tmp_path_factory.mktemp("sanitized")
    command = ["setup.py", "-q", "build", "--build-base", str(base), "--build-lib", f"{base}/lib"]
    env = {**os.environ, "PAGEWIRE_SANITIZE": "address,undefined"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=env, check=True, timeout=900)
    return base / "lib"


def run(package: Path, *command: str, isa: str = "") -> subprocess.CompletedProcess:
    env = {
        **os.environ,
        # libstdc++ too: the runtime must find what throws before the extension is loaded
        "LD_PRELOAD": f"{gcc_file('libasan.so')} {gcc_file('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # Python itself never frees everything
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": str(package),
        "PAGEWIRE_CPU_ISA": isa,
        "PAGEWIRE_CPU_THREADS": "2",
    }
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "scalar"])
def test_suite_is_clean(package, isa):
    usable = run(package, "-c", "from pagewire import _cpu; print(_cpu.__file__, _cpu.usable_isas())")
    assert str(package) in usable.stdout, usable.stdout + usable.stderr
    if isa not in usable.stdout:
        pytest.skip(f"no {isa} here")
    # what is forced onto other instruction sets, and what is about numbers, is not for here
    chosen = f"cpu and not (invisible and not {isa}) and not extreme_integers"
    tests = ["tests/ops", "tests/cpu", "-k", chosen, "-m", "not slow"]
    options = ["-q", "-p", "no:cacheprovider", "-o", f"pythonpath=tests {package}"]
    done = run(package, "-m", "pytest", *options, *tests, isa=isa)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout and "runtime error" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_planted_fault_is_seen(package):
    """Reading past the end of an allocation through the extension must abort the process."""
    code = (
        "import ctypes, ctypes.util; from pagewire import _cpu\n"
        "malloc = ctypes.CDLL(None).malloc; malloc.restype = ctypes.c_void_p\n"
        "data = malloc(4096)\n"
        "_cpu.read(data, 2048, _cpu.choose_kernels(''), 1)\n"
    )
    done = run(package, "-c", code)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
