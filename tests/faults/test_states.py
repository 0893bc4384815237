"""Every fault at every named state of a request, at P and at D, under load: right or an explicit error."""

import socket

import pytest

from faults.stepped import REQUESTS, STATES, TIMEOUT_S, Rig, granted, phases
from pagewire.net.channel import LENGTH
from pagewire.serve.messages import Cancel
from pagewire.transfer.frames import Abort
from pagewire.transfer.handoff import Phase
from serve.tiny import make_tiny_llama

SIDES = ("p", "d")
QUICK_STATE = "chunks"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("model"), num_layers=3, eos_token_id=None))


@pytest.fixture(scope="module")
def undisturbed(model: str) -> dict[str, list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAGEWIRE_BACKEND", "reference")
        rig = Rig(model, patch)
        for name in REQUESTS:
            rig.submit(name)
            rig.settle()
        assert not rig.recovered
        return rig.outputs


@pytest.fixture()
def rig(model: str, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setenv("PAGEWIRE_BACKEND", "reference")
    return Rig(model, monkeypatch)


# ---------------------------------------------------------------- frames: what the side sends next is damaged


def truncated(framed: bytes) -> bytes:
    """Its length says so: a whole frame that lacks its end."""
    return LENGTH.pack(len(framed) - LENGTH.size - 5) + framed[LENGTH.size : -5]


def flipped(framed: bytes) -> bytes:
    at = len(framed) // 2
    return framed[:at] + bytes([framed[at] ^ 0x10]) + framed[at + 1 :]


def short(framed: bytes) -> bytes:
    """Its length does not say so: the reader waits for the rest, and takes what follows for it."""
    return framed[:-5]


def swallowed(framed: bytes) -> bytes:
    return b""


def too_long(framed: bytes) -> bytes:
    return b"\xff\xff\xff\x7f" + framed[LENGTH.size :]


def cut(framed: bytes) -> bytes:
    """Half a frame; `damage` closes behind it."""
    return framed[: len(framed) // 2]


def damage(rig: Rig, side: str, how) -> list[str]:
    """Arms it; the kind of frame that it hit, once it did."""
    channel = rig.pair.link_of(side).transport
    hit: list[str] = []

    def send(frame) -> None:
        del channel.send
        hit.append(type(frame).__name__)
        body = channel._codec.encode(frame)
        channel._queue(how(LENGTH.pack(len(body)) + body))
        channel.flush()
        if how is cut:
            channel._sock.shutdown(socket.SHUT_RDWR)

    channel.send = send
    return hit


def frame_fault(how):
    def fault(rig: Rig, side: str, state: str) -> None:
        link = rig.pair.link_of(side)
        hit = damage(rig, side, how)
        rig.settle()
        if not hit:
            link.transport.send(Abort("nobody", 1, "planted"))
        assert hit
        for name in ("next", "whole_p"):  # what a gap or a torn frame hides until the next frame, these show
            rig.submit(name)
            rig.settle()
        assert rig.lost, f"a damaged {hit} went unnoticed"
        assert "b" not in rig.recovered, "D goes on with what it has"

    return fault


# ---------------------------------------------------------------- the others


def payload(rig: Rig, side: str, state: str) -> None:
    """In the staging slot, between P's checksum and D's; D is the side that reads."""
    unpack, hit = rig.pair.d._unpack, []

    def corrupt(action):
        chunk = action.chunk
        if not hit:
            rig.pair.arena.staging_slot(chunk.slot)[chunk.payload_bytes - 1] ^= 1
            hit.append(chunk.request_id)
        return unpack(action)

    rig.pair.d._unpack = corrupt
    rig.settle()
    rig.pair.d._unpack = unpack
    assert set(rig.recovered) == set(hit) and all("CRC32C" in why for why in rig.recovered.values())
    assert hit or state == "decoding"


def stall(rig: Rig, side: str, state: str) -> None:
    """No turns for longer than a handoff may stand still."""
    other, turn = {"p": ("d", rig.pair.turn_d), "d": ("p", rig.pair.turn_p)}[side]
    for _ in range(5):
        turn()
    before = granted(rig.pair, other)
    rig.skew_s += TIMEOUT_S + 1
    for _ in range(5):
        turn()
    assert before.isdisjoint(granted(rig.pair, other)), "it waits beyond its deadline"
    rig.settle()
    assert not rig.lost
    assert all("within 60000 ms" in why for why in rig.recovered.values()), rig.recovered


def pause(rig: Rig, side: str, state: str) -> None:
    """No turns, but not for so long: nobody notices."""
    turn = {"p": rig.pair.turn_d, "d": rig.pair.turn_p}[side]
    for _ in range(30):
        turn()
    rig.settle()
    assert not rig.recovered


def cancel(rig: Rig, side: str, state: str) -> None:
    """Which reaches this side some turns before the other."""
    rig.cancelled.add("a")
    rig.pair.channels[{"p": "prefill", "d": "decode"}[side]].send(Cancel("a"))
    was_at_d = phases(rig.pair, "a")[1]
    rig.pair.turns(3)
    if side == "d" and was_at_d is not Phase.RUNNING:
        assert phases(rig.pair, "a")[0] is None, "P was not told"
    if side == "p" and was_at_d is Phase.RECEIVING:
        assert phases(rig.pair, "a")[1] is not Phase.RECEIVING, "D was not told"
    rig.pair.cancel("a")
    rig.settle()
    assert not rig.recovered


def drop(rig: Rig, side: str, state: str) -> None:
    rig.pair.drop(side)
    rig.settle()
    assert rig.lost and "b" not in rig.recovered and all(why != "" for why in rig.recovered.values())


def full(rig: Rig, side: str, state: str) -> None:
    """Requests that need all of the side's pages wait, and others behind them."""
    for name in (f"whole_{side}", "next"):
        rig.submit(name)
    rig.settle()
    assert not rig.recovered


FAULTS = {
    **{how.__name__: frame_fault(how) for how in (truncated, flipped, short, swallowed, too_long, cut)},
    **{fault.__name__: fault for fault in (payload, stall, pause, cancel, drop, full)},
}


def cells() -> list:
    """Each fault once in `make test`: at chunks on their way, at one side in turn."""
    every = []
    for state in STATES:
        for number, fault in enumerate(FAULTS):
            for side in SIDES if fault != "payload" else ("d",):
                quick = state == QUICK_STATE and (fault == "payload" or side == SIDES[number % 2])
                marks = () if quick else pytest.mark.faults
                every.append(pytest.param(state, side, fault, id=f"{state}-{side}-{fault}", marks=marks))
    return every


@pytest.mark.parametrize(("state", "side", "fault"), cells())
def test_a_fault_in_a_state(rig: Rig, undisturbed: dict[str, list[int]], state: str, side: str, fault: str) -> None:
    rig.reach(state)
    FAULTS[fault](rig, side, state)
    print(f"{state} {side} {fault}: recovered {rig.recovered or 'none'}{', link lost' if rig.lost else ''}")
    rig.check_clean(undisturbed)
