"""A model process that runs for itself (`pagewire serve --role prefill|decode`), on this machine or another."""

import asyncio
import time
from typing import NamedTuple

import msgspec

from pagewire.net.channel import ChannelClosed
from pagewire.net.tls import Tls
from pagewire.serve.channel import AsyncChannel
from pagewire.serve.front.worker import Worker
from pagewire.serve.messages import Events, Ready, WorkerMessage

DIAL_TIMEOUT_S = 10.0
ROLES = ("prefill", "decode")


def at(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Address(NamedTuple):
    """Of a worker's control port."""

    role: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """ROLE@HOST:PORT. Raises ValueError."""
        role, _, where = text.partition("@")
        host, _, port = where.rpartition(":")
        if role not in ROLES or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"--peer: expected prefill@HOST:PORT or decode@HOST:PORT, got {text!r}")
        return cls(role, host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"{self.role}@{at(self.host, self.port)}"

    @property
    def url(self) -> str:
        return f"tcp://{at(self.host, self.port)}"


class RemoteWorker(Worker):
    """What lives and ends here is the connection: the process outlives it, and waits for the next one."""

    _ahead_us = 0  # of our clock, which is another machine's

    @classmethod
    async def dial(cls, address: Address, tls: Tls | None) -> "RemoteWorker":
        """Raises OSError, also when the certificate is not that of the role."""
        name = f"{address.role}.pagewire" if tls else None
        context = tls.context(server_side=False) if tls else None
        opening = asyncio.open_connection(address.host, address.port, ssl=context, server_hostname=name)
        try:
            reader, writer = await asyncio.wait_for(opening, DIAL_TIMEOUT_S)
        except asyncio.TimeoutError:  # noqa: UP041 (on 3.10 it is not the builtin)
            raise TimeoutError(f"no connection within {DIAL_TIMEOUT_S:g} s") from None
        return cls(address.role, str(address), AsyncChannel(reader, writer))

    def dated(self, events: Events) -> Events:
        return Events(
            [
                msgspec.structs.replace(event, role=self.name, start_us=event.start_us + self._ahead_us)
                for event in events.events
            ]
        )

    def _hear(self, message: WorkerMessage) -> None:
        super()._hear(message)
        if isinstance(message, Ready):
            self._ahead_us = time.monotonic_ns() // 1000 - message.now_us
            if message.role != self.role:
                raise ChannelClosed(f"is a {message.role} process")

    async def _bury(self) -> None:
        await self.channel.close()

    def end(self) -> None:
        self._kill()

    def obituary(self) -> str:
        if self._killed_for:
            return f"{self.name} {self._killed_for} and was dropped"
        return f"{self.name} {self.last_words or 'closed the connection'}"

    def _kill(self) -> None:
        self.channel.abort()
