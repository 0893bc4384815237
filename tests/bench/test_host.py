"""The host's cost: every op, its checks, and the launches it makes over the stand-in, are measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "benches" / "host.py"


@pytest.mark.timeout(300)  # it compiles what it calls
def test_every_op_is_measured():
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PAGEWIRE_"))}
    env = kept | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(SCRIPT), "--calls", "2", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {name.split(" ")[0].rstrip(",") for name in found} == {
        "decode", "prefill", "append_kv", "merge_state", "merge_states", "pack_kv", "unpack_kv",
    }  # fmt: skip
    for name, of in found.items():
        assert min(of[what] for what in ("checks", "anew", "triton", "launches")) > 0, (name, of)
        assert of["number"] == (2 if name.startswith("prefill") else 1), (name, of)
