"""What the driver is told of a launch: the same by `kernels/again.py` as by Triton's own launcher, bit for bit."""

import json
import os
import pathlib
import struct
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytest.importorskip("pagewire._host")
ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = pathlib.Path(__file__).with_name("launches_over_standin.py")
PREFILL = ["_prefill_kernel", "_decode_kernel", "_combine_kernel"]
KERNELS = {
    "decode": PREFILL[1:], "prefill": PREFILL[1:], "prefill, long": PREFILL, "append_kv": ["_copy_kernel"],
    "append_kv e4m3": ["_convert_kernel"], "merge_state": ["_merge_two_kernel"], "merge_states": ["_merge_kernel"],
    "pack_kv": ["_copy_kernel"], "unpack_kv": ["_copy_kernel"], "Hopper": 2 * PREFILL[:1],
    "Hopper decode": ["_decode_kernel"],
}  # fmt: skip


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("standin")
    paths = [str(ROOT / "benches"), *(p for p in sys.path if p)]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PAGEWIRE_"))}
    env |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    made = "import pathlib, sys; from standin import driver; driver.build(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", made, str(folder)], env=env, check=True)
    env |= {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(600)  # it compiles what it calls
def test_the_driver_is_told_the_same(lines):
    calls = [line for line in lines if "name" in line]
    assert len(calls) == 18
    for call in calls:
        name, half = call["name"], len(call["told"]) // 2
        assert call["by_ours"] == [False] * half + [True] * half, name
        assert call["told"][:half] == call["told"][half:], name
        kernels = [launch["kernel"] for launch in call["told"][:half]]
        op = name.split(",")[0]
        assert kernels == (KERNELS.get(name) or KERNELS.get(op) or KERNELS[op.split(" ")[0]]), name


def test_a_cache_is_shown_to_the_tma_unit_as_a_matrix(lines):
    """64 pages of 16 tokens of 8 heads of 128, read in boxes of 16 rows and 128 bytes."""
    (call,) = (line for line in lines if line.get("name") == "Hopper, boxes")
    matrices = [x for x in call["told"][0]["values"] if len(x) == 256]
    assert len(matrices) == 2
    for matrix in matrices:
        told = struct.unpack("<9Q", bytes.fromhex(matrix)[:72])
        assert told[0] % 16 == 0 and told[2:] == (2, 1024, 1024, 2048, 64, 16, 3)  # the swizzle of 128 bytes


def test_a_cache_of_64_bytes_a_row_is_swizzled_in_these(lines):
    (call,) = (line for line in lines if line.get("name") == "Hopper decode, torch.float8_e4m3fn")
    matrices = [x for x in call["told"][0]["values"] if len(x) == 256]
    assert len(matrices) == 2
    for matrix in matrices:
        assert struct.unpack("<9Q", bytes.fromhex(matrix)[:72])[2:] == (2, 512, 1024, 512, 64, 16, 2)


def test_a_launch_that_is_refused_names_its_kernel(lines):
    (error,) = (line["refused"] for line in lines if "refused" in line)
    assert error == "pagewire: _copy_kernel could not be started: CUDA error 700: stand-in"


def test_a_thread_without_a_context_gets_one_from_triton(lines):
    assert {"launches": 1, "context": 1} in lines
