"""The control channel: frames survive any cut, its end is told last, and nothing oversized is believed."""

import asyncio
import os
import socket

import pytest

from pagewire.net.channel import LENGTH, MAX_FRAME_BYTES, Channel, ChannelClosed, Codec, frame, wait
from pagewire.serve.channel import FRONT_CODEC, WORKER_CODEC, AsyncChannel
from pagewire.serve.messages import Cancel, Finished, Sampling, Shutdown, Submit, Token

SUBMIT = Submit("r", [1, 2, 300000], 5, [0], Sampling(temperature=0.5, seed=1 << 40))
RAW = Codec(bytes, bytes)


def channel_pair(codec: Codec = RAW, other: Codec = RAW) -> tuple[Channel, Channel]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(a, codec, name="a"), Channel(b, other, name="b", accept_fds=True)


def receive(channel: Channel) -> object:
    wait([channel], 5)
    (message,) = channel.poll(1)
    return message


def test_messages_both_ways() -> None:
    front, work = channel_pair(FRONT_CODEC, WORKER_CODEC)
    for message in (SUBMIT, Cancel("r"), Shutdown()):
        front.send(message)
    assert work.poll() == [SUBMIT, Cancel("r"), Shutdown()]
    work.send(Token("r", 0, 7))
    assert receive(front) == Token("r", 0, 7)
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
    assert receive(b) == b"here"
    (received,) = b.fds
    assert os.pread(received, 6, 0) == b"inside"
    assert not os.get_inheritable(received)
    os.close(received)


def test_the_asyncio_side() -> None:
    async def run() -> list:
        a, b = socket.socketpair()
        work = Channel(b, WORKER_CODEC, name="front")
        front = AsyncChannel(*await asyncio.open_unix_connection(sock=a))
        front.send(SUBMIT)
        wait([work], 5)
        assert work.poll() == [SUBMIT]
        work.send(Token("r", 0, 1))
        work.send(Finished("r", "stop", 1))
        work.close()
        got = [message async for message in front]
        await front.close()
        return got

    assert asyncio.run(run()) == [Token("r", 0, 1), Finished("r", "stop", 1)]


def test_what_a_stopped_worker_does_not_read_is_bounded_and_can_be_taken_back() -> None:
    submits = [Submit(f"r{i}", list(range(70_000, 80_000)), 5, [], Sampling()) for i in range(400)]  # 50 kB

    async def run() -> None:
        a, b = socket.socketpair()
        work = Channel(b, WORKER_CODEC, name="front")
        front = AsyncChannel(*await asyncio.open_unix_connection(sock=a))
        for submit in submits:
            front.send(submit)
            await asyncio.sleep(0)
        assert front._writer.transport.get_write_buffer_size() < 1 << 20
        taken = [i for i in range(400) if front.withdraw(submits[i])]
        assert len(taken) > 350 and taken == list(range(taken[0], 400))
        assert not front.withdraw(submits[399])
        front.send(Shutdown())
        got: list = []
        while Shutdown() not in got:
            await asyncio.sleep(0.001)
            got += work.poll()
        assert [message.request_id for message in got[:-1]] == [f"r{i}" for i in range(taken[0])]
        work.close()
        await front.close()

    asyncio.run(run())


def test_a_flood_is_taken_in_turns() -> None:
    """`pending` says that more was read than polled, of which the socket does not speak any more."""
    a, b = channel_pair()
    for _ in range(200):
        a.send(b"x")
    assert not b.pending and not a.wants_write
    total = len(b.poll(64))
    assert total == 64 and b.pending
    while b.pending:
        total += len(b.poll(64))
    assert total == 200


def test_descriptors_nobody_asked_for_are_not_kept() -> None:
    a, b = channel_pair()
    num_fds = len(os.listdir("/proc/self/fd"))
    gift = os.memfd_create("gift")
    for _ in range(20):
        a.send(b"here", fds=[gift, gift])
        b.poll()
    assert len(b.fds) == 1 and len(os.listdir("/proc/self/fd")) == num_fds + 2
    b.accept_fds = False
    a.send(b"here", fds=[gift])
    assert b.poll() == [b"here"]
    b.close_fds()
    os.close(gift)
    assert len(os.listdir("/proc/self/fd")) == num_fds
