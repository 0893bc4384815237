"""The control channel between the front and a worker: msgpack in the frames of `net.channel`, whose `Channel` is a
worker's side; `AsyncChannel` is the front's.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from pagewire.net.channel import LENGTH, Codec, frame, frame_len
from pagewire.serve.messages import FrontMessage, WorkerMessage

WORKER_CODEC = Codec(msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(FrontMessage).decode)
FRONT_CODEC = Codec(msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(WorkerMessage).decode)


class AsyncChannel:
    """The front: `send(message)`; `async for message in channel` until the worker is gone.

    What a worker does not read waits here, and only as messages that can still be taken back (`withdraw`): a worker
    that stands still costs no more than the requests that are waiting for it.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._waiting: deque[Any] = deque()
        self._pump: asyncio.Task[None] | None = None

    def send(self, message: Any) -> None:
        """Queues the message; a worker that is gone is reported by the reading side, not here."""
        if self._pump is None and self._writer.transport.get_write_buffer_size() == 0:
            self._write(message)
            return
        self._waiting.append(message)
        if self._pump is None:
            self._pump = asyncio.ensure_future(self._write_waiting())

    def withdraw(self, message: Any) -> bool:
        """Takes the message back if it has not left; whether it had not."""
        if waits := message in self._waiting:
            self._waiting.remove(message)
        return waits

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
            self._writer.write(frame(FRONT_CODEC.encode(message)))

    async def __aiter__(self) -> AsyncIterator[Any]:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                length = frame_len(await self._reader.readexactly(LENGTH.size))
                yield FRONT_CODEC.decode(await self._reader.readexactly(length))

    def abort(self) -> None:
        self._waiting.clear()
        self._writer.transport.abort()

    async def close(self) -> None:
        self._waiting.clear()
        self._writer.close()
        with contextlib.suppress(ConnectionError):  # the worker went first
            await self._writer.wait_closed()
