"""The attention kernels compile to sm_80 and sm_90 without a GPU: no register spills that
count, shared memory within the limit, as many programs resident as the launcher counts on, K and V copied
asynchronously, 16 bytes at a time.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")
from kernels import instructions  # noqa: E402

SCRIPT = pathlib.Path(__file__).with_name("compile_attention.py")
# of asynchronous copies on sm_90; Triton 3.6 drops them
KEEPS_HINTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
# of the instructions of a tile loop. 128 rows of 256 dims: 1.9 times as fast as 64 rows that do not spill (H200,
# benches/results/h200-2026-11-26)
SPILLS = {"sm_90-prefill-bfloat16-bfloat16-D256": 0.12, "sm_90-prefill-float16-float16-D256": 0.12}
# 64 rows with every modifier and scales per token, whose lift takes registers: nothing is said of its speed
SPILLS["sm_90-decode-bfloat16-float8_e4m3fn-D128-M64-P16-modified"] = 0.07
SHARED_OF_A_PROGRAM = {80: 99 << 10, 90: 227 << 10}  # the rows for 80 also serve 8.6, 8.9 and 12.x
SHARED_OF_A_PROCESSOR = {80: 164 << 10, 90: 228 << 10}  # of which each program costs 1 KiB more


def compiled(amount: str, num_shards: int = 2) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-W", "ignore", str(SCRIPT), amount]
    shards = [
        subprocess.Popen(
            [*command, str(i), str(num_shards)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(num_shards)
    ]
    rows = []
    for shard in shards:
        out, err = shard.communicate()
        assert shard.returncode == 0, err[-4000:]
        rows += [json.loads(line) for line in out.splitlines()]
    return rows


def check(rows: list[dict]) -> None:
    assert {row["arch"] for row in rows} == {80, 90}
    for row in rows:
        # what is computed again for values that are not finite is not hot
        limit = next((v for k, v in SPILLS.items() if k in row["case"]), 0.02)
        assert row["spills"] <= limit, f"spills in a tile loop: {row}"
        # ptxas says C7515, and the kernel takes a fifth longer: each product waits for the one before it
        assert not row["serialised"], f"wgmma runs one by one: {row}"
        assert row["shared"] <= SHARED_OF_A_PROGRAM[row["arch"]], f"shared memory: {row}"
        if row["kernel"] == "_decode_kernel":
            threads = 32 * row["num_warps"]
            registers = -(-row["reg"] // 8) * 8 * threads
            resident = min((1 << 16) // registers, SHARED_OF_A_PROCESSOR[row["arch"]] // (row["shared"] + 1024))
            assert resident >= row["programs_per_processor"], f"its grid does not fit at once: {row}"


@pytest.fixture(scope="module")
def representative() -> list[dict]:
    return compiled("quick")


def test_representative_set(representative: list[dict]) -> None:
    rows = representative
    check(rows)
    for row in rows:
        if row["kernel"] != "_combine_kernel" and "float32" not in row["case"]:
            assert 16 in row["copies"], f"K and V are not copied asynchronously, 16 bytes at a time: {row}"
        if row["kernel"] == "_prefill_kernel":
            assert row["wgmma"] == (row["arch"] == 90), row
        if row["kernel"] == "_prefill_kernel" or "D256-M64" in row["case"]:
            assert row["evict_first"] == 0, f"K and V are read again: {row}"
        elif row["kernel"] == "_decode_kernel" and row["arch"] == 90 and KEEPS_HINTS:
            assert row["evict_first"] > 0, row


def test_the_merge_waits_for_what_it_reads(representative: list[dict]) -> None:
    """Where a row of the table says so, it is launched while the decode kernel runs: only on sm_90, and it reads and
    writes nothing before."""
    for row in representative:
        asked = row["arch"] == 90 and row["case"].endswith("dependent")
        grid = [word for word in row["order"] if word.startswith("griddep")]
        if row["kernel"] == "_combine_kernel":
            assert row["dependent"] == asked and "st.global" in row["order"], row["case"]
            assert grid == ["griddepcontrol.wait"] * row["dependent"], row["case"]
            assert row["order"][: len(grid)] == grid, row["case"]
        else:
            assert not row["dependent"], row["case"]
            assert grid == ["griddepcontrol.launch_dependents"] * asked, row["case"]


def test_hot_loops_keep_their_budgets(representative: list[dict]) -> None:
    counted = {row["case"]: row["loop"] for row in representative if row["kernel"] != "_combine_kernel"}
    instructions.check(counted, instructions.budgets("kernel,"))


def test_no_compilation_for_another_batch_or_length() -> None:
    """Also: no tile depends on them. A plain decode, and a prefill with modifiers whose short requests decode."""
    (counts,) = compiled("shapes", 1)
    assert counts == {"_decode_kernel": 2, "_combine_kernel": 2, "_prefill_kernel": 1}


@pytest.mark.slow
@pytest.mark.timeout(2700)  # hundreds of compilations
def test_every_tuning_row() -> None:
    check(compiled("full"))
