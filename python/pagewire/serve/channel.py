"""Framed messages over a stream socket: a u32 little-endian byte count, then one encoded message.

`Channel` is a worker's side: it never blocks, so a worker polls it between forwards and cannot
deadlock against a peer that is itself sending. `AsyncChannel` is the front's. Neither needs torch.
"""

import asyncio
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from pagewire.serve.messages import FrontMessage, WorkerMessage

LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 4 << 20  # a Submit with 128k token ids is about 0.7 MB
MAX_FDS = 1  # a HELLO's
READ_BYTES = 1 << 16
MAX_READS = 16  # a poll: who sends without pause does not keep us from our work


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


def frame_len(prefix: bytes | bytearray, channel: "Channel | None" = None, at: int = 0) -> int:
    """Bytes of the body of the frame at `at`. Raises ChannelClosed on a length no sender of ours would write."""
    length: int = LENGTH.unpack_from(prefix, at)[0]
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
        self.accept_fds = accept_fds  # what comes while this is False is closed by the kernel
        self._inbox = bytearray()
        self._outbox = bytearray()

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        return bool(self._outbox)

    @property
    def num_unsent(self) -> int:
        """Bytes that the socket did not take yet."""
        return len(self._outbox)

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

    @property
    def pending(self) -> bool:
        """Whether a message was read and not yet polled, of which the socket says nothing any more."""
        size = LENGTH.size
        return len(self._inbox) >= size and len(self._inbox) >= size + LENGTH.unpack_from(self._inbox)[0]

    def poll(self, max_messages: int = 1 << 30) -> list[Any]:
        """Messages that arrived in full. Raises ChannelClosed once all of them were returned."""
        closed = False if self.pending else self._fill()
        bodies: list[bytes] = []
        at = 0
        while len(self._inbox) >= at + LENGTH.size and len(bodies) < max_messages:
            start = at + LENGTH.size
            end = start + frame_len(self._inbox, self, at)
            if len(self._inbox) < end:
                break
            bodies.append(bytes(self._inbox[start:end]))
            at = end
        del self._inbox[:at]
        if closed and not bodies:
            raise ChannelClosed(f"{self.name}: the other end closed", self)
        return [self._codec.decode(body) for body in bodies]

    def _fill(self) -> bool:
        """Whether the other end has closed."""
        for _ in range(MAX_READS):
            try:
                if self.accept_fds:
                    data, fds, _, _ = socket.recv_fds(self._sock, READ_BYTES, MAX_FDS)
                    for fd in fds:
                        os.set_inheritable(fd, False)
                    self.fds.extend(fds)
                    self.close_fds(beyond=MAX_FDS)
                else:
                    data = self._sock.recv(READ_BYTES)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                return True
            if not data:
                return True
            self._inbox += data
        return False

    def drain(self, timeout_s: float) -> None:
        """Waits until everything queued was taken, or gives up."""
        self._sock.settimeout(timeout_s)
        try:
            self._sock.sendall(self._outbox)
        except OSError:
            return  # nobody is left to read it
        self._outbox.clear()

    def close_fds(self, beyond: int = 0) -> None:
        """Those that nobody took, but for the first ones."""
        while len(self.fds) > beyond:
            os.close(self.fds.pop())

    def close(self) -> None:
        self.close_fds()
        self._sock.close()


def wait(
    channels: Iterable[Channel], timeout_s: float | None, watched: Mapping[int, bool] = MappingProxyType({})
) -> None:
    """Returns when a channel can be read, a queued send can go on, or the time is over.

    Args:
        watched: other descriptors that end the wait, and whether they do so too when they can be written.
    """
    poller = select.poll()
    for fd, writing in watched.items():
        poller.register(fd, select.POLLIN | (select.POLLOUT if writing else 0))
    for channel in channels:
        poller.register(channel, select.POLLIN | (select.POLLOUT if channel.wants_write else 0))
    poller.poll(None if timeout_s is None else timeout_s * 1000)
    for channel in channels:
        channel.flush()


class AsyncChannel:
    """The front: `send(message)`; `async for message in channel` until the worker is gone.

    What a worker does not read waits here, and only as messages that can still be taken back (`withdraw`): a worker
    that stands still costs no more than the requests that are waiting for it.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, codec: Codec = FRONT_CODEC) -> None:
        self._reader = reader
        self._writer = writer
        self._codec = codec
        self._waiting: deque[Any] = deque()
        self._pump: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, sock: socket.socket, codec: Codec = FRONT_CODEC) -> "AsyncChannel":
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(reader, writer, codec)

    def send(self, message: Any) -> None:
        """Queues the message; a worker that is gone is reported by the reading side, not here."""
        if self._pump is None and self._writer.transport.get_write_buffer_size() == 0:
            self._write(message)
            return
        self._waiting.append(message)
        if self._pump is None:
            self._pump = asyncio.ensure_future(self._write_waiting())

    def withdraw(self, unsent: Callable[[Any], bool]) -> bool:
        """Takes back the first message that `unsent` says yes to and that has not left; whether there was one."""
        for message in self._waiting:
            if unsent(message):
                self._waiting.remove(message)
                return True
        return False

    async def _write_waiting(self) -> None:
        try:
            while self._waiting:
                await self._writer.drain()
                if self._waiting:
                    self._write(self._waiting.popleft())
        except OSError:
            self._waiting.clear()
        finally:
            self._pump = None

    def _write(self, message: Any) -> None:
        if not self._writer.is_closing():
            self._writer.write(frame(self._codec.encode(message)))

    def __aiter__(self) -> "AsyncChannel":
        return self

    async def __anext__(self) -> Any:
        try:
            length = frame_len(await self._reader.readexactly(LENGTH.size))
            return self._codec.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise StopAsyncIteration from None

    async def close(self) -> None:
        self._waiting.clear()
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            pass  # the worker went first
