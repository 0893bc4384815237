"""The control channel: frames survive any cut, its end is told last, and nothing oversized is believed."""

import asyncio
import os
import socket

import pytest

from pagewire.serve.channel import (
    FRONT_CODEC,
    LENGTH,
    MAX_FRAME_BYTES,
    WORKER_CODEC,
    AsyncChannel,
    Channel,
    ChannelClosed,
    Codec,
    frame,
    receive,
    wait,
)
from pagewire.serve.messages import Cancel, Finished, Sampling, Shutdown, Submit, Token

SUBMIT = Submit("r", [1, 2, 300000], 5, [0], Sampling(temperature=0.5, seed=1 << 40))
RAW = Codec(bytes, bytes)


def channel_pair(codec: Codec = RAW, other: Codec = RAW) -> tuple[Channel, Channel]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(a, codec, name="a"), Channel(b, other, name="b", accept_fds=True)


def test_messages_both_ways() -> None:
    front, work = channel_pair(FRONT_CODEC, WORKER_CODEC)
    for message in (SUBMIT, Cancel("r"), Shutdown()):
        front.send(message)
    assert work.poll() == [SUBMIT, Cancel("r"), Shutdown()]
    work.send(Token("r", 0, 7))
    assert receive(front, 1) == Token("r", 0, 7)
    assert front.poll() == []


def test_a_frame_may_arrive_a_byte_at_a_time() -> None:
    a, b = socket.socketpair()
    channel = Channel(b, RAW, name="b")
    got = []
    for byte in frame(b"hello") + frame(b"") + frame(b"!"):
        a.send(bytes([byte]))
        got += channel.poll()
    assert got == [b"hello", b"", b"!"]


def test_what_the_socket_does_not_take_is_sent_later() -> None:
    """Neither side blocks, though each has more to say than the socket holds."""
    a, b = channel_pair()
    body = bytes(1 << 20)
    for channel in (a, b):
        for _ in range(3):
            channel.send(body)
    assert a.wants_write and b.wants_write
    got: dict[str, int] = {"a": 0, "b": 0}
    while min(got.values()) < 3:
        wait([a, b], 1)
        for channel in (a, b):
            got[channel.name] += len(channel.poll())
    assert not a.wants_write and not b.wants_write


def test_the_end_comes_after_the_last_message() -> None:
    a, b = channel_pair()
    a.send(b"last words")
    a.close()
    assert b.poll() == [b"last words"]
    with pytest.raises(ChannelClosed, match="b: the other end closed") as closed:
        b.poll()
    assert closed.value.channel is b
    with pytest.raises(ChannelClosed):
        b.send(b"anyone?")


@pytest.mark.parametrize("length", [MAX_FRAME_BYTES + 1, (1 << 32) - 1])
def test_an_oversized_frame_is_neither_sent_nor_waited_for(length: int) -> None:
    a, b = socket.socketpair()
    channel = Channel(b, RAW, name="b")
    a.send(LENGTH.pack(length))
    with pytest.raises(ChannelClosed, match=f"got {length}"):
        channel.poll()
    with pytest.raises(ValueError, match="at most"):
        channel.send(bytes(MAX_FRAME_BYTES + 1))


def test_a_descriptor_travels_with_its_frame() -> None:
    a, b = channel_pair()
    fd = os.memfd_create("gift")
    os.write(fd, b"inside")
    a.send(b"here", fds=[fd])
    os.close(fd)
    assert receive(b, 1) == b"here"
    (received,) = b.fds
    assert os.pread(received, 6, 0) == b"inside"
    assert not os.get_inheritable(received)
    os.close(received)


def test_receive_gives_up() -> None:
    a, b = channel_pair()
    with pytest.raises(TimeoutError, match="b: nothing arrived within 0.05 s"):
        receive(b, 0.05)
    a.close()


def test_the_asyncio_side() -> None:
    async def run() -> list:
        a, b = socket.socketpair()
        work = Channel(b, WORKER_CODEC, name="front")
        front = await AsyncChannel.open(a)
        front.send(SUBMIT)
        await front.drain()
        wait([work], 5)
        assert work.poll() == [SUBMIT]
        work.send(Token("r", 0, 1))
        work.send(Finished("r", "stop", 1))
        work.close()
        got = [message async for message in front]
        await front.close()
        return got

    assert asyncio.run(run()) == [Token("r", 0, 1), Finished("r", "stop", 1)]
