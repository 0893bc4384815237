"""A worker's end of the link: whom it joins, what it refuses and why, and that nothing of a lost one is kept."""

import gc
import os
import socket
import time
from types import SimpleNamespace

import msgspec
import pytest
import torch

import pagewire as pw
from pagewire.net.channel import Channel, Codec
from pagewire.serve.config import WorkerConfig
from pagewire.serve.messages import Pair
from pagewire.serve.worker import peers
from pagewire.serve.worker.peers import MAX_FRAMES, MAX_PENDING, Peers
from pagewire.transfer import shm
from pagewire.transfer.codec import FrameCodec
from pagewire.transfer.frames import Ack, Chunk, Credit, Held
from pagewire.transfer.packing import new_hello
from pagewire.transfer.shm import Arena
from pagewire.transfer.transport import connect as connect_to

CONFIG = WorkerConfig(model="none", page_size=4, prefill_chunk=16, staging_bytes=1 << 16, handoff_timeout_ms=60_000)


@pytest.fixture(scope="module")
def cache() -> pw.PagedKVCache:
    return pw.PagedKVCache.allocate(
        num_layers=3, num_pages=2, page_size=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu"
    )


def peers_of(role: str, cache: pw.PagedKVCache, config: WorkerConfig = CONFIG, address: str = "unix:") -> Peers:
    return Peers(new_hello(role, cache, b"f" * 32), cache, config, address)


@pytest.fixture()
def ends(cache):
    """D's and P's; no descriptor is left once they are gone."""
    gc.collect()  # mappings keep a descriptor until they are
    num_fds = len(os.listdir("/proc/self/fd"))
    both = peers_of("decode", cache), peers_of("prefill", cache)
    yield both
    for end in both:
        end.close()
    assert len(os.listdir("/proc/self/fd")) == num_fds


@pytest.fixture()
def d(ends) -> Peers:
    return ends[0]


@pytest.fixture()
def p(ends) -> Peers:
    return ends[1]


def pair(d: Peers, p: Peers, link: int) -> None:
    d.pair(Pair(link, p.incarnation, ""))
    p.pair(Pair(link, d.incarnation, d.address))


def turns(*ends: Peers) -> list[list[int]]:
    """The links that stand at each since some turns."""
    joined: list[list[int]] = [[] for _ in ends]
    for _ in range(4):
        for end, links in zip(ends, joined, strict=True):
            links += [link.number for link in end.join()]
    return joined


def link_of(end: Peers) -> peers.Link:
    (link,) = end.links.values()
    return link


def frames(end: Peers) -> list:
    return [frame for _, frame in end.poll()]


def connect(d: Peers, name: str = "D", accept_fds: bool = True) -> Channel:
    """A raw one, as anybody's."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(f"\0pagewire-{d.address.removeprefix('unix:')}")
    codec = FrameCodec()
    return Channel(sock, Codec(codec.encode, codec.decode), name=name, accept_fds=accept_fds)


def test_p_and_d_are_joined_and_share_the_arena(d, p):
    pair(d, p, 7)
    assert turns(d, p) == [[7], [7]] and list(d.links) == list(p.links) == [7]
    assert not link_of(p).transport.fds, "the mapping needs none"
    link_of(d).staging.staging_slot(3)[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert link_of(p).staging.staging_slot(3)[:4].tolist() == [1, 2, 3, 4]
    d.send(7, Credit(1))
    p.send(7, Ack("r", 1))
    d.send(8, Credit(2))  # into nothing
    assert p.poll() == [(7, Credit(1))] and d.poll() == [(7, Ack("r", 1))]
    assert d.losses() == p.losses() == []


def test_a_lost_link_is_told_once_and_a_new_one_stands_beside_nothing_of_it(d, p):
    held = len(os.listdir("/proc/self/fd"))
    for link in range(1, 30):
        pair(d, p, link)
        assert turns(d, p) == [[link], [link]]
        (d if link % 2 else p).drop(link, "planted")
        assert d.poll() == p.poll() == []
        d.send(link, Credit(1))
        p.send(link, Credit(1))
        told = [(loss.link, loss.reason) for peer in (d, p) for loss in peer.losses()]
        other = "P: the other end closed" if link % 2 == 0 else "D: the other end closed"
        assert sorted(told) == sorted([(link, "planted"), (link, other)])
        assert not d.links and not p.links
    assert len(os.listdir("/proc/self/fd")) <= held + 2


def test_a_second_pairing_ends_the_first(d, p):
    pair(d, p, 1)
    turns(d, p)
    pair(d, p, 2)
    assert [loss.link for loss in (*d.losses(), *p.losses())] == [1, 1]
    assert turns(d, p) == [[2], [2]] and list(d.links) == list(p.links) == [2] and not d.losses()


def test_p_before_its_pairing_and_the_pairing_before_p(d, p):
    p.pair(Pair(1, d.incarnation, d.address))
    assert turns(d, p) == [[], [1]]
    d.pair(Pair(1, p.incarnation, ""))
    assert turns(d) == [[1]]


def test_d_does_not_join_another_incarnation(d, p, cache, monkeypatch):
    stranger = peers_of("prefill", cache)
    stranger.pair(Pair(1, d.incarnation, d.address))
    d.pair(Pair(1, p.incarnation, ""))
    assert turns(d, stranger) == [[], [1]] and not d.links
    p.pair(Pair(1, d.incarnation, d.address))
    assert turns(d, p) == [[1], [1]]
    later = time.monotonic() + 61
    monkeypatch.setattr(peers, "time", SimpleNamespace(monotonic=lambda: later))
    d.join()
    assert list(d.links) == [1] and stranger.poll() == [] and stranger.losses()[0].reason == "D: the other end closed"


def test_p_does_not_join_another_incarnation(d, p):
    p.pair(Pair(1, "00" * 16, d.address))
    turns(d, p)
    (loss,) = p.losses()
    assert loss.reason == f"HELLO: incarnation: expected {'00' * 16}, got {d.incarnation}"


@pytest.mark.parametrize("of", ["d", "p"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fingerprint": b"g" * 32}, "fingerprint: expected 6666666666666666, got 6767676767676767"),
        ({"tenant": "b"}, "tenant: expected , got b"),
        ({"groups": (Held(0, 3, 0, 2, 32, 32, "float32", "none"),)}, "head_dim: expected 16, got 32"),
        ({"groups": (Held(3, 6, 0, 2, 16, 16, "float32", "none"),)}, "nothing is held by both: layers (0, 3) x "),
        ({"wire_dtypes": ("bfloat16",)}, "wire dtype: D takes "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_peer_of_another_model_is_refused(d, p, of, change, sentence, monkeypatch):
    """By the field in which they differ."""
    liar, honest = (p, d) if of == "d" else (d, p)
    if "wire_dtypes" in change:
        honest._ours = msgspec.structs.replace(honest._ours, wire_dtypes=("int8",))
    if liar is d:
        d._listener.hello = msgspec.structs.replace(d._listener.hello, **change)

    def lying(address, **options):
        transport = connect_to(address, **options)

        def send(frame):
            del transport.send
            transport.send(msgspec.structs.replace(frame, **change))

        transport.send = send
        return transport

    if liar is p:
        monkeypatch.setattr(peers, "connect", lying)
    pair(d, p, 1)
    turns(d, p)
    (loss,) = honest.losses()
    assert sentence in loss.reason and loss.link == 1 and not honest.links


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(fds=0), "HELLO: expected the staging arena's descriptor, got 0"),
        (dict(num_slots=0), "staging arena: expected 0 slots"),
        (dict(num_slots=1 << 16), "staging arena: expected 65536 slots"),
        (dict(file="/"), "staging arena"),
        (dict(role="prefill"), "HELLO: expected one from decode, got one from prefill"),
        (dict(silent=True), "D: no HELLO that was asked for within 0.05 s"),
        (dict(frame=Credit(1)), "HELLO: expected one from decode, got Credit"),
        (dict(raw=b"GET / HTTP/1.1\r\n\r\n"), "expected a frame of <="),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_p_against_a_d_that_lies(cache, change, sentence):
    num_fds = len(os.listdir("/proc/self/fd"))
    p = peers_of("prefill", cache, msgspec.structs.replace(CONFIG, handoff_timeout_ms=50))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0pagewire-test-liar-{os.getpid()}")
    listener.listen()
    p.pair(Pair(1, (b"i" * 16).hex(), f"unix:test-liar-{os.getpid()}"))
    sock, _ = listener.accept()
    codec = FrameCodec()
    channel = Channel(sock, Codec(codec.encode, codec.decode), name="P")
    arena = Arena.create(4, 4096)
    hello = msgspec.structs.replace(
        new_hello(change.get("role", "decode"), cache, b"f" * 32),
        num_slots=change.get("num_slots", 4), slot_bytes=4096, incarnation=b"i" * 16,
    )  # fmt: skip
    given = os.open(change["file"], os.O_RDONLY) if "file" in change else os.dup(arena.fd)
    if "raw" in change:
        sock.send(change["raw"])
    elif not change.get("silent"):
        channel.send(change.get("frame", hello), fds=[given] * change.get("fds", 1))
    os.close(given)
    deadline = time.monotonic() + 5
    while not (losses := p.losses()):
        assert not p.join() and time.monotonic() < deadline
        time.sleep(0.01)
    assert sentence in losses[0].reason and not p.links
    for held in (listener, channel):
        held.close()
    os.close(arena.fd)
    del arena
    assert len(os.listdir("/proc/self/fd")) <= num_fds


def test_nobody_answers_at_the_address(p):
    p.pair(Pair(3, "00" * 16, "unix:nobody"))
    (loss,) = p.losses()
    assert loss.link == 3 and loss.reason == "D: cannot be connected to: Connection refused"


def test_another_user_is_not_let_in(d, p, monkeypatch):
    monkeypatch.setattr(shm.os, "getuid", lambda: 12345)
    stranger = connect(d)
    d.join()
    assert not d._pending
    with pytest.raises(Exception, match="closed"):
        stranger.poll()
    p.pair(Pair(1, d.incarnation, d.address))
    assert p.losses()[0].reason == "D: cannot be connected to: its address belongs to another user"
    stranger.close()


def test_without_memory_for_an_arena_the_connection_ends_and_the_process_does_not(d, p, monkeypatch):
    def none(*staging):
        raise OSError("no memory")

    with monkeypatch.context() as without:
        without.setattr(shm.Arena, "create", none)
        pair(d, p, 1)
        turns(d, p)
        assert p.losses()[0].reason == "D: the other end closed" and not d.links
    pair(d, p, 2)
    assert turns(d, p) == [[2], [2]]


def test_one_that_is_gone_before_it_is_accepted_leaves_nothing(d, p):
    connect(d).close()
    d.join()
    assert not d._pending and d.losses() == []
    pair(d, p, 1)
    assert turns(d, p) == [[1], [1]]


def test_connections_that_nobody_asked_for_are_few_and_end(d, p):
    crowd = []
    for _ in range(20):
        crowd.append(connect(d, accept_fds=False))
        d.join()
    assert len(d._pending) == MAX_PENDING
    pair(d, p, 1)
    assert turns(d, p) == [[1], [1]]
    for channel in crowd:
        channel.close()
    d.join()
    assert not d._pending and list(d.links) == [1]


def test_a_peer_that_floods_gets_its_share_of_a_turn(d, p):
    pair(d, p, 1)
    turns(d, p)
    for _ in range(200):
        p.send(1, Ack("x", 1))
    assert [len(d.poll()) for _ in range(3)] == [MAX_FRAMES] * 3 and d.pending


def test_a_peer_that_does_not_read_is_dropped(d, p, monkeypatch):
    monkeypatch.setattr(peers, "MAX_UNSENT_BYTES", 1 << 16)
    pair(d, p, 1)
    turns(d, p)
    for _ in range(5000):
        d.send(1, Credit(1))
    (loss,) = d.losses()
    assert "P: it does not read" in loss.reason


@pytest.mark.parametrize("address", ["unix:", "tcp://127.0.0.1:0"])
def test_payloads_that_credits_bound_are_no_sign_of_a_peer_that_does_not_read(cache, address, monkeypatch):
    """All slots pushed while D is at its step, over either transport; then D has each of them."""
    monkeypatch.setattr(peers, "MAX_UNSENT_BYTES", 1 << 16)
    config = msgspec.structs.replace(CONFIG, staging_bytes=32 << 20, prefill_chunk=1 << 14)
    d, p = peers_of("decode", cache, config, address), peers_of("prefill", cache, config)
    pair(d, p, 1)
    assert turns(d, p) == [[1], [1]]
    slots, slot_bytes = link_of(p).staging.num_staging_slots, link_of(p).staging.staging_slot_bytes
    assert slots * slot_bytes > 16 << 20
    chunks = [
        Chunk("r", i, b"c" * 16, b"f" * 32, 0, 0, 1, 0, 2, 16, 16, 0, 4, "float32", "none", "crc32c", 0, slot_bytes, i)
        for i in range(slots)
    ]
    for i, chunk in enumerate(chunks):
        link_of(p).staging.staging_slot(i).fill_(i + 1)
        p.send(1, chunk)
    got = []
    while len(got) < slots:
        assert not p.poll() and not p.losses() and not d.losses()
        got += frames(d)
    assert got == chunks
    assert all((link_of(d).staging.staging_slot(i) == i + 1).all() for i in range(slots))
    for end in (p, d):
        end.close()


def test_descriptors_behind_the_hello_are_closed_by_the_kernel(d, p):
    pair(d, p, 1)
    turns(d, p)
    before = len(os.listdir("/proc/self/fd"))
    gift = os.memfd_create("gift")
    link_of(d).transport.send(Credit(1), fds=[gift])
    os.close(gift)
    assert frames(p) == [Credit(1)] and len(os.listdir("/proc/self/fd")) == before


def test_several_peers_at_once(cache):
    """Two P's and two D's, each joined with both others; what one loses is one link."""
    ds, ps = [peers_of("decode", cache) for _ in range(2)], [peers_of("prefill", cache) for _ in range(2)]
    numbers = {(i, j): 1 + 2 * i + j for i in range(2) for j in range(2)}
    for (i, j), number in numbers.items():
        pair(ds[i], ps[j], number)
    assert [sorted(links) for links in turns(*ds, *ps)] == [[1, 2], [3, 4], [1, 3], [2, 4]]
    for (i, j), number in numbers.items():
        ds[i].links[number].staging.staging_slot(0)[0] = number
        assert ps[j].links[number].staging.staging_slot(0)[0] == number
        ps[j].send(number, Ack(str(number), 1))
    assert [d.poll() for d in ds] == [[(1, Ack("1", 1)), (2, Ack("2", 1))], [(3, Ack("3", 1)), (4, Ack("4", 1))]]
    ps[1].close()
    for d in ds:
        d.poll()
    assert [[loss.link for loss in d.losses()] for d in ds] == [[2], [4]]
    assert [list(d.links) for d in ds] == [[1], [3]] and sorted(ps[0].links) == [1, 3]
    pair(ds[0], ps[0], 9)  # anew: of these two only
    assert turns(ds[0], ps[0]) == [[9], [9]] and sorted(ps[0].links) == [3, 9]
    for end in (*ds, ps[0]):
        end.close()
