"""The KV stream over NIXL between two processes, and what becomes of an arena whose connection ends."""

import multiprocessing
import os
import signal
import time

import msgspec
import pytest
import torch

import pagewire as pw
from pagewire.allocator import PageAllocator
from pagewire.net.channel import ChannelClosed, wait
from pagewire.transfer.actions import Push, Send, Start, Unpack
from pagewire.transfer.frames import Ack, Chunk, Commit, Credit, Reserve
from pagewire.transfer.nixl import NixlError, new_agent
from pagewire.transfer.packing import Packing, new_hello
from pagewire.transfer.receiver import Receiver
from pagewire.transfer.sender import Sender
from pagewire.transfer.transport import connect, listen
from transfer.test_transports import HELLO, NIXL, SLOTS, accepted, chunk, end_of, everything, joined, turn

pytestmark = NIXL
ADDRESS = "nixl+tcp://127.0.0.1:0"
SPAWN = multiprocessing.get_context("spawn")  # UCX does not work on in a fork
TOKENS, PAGE = 700, 16
PROMPT = tuple(i % 97 for i in range(TOKENS))


def now_ms() -> int:
    return int(time.monotonic() * 1000)


def cache_of(filled: bool) -> pw.PagedKVCache:
    cache = pw.PagedKVCache.allocate(
        num_layers=3, num_pages=64, page_size=PAGE, num_kv_heads=2, head_dim=64, dtype=torch.float32, device="cpu"
    )
    if filled:
        torch.manual_seed(7)
        packed = pw.pack_kv(cache, torch.arange(TOKENS))
        packed.buffer.view(torch.float32).normal_()
        pw.unpack_kv(packed, cache, torch.arange(TOKENS))
    return cache


def run_p(address: str, num_requests: int) -> None:
    """A whole P, of whose prefill only the KV is there."""
    cache = cache_of(filled=False)
    computed = pw.pack_kv(cache_of(filled=True), torch.arange(TOKENS))
    ours = new_hello("prefill", cache, b"f" * 32)
    p = connect(address)
    while not (got := turn(p)[0]):
        pass
    p.open_staging(got[0])
    p.send(ours)
    packing = Packing(cache, ours, got[0])
    allocator = PageAllocator(64)
    sender = Sender(allocator, PAGE, now_ms=now_ms)
    sender.link(1, packing.wire, got[0].num_slots, got[0].slot_bytes)
    num_acked = 0
    while num_acked < num_requests:
        wait([p], 0.2)
        for frame in p.poll():
            if isinstance(frame, Reserve):
                sender.submit(frame.request_id, PROMPT, (1,))
                (begin,) = sender.reserve(1, frame)
                slots = pw.page_slots(torch.tensor(begin.pages), 0, TOKENS, PAGE)
                pw.unpack_kv(computed, cache, slots)
                for layer in range(3):
                    sender.layer_ready(frame.request_id, layer, 0, TOKENS)
                digests = packing.digests(begin.pages, frame.blocks, (0, TOKENS))
                sender.prefilled(frame.request_id, 5, {1: digests})
            elif isinstance(frame, Credit):
                sender.credit(1, frame)
            elif isinstance(frame, Ack):
                sender.ack(1, frame)
                num_acked += 1
        while (send := sender.next_send()) is not None:
            if isinstance(send, Push):
                slot = p.staging.staging_slot(send.staging_slot)
                for action in sender.pushed(send, *packing.pack(send.pages, send.block, send.tokens, slot)):
                    p.send(action.frame)
            else:
                p.send(send.frame)
    assert allocator.num_free == 64
    p.close()


def test_requests_between_two_processes():
    """Sender to Receiver with real packing: every byte of D's pages, and SHA-256 digests of each layer."""
    cache, expected = cache_of(filled=False), cache_of(filled=True)
    hello = new_hello("decode", cache, b"f" * 32)
    slots = Packing(cache, hello, hello).staging(1 << 20, 256)
    listener = listen(ADDRESS, hello, slots)
    process = SPAWN.Process(target=run_p, args=(listener.address, 3), daemon=True)
    process.start()
    d = accepted(listener, 60)
    allocator = PageAllocator(64)
    receiver = Receiver(
        allocator, PAGE, hello.groups, vocab_size=100, max_waiting=4, timeout_ms=30_000, now_ms=now_ms,
        new_capability=lambda: os.urandom(16),
    )  # fmt: skip
    (theirs,) = everything(d, d, 1)
    packing = Packing(cache, hello, theirs)
    receiver.link(1, packing.wire, slots[0])
    started = []
    actions = [a for name in "abc" for a in receiver.submit(name, PROMPT, TOKENS + 1, links=(1,))]
    num_chunks, deadline = 0, time.monotonic() + 60
    while len(started) < 3:
        assert time.monotonic() < deadline, started
        while actions:
            action = actions.pop(0)
            if isinstance(action, Send):
                d.send(action.frame)
            elif isinstance(action, Unpack):
                staging = d.staging.staging_slot(action.chunk.slot)
                actions += receiver.unpacked(action, packing.unpack(action.chunk, action.pages, staging))
            else:
                assert isinstance(action, Start), action
                share = action.shares[0]
                ours = packing.digests(action.pages, share.reserve.blocks, (0, TOKENS))
                assert action.first_token == 5 and share.commit.digests == ours and len(ours) == 3
                at = pw.page_slots(torch.tensor(action.pages), 0, TOKENS, PAGE)
                assert torch.equal(pw.pack_kv(cache, at).buffer, pw.pack_kv(expected, torch.arange(TOKENS)).buffer)
                started.append(action.request_id)
                actions += receiver.release(action.request_id)
        wait([d], 0.2)
        for frame in d.poll(16) if len(started) < 3 else ():
            num_chunks += isinstance(frame, Chunk)
            actions += (receiver.chunk if isinstance(frame, Chunk) else receiver.commit)(1, frame)
            assert isinstance(frame, Chunk | Commit)
    assert sorted(started) == ["a", "b", "c"] and num_chunks > slots[0], "no slot was used twice"
    process.join(20)
    assert process.exitcode == 0 and allocator.num_free == 64
    d.close()
    listener.close()
    assert not listener._arenas


def run_d(address_to: object) -> None:
    """A D that takes nothing in."""
    listener = listen(ADDRESS, HELLO, (SLOTS, 1 << 16))
    address_to.put(listener.address)
    d = accepted(listener, 60)
    while True:
        turn(d)


def test_a_killed_d_is_seen():
    addresses = SPAWN.Queue()
    process = SPAWN.Process(target=run_d, args=(addresses,), daemon=True)
    process.start()
    p = connect(addresses.get(timeout=60))
    (hello,) = everything(p, p, 1)
    p.open_staging(hello)
    p.send(chunk(0, 1 << 16))
    p.drain(20)
    assert not p.num_unsent
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    with pytest.raises(ChannelClosed):
        p.send(chunk(1, 1 << 16))
        end_of(p)
        p.send(chunk(1, 1 << 16))
    p.close()


@pytest.fixture()
def ends():
    listener = listen(ADDRESS, HELLO, (SLOTS, 1 << 16))
    p = connect(listener.address)
    d = accepted(listener)
    yield p, d, listener
    for end in (p, d, listener):
        end.close()


def test_an_arena_is_kept_until_p_has_closed(ends):
    """D closes first: no other peer is given the memory, where a WRITE may be under way."""
    p, d, listener = ends
    joined(p, d)
    base = d.staging.staging_slot(0).data_ptr()
    d.close()
    d.staging = None
    other = connect(listener.address)
    e = accepted(listener)
    assert e.staging.staging_slot(0).data_ptr() != base
    assert [arena.staging_slot(0).data_ptr() for _, arena in listener._arenas][0] == base
    with pytest.raises(NixlError, match="D: NIXL: NIXL_ERR_REMOTE_DISCONNECT"):
        p.send(chunk(1, 1 << 16))
    assert "the other end closed" in end_of(p)
    with pytest.raises(ChannelClosed, match="the other end closed"):
        p.send(Ack("to a socket that takes it", 1))
    p.close()
    third = connect(listener.address)
    f = accepted(listener)
    assert [arena for _, arena in listener._arenas] == [e.staging, f.staging]
    for end in (other, e, third, f):
        end.close()


@pytest.mark.parametrize("staging", [b"", b"1234567", b"12345678", b"12345678" + bytes(100), b"12345678nixlSerDes|"])
def test_a_hello_without_a_way_to_the_arena_is_refused(ends, staging):
    p, d, _ = ends
    (hello,) = everything(p, d, 1)
    with pytest.raises((ValueError, OSError), match="expected NIXL's metadata, got|NIXL: "):
        p.open_staging(msgspec.structs.replace(hello, staging=staging))


def test_an_arena_that_d_does_not_offer_is_not_written(ends):
    p, d, _ = ends
    (hello,) = everything(p, d, 1)
    p.open_staging(msgspec.structs.replace(hello, num_slots=2 * SLOTS))
    p.send(chunk(0, 1 << 16))
    with pytest.raises(NixlError, match="D: NIXL: "):
        p.send(chunk(SLOTS, 1 << 16))


def test_frames_stay_behind_a_write_under_way(ends, monkeypatch):
    p, d, _ = ends
    joined(p, d)
    states = ["PROC"] * 3
    check = p._agent.check_xfer_state
    monkeypatch.setattr(p._agent, "check_xfer_state", lambda write: states.pop() if states else check(write))
    p.send(chunk(0, 1 << 16))
    p.send(Ack("behind it", 1))
    assert p.num_unsent == 1 << 16 and p.wants_write and len(states) == 1
    assert d.poll() == []
    assert everything(d, p, 2) == [chunk(0, 1 << 16), Ack("behind it", 1)]
    assert not p.num_unsent and not p.wants_write


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nixl", None)
    with pytest.raises(OSError, match=r"pip install pagewire\[nixl\]"):
        listen(ADDRESS, HELLO, (SLOTS, 64))
    with pytest.raises(NixlError):
        new_agent()


def test_nothing_lands_after_d_has_closed(monkeypatch):
    """Over UCX's TCP it is D's agent that writes what P sent, so the agent has to be gone before the memory."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    listener = listen(ADDRESS, HELLO, (SLOTS, 64 << 20))
    p = connect(listener.address)
    d = accepted(listener)
    joined(p, d)
    for slot in range(SLOTS):
        p.staging.staging_slot(slot).fill_(1)
        p.send(chunk(slot, 64 << 20))
    arena = d.staging
    deadline = time.monotonic() + 20
    while not arena.staging_slot(0)[0]:
        assert time.monotonic() < deadline
        p.flush()
    d.close()
    landed = [int(arena.staging_slot(slot).count_nonzero()) for slot in range(SLOTS)]
    assert landed[-1] < 64 << 20, "all of it was there before"
    with pytest.raises(ChannelClosed):
        while time.monotonic() < deadline:
            p.flush()
    p.close()
    time.sleep(0.5)
    assert [int(arena.staging_slot(slot).count_nonzero()) for slot in range(SLOTS)] == landed
    listener.close()
    assert not listener._arenas
