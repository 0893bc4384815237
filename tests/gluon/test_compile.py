"""The Hopper kernels compile for sm_90 without a GPU, and their machine code has what the source says: the order of
products, waits and softmax, no spills in a loop over tiles, boxes of the TMA unit, registers by role, the swizzles.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from kernels import instructions  # noqa: E402

HERE = pathlib.Path(__file__).parent
QUICK_PREFILL = (
    "D64-P16-bfloat16",
    "D128-P16-bfloat16",
    "D256-P16-bfloat16",
    "D128-P1-bfloat16",
    "D128-P16-bfloat16-float8_e4m3fn",
    "D192-P16-bfloat16",
    "D128-P16-bfloat16-turns",
    "D128-P16-bfloat16-float8_e4m3fn-token",
    "D128-P16-bfloat16-parts",
)
QUICK_DECODE = (
    "D64-P16-G4-bfloat16",
    "D128-P16-G4-bfloat16",
    "D256-P16-G4-bfloat16",
    "D128-P16-G16-bfloat16",
    "D128-P16-G4-bfloat16-float8_e4m3fn",
    "D128-P16-G4-bfloat16-int8",
    "D128-P16-G4-bfloat16-int8-token",
)
SHARED_OF_A_PROGRAM = 227 << 10
SHARED_OF_A_PROCESSOR = 228 << 10
RESERVED = 1 << 10  # of it, for each program
REGISTERS = {"boxes": {"240", "24"}, "rows": {"224", "56"}, "bytes": {"216", "72"}}  # of a consumer, of the producer
ORDER = ["product", "wait(1)", "exp2", "wait(0)"]
ONE_BY_ONE = ["product", "wait(0)", "exp2", "product", "wait(0)"]  # decode's


def compiled(script: str, *words: str) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PAGEWIRE_HOPPER": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / script), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


BYTES = {"float8_e4m3fn", "float8_e5m2", "int8"}


def check_shared_memory(row: dict) -> None:
    """Copies put boxes where products look for them, swizzled as these read; parts are written before they count."""
    for copy in row["copies"]:
        assert copy["told"] == copy["laid"] and tuple(copy["told"][2]) in map(tuple, row["swizzles"]), row["case"]
        assert copy["row"] % 8 == 0 and copy["column"] == 0, row["case"]  # whole atoms of the swizzle
    rows = {(copy["told"][0], copy["of_rows"]) for copy in row["copies"]}
    for box, tile in rows:
        at = {copy["row"] for copy in row["copies"] if (copy["told"][0], copy["of_rows"]) == (box, tile)}
        assert at == set(range(0, tile, box)), row["case"]
    assert row["operands"] == [[128, 16]], row["case"]
    assert all(before.endswith("sync") and after.endswith("sync") for before, after in row["atomics"]), row["case"]


def check_prefill(rows: list[dict]) -> None:
    for row in rows:
        width, page, *words = row["case"].split("-")
        by = "bytes" if BYTES & set(words) else "rows" if page in ("P1", "P3") else "boxes"
        assert row["shared"] <= SHARED_OF_A_PROGRAM, row
        loops = sorted(row["loops"], key=lambda loop: loop["length"])
        assert len(loops) == (6 if "modified" in words else 4), row  # of both consumers: whole tiles, masked ones
        assert all(loop["order"] == ORDER for loop in loops), row
        # whole tiles; 256 dims with every modifier, or with fewer registers, spill some, and pages of 8 rows 6 of 505
        for loop in loops[:2]:
            some = "modified" in words or (by == "bytes" and width == "D256") or page == "P8"
            assert loop["spills"] <= 0.02 * loop["length"] * some, row
        for loop in loops[2:]:  # one or two of a row tile
            assert loop["spills"] <= 0.05 * loop["length"], row
        assert REGISTERS[by] <= set(row["registers"]), row
        assert [bool(row[what]) for what in ("boxes", "rows")] == [by == "boxes", by == "rows"], row
        assert row["fences"] > 0 and row["swizzles"] == [[128, 16]], row
        assert len(row["atomics"]) == 2 * ("parts" in words), row  # of each consumer
        check_shared_memory(row)


def check_decode(rows: list[dict]) -> None:
    for row in rows:
        width, _, group, *words = row["case"].split("-")
        head_dim, rows_of_product = int(width[1:]), max(8, int(group[1:]))
        of_bytes = bool(BYTES & set(words))
        assert row["shared"] <= SHARED_OF_A_PROGRAM, row
        assert row["programs"] * (row["shared"] + RESERVED) <= SHARED_OF_A_PROCESSOR, row
        assert row["programs"] * row["threads"] * row["maxnreg"] <= 1 << 16, row
        assert row["order"] == ONE_BY_ONE and row["spills"] <= max(1, 0.002 * row["length"]), row
        # K: D / 16 steps of 64 keys; V: D / 64 blocks of 16 keys
        assert row["products"] == row["keys"] * head_dim // 512 and row["shapes"] == [f"m64n{rows_of_product}k16"], row
        if of_bytes:  # once from shared memory, as wide as a thread's bytes lie side by side, and never back
            run = head_dim // 32
            values = row["keys"] * head_dim // 128 // run
            assert (
                row["loads"]["128"] >= row["keys"] * head_dim // 128 // 16 and row["loads"][str(8 * run)] >= values
            ), row
            assert row["stores"] <= max(4, rows_of_product // 4) + 4 * ("token" in words), row
        assert (
            {"56" if "token" in words else "24"} < set(row["registers"]) and row["boxes"] > 0 and row["fences"] > 0
        ), row
        stored = [min(128, head_dim), 8] if of_bytes else [128, 16]
        assert row["swizzles"] == sorted([stored, *([[128, 16]] if of_bytes else [])]), row
        handed = " ".join(row["handed"])  # P, from the softmax to the second product
        assert "store fence barrier product" in handed, row
        assert len(row["atomics"]) == 1 and row["copies"], row
        check_shared_memory(row)


@pytest.fixture(scope="module")
def prefills() -> list[dict]:
    return compiled("compile_prefill.py", *QUICK_PREFILL)


@pytest.fixture(scope="module")
def decodes() -> list[dict]:
    return compiled("compile_decode.py", *QUICK_DECODE)


@pytest.mark.timeout(600)
def test_representative_prefills(prefills):
    assert len(prefills) == len(QUICK_PREFILL)
    check_prefill(prefills)
    shapes = {row["case"].split("-")[0]: row["shapes"] for row in prefills if "token" not in row["case"]}
    assert shapes == {
        "D64": ["m64n128k16", "m64n64k16"], "D128": ["m64n128k16"], "D192": ["m64n128k16"],
        "D256": ["m64n256k16", "m64n64k16"],
    }  # fmt: skip


@pytest.mark.timeout(600)
def test_representative_decodes(decodes):
    assert len(decodes) == len(QUICK_DECODE)
    check_decode(decodes)


def test_hot_loops_keep_their_budgets(prefills, decodes):
    """Of the tiles that every row sees whole."""
    counted = {row["case"]: max(sorted(loop["length"] for loop in row["loops"])[:2]) for row in prefills}
    instructions.check(counted, instructions.budgets("Hopper prefill,"))
    instructions.check({row["case"]: row["length"] for row in decodes}, instructions.budgets("Hopper decode,"))


def test_no_compilation_for_another_batch_or_length():
    (decodes,), (prefills,) = (compiled(f"compile_{op}.py", "shapes") for op in ("decode", "prefill"))
    assert (decodes["compilations"], prefills["compilations"]) == (1, 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_prefill():
    check_prefill(compiled("compile_prefill.py"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_decode():
    check_decode(compiled("compile_decode.py"))
