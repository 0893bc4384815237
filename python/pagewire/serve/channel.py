"""Framed messages over a stream socket: a u32 little-endian byte count, then one encoded message.

`Channel` is a worker's side: it never blocks, so a worker polls it between forwards and cannot
deadlock against a peer that is itself sending. `AsyncChannel` is the front's. Neither needs torch.
"""

import asyncio
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from pagewire.serve.messages import FrontMessage, WorkerMessage

LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 4 << 20  # a Submit with 128k token ids is about 0.7 MB
MAX_FDS = 4


class ChannelClosed(Exception):
    """The other end is gone, or what it sent cannot be a frame; nothing more will arrive."""

    def __init__(self, message: str, channel: "Channel | None" = None) -> None:
        super().__init__(message)
        self.channel = channel


class Codec(NamedTuple):
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


WORKER_CODEC = Codec(msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(FrontMessage).decode)
FRONT_CODEC = Codec(msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(WorkerMessage).decode)


def frame(body: bytes) -> bytes:
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"frame: expected at most {MAX_FRAME_BYTES} bytes, got {len(body)}")
    return LENGTH.pack(len(body)) + body


def frame_len(prefix: bytes | bytearray, channel: "Channel | None" = None) -> int:
    """Bytes of the frame's body. Raises ChannelClosed on a length no sender of ours would write."""
    length: int = LENGTH.unpack_from(prefix)[0]
    if length > MAX_FRAME_BYTES:
        raise ChannelClosed(f"expected a frame of <= {MAX_FRAME_BYTES} bytes, got {length}", channel)
    return length


class Channel:
    """Non-blocking: `send` queues what the socket does not take, `poll` returns what arrived."""

    def __init__(self, sock: socket.socket, codec: Codec, *, name: str, accept_fds: bool = False) -> None:
        sock.setblocking(False)
        self.name = name
        self.fds: deque[int] = deque()  # received, in order, owned by whoever takes them
        self._sock = sock
        self._codec = codec
        self._accept_fds = accept_fds
        self._inbox = bytearray()
        self._outbox = bytearray()

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        return bool(self._outbox)

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Raises ChannelClosed if the other end is gone. `fds` go with the frame's first byte."""
        data = frame(self._codec.encode(message))
        if fds:
            # a handshake step: the frame is small and nothing is queued before it
            if self._outbox or socket.send_fds(self._sock, [data], list(fds)) != len(data):
                raise ChannelClosed(f"{self.name}: the socket is full, no fd was passed", self)
            return
        self._outbox += data
        self.flush()

    def flush(self) -> None:
        while self._outbox:
            try:
                sent = self._sock.send(self._outbox)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise ChannelClosed(f"{self.name}: {error.strerror}", self) from error
            del self._outbox[:sent]

    def poll(self, max_messages: int = 1 << 30) -> list[Any]:
        """Messages that arrived in full. Raises ChannelClosed once all of them were returned."""
        closed = self._fill()
        messages: list[Any] = []
        while len(self._inbox) >= LENGTH.size and len(messages) < max_messages:
            end = LENGTH.size + frame_len(self._inbox, self)
            if len(self._inbox) < end:
                break
            body = bytes(self._inbox[LENGTH.size : end])
            del self._inbox[:end]
            messages.append(self._codec.decode(body))
        if closed and not messages:
            raise ChannelClosed(f"{self.name}: the other end closed", self)
        return messages

    def _fill(self) -> bool:
        while True:
            try:
                if self._accept_fds:
                    data, fds, _, _ = socket.recv_fds(self._sock, 1 << 16, MAX_FDS)
                    for fd in fds:
                        os.set_inheritable(fd, False)
                    self.fds.extend(fds)
                else:
                    data = self._sock.recv(1 << 16)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                return True
            if not data:
                return True
            self._inbox += data

    def drain(self, timeout_s: float) -> None:
        """Waits until everything queued was taken, or gives up."""
        self._sock.settimeout(timeout_s)
        try:
            self._sock.sendall(self._outbox)
        except OSError:
            return  # nobody is left to read it
        self._outbox.clear()

    def close(self) -> None:
        self._sock.close()


def wait(channels: Iterable[Channel], timeout_s: float | None) -> None:
    """Returns when a channel can be read, a queued send can go on, or the time is over."""
    poller = select.poll()
    for channel in channels:
        poller.register(channel, select.POLLIN | (select.POLLOUT if channel.wants_write else 0))
    poller.poll(None if timeout_s is None else timeout_s * 1000)
    for channel in channels:
        channel.flush()


def receive(channel: Channel, timeout_s: float) -> Any:
    """Blocks for the next message. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not (messages := channel.poll(max_messages=1)):
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError(f"{channel.name}: nothing arrived within {timeout_s:g} s")
        wait([channel], remaining_s)
    return messages[0]


class AsyncChannel:
    """The front: `send(message)`; `async for message in channel` until the worker is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, codec: Codec = FRONT_CODEC) -> None:
        self._reader = reader
        self._writer = writer
        self._codec = codec

    @classmethod
    async def open(cls, sock: socket.socket, codec: Codec = FRONT_CODEC) -> "AsyncChannel":
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(reader, writer, codec)

    def send(self, message: Any) -> None:
        """Queues the message; a worker that is gone is reported by the reading side, not here."""
        self._writer.write(frame(self._codec.encode(message)))

    async def drain(self) -> None:
        await self._writer.drain()

    def __aiter__(self) -> "AsyncChannel":
        return self

    async def __anext__(self) -> Any:
        try:
            length = frame_len(await self._reader.readexactly(LENGTH.size))
            return self._codec.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise StopAsyncIteration from None

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            pass  # the worker went first
