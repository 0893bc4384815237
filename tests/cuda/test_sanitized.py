"""The shared cases on the CUDA kernels, emulated under AddressSanitizer and UBSan: every byte of every tensor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pagewire import emulation

ROOT = Path(__file__).parents[2]


def library(name: str) -> str:
    found = subprocess.run(
        [emulation._compiler(), f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{emulation._compiler()} has no {name}")
    return found


def sanitized(*arguments: str) -> subprocess.CompletedProcess:
    reason = emulation.unavailable()
    if reason is not None:
        pytest.skip(reason)
    emulation.build("asan")
    env = {
        **os.environ,
        "PAGEWIRE_EMULATE_CUDA": "asan",
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        # Python and torch never free everything; the kernels' faults are what counts
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "TRITON_INTERPRET": "0",
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "--no-header", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_shared_cases_under_sanitizers():
    numbers = "every_bit_pattern or extreme_integers or token_scales"  # long, and about nothing else
    done = sanitized("tests/ops", "-m", "not slow", "-k", f"cuda and not ({numbers})")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_own_cases_under_sanitizers():
    done = sanitized("tests/cuda/test_attention_cuda.py", "-m", "not slow")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


OUT_OF_BOUNDS = """
import numpy, torch, pagewire as pw
page = numpy.zeros((1, 16, 1, 64), numpy.float16)
lies = numpy.lib.stride_tricks.as_strided(page, (4, 16, 1, 64))  # four pages where there is one
q, k = torch.zeros(1, 1, 64, dtype=torch.float16), torch.from_numpy(lies)
table, lens = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
pw.decode(q, k, k, table, lens, backend="cuda")
"""


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_a_read_outside_a_tensor_is_seen(tmp_path):
    test = tmp_path / "test_outside.py"
    test.write_text("def test():\n" + "".join(f"    {line}\n" for line in OUT_OF_BOUNDS.split("\n")))
    done = sanitized(str(test), "--rootdir", str(tmp_path), "-c", str(ROOT / "pyproject.toml"))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr + done.stdout, (done.stdout + done.stderr)[-4000:]
