"""The emulation reports what a GPU would only show as corruption: one planted bug of each kind."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pagewire import emulation

SOURCES = {name: Path(__file__).with_name(f"{name}.cu") for name in ("planted", "planted_async")}
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
ASYNC_REPORTS = {
    "no_expect_tx": "reads bytes of a TMA load that is still under way",
    "wrong_parity": "overwrites what another thread may still be reading",
    "reads_without_waiting": "overwrites what another thread may still be reading",
    "one_lane_waits": "reads what a TMA load wrote without having waited for its mbarrier",
    "no_proxy_fence_after_write": "lets a TMA load overwrite what thread 0 wrote with no fence_proxy_async between",
    "no_proxy_fence_after_read": "lets a TMA load overwrite what was read with no fence_proxy_async between",
    "stage_not_waited_for": "arrives at the mbarrier at byte 16384 after all 1 that it expects",
    "arrives_before_its_warp": "overwrites what another thread may still be reading",
    "one_warp_arrives": "overwrites what another thread may still be reading",
    "reads_after_arriving": "overwrites what another thread may still be reading, no barrier between, byte 0 ",
    "reads_after_fencing": "lets a TMA load overwrite what was read with no fence_proxy_async between, byte 0 ",
    "not_initialised": "an mbarrier that was not initialised, byte 16384",
    "no_barrier_after_init": ("with no barrier since thread 0 initialised it", "an mbarrier that was not initialised"),
    "no_fence_after_init": "loads for the mbarrier at byte 16384 with no fence_mbarrier_init by thread 0 before",
    "initialised_twice": "initialises the mbarrier at byte 16392 again",
    "no_arrivals": "initialises an mbarrier with 0 arrivals",
    "too_many_arrivals": "arrives at the mbarrier at byte 16384 after all 1 that it expects",
    "phase_missed": "deadlock: thread 0 waits for the mbarrier at byte 16384, phase 2: 1 of 1 arrivals",
    "consumer_never_arrives": "deadlock: thread 0 waits for the mbarrier at byte 16384, phase 1: 1 of 1 arrivals and 0 "
    "bytes to come at planted_async.cu",
    "bytes_never_come": "deadlock: thread 0 waits for the mbarrier at byte 16384, phase 0: 0 of 1 arrivals and 8192 "
    "bytes to come at planted_async.cu",
    "bytes_nobody_waits_for": "ends while bytes are expected that never came: the mbarrier at byte 16392, phase 2: 1 "
    "of 1 arrivals and 16 bytes to come",
    "load_nobody_waits_for": "ends with 2 TMA loads under way that nobody waited for, one of planted_async.cu",
    "misaligned_box": "thread 64 misaligned access of 128 bytes",
    "misaligned_mbarrier": "thread 0 misaligned access of 8 bytes",
    "box_out_of_bounds": "touches bytes outside the block's 17408 bytes of shared memory, byte 16384",
    "box_over_box": "writes bytes into which a TMA load is under way",
    "box_over_mbarrier": "overwrites an mbarrier, byte 16384",
    "mbarrier_as_data": "overwrites an mbarrier, byte 16384",
    "map_not_encoded": "loads by a tensor map that was not encoded",
    "old_device": "executes mbarrier.try_wait on sm_80, which needs sm_90",
    "map_base": "tensor map: its base is not aligned to 16 bytes",
    "map_dimension": "tensor map: a dimension of 0, expected 1 to 2^32",
    "map_stride": "tensor map: a stride of 776 bytes, expected a multiple of 16 below 2^40",
    "map_box": "tensor map: a box of 257, expected 1 to 256",
    "map_row": "tensor map: a box with rows of 144 bytes, expected 32, 64 or 128",
    "map_old_device": "tensor map: sm_80 has no tensor memory accelerator",
}
ADDRESS_SANITIZER = {
    "shared_out_of_bounds_by_pointer": "heap-buffer-overflow",
    "global_out_of_bounds": "heap-buffer-overflow",
}


PROGRAMS = {"planted": REPORTS, "planted_async": ASYNC_REPORTS}
FINE = [
    ("planted", "ok"),
    *(
        ("planted_async", f"ok{how}")
        for how in ("", "_every_lane_arrives", "_one_lane_fences", "_one_lane_waits_for_all")
    ),
]
BUGS = [(program, bug) for program, reports in PROGRAMS.items() for bug in reports]


@functools.cache
def build(program: str, kind: str = "plain") -> Path:
    reason = emulation.unavailable()
    if reason is not None:
        pytest.skip(reason)
    folder = emulation.cache_dir() / kind
    runtime = sorted((emulation.CSRC / "emulation").glob("*.cpp"))
    objects = emulation.compile_objects([SOURCES[program], *runtime], kind, [], folder)
    target = folder / f"{program}-{hashlib.sha256(repr(objects).encode()).hexdigest()[:16]}"
    if not target.exists():
        emulation.link(objects, kind, target, shared=False)
    return target


def run(program: Path, bug: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, bug], capture_output=True, text=True, timeout=60, env={**os.environ, **env})


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(("program", "variant"), FINE)
def test_no_bug_no_report(program, variant, order):
    done = run(build(program), variant, PAGEWIRE_EMULATION_ORDER=order)
    assert (done.returncode, done.stdout) == (0, "no fault\n")


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(("program", "bug"), BUGS)
def test_bug_is_reported(program, bug, order):
    done = run(build(program), bug, PAGEWIRE_EMULATION_ORDER=order)
    assert done.returncode == 1, done.stdout
    by_whom = "pagewire: tensor map: " if "tensor map: " in PROGRAMS[program][bug] else "planted_kernel: "
    assert done.stdout.startswith(by_whom), done.stdout
    reports = PROGRAMS[program][bug]
    expected = reports if isinstance(reports, tuple) else (reports,)
    assert any(words in done.stdout for words in expected), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("program", "bug"), [*FINE, *BUGS, *(("planted", bug) for bug in ADDRESS_SANITIZER)])
def test_bug_is_reported_under_sanitizers(program, bug):
    done = run(build(program, "asan"), bug, ASAN_OPTIONS="detect_leaks=0:abort_on_error=0")
    if bug in ADDRESS_SANITIZER:
        assert done.returncode not in (0, 1, 2, 3) or "AddressSanitizer" in done.stderr
        assert ADDRESS_SANITIZER[bug] in done.stderr, done.stderr
    elif (program, bug) in FINE:
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert done.returncode == 1 and "AddressSanitizer" not in done.stderr, done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_planted_bugs_are_all_expected(program):
    names = run(build(program), "?").stdout.split()
    more = ADDRESS_SANITIZER if program == "planted" else {}
    fine = [variant for of, variant in FINE if of == program]
    assert set(names) == {*fine, *PROGRAMS[program], *more}


# what the machine code of the pipeline must have: TMA loads, waits and arrivals, swizzled ldmatrix, movmatrix
INSTRUCTIONS = ("UTMALDG.4D", "SYNCS.PHASECHK", "SYNCS.ARRIVE", "FENCE.VIEW.ASYNC", "UTMACCTL.PF", "LDSM.", "MOVM.")


@pytest.mark.slow
def test_pipeline_compiles_for_a_device(tmp_path):
    sys.path.insert(0, str(emulation.CSRC))
    build_cuda = pytest.importorskip("build_cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PAGEWIRE_CUDA", raising=False)  # the Makefile's, about its own build
        try:
            nvcc = build_cuda.find_nvcc()
        except build_cuda.CannotBuild as error:
            pytest.skip(str(error))
    object_file = tmp_path / "pipeline.o"
    code = "-gencode=arch=compute_90a,code=sm_90a"
    command = [nvcc, *build_cuda.FLAGS, f"-I{emulation.CSRC}", code, "-c", str(SOURCES["planted_async"])]
    done = subprocess.run([*command, "-o", str(object_file)], capture_output=True, text=True)
    assert done.returncode == 0 and "0 bytes spill stores" in done.stderr, done.stderr
    triton = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin"
    env = {**os.environ, "PATH": f"{os.environ['PATH']}{os.pathsep}{triton}"}
    cuobjdump = shutil.which("cuobjdump", path=env["PATH"])
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH or in triton")
    sass = subprocess.run([cuobjdump, "-sass", object_file], capture_output=True, text=True, check=True, env=env).stdout
    assert not [name for name in INSTRUCTIONS if name not in sass]
