"""The movement kernels compile to sm_80 and sm_90 without a GPU, do not spill, move aligned rows 16 bytes at a time."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from kernels import instructions  # noqa: E402

SCRIPT = pathlib.Path(__file__).with_name("compile_movement.py")
WIDE = ["ld.global.v4.b32", "st.global.v4.b32"]


def compiled(amount: str) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-W", "ignore", str(SCRIPT), amount]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict]) -> None:
    assert {row["arch"] for row in rows} == {80, 90}
    for row in rows:
        assert row["stack"] == row["local"] == 0, f"spills: {row}"
        scaled = "tensor" in row["call"] or "head" in row["call"]  # scales are copied one by one
        if row["kernel"] == "_copy_kernel" and not scaled:
            narrow = row["call"].endswith("-24-3")  # odd strides
            assert (row["words"] == WIDE) != narrow, f"not 16 bytes at a time: {row}"
        if row["kernel"] == "_convert_kernel":
            assert not row["div_full"], f"approximate division: {row}"
            # narrow accesses are the scales'; values go 16 (fp8 and int8 at least 8) bytes at a time
            assert set(WIDE[:1]) <= set(row["words"]), f"narrow loads: {row}"


@pytest.fixture(scope="module")
def quick() -> list[dict]:
    return compiled("quick")


def test_kernels_keep_their_budgets(quick: list[dict]) -> None:
    counted = {f"{row['kernel']} {row['call']}": row["instructions"] for row in quick if row["arch"] == 90}
    instructions.check(counted, instructions.budgets("whole"))


def test_quick_set(quick: list[dict]) -> None:
    rows = quick
    check(rows)
    kernels = {row["kernel"] for row in rows}
    assert kernels == {"_copy_kernel", "_convert_kernel", "_merge_two_kernel", "_merge_kernel", "_write_kernel"}
    native = {row["arch"]: row["native"] for row in rows if "float8" in row["call"]}
    assert native == {80: False, 90: True}


@pytest.mark.slow
@pytest.mark.timeout(2700)  # hundreds of compilations
def test_every_combination() -> None:
    check(compiled("full"))
