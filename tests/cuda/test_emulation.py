"""The emulation reports what a GPU would only show as corruption: one planted bug of each kind."""

import os
import subprocess
from pathlib import Path

import pytest

from pagewire import emulation

PLANTED = Path(__file__).with_name("planted.cu")
# name -> words of the report, or several where it depends on the order of threads
REPORTS = {
    "shared_out_of_bounds": "thread 7 touches bytes outside the block's 1024 bytes of shared memory, byte 1024",
    "misaligned_shared": "misaligned access of 8 bytes",
    "misaligned_global": "misaligned access of 8 bytes",
    "misaligned_copy": "misaligned access of 16 bytes",
    "divergent_block": "divergent barrier: thread 0 waits in sync_block at planted.cu",
    "divergent_warp": "divergent barrier: ",
    "returns_before_barrier": "thread 3 has returned",
    "different_barriers": "divergent barrier: reaches sync_block while others wait at planted.cu",
    "copy_not_waited": "reads bytes of a cp.async that has not been waited for",
    "copy_not_committed": "reads bytes of a cp.async that has not been waited for",
    "copy_without_barrier": ("reads uninitialised shared memory", "reads what thread "),
    "overwrites_copy": "writes bytes into which a cp.async is under way",
    "uninitialised": "reads uninitialised shared memory, byte 80",
    "read_race": ("reads what thread ", "overwrites what another thread may still be reading"),
    "write_race": ("reads what thread ", "overwrites what another thread may still be reading"),
    "matrix_race": "reads what thread ",
    "shared_over_limit": "invalid argument (49168 bytes of shared memory, the kernel's limit is 49152)",
    "shared_over_device": "invalid argument (232464 bytes of shared memory, the kernel's limit is 232448)",
    "no_blocks": "invalid configuration argument (0 x 1 blocks)",
    "too_many_blocks": "invalid configuration argument (2 x 65536 blocks)",
    "too_many_threads": "invalid configuration argument (blocks of 1056 threads)",
    "too_many_parameters": "invalid argument (32765 bytes of parameters, at most 32764)",
}
ADDRESS_SANITIZER = {
    "shared_out_of_bounds_by_pointer": "heap-buffer-overflow",
    "global_out_of_bounds": "heap-buffer-overflow",
}


def build(kind: str) -> Path:
    reason = emulation.unavailable()
    if reason is not None:
        pytest.skip(reason)
    folder = emulation.cache_dir() / kind
    runtime = sorted((emulation.CSRC / "emulation").glob("*.cpp"))
    objects = emulation.compile_objects([PLANTED, *runtime], kind, [], folder)
    target = folder / f"planted-{objects[0].stem[-16:]}"
    if not target.exists():
        emulation.link(objects, kind, target, shared=False)
    return target


def run(program: Path, bug: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, bug], capture_output=True, text=True, timeout=60, env={**os.environ, **env})


@pytest.fixture(scope="module")
def planted() -> Path:
    return build("plain")


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_no_bug_no_report(planted, order):
    done = run(planted, "ok", PAGEWIRE_EMULATION_ORDER=order)
    assert (done.returncode, done.stdout) == (0, "no fault\n")


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("bug", REPORTS)
def test_bug_is_reported(planted, bug, order):
    done = run(planted, bug, PAGEWIRE_EMULATION_ORDER=order)
    assert done.returncode == 1, done.stdout
    assert done.stdout.startswith("planted_kernel: "), done.stdout
    expected = REPORTS[bug] if isinstance(REPORTS[bug], tuple) else (REPORTS[bug],)
    assert any(words in done.stdout for words in expected), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["ok", *REPORTS, *ADDRESS_SANITIZER])
def test_bug_is_reported_under_sanitizers(bug):
    done = run(build("asan"), bug, ASAN_OPTIONS="detect_leaks=0:abort_on_error=0")
    if bug in ADDRESS_SANITIZER:
        assert done.returncode not in (0, 1, 2, 3) or "AddressSanitizer" in done.stderr
        assert ADDRESS_SANITIZER[bug] in done.stderr, done.stderr
    elif bug == "ok":
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert done.returncode == 1 and "AddressSanitizer" not in done.stderr, done.stderr


def test_planted_bugs_are_all_expected(planted):
    names = run(planted, "?").stdout.split()
    assert set(names) == {"ok", *REPORTS, *ADDRESS_SANITIZER}
