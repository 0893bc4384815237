"""What the compiled CUDA code looks like, without a GPU: nvcc builds it, the resource report and the SASS are read."""

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pagewire import emulation

sys.path.insert(0, str(emulation.CSRC))
import build_cuda  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ARCHITECTURES = ("sm_80", "sm_90a")
# bytes of shared memory of one multiprocessor, and what a block takes besides its own
SHARED = {"sm_80": 163 * 1024 + 1024, "sm_90a": 227 * 1024 + 1024}
SMALL = 99 * 1024 + 1024  # of sm_86 and sm_89, which run the code of sm_80
RESERVED = 1024
REGISTERS = 65536
# blocks a multiprocessor, as the first lines of attention_kernel.h plan: (padded width, architecture) -> blocks
PLAN = {
    (64, "sm_80"): 2, (64, "sm_90a"): 3, (128, "sm_80"): 1, (128, "sm_90a"): 2, (256, "sm_80"): 1, (256, "sm_90a"): 2,
}  # fmt: skip
IN_FLIGHT = 32 * 1024


@functools.cache
def extension() -> Path:
    import pybind11

    folder = emulation.cache_dir().parent / "nvcc"
    target = folder / "pagewire" / "_cuda.so"
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    with pytest.MonkeyPatch.context() as patch:
        # the Makefile leaves CUDA out of its own build, not out of this test
        patch.delenv("PAGEWIRE_CUDA", raising=False)
        try:
            build_cuda.find_nvcc()
        except build_cuda.CannotBuild as error:
            pytest.skip(str(error))
        build_cuda.build(folder / "objects", includes, target)
    return target


@functools.cache
def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found is None:  # Triton brings its own
        triton = pytest.importorskip("triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if not Path(found).exists():
        pytest.skip("no cuobjdump on PATH or in triton")
    return found


def dump(*arguments: str) -> str:
    tools = os.pathsep.join([os.path.dirname(cuobjdump()), os.environ["PATH"]])  # finds nvdisasm
    done = subprocess.run(
        [cuobjdump(), *arguments, str(extension())],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": tools},
    )  # fmt: skip
    return done.stdout


@functools.cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, mangled kernel) -> REG, STACK, LOCAL, SHARED..."""
    found, arch = {}, ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        if match := re.search(r"Function (\S+):", line):
            name = match[1]
        if "REG:" in line:
            found[arch, name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


@functools.cache
def sass(arch: str) -> dict[str, str]:
    """Mangled kernel -> its instructions."""
    parts = re.split(r"\n\s*Function : (\S+)", dump("--dump-sass", "-arch", arch))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def kernels(arch: str, word: str) -> dict[str, str]:
    """Those that are launched: the attention kernels for little shared memory are empty in sm_90a."""
    found = {name: code for name, code in sass(arch).items() if word in name}
    if word == "attention_kernel" and arch == "sm_90a":
        found = {name: code for name, code in found.items() if not shape_of(name)[1]}
    assert found, f"no {word} in {arch}: {list(sass(arch))[:4]}"
    return found


def shape_of(name: str) -> tuple[int, bool]:
    """(padded width, whether it is the kernel for 99 KiB of shared memory)."""
    match = re.search(r"attention_kernel.*Li(\d+)ELb([01])E", name)
    assert match is not None, name
    return int(match[1]), match[2] == "1"


def test_both_architectures_and_ptx_are_there():
    assert {arch for arch, _ in resources()} == set(ARCHITECTURES)
    assert re.search(r"\.target sm_90\b", dump("--dump-ptx"))
    attention = [name for arch, name in resources() if arch == "sm_80" and "attention" in name]
    # (fp16, bf16) x 4 cache types x 3 widths, the two larger ones twice: with three stages and with two
    assert len(attention) == 40


def test_nothing_spills():
    for (arch, name), use in resources().items():
        assert use["STACK"] == 0 and use["LOCAL"] == 0, f"{arch} {name}: {use}"
    for arch in ARCHITECTURES:
        for name, code in sass(arch).items():
            assert not re.search(r"\b(LDL|STL)\b", code), f"{arch} {name} uses local memory"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_occupancy_is_the_plan(arch):
    """Registers and shared memory of a decode block (one warp for the rows) against a multiprocessor."""
    for name in kernels(arch, "attention_kernel"):
        width, small = shape_of(name)
        threads = 64 if width == 256 else 128
        stages = 4 if width == 64 else 2 if small else 3
        stage = 32 * 1024 * width // 128 * threads // 128  # K and V of a tile
        # stages, query rows, the scan's and the scales' space (Shape in attention_kernel.h)
        used = stages * stage + 16 * width * 2
        used += 256 + threads * 16 + stages * 2 * threads * 4 + 128 + RESERVED
        registers = -(-resources()[arch, name]["REG"] // 8) * 8 * threads
        blocks = min((SMALL if small else SHARED[arch]) // used, REGISTERS // registers)
        assert blocks >= (1 if small else PLAN[width, arch]), f"{name}: {blocks} blocks"
        assert blocks * (stages - 1) * stage >= IN_FLIGHT
        most_rows = used + (threads // 32 - 1) * 16 * width * 2  # every warp has rows of its own
        assert most_rows - RESERVED <= (SMALL if small else SHARED[arch]) - RESERVED, name
    for word, planned in (("copy_kernel", 7), ("convert_kernel", 8), ("merge_kernel", 8)):
        for name in kernels(arch, word):
            registers = -(-resources()[arch, name]["REG"] // 8) * 8 * 128
            assert REGISTERS // registers >= planned, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_copies_asynchronously_and_multiplies_on_the_tensor_core(arch):
    for name, code in kernels(arch, "attention_kernel").items():
        assert "LDGSTS.E.BYPASS.128" in code or re.search(r"LDGSTS\.\S*128", code), name
        assert "HMMA.16816.F32" in code, name
        assert "LDSM.16.M88.4" in code and "LDSM.16.MT88.4" in code, name
        assert "MUFU.EX2" in code, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_merge_is_ordered_by_one_thread_between_barriers(arch):
    """Not by fences of all threads: bar.sync, one thread's atom.acq_rel.gpu, bar.sync."""
    words = r"(BAR\.SYNC|MEMBAR\.\w+\.\w+|ATOMG\S*|CCTL\.IVALL)"
    count = ["MEMBAR.ALL.GPU", "ATOMG.E.INC.STRONG.GPU", "CCTL.IVALL"]
    for name, code in kernels(arch, "attention_kernel").items():
        found = re.findall(words, code)
        assert not [word for word in found if word.startswith("MEMBAR.SC")], name
        merge = found.index(count[1])
        assert found[merge - 2 : merge + 3] == ["BAR.SYNC", *count, "BAR.SYNC"], f"{name}: {found}"
        leave = found.index(count[1], merge + 1)
        assert found[leave - 1 : leave + 2] == count, f"{name}: {found}"
        assert found.count(count[1]) == 2, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_movement_is_sixteen_bytes_wide(arch):
    for word in ("copy_kernel", "convert_kernel"):
        for name, code in kernels(arch, word).items():
            assert re.search(r"LDG\.\S*128", code) and re.search(r"STG\.\S*128", code), name
    for name, code in kernels(arch, "merge_kernel").items():
        assert re.search(r"LDG\.\S*(128|64)", code), name


def test_hopper_converts_fp8_in_hardware():
    for name, code in kernels("sm_90a", "attention_kernel").items():
        if "Float8E4M3" in name:
            assert "F2FP" in code, name


def test_extension_is_small_and_stands_alone():
    assert extension().stat().st_size < 30e6
    needed = subprocess.run(["readelf", "-d", extension()], capture_output=True, text=True).stdout
    libraries = re.findall(r"NEEDED.*\[(\S+)\]", needed)
    assert not [x for x in libraries if x.startswith(("libtorch", "libc10", "libcuda", "libcudart"))]
