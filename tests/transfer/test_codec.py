"""A connection's frames are counted: one that is missing, repeated, out of turn or damaged ends it."""

import pytest

from pagewire.transfer.codec import SEQUENCES, ConnectionLost, FrameCodec
from pagewire.transfer.frames import Abort, Ack, Credit, encode


def three() -> list[bytes]:
    codec = FrameCodec()
    return [codec.encode(frame) for frame in (Credit(0), Ack("a", 1), Abort("b", 2, "late"))]


def test_both_directions_count_for_themselves() -> None:
    p, d = FrameCodec(), FrameCodec()
    for slot in range(3):
        assert d.decode(p.encode(Credit(slot))) == Credit(slot)
    assert p.decode(d.encode(Ack("a", 1))) == Ack("a", 1)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([1], r"expected 0, got 1 \(Ack\)"),
        ([0, 2], r"expected 1, got 2 \(Abort\)"),
        ([0, 0], r"expected 1, got 0 \(Credit\)"),
        ([0, 2, 1], "expected 1, got 2"),
    ],
)
def test_a_gap_a_repetition_and_another_order_end_it(order: list[int], words: str) -> None:
    frames, codec = three(), FrameCodec()
    with pytest.raises(ConnectionLost, match=words):
        for i in order:
            codec.decode(frames[i])


@pytest.mark.parametrize("data", [b"", b"PWKV" + b"\xff" * 90, three()[1][:-1], three()[1][:-1] + b"?"])
def test_what_cannot_be_read_ends_it_with_the_reason(data: bytes) -> None:
    codec = FrameCodec()
    codec.decode(three()[0])
    with pytest.raises(ConnectionLost, match=r"frame 1 cannot be read: \w+"):
        codec.decode(data)


def test_the_count_wraps() -> None:
    p, d = FrameCodec(), FrameCodec()
    p._num_sent = d._num_received = SEQUENCES - 1
    for slot in range(2):
        assert d.decode(p.encode(Credit(slot))) == Credit(slot)
    assert p.encode(Credit(2)) == encode(Credit(2), 1)
