"""What the compiled CUDA code looks like, without a GPU: nvcc builds it, the resource report and the SASS are read."""

import re
import subprocess

import pytest

from kernels import instructions
from machine_code import extension, report
from machine_code.extension import ARCHITECTURES, dump, resources
from machine_code.kernels import ATTENTION, REGISTERS, SHARED, SMALL, block_of, blocks_of_a_multiprocessor, kernels
from pagewire import emulation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

IN_FLIGHT = 32 * 1024


@pytest.fixture(autouse=True)
def built() -> None:
    try:
        extension.extension()
        extension.cuobjdump()
    except extension.Missing as error:
        pytest.skip(str(error))


def test_both_architectures_and_ptx_are_there():
    assert {arch for arch, _ in resources()} == set(ARCHITECTURES)
    assert re.search(r"\bsm_90\.ptx\b", dump("--list-ptx"))
    # 5 cache types x 3 widths, for few rows and for many, plain and modified
    assert len(kernels("sm_80", *ATTENTION)) == 60
    # 8 and 16 rows of 16-bit caches in 3 widths, of 8-bit caches in two but for 16 rows of the larger
    assert len(kernels("sm_90a", "decode_sm90_kernel")) == 2 * 6 + 3 * 3


def test_nothing_spills():
    for (arch, name), use in resources().items():
        assert use["STACK"] == 0 and use["LOCAL"] == 0, f"{arch} {name}: {use}"
    for arch in ARCHITECTURES:
        for name, code in extension.code(arch).items():
            assert not re.search(r"\b(LDL|STL)\b", code), f"{arch} {name} uses local memory"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_occupancy_is_the_plan(arch):
    """What the first lines of decode.h and decode_sm90.h say: blocks a multiprocessor, and bytes in flight."""
    for kernel in kernels(arch, *ATTENTION):
        of_devices = [SHARED[arch], SMALL] if arch == "sm_80" else [SHARED[arch]]
        for shared in of_devices:
            block, blocks = block_of(kernel, shared), blocks_of_a_multiprocessor(kernel, shared)
            planned = (
                1
                if shared == SMALL and kernel.width > 64
                else min(block.planned, 2)
                if shared == SMALL
                else block.planned
            )
            assert blocks >= planned, f"{kernel.case}, {shared}: {blocks} blocks"
            assert block.shared <= shared, kernel.case
            assert blocks * (block.stages - 1) * block.stage >= IN_FLIGHT, kernel.case
    for function, planned in (("copy_kernel", 8), ("convert_kernel", 7), ("merge_kernel", 8), ("merge_two_kernel", 8)):
        for kernel in kernels(arch, function):
            assert REGISTERS // (kernel.registers_taken * 128) >= planned, kernel.case


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_copies_asynchronously_and_multiplies_on_the_tensor_core(arch):
    for kernel in kernels(arch, *ATTENTION):
        name, code = kernel.case, kernel.code
        if kernel.function == "decode_sm90_kernel":
            assert "UTMALDG.4D" in code and "MOVM.16.MT88" in code and "LDGSTS" not in code, name
        else:
            assert "LDGSTS.E.BYPASS.128" in code or re.search(r"LDGSTS\.\S*128", code), name
        assert "HMMA.16816.F32" in code, name
        assert "LDSM.16.M88.4" in code and "LDSM.16.MT88.4" in code, name
        assert "MUFU.EX2" in code, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_merge_is_ordered_by_one_thread_between_barriers(arch):
    """Not by fences of all threads: bar.sync, one thread's atom.acq_rel.gpu, bar.sync."""
    # MEMBAR.ALL.CTA is of a proxy fence, which no other block sees
    words = r"(BAR\.SYNC|MEMBAR\.(?!ALL\.CTA)\w+\.\w+|ATOMG\S*|CCTL\.IVALL)"
    count = ["MEMBAR.ALL.GPU", "ATOMG.E.INC.STRONG.GPU", "CCTL.IVALL"]
    for kernel in kernels(arch, *ATTENTION):
        name, code = kernel.case, kernel.code
        found = re.findall(words, code)
        assert not [word for word in found if word.startswith("MEMBAR.SC")], name
        merge = found.index(count[1])
        assert found[merge - 2 : merge + 3] == ["BAR.SYNC", *count, "BAR.SYNC"], f"{name}: {found}"
        leave = found.index(count[1], merge + 1)
        assert found[leave - 1 : leave + 2] == count, f"{name}: {found}"
        assert found.count(count[1]) == 2, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_movement_is_sixteen_bytes_wide(arch):
    for kernel in kernels(arch, "copy_kernel", "convert_kernel", "merge_kernel", "merge_two_kernel"):
        if kernel.plain:
            assert re.search(r"LDG\.\S*128", kernel.code) and re.search(r"STG\.\S*(128|64)", kernel.code), kernel.case


def test_hopper_converts_fp8_in_hardware():
    for kernel in kernels("sm_90a", *ATTENTION):
        if "float8_e4m3fn" in kernel.types:
            assert "F2FP" in kernel.code, kernel.case


def test_the_report():
    """Shown with `pytest -s`. What a way copies is a whole tile, or it is not the plain way."""
    rows = [row for arch in ARCHITECTURES for row in report.rows(arch)]
    print("", report.table(rows), sep="\n")
    for row in rows:
        if row.kernel.function in ATTENTION and re.search(report.COPY, row.kernel.code):
            copied = sum(32 * 16 for at in row.way if re.search(report.COPY, at.text))
            assert copied == row.bytes_, row.kernel.case


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_plain_ways_keep_their_budgets(arch):
    budgets = instructions.budgets("CUDA kernel,", f"{arch}, nvcc {extension.release()}")
    counted = report.budgeted(report.rows(arch))
    assert budgets.keys() == counted.keys(), "as `PYTHONPATH=tests python -m machine_code.report --budgets` prints them"
    instructions.check(counted, budgets)


def test_kernels_keep_the_budgets_they_state():
    """`// Budget of decode_kernel: 720 instructions for 8 KiB of bfloat16, width 128, 20 a copy.`, in a source."""
    words = r"// Budget of (\w+): (\d+) instructions for 8 KiB of (\w+), width (\d+)(?:, (\d+) a copy)?\."
    sources = [path for path in (emulation.CSRC / "cuda").rglob("*") if path.suffix in (".h", ".cu")]
    stated = [found for path in sources for found in re.findall(words, path.read_text())]
    if not stated:
        pytest.skip("no kernel states a budget")
    rows = [row for arch in ARCHITECTURES for row in report.rows(arch)]
    for function, instructions_, cache, width, a_copy in stated:
        case = f"{function} {cache}-{width}"
        meant = [row for row in rows if row.kernel.case.removesuffix("-8").removesuffix("-16") == case]
        assert meant, f"{case}: no such kernel"
        for row in meant:
            name = f"{row.kernel.arch} {row.kernel.case}"
            assert len(row.way) * 8192 / row.bytes_ <= int(instructions_), name
            assert not a_copy or row.per_copy <= int(a_copy), name


def test_extension_is_small_and_stands_alone():
    assert extension.extension().stat().st_size < 30e6
    needed = subprocess.run(["readelf", "-d", extension.extension()], capture_output=True, text=True).stdout
    libraries = re.findall(r"NEEDED.*\[(\S+)\]", needed)
    assert not [x for x in libraries if x.startswith(("libtorch", "libc10", "libcuda", "libcudart"))]
