"""Every transport, by the same tests: frames and payloads in order, back pressure, and an end that both sides see."""

import contextlib
import dataclasses
import gc
import importlib.util
import os
import signal
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch
import trustme

from pagewire.net import channel as channels
from pagewire.net.channel import LENGTH, ChannelClosed, wait
from pagewire.net.tls import Tls
from pagewire.transfer.codec import ConnectionLost
from pagewire.transfer.frames import Ack, Chunk, Commit, Credit, Frame, Held, Hello, encode
from pagewire.transfer.nixl import NixlTransport, new_agent
from pagewire.transfer.transport import Listener, Transport, connect, listen
from pagewire.transfer.unix import UnixTransport
from transfer import fake_cuda

NIXL = pytest.mark.skipif(not importlib.util.find_spec("nixl"), reason="no nixl here: make test-nixl")
SLOTS, SLOT_BYTES = 3, 4 << 20
HELLO = Hello("decode", 0, 0, b"i" * 16, b"f" * 32, (Held(0, 3, 0, 2, 16, 16, "float32", "none"),))
LOST = (ChannelClosed, ConnectionLost)


class Kind(NamedTuple):
    address: str
    tls_of_p: Tls | None = None
    tls_of_d: Tls | None = None


def write_tls(folder: Path, ca: trustme.CA, *names: str) -> Tls:
    folder.mkdir()
    paths = [str(folder / name) for name in ("ca.pem", "certificate.pem", "key.pem")]
    certificate = ca.issue_cert(*names)
    ca.cert_pem.write_to_path(paths[0])
    for i, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(paths[1], append=i > 0)
    certificate.private_key_pem.write_to_path(paths[2])
    return Tls(*paths)


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> dict[str, Tls]:
    folder, ca = tmp_path_factory.mktemp("tls"), trustme.CA()
    kinds = {name: write_tls(folder / name, ca, f"{name}.pagewire") for name in ("prefill", "decode", "front")}
    kinds["nameless"] = write_tls(folder / "nameless", ca, "user@example.org")
    kinds["wild"] = write_tls(folder / "wild", ca, "*.pagewire")
    kinds["stranger"] = write_tls(folder / "stranger", trustme.CA(), "prefill.pagewire", "decode.pagewire")
    return kinds


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory) -> str:
    return fake_cuda.build(tmp_path_factory.mktemp("libcuda"))


@pytest.fixture()
def one_process(libcuda, monkeypatch):
    """CUDA IPC with a driver that allows both ends in one; it has nothing left in the end."""
    fake_cuda.install(libcuda, monkeypatch.setattr)
    monkeypatch.setenv("FAKE_CUDA_ONE_PROCESS", "1")
    yield
    assert fake_cuda.num_bytes(libcuda) == (0, 0)


ADDRESSES = {"shm": "unix:", "ipc": "cuda-ipc:", "tcp": "tcp://localhost:0", "tcp6": "tcp://[::1]:0"}


@pytest.fixture(params=[*ADDRESSES, "tls", pytest.param("nixl", marks=NIXL)])
def kind(request, tls) -> Kind:
    if request.param == "tls":
        return Kind("tcp://127.0.0.1:0", tls["prefill"], tls["decode"])
    if request.param == "nixl":
        new_agent()  # what UCX opens once and keeps
        return Kind("nixl+tcp://127.0.0.1:0", tls["prefill"], tls["decode"])
    if request.param == "ipc":
        request.getfixturevalue("one_process")
    return Kind(ADDRESSES[request.param])


class Ends(NamedTuple):
    p: Transport
    d: Transport
    listener: Listener


def turn(*transports: Transport) -> list[list[Frame]]:
    """What each polls after a wait."""
    wait(transports, 0.2)
    return [transport.poll(64) for transport in transports]


def accepted(listener: Listener, timeout_s: float = 5) -> Transport:
    deadline = time.monotonic() + timeout_s
    while (transport := listener.accept()) is None:
        assert time.monotonic() < deadline, listener.problem
        time.sleep(0.001)
    return transport


def joined(p: Transport, d: Transport) -> None:
    """P has D's HELLO and has opened its staging."""
    got: list[Frame] = []
    while not got:
        got, nothing = turn(p, d)
        assert not nothing
    (hello,) = got
    assert isinstance(hello, Hello)
    p.open_staging(hello)
    p.send(msgspec.structs.replace(HELLO, role="prefill"))
    while not (got := turn(p, d)[1]):
        pass
    assert [frame.role for frame in got] == ["prefill"]


def num_fds() -> int:
    gc.collect()  # mappings keep a descriptor until they are
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture()
def ends(kind):
    """Joined; no descriptor is left behind."""
    before = num_fds()
    listener = listen(kind.address, HELLO, (SLOTS, SLOT_BYTES), tls=kind.tls_of_d)
    p = connect(listener.address, tls=kind.tls_of_p)
    d = accepted(listener)
    joined(p, d)
    yield Ends(p, d, listener)
    for end in (p, d, listener):
        end.close()
    for transport in (p, d):
        transport.staging = None
    assert num_fds() == before


def chunk(slot: int, payload_bytes: int, number: int = 0) -> Chunk:
    return Chunk(
        "r", number, b"c" * 16, b"f" * 32, 0, 0, 1, 0, 2, 16, 16, 0, 4, "float32", "none", "crc32c", 0,
        payload_bytes, slot,
    )  # fmt: skip


def everything(receiver: Transport, sender: Transport, number: int) -> list[Frame]:
    got: list[Frame] = []
    deadline = time.monotonic() + 20
    while len(got) < number:
        assert time.monotonic() < deadline, f"{len(got)} of {number}"
        wait({receiver, sender}, 0.2)
        got += receiver.poll(64)
    return got


def end_of(*transports: Transport) -> str:
    """The reason why one of them ended, with the others alive meanwhile."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            turn(*transports)
        except LOST as lost:
            return str(lost)
    raise AssertionError("it did not end")


def raw(transport: Transport, data: bytes) -> None:
    """Onto the stream, past every check of its sender."""
    transport._queue(data)
    with contextlib.suppress(ChannelClosed):
        transport.flush()


def framed(frame: Frame, sequence: int = 1) -> bytes:
    body = encode(frame, sequence)
    return LENGTH.pack(len(body)) + body


def test_frames_both_ways_in_order(ends):
    digests = tuple(bytes([i % 251]) * 32 for i in range(4096))
    to_d = [Ack("x", i) for i in range(500)] + [Commit("r", 1, b"c" * 16, 7, b"s" * 32, digests), Ack("last", 0)]
    to_p = [Credit(i) for i in range(700)]
    for frame in to_d:
        ends.p.send(frame)
    for frame in to_p:
        ends.d.send(frame)
    assert everything(ends.d, ends.p, len(to_d)) == to_d
    assert everything(ends.p, ends.d, len(to_p)) == to_p


@pytest.mark.parametrize("payload_bytes", [1, 1000, 65_537, SLOT_BYTES])
def test_a_payload_is_there_when_its_chunk_is(ends, payload_bytes):
    """In each slot, and in none but its own; over and over, as credits come back."""
    torch.manual_seed(payload_bytes)
    ends.d.staging._bytes.zero_()
    for i in range(2 * SLOTS):
        slot = (2 * i) % SLOTS
        payload = torch.randint(0, 256, (payload_bytes,), dtype=torch.uint8)
        ends.p.staging.staging_slot(slot)[:payload_bytes] = payload
        ends.p.send(chunk(slot, payload_bytes, i))
        ends.p.send(Ack("behind it", i))
        got: list[Frame] = []
        while len(got) < 2:
            more = everything(ends.d, ends.p, 1)
            if more and not got:
                assert torch.equal(ends.d.staging.staging_slot(slot)[:payload_bytes], payload), i
            got += more
        assert got == [chunk(slot, payload_bytes, i), Ack("behind it", i)]
        assert not ends.d.staging.staging_slot(slot)[payload_bytes:].any()
        ends.d.send(Credit(slot))
        assert everything(ends.p, ends.d, 1) == [Credit(slot)]


def test_all_slots_at_once_to_a_reader_that_stops(ends):
    """P keeps its promise not to block; nothing is lost when D goes on, and no more waits than was pushed."""
    pushed = 0
    for slot in range(SLOTS):
        ends.p.staging.staging_slot(slot)[:] = slot + 1
        ends.p.send(chunk(slot, SLOT_BYTES, slot))
        pushed += SLOT_BYTES + len(framed(chunk(slot, SLOT_BYTES)))
    start = time.monotonic()
    for i in range(30_000):
        ends.p.send(Ack("more", i))
        pushed += len(framed(Ack("more", i)))
    assert time.monotonic() - start < 20
    apart = isinstance(ends.p, NixlTransport)  # the payloads are elsewhere, and the socket takes the rest
    assert ends.p.num_unsent <= pushed and (apart or ends.p.num_unsent and ends.p.wants_write)
    got = everything(ends.d, ends.p, SLOTS + 30_000)
    assert got[:SLOTS] == [chunk(slot, SLOT_BYTES, slot) for slot in range(SLOTS)]
    assert got[SLOTS:] == [Ack("more", i) for i in range(30_000)]
    assert not ends.p.num_unsent and not ends.p.wants_write
    for slot in range(SLOTS):
        assert (ends.d.staging.staging_slot(slot) == slot + 1).all()


def test_a_flood_is_taken_in_turns_and_pending_says_so(ends):
    for _ in range(200):
        ends.p.send(Ack("x", 1))
    total = 0
    while total < 200:
        if not ends.d.pending:
            wait([ends.d, ends.p], 5)
        got = len(ends.d.poll(16))
        assert got <= 16
        total += got
    assert not ends.d.pending and ends.d.poll() == []


@pytest.mark.parametrize("max_reads", [1, 3])
def test_what_was_read_and_not_yet_polled_is_not_waited_for(ends, monkeypatch, max_reads):
    """The socket says nothing of what TLS or we hold already, nor of a payload whose last byte ended a turn."""
    sent = [Commit("r", 1, b"c" * 16, 7, b"s" * 32, (b"d" * 32,) * 40), chunk(1, 2000)]
    for frame in sent:
        ends.p.send(frame)
    while ends.p.num_unsent:
        ends.p.flush()
    for name, value in dict(READ_BYTES=100, PART_BYTES=100, MAX_READS=max_reads).items():
        monkeypatch.setattr(channels, name, value)
    got: list[Frame] = []
    start = time.monotonic()
    while len(got) < len(sent):
        wait([ends.d], 5)
        got += ends.d.poll()
    assert got == sent and time.monotonic() - start < 4


@pytest.mark.parametrize("who", ["p", "d"])
def test_the_end_of_one_is_seen_by_the_other_behind_its_last_words(ends, who):
    one, other = (ends.p, ends.d) if who == "p" else (ends.d, ends.p)
    one.send(Credit(1))
    one.close()
    assert everything(other, other, 1) == [Credit(1)]
    assert "the other end closed" in end_of(other)
    with pytest.raises(ChannelClosed):
        for _ in range(100):
            other.send(Credit(2))
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\xff" * 64, "expected a frame of <="),
        (LENGTH.pack(90) + b"PWKV" + b"\xff" * 86, "cannot be read"),
        (framed(Ack("x", 1), 2), "sequence: expected 1, got 2"),
        (framed(chunk(SLOTS, 64)), f"CHUNK: slot: expected one of {SLOTS}, got {SLOTS}"),
        (
            framed(chunk(0, SLOT_BYTES + 1)),
            f"CHUNK: payload_bytes: expected at most {SLOT_BYTES}, got {SLOT_BYTES + 1}",
        ),
    ],
    ids=["garbage", "noise", "gap", "slot", "payload_bytes"],
)
def test_what_p_may_not_say_ends_the_connection(ends, data, sentence):
    raw(ends.p, data)
    assert sentence in end_of(ends.d)


def test_a_chunk_from_d_ends_the_connection(ends):
    raw(ends.d, framed(chunk(0, 64)) + bytes(64))
    assert "only P does" in end_of(ends.p)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_cut_in_the_middle_of_a_frame_or_payload_is_an_end_and_no_chunk(ends, kind, share):
    data = framed(chunk(1, 100_000)) + (bytes(100_000) if kind.address.startswith("tcp:") else b"")
    raw(ends.p, data[: max(3, int(len(data) * share))])
    got: list[Frame] = []
    for _ in range(3):
        got += turn(ends.d)[0]
    ends.p.close()
    assert "the other end closed" in end_of(ends.d) and not got


def test_a_wait_ends_when_something_comes(ends):
    threading.Timer(0.2, lambda: ends.p.send(Ack("x", 1))).start()
    start = time.monotonic()
    wait([ends.d], 30)
    assert time.monotonic() - start < 10 and everything(ends.d, ends.d, 1) == [Ack("x", 1)]


def test_what_followed_its_chunk_is_out_of_reach_of_p(ends):
    """Otherwise D verifies a copy of its own."""
    ends.p.staging.staging_slot(1)[:] = 1
    ends.p.send(chunk(1, SLOT_BYTES))
    assert everything(ends.d, ends.p, 1) == [chunk(1, SLOT_BYTES)]
    ends.p.staging.staging_slot(1)[:] = 2
    assert not ends.d.payload_follows or (ends.d.staging.staging_slot(1) == 1).all()


@pytest.mark.parametrize("kind", [Kind(ADDRESSES["tcp"])])
def test_a_wait_for_the_rest_of_a_payload_is_not_ended_by_each_byte_of_it(ends):
    """But by the last ones, by the frame behind them, and by an end."""
    data = framed(chunk(0, 1000)) + bytes(10)
    for piece, wakes in ((data, True), (bytes(100), False), (bytes(890), True), (framed(Ack("x", 1), 2), True)):
        raw(ends.p, piece)
        start, most = time.monotonic(), 20 if wakes else 0.3
        wait([ends.d], most)
        assert (time.monotonic() - start < most) == wakes, piece
        if wakes:
            ends.d.poll()
    raw(ends.p, framed(chunk(0, 1000), 3) + bytes(10))
    wait([ends.d], 5)
    assert ends.d.poll() == []
    ends.p.close()
    start = time.monotonic()
    wait([ends.d], 20)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("who", ["p", "d"])
def test_a_killed_process_is_seen(kind, who):
    """Not closed in order: kill -9, as its kernel does it."""
    if kind.address.startswith("nixl+") and who == "d":
        pytest.skip("UCX does not work on in a fork: test_nixl kills a D that was spawned")
    before = num_fds()
    listener = listen(kind.address, HELLO, (SLOTS, 1 << 16), tls=kind.tls_of_d)

    def run() -> None:
        if who == "p":
            p = connect(listener.address, tls=kind.tls_of_p)
            while True:
                turn(p)
        d = accepted(listener)
        while True:
            turn(d)

    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            run()
        os._exit(1)
    survivor = accepted(listener) if who == "p" else connect(listener.address, tls=kind.tls_of_p)
    listener.close()
    if who == "d":
        everything(survivor, survivor, 1)
    else:
        turn(survivor)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert end_of(survivor)
    survivor.close()
    del survivor
    assert num_fds() <= before + 1  # the mapping's, until it is collected


def test_many_connections_leave_nothing(kind):
    before = num_fds()
    listener = listen(kind.address, HELLO, (SLOTS, 1 << 16), tls=kind.tls_of_d)
    for i in range(10):
        p = connect(listener.address, tls=kind.tls_of_p)
        d = accepted(listener)
        if i % 2:
            joined(p, d)
        p.close()
        d.close()
        p.staging = d.staging = None
    listener.close()
    assert num_fds() == before


def test_accept_does_not_wait(kind):
    listener = listen(kind.address, HELLO, (SLOTS, 1 << 16), tls=kind.tls_of_d)
    start = time.monotonic()
    assert listener.accept() is None and time.monotonic() - start < 0.5
    listener.close()


@pytest.mark.parametrize("staging", [(0, 0), (1, 0), (1 << 16, 1 << 31), (4, 1000)])
def test_impossible_staging_is_refused_by_p(kind, staging):
    listener = listen(kind.address, HELLO, (SLOTS, 1 << 16), tls=kind.tls_of_d)
    p = connect(listener.address, tls=kind.tls_of_p)
    d = accepted(listener)
    everything(p, d, 1)
    with pytest.raises(ValueError, match=f"got {staging[0]} slots of {staging[1]} bytes|expected {staging[0]} slots"):
        p.open_staging(msgspec.structs.replace(HELLO, num_slots=staging[0], slot_bytes=staging[1]))
    for end in (p, d, listener):
        end.close()


# ---------------------------------------------------------------- TCP and TLS


class Dribble:
    """Between P and D: some bytes at a time, each way, with pauses at random."""

    def __init__(self, address: str, piece: int, pause_s: float) -> None:
        host, port = address.removeprefix("tcp://").rsplit(":", 1)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._to = host, int(port)
        self._piece, self._pause_s = piece, pause_s
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        p, _ = self._listener.accept()
        d = socket.create_connection(self._to)
        threads = [threading.Thread(target=self._carry, args=pair, daemon=True) for pair in ((p, d), (d, p))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for sock in (p, d, self._listener):
            sock.close()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            while data := source.recv(self._piece):
                target.sendall(data)
                if hash(data) % 17 == 0:
                    time.sleep(self._pause_s)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(("secured", "piece"), [(False, 1), (True, 1), (False, 1009), (True, 1009)])
def test_over_a_line_that_gives_a_byte_at_a_time(tls, secured, piece):
    of_p, of_d = (tls["prefill"], tls["decode"]) if secured else (None, None)
    listener = listen("tcp://127.0.0.1:0", HELLO, (SLOTS, 1 << 20), tls=of_d)
    line = Dribble(listener.address, piece, 0.002)
    p = connect(line.address, tls=of_p)
    d = accepted(listener)
    joined(p, d)
    num_bytes = 3000 * piece // (1 if piece == 1 else 4)
    for i in range(3):
        payload = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
        p.staging.staging_slot(i)[:num_bytes] = payload
        p.send(chunk(i, num_bytes, i))
        d.send(Credit(i))
        assert everything(d, p, 1) == [chunk(i, num_bytes, i)]
        assert torch.equal(d.staging.staging_slot(i)[:num_bytes], payload)
        assert everything(p, d, 1) == [Credit(i)]
    for end in (p, d, listener):
        end.close()


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://10.0.0.1:1", "tcp://0:0"])
def test_no_address_of_the_world_without_tls(address):
    with pytest.raises(ValueError, match="expected TLS"):
        listen(address, HELLO, (SLOTS, 64))
    if address != "tcp://0:0":
        with pytest.raises(ValueError, match="expected TLS"):
            connect(address)


def test_with_tls_every_address(tls):
    listen("tcp://0.0.0.0:0", HELLO, (SLOTS, 64), tls=tls["decode"]).close()


@pytest.mark.parametrize("address", ["tcp://", "tcp://x", "tcp://127.0.0.1", "http://127.0.0.1:1", "tcp://127.0.0.1:x",
                                     "tcp://127.0.0.1:1/x", "tcp://localhost:1", "127.0.0.1:1", ""])  # fmt: skip
def test_no_address_at_all(address):
    with pytest.raises(ValueError, match="address: expected tcp://host:port with an IP address, got "):
        connect(address)


def test_nobody_listens(tls):
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    sock.close()
    for of_p in (None, tls["prefill"]):
        with pytest.raises((OSError, ChannelClosed), match="refused|closed"):
            p = connect(f"tcp://127.0.0.1:{port}", tls=of_p)
            raise ChannelClosed(end_of(p))


@pytest.mark.parametrize(
    ("of_p", "of_d", "said_by", "sentence"),
    [
        ("front", "decode", "d", "expected a certificate for prefill.pagewire, got front.pagewire"),
        ("decode", "decode", "d", "expected a certificate for prefill.pagewire, got decode.pagewire"),
        ("nameless", "decode", "d", "expected a certificate for prefill.pagewire, got one without a DNS name"),
        ("wild", "decode", "d", "expected a certificate for prefill.pagewire, got *.pagewire"),
        ("stranger", "decode", "p", "expected a certificate for decode.pagewire"),
        ("prefill", "stranger", "p", "expected a certificate for decode.pagewire"),
        ("prefill", "prefill", "p", "expected a certificate for decode.pagewire"),
        ("prefill", "wild", "p", "expected a certificate for decode.pagewire"),
        (None, "decode", "d", "TLS: "),
        ("prefill", None, "p", "TLS: "),
    ],
    ids=str,
)
def test_another_certificate_is_refused_and_the_next_one_served(tls, of_p, of_d, said_by, sentence):
    listener = listen("tcp://127.0.0.1:0", HELLO, (SLOTS, 64), tls=tls.get(of_d))
    p = connect(listener.address, tls=tls.get(of_p))
    p.send(Credit(1))
    d = None
    reasons: dict[str, str] = {}
    got: list[Frame] = []
    deadline = time.monotonic() + 5
    while len(reasons) < 2:
        assert time.monotonic() < deadline, reasons
        d = d or listener.accept()
        if listener.problem:
            reasons["d"] = listener.problem
        for name, transport in (("p", p), ("d", d)):
            if transport and name not in reasons:
                try:
                    transport.flush()
                    got += transport.poll()
                except LOST as lost:
                    reasons[name] = str(lost)
                    transport.close()
    assert sentence in reasons[said_by] and all(reasons.values())
    assert not [frame for frame in got if isinstance(frame, Credit)], "D took a frame of one it refused"
    if of_d == "decode":
        p = connect(listener.address, tls=tls["prefill"])
        d = accepted(listener)
        joined(p, d)
        p.close()
        d.close()
    listener.close()


def test_one_without_a_certificate_is_refused(tls):
    listener = listen("tcp://127.0.0.1:0", HELLO, (SLOTS, 64), tls=tls["decode"])
    context = ssl.create_default_context(cafile=tls["decode"].ca)
    context.check_hostname = False
    sock = socket.create_connection(("127.0.0.1", int(listener.address.rsplit(":", 1)[1])))
    d = accepted(listener)
    secured = context.wrap_socket(sock, do_handshake_on_connect=False)
    secured.setblocking(False)
    deadline = time.monotonic() + 5
    reason = ""
    while not reason and time.monotonic() < deadline:
        with contextlib.suppress(ssl.SSLError, OSError):
            secured.do_handshake()
        try:
            turn(d)
        except ChannelClosed as closed:
            reason = str(closed)
    assert "did not return a certificate" in reason
    for end in (secured, d, listener):
        end.close()


def test_tls_1_2_is_refused(tls):
    assert tls["decode"].context(True).minimum_version.name == "TLSv1_3"
    context = tls["prefill"].context(False)
    context.minimum_version = context.minimum_version.__class__.TLSv1_2
    context.maximum_version = context.minimum_version
    listener = listen("tcp://127.0.0.1:0", HELLO, (SLOTS, 64), tls=tls["decode"])
    sock = socket.create_connection(("127.0.0.1", int(listener.address.rsplit(":", 1)[1])))
    d = accepted(listener)
    secured = context.wrap_socket(sock, server_hostname="decode.pagewire", do_handshake_on_connect=False)
    secured.setblocking(False)
    with contextlib.suppress(OSError):
        secured.do_handshake()
    assert "TLS: " in end_of(d) or "version" in end_of(d)
    for end in (secured, d, listener):
        end.close()


def test_half_a_handshake_costs_no_time(tls):
    """D's turn goes on beside one that says nothing, and beside one that stops in the middle."""
    listener = listen("tcp://127.0.0.1:0", HELLO, (SLOTS, 64), tls=tls["decode"])
    where = ("127.0.0.1", int(listener.address.rsplit(":", 1)[1]))
    idle = [socket.create_connection(where) for _ in range(2)]
    idle[1].send(b"\x16\x03\x01\x02\x00\x01")  # a ClientHello's first bytes
    start = time.monotonic()
    halves = [accepted(listener) for _ in idle]
    for _ in range(20):
        for d in halves:
            d.flush()
            assert d.poll() == [] and not d.wants_write and d.num_unsent
    assert time.monotonic() - start < 1
    p = connect(listener.address, tls=tls["prefill"])
    d = accepted(listener)
    joined(p, d)
    for end in (*idle, *halves, p, d, listener):
        end.close()


@pytest.mark.parametrize("broken", ["ca", "certificate", "key"])
@pytest.mark.parametrize("how", ["missing", "empty", "noise"])
def test_files_that_are_no_certificates(tls, tmp_path, broken, how):
    path = tmp_path / "file.pem"
    if how != "missing":
        path.write_text("" if how == "empty" else "-----BEGIN CERTIFICATE-----\nnoise\n-----END CERTIFICATE-----\n")
    bad = dataclasses.replace(tls["decode"], **{broken: str(path)})
    with pytest.raises(ValueError, match=f"TLS: expected a.* in .*{path}") as error:
        bad.context(True)
    assert "\n" not in str(error.value)


def test_a_key_of_another_certificate(tls):
    with pytest.raises(ValueError, match="its key"):
        dataclasses.replace(tls["decode"], key=tls["prefill"].key).context(True)


def test_the_last_words_are_waited_for(ends):
    ends.p.send(Ack("x", 1))
    for slot in range(SLOTS):
        ends.p.send(chunk(slot, SLOT_BYTES, slot))
    got: list[Frame] = []

    def read() -> None:
        while len(got) < 1 + SLOTS:
            got.extend(ends.d.poll())

    thread = threading.Thread(target=read)
    thread.start()
    assert ends.p.num_unsent or isinstance(ends.p, UnixTransport | NixlTransport)
    ends.p.drain(10)
    thread.join()
    assert not ends.p.num_unsent and len(got) == 1 + SLOTS
