"""Framed messages over a stream socket: a u32 little-endian byte count, then one encoded message.

A `Channel` never blocks, so a worker polls it between forwards and cannot deadlock against a peer that is itself
sending. It needs no torch.
"""

import os
import select
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 4 << 20  # a Submit with 128k token ids is about 0.7 MB
MAX_FDS = 1  # a HELLO's
READ_BYTES = 1 << 16
PART_BYTES = 1 << 18  # of a payload, in one read or write
JOINED_BYTES = 1 << 12  # what waits is joined up to here: many small frames cost no more than their bytes
# a poll: who sends without pause does not keep us from our work
MAX_READS = 512
MAX_POLL_BYTES = 8 << 20
_NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class ChannelClosed(Exception):
    """The other end is gone, or what it sent cannot be a frame; nothing more will arrive."""

    def __init__(self, message: str, channel: "Channel | None" = None) -> None:
        super().__init__(message)
        self.channel = channel


class Codec(NamedTuple):
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


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
    """Non-blocking: `send` queues what the socket does not take, `poll` returns what arrived.

    An SSLSocket that has not shaken hands yet does so here, before anything is sent or believed.
    """

    def __init__(self, sock: socket.socket, codec: Codec, *, name: str, accept_fds: bool = False) -> None:
        """accept_fds: only a Unix socket can; what comes while it is False is closed by the kernel."""
        sock.setblocking(False)
        self.name = name
        self.fds: deque[int] = deque()  # received, in order, owned by whoever takes them
        self.accept_fds = accept_fds
        self._sock = sock
        self._tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self._codec = codec
        self._inbox = bytearray()
        self._following: tuple[Any, memoryview] | None = None  # a message, and where the rest of its payload goes
        self._outbox: deque[memoryview] = deque()
        self._num_unsent = 0
        self._wakes_at = 1
        self._ended = ""  # why nothing more will arrive
        self._shaken = self._tls is None
        # TLS may have to write before it can read, and the other way round
        self._read_needs_write = self._write_needs_read = False

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        return self._read_needs_write or bool(self._outbox and not self._write_needs_read)

    @property
    def num_unsent(self) -> int:
        """Bytes that the socket did not take yet."""
        return self._num_unsent

    def received(self, message: Any) -> memoryview | None:
        """For a subclass: where the bytes that follow this message go, if any do."""
        return None

    def send(self, message: Any, fds: Sequence[int] = (), payload: memoryview | None = None) -> None:
        """Raises ChannelClosed if the other end is gone. `fds` go with the frame's first byte, `payload` behind it; it
        is not copied.
        """
        data = frame(self._codec.encode(message))
        if fds:
            # a handshake step: the frame is small and nothing is queued before it
            if self._outbox or socket.send_fds(self._sock, [data], list(fds)) != len(data):
                raise ChannelClosed(f"{self.name}: the socket is full, no fd was passed", self)
            return
        self._queue(data)
        if payload is not None:
            self._queue(payload)
        self.flush()

    def flush(self) -> None:
        if not self._shake():
            return
        while self._outbox:
            head = self._outbox[0]
            try:
                sent = self._sock.send(head[:PART_BYTES])
            except _NOT_NOW as error:
                self._write_needs_read = isinstance(error, ssl.SSLWantReadError)
                return
            except OSError as error:
                raise ChannelClosed(f"{self.name}: {error.strerror}", self) from error
            self._write_needs_read = False
            self._num_unsent -= sent
            if sent < len(head):
                self._outbox[0] = head[sent:]
            else:
                self._outbox.popleft()

    @property
    def pending(self) -> bool:
        """Whether something was read and not yet polled, of which the socket says nothing any more."""
        size = LENGTH.size
        if self._following:
            whole = not self._following[1]
        else:
            whole = len(self._inbox) >= size and len(self._inbox) >= size + LENGTH.unpack_from(self._inbox)[0]
        return whole or bool(self._tls and self._tls.pending())

    def poll(self, max_messages: int = 1 << 30) -> list[Any]:
        """Messages that arrived in full. Raises ChannelClosed once all of them were returned."""
        messages: list[Any] = []
        num_bytes = 0
        for _ in range(MAX_READS):
            self._take(messages, max_messages)
            if len(messages) >= max_messages or num_bytes >= MAX_POLL_BYTES or not (read := self._read()):
                break
            num_bytes += read
        self._wake_at(min(len(self._following[1]), PART_BYTES) if self._following else 1)
        if self._ended and not messages:
            raise ChannelClosed(f"{self.name}: {self._ended}", self)
        return messages

    def _wake_at(self, num_bytes: int) -> None:
        """Bytes that have come before a wait ends: of a payload, more than a segment. TLS has some with itself."""
        if num_bytes != self._wakes_at and not self._tls:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)
            self._wakes_at = num_bytes

    def drain(self, timeout_s: float) -> None:
        """Waits until everything queued was taken, or gives up."""
        self._sock.settimeout(timeout_s)
        try:
            if self._tls and not self._shaken:
                self._tls.do_handshake()
            for part in self._outbox:
                self._sock.sendall(part)
        except OSError:
            return  # nobody is left to read it
        self._outbox.clear()
        self._num_unsent = 0

    def close_fds(self, beyond: int = 0) -> None:
        """Those that nobody took, but for the first ones."""
        while len(self.fds) > beyond:
            os.close(self.fds.pop())

    def close(self) -> None:
        self.close_fds()
        self._sock.close()

    def _queue(self, data: bytes | memoryview) -> None:
        self._num_unsent += len(data)
        if self._outbox and len(self._outbox[-1]) + len(data) <= JOINED_BYTES:
            data = b"".join((self._outbox.pop(), data))
        self._outbox.append(memoryview(data))

    def _take(self, messages: list[Any], max_messages: int) -> None:
        """Adds what the inbox has in full."""
        at = 0
        while len(messages) < max_messages:
            if self._following:
                message, rest = self._following
                part = self._inbox[at : at + len(rest)]
                rest[: len(part)] = part
                at += len(part)
                if len(part) < len(rest):
                    self._following = message, rest[len(part) :]
                    break
                self._following = None
                messages.append(message)
                continue
            start = at + LENGTH.size
            if len(self._inbox) < start or len(self._inbox) < (end := start + frame_len(self._inbox, self, at)):
                break
            message = self._codec.decode(bytes(self._inbox[start:end]))
            at = end
            payload = self.received(message)
            if payload is None:
                messages.append(message)
            else:
                self._following = message, payload
        del self._inbox[:at]

    def _read(self) -> int:
        """Bytes that came; 0: none now, or none any more (`_ended`)."""
        if self._ended or not self._shake():
            return 0
        try:
            num_bytes = self._receive()
        except _NOT_NOW as error:
            self._read_needs_write = isinstance(error, ssl.SSLWantWriteError)
            return 0
        except OSError as error:
            self._ended = str(error) if isinstance(error, ssl.SSLError) else "the other end closed"
            return 0
        self._read_needs_write = False
        if not num_bytes:
            self._ended = "the other end closed"
        return num_bytes

    def _receive(self) -> int:
        if self._following:  # straight to its place
            message, rest = self._following
            num_bytes = self._sock.recv_into(rest[:PART_BYTES])
            self._following = message, rest[num_bytes:]
            return num_bytes
        if self.accept_fds:
            data, fds, _, _ = socket.recv_fds(self._sock, READ_BYTES, MAX_FDS)
            for fd in fds:
                os.set_inheritable(fd, False)
            self.fds.extend(fds)
            self.close_fds(beyond=MAX_FDS)
        else:
            data = self._sock.recv(READ_BYTES)
        self._inbox += data
        return len(data)

    def _shake(self) -> bool:
        """Whether hands are shaken. Raises ChannelClosed when they will not be."""
        if self._shaken:
            return True
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except _NOT_NOW as error:
            self._write_needs_read = isinstance(error, ssl.SSLWantReadError)
            self._read_needs_write = not self._write_needs_read
            return False
        except OSError as error:
            raise ChannelClosed(f"{self.name}: TLS: {error}", self) from error
        self._shaken, self._read_needs_write, self._write_needs_read = True, False, False
        return True


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
        if channel.pending:
            timeout_s = 0
    poller.poll(None if timeout_s is None else timeout_s * 1000)
    for channel in channels:
        channel.flush()
