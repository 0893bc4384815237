"""Prefill's Hopper kernel compiles for sm_90 without a GPU, and its machine code has what the source says: the order of
products, waits and softmax, no spills in a loop over tiles, boxes of the TMA unit, registers by role, one swizzle.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from kernels import instructions  # noqa: E402

SCRIPT = pathlib.Path(__file__).with_name("compile_prefill.py")
QUICK = (
    "D64-P16-bfloat16",
    "D128-P16-bfloat16",
    "D256-P16-bfloat16",
    "D128-P1-bfloat16",
    "D128-P16-bfloat16-float8_e4m3fn",
)
SHARED_OF_A_PROGRAM = 227 << 10
REGISTERS = {"boxes": {"240", "24"}, "rows": {"224", "56"}, "bytes": {"216", "72"}}  # of a consumer, of the producer
ORDER = ["product", "wait(1)", "exp2", "wait(0)"]


def compiled(*words: str) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PAGEWIRE_HOPPER": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict]) -> None:
    for row in rows:
        _, page, *words = row["case"].split("-")
        by = (
            "bytes"
            if words[-1] in ("float8_e4m3fn", "float8_e5m2", "int8")
            else "rows"
            if page in ("P1", "P3")
            else "boxes"
        )
        assert row["shared"] <= SHARED_OF_A_PROGRAM, row
        loops = sorted(row["loops"], key=lambda loop: loop["length"])
        assert len(loops) == (6 if "modified" in words else 4), row  # of both consumers: whole tiles, masked ones
        assert all(loop["order"] == ORDER for loop in loops), row
        for loop in loops[:2]:  # whole tiles; 256 dims with every modifier, or with fewer registers, spill some
            some = "modified" in words or (by == "bytes" and "D256" in row["case"])
            assert loop["spills"] <= 0.02 * loop["length"] * some, row
        for loop in loops[2:]:  # one or two of a row tile
            assert loop["spills"] <= 0.05 * loop["length"], row
        assert REGISTERS[by] <= set(row["registers"]), row
        assert [bool(row[what]) for what in ("boxes", "rows")] == [by == "boxes", by == "rows"], row
        assert row["fences"] > 0 and row["swizzles"] == ["128"], row


@pytest.fixture(scope="module")
def quick() -> list[dict]:
    return compiled(*QUICK)


@pytest.mark.timeout(600)
def test_representative_set(quick):
    assert len(quick) == len(QUICK)
    check(quick)
    shapes = {row["case"].split("-")[0]: row["shapes"] for row in quick}
    assert shapes == {
        "D64": ["m64n128k16", "m64n64k16"], "D128": ["m64n128k16"], "D256": ["m64n256k16", "m64n64k16"],
    }  # fmt: skip


def test_hot_loops_keep_their_budgets(quick):
    """Of the tiles that every row sees whole."""
    counted = {row["case"]: max(sorted(loop["length"] for loop in row["loops"])[:2]) for row in quick}
    instructions.check(counted, instructions.budgets("Hopper prefill,"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_case():
    check(compiled())
