"""Real processes behind real HTTP: killed and stopped at states that a client sees, under four streams."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.http_server import Server, serve, wait_for
from serve.test_recovery import OPTIONS, Stream, bodies, conserved, kill, staging_arenas, wait_replaced
from serve.tiny import make_tiny_llama

NUM_STREAMS = 4
DEADLINE_S = 20  # of a request that loses a process: its timeout, a start, and its own 200 tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", eos_token_id=None))


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[Server]:
    with serve("--model", model, *OPTIONS, "--worker-timeout", "1.5") as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[tuple]:
    return [stream.outcome() for stream in [Stream(server, **body) for body in bodies()[:NUM_STREAMS]]]


def num_fds(server: Server) -> int:
    """The front's, once connections that clients have closed are closed."""
    time.sleep(0.5)
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


# events of any stream: before any token, the first token (P's), in the middle of decoding
MOMENTS = {"before": 0, "first": 1, "decoding": 30}
FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "blink": signal.SIGSTOP}
QUICK = {("before", "decode", "stop"), ("decoding", "prefill", "blink")}  # test_recovery.py has kills in `make test`
CELLS = [
    pytest.param(*cell, id="-".join(cell), marks=[pytest.mark.faults] * (cell not in QUICK))
    for cell in ((moment, role, fault) for moment in MOMENTS for role in ("prefill", "decode") for fault in FAULTS)
]


@pytest.mark.parametrize(("moment", "role", "fault"), CELLS)
def test_a_signal_at_a_moment(server: Server, undisturbed: list[tuple], moment: str, role: str, fault: str) -> None:
    """kill: SIGKILL. stop: SIGSTOP, until the front kills it. blink: SIGSTOP, and SIGCONT before that."""
    before, fds = server.pids(), num_fds(server)
    streams = [Stream(server, **body) for body in bodies()[:NUM_STREAMS]]
    wait_for(lambda: any(stream.num_events >= MOMENTS[moment] for stream in streams), 20)
    hit, start = kill(server, role, number=FAULTS[fault]), time.monotonic()
    if fault == "blink":
        time.sleep(0.5)
        kill(server, role, number=signal.SIGCONT)
    assert [stream.outcome() for stream in streams] == undisturbed
    assert time.monotonic() - start < DEADLINE_S
    if fault != "blink":
        wait_replaced(server, hit)
    server.wait_healthy()
    wait_for(lambda: conserved(server), 5)
    after = server.pids()
    assert {r for r in before if before[r] != after[r]} == ({role} if fault != "blink" else set())
    assert fault == "blink" or not Path(f"/proc/{hit[role]}").exists()
    assert staging_arenas(after.values()) <= 2 and staging_arenas([server.process.pid]) == 0  # the mapping of each side
    again = Stream(server, **bodies()[0]).outcome()
    assert again == undisturbed[0]
    assert num_fds(server) <= fds
