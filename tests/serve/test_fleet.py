"""Several P's and D's that run for themselves, and a front that joins every one with every other, over TCP and TLS."""

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagewire.net.channel import frame
from serve.http_server import Server, command, environment, serve, wait_for
from serve.test_recovery import OPTIONS, Stream, bodies, conserved
from serve.tiny import make_tiny_llama
from transfer.certificates import Certificates

ROLES = ("prefill", "prefill", "decode", "decode")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", eos_token_id=None))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


class Member:
    """A model process, on a port that it keeps over its lives."""

    def __init__(self, role: str, options: list[str]) -> None:
        self.role, self.options = role, options
        self.port = 0
        self.start()

    @property
    def name(self) -> str:
        return f"{self.role}@127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            command("--role", self.role, "--port", str(self.port), *self.options), env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout and self.process.stderr
        line = self.process.stdout.readline()
        found = re.fullmatch(rf"pagewire: {self.role} waits for a front on 127\.0\.0\.1:(\d+)\n", line)
        assert found, (line, self.process.stderr.read() if self.process.poll() is not None else "")
        self.port = int(found[1])
        self.stderr: list[str] = []
        self._reader = threading.Thread(target=lambda: self.stderr.extend(self.process.stderr or ()), daemon=True)
        self._reader.start()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream
            stream.close()


@contextlib.contextmanager
def fleet(model: str, certificates: Certificates | None = None) -> Iterator[tuple[Server, list[Member]]]:
    def tls(role: str) -> list[str]:
        return certificates.options(role) if certificates else []

    members = [Member(role, ["--model", model, *OPTIONS, *tls(role)]) for role in ROLES]
    try:
        peers = [argument for member in members for argument in ("--peer", member.name)]
        with serve("--role", "front", "--model", model, *peers, *tls("front")) as server:
            yield server, members
    finally:
        for member in members:
            member.end()


@pytest.fixture(scope="module")
def undisturbed(model) -> list[tuple]:
    with serve("--model", model, *OPTIONS) as server:
        return [stream.outcome() for stream in [Stream(server, **body) for body in bodies()]]


@pytest.fixture(scope="module")
def up(model, certificates) -> Iterator[tuple[Server, list[Member]]]:
    with fleet(model, certificates) as both:
        yield both


def links_used(server: Server) -> set[str]:
    """The processes that prefilled or decoded something."""
    requests = server.request("GET", "/debug/requests")[1]["requests"]
    return {event["role"] for one in requests for event in one["events"] if event["name"] in ("prefill", "decode")}


def all_joined(server: Server, members: list[Member]) -> bool:
    return len(server.pids()) == len(members) and all(
        server.metric("pagewire_pages", role=member.name, state="total") > 0 for member in members
    )


def test_two_and_two_over_tls_answer_as_one_pair_does(up, undisturbed):
    server, members = up
    wait_for(lambda: all_joined(server, members), 20)
    time.sleep(0.5)  # for the last of four links
    assert [stream.outcome() for stream in [Stream(server, **body) for body in bodies()]] == undisturbed
    wait_for(lambda: links_used(server) == {member.name for member in members}, 5)
    wait_for(lambda: conserved(server), 5)


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_kill_9_of_one_of_two_and_its_return(up, undisturbed, victim):
    server, members = up
    wait_for(lambda: all_joined(server, members), 20)
    streams = [Stream(server, **body) for body in bodies()]
    wait_for(lambda: any(stream.num_events >= 5 for stream in streams), 20)
    member = next(member for member in members if member.role == victim)
    member.process.send_signal(signal.SIGKILL)
    assert [stream.outcome() for stream in streams] == undisturbed
    assert server.request("GET", "/health")[0] == 200, "the other pair beats"
    wait_for(lambda: f"pagewire: {member.name} closed the connection; trying again" in "".join(server.stderr), 5)
    member.end()
    member.start()
    wait_for(lambda: all_joined(server, members), 20)
    assert [stream.outcome() for stream in [Stream(server, **body) for body in bodies()]] == undisturbed
    wait_for(lambda: conserved(server), 5)


def test_members_outlive_their_front(model, certificates, up):
    """The next front finds processes without requests, and the one that was interrupted is not answered twice."""
    server, members = up
    pids = server.pids()
    with server.open_stream("/v1/completions", prompt=[40, 41], max_tokens=400) as response:
        response.readline()
        os.kill(server.process.pid, signal.SIGKILL)
        peers = [argument for member in members for argument in ("--peer", member.name)]
        with serve("--role", "front", "--model", model, *peers, *certificates.options("front")) as second:
            wait_for(lambda: all_joined(second, members), 20)
            assert second.pids() == pids
            wait_for(lambda: conserved(second), 5)
            assert second.post("/v1/completions", prompt=[40, 41], max_tokens=3)[0] == 200


@pytest.mark.parametrize("presented", ["decode", "front of a stranger"])
def test_a_front_with_another_certificate_is_refused(model, certificates, presented, tmp_path):
    """Whoever sees it first says what is wrong with it; then the right front is served."""
    if presented == "decode":
        options, told = certificates.options("decode"), "expected a certificate for front.pagewire, got decode.pagewire"
    else:
        options, told = Certificates(tmp_path).options("front"), "certificate verify failed"
    member = Member("decode", ["--model", model, *OPTIONS, *certificates.options("decode")])
    try:
        with serve("--role", "front", "--model", model, "--peer", member.name, *options, healthy=False) as server:
            wait_for(lambda: told in "".join((*member.stderr, *server.stderr)), 20)
            assert server.request("GET", "/health")[0] == 503
        assert "refused 127.0.0.1: TLS" in "".join(member.stderr)
        with socket.create_connection(("127.0.0.1", member.port)) as plain:
            plain.sendall(b"\0" * 64)  # is no TLS
        with serve(
            "--role", "front", "--model", model, "--peer", member.name, *certificates.options("front"), healthy=False
        ) as server:
            wait_for(lambda: server.post("/v1/completions", prompt=[40], max_tokens=3)[0] == 200, 30)
    finally:
        member.end()


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "tls"])
def test_who_only_knocks_does_not_end_a_member(model, certificates, secured):
    """Connections that are reset before anything is said, as a port scan leaves them, and some that talk nonsense."""
    options = {role: certificates.options(role) if secured else [] for role in ("decode", "front")}
    member = Member("decode", ["--model", model, *OPTIONS, *options["decode"]])
    try:
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", member.port)) as knock:
                knock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for nonsense in (frame(b"nonsense"), b"GET / HTTP/1.1\r\n\r\n", frame(b""), b"\x01"):
            with socket.create_connection(("127.0.0.1", member.port)) as stranger:
                stranger.sendall(nonsense)
        peer = ("--peer", member.name)
        with serve("--role", "front", "--model", model, *peer, *options["front"], healthy=False) as server:
            wait_for(lambda: server.post("/v1/completions", prompt=[40], max_tokens=3)[0] == 200, 30)
        assert member.process.poll() is None
    finally:
        member.end()


def refusal(*args: str) -> str:
    result = subprocess.run(command(*args), env=environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode in (1, 2) and "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip()


def test_what_cannot_work_is_said(model, certificates, tmp_path):
    tls = certificates.options("decode")
    role = ("--role", "decode", "--model", model, "--port", "0")
    assert "expected TLS" in refusal(*role, "--host", "0.0.0.0")
    assert "expected all three or none" in refusal(*role, *tls[:4])
    assert "--peer: expected with --role front" in refusal("--role", "front", "--model", model)
    assert "--peer: expected with --role front" in refusal("--model", model, "--peer", "decode@127.0.0.1:1")
    assert "--peer: expected prefill@HOST:PORT" in refusal("--role", "front", "--model", model, "--peer", "nowhere")
    assert "expected TLS" in refusal("--role", "front", "--model", model, "--peer", "decode@192.0.2.1:9")
    missing = ("--tls-ca", str(tmp_path / "none.pem"), *tls[2:])
    assert "none.pem" in refusal(*role, *missing)
    assert "none.pem" in refusal("--role", "front", "--model", model, "--peer", "decode@127.0.0.1:9", *missing)
    assert "--tls-ca: expected with --role" in refusal("--model", model, *tls)
    assert "--kv-transport: expected shm with --role decode" in refusal(*role, "--kv-transport", "cuda-ipc")
    assert "kv_transport: expected shm for caches on cpu" in refusal(
        "--model", model, "--kv-transport", "cuda-ipc", "--device", "cpu", "--port", "0"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "in use" in refusal("--role", "decode", "--model", model, "--port", port).lower()
    assert not list(Path(tmp_path).iterdir())
