"""Who does what of a batch: schedule.h by itself, over whole batches (schedule.cpp), without the emulation."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pagewire import emulation

SOURCE = Path(__file__).with_name("schedule.cpp")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"]


@pytest.fixture(scope="module")
def schedule() -> Path:
    compiler = os.environ.get("CXX", "g++")
    if not emulation.CSRC.is_dir():
        pytest.skip(f"needs the sources: {emulation.CSRC} does not exist")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a C++ compiler: {compiler!r} is not on PATH (set CXX)")
    headers = [emulation.CSRC / "cuda" / "attention" / "schedule.h", *(emulation.CSRC / "pagewire").glob("*.h")]
    command = [compiler, *FLAGS, f"-I{emulation.CSRC}", str(SOURCE)]
    digest = hashlib.sha256(" ".join(command).encode())
    for file in sorted([SOURCE, *headers]):
        digest.update(file.read_bytes())
    target = emulation.cache_dir() / f"schedule-{digest.hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.replace(target)
    return target


@pytest.mark.parametrize("seed", [1, 2])
def test_whole_batches(schedule, seed):
    done = subprocess.run([schedule, str(seed), "20000"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith(" batches hold\n"), done.stdout + done.stderr
