"""benches/transfer.py: two processes move a small prompt both ways, and the table's lines are sane."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRANSPORTS = ("shm", "tcp", "tls")
SCRIPT = Path(__file__).parents[2] / "benches" / "transfer.py"


@pytest.mark.timeout(120)
def test_every_prompt_has_its_line() -> None:
    command = [sys.executable, str(SCRIPT), "--layers", "2", "--heads", "1", "--head-dim", "8", "--dtype", "bfloat16",
               "--page-size", "4", "--prompts", "3,600", "--rounds", "2"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=100)
    geometry, *tables = done.stdout.splitlines()
    assert geometry == "2 layers, 1 heads of 8, bfloat16, pages of 4"
    assert len(tables) == 4 * len(TRANSPORTS)
    for transport, (staging, head, *lines) in zip(TRANSPORTS, (tables[:4], tables[4:8], tables[8:]), strict=True):
        # both layers of a whole forward
        assert staging.startswith(f"{transport}: ") and staging.endswith("slots of 32768 bytes, 2 rounds")
        assert head.split() == "tokens chunks MB ms ours ms raw % of raw".split()
        rows = [[float(word) for word in line.split()] for line in lines]
        assert [row[:3] for row in rows] == [[3, 1, 0.0], [600, 2, 0.04]]
        assert all(min(ours, raw, percent) > 0 for *_, ours, raw, percent in rows)
