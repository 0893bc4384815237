"""A model process that runs for itself (`pagewire serve --role prefill|decode`), on this machine or another."""

import asyncio
import time

import anyio

from pagewire.net.channel import ChannelClosed
from pagewire.net.tls import DOMAIN, Tls
from pagewire.serve.channel import AsyncChannel
from pagewire.serve.front.worker import Worker
from pagewire.serve.messages import Ready, WorkerMessage

DIAL_TIMEOUT_S = 10.0
ROLES = ("prefill", "decode")


def parse_peer(text: str) -> tuple[str, str, int]:
    """(role, host, port) of ROLE@HOST:PORT, a worker's control port. Raises ValueError."""
    role, _, where = text.partition("@")
    host, _, port = where.rpartition(":")
    if role not in ROLES or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"--peer: expected prefill@HOST:PORT or decode@HOST:PORT, got {text!r}")
    return role, host.strip("[]"), int(port)


class RemoteWorker(Worker):
    """What lives and ends here is the connection: the process outlives it, and waits for the next one."""

    @classmethod
    async def dial(cls, peer: str, tls: Tls | None) -> "RemoteWorker":
        """peer: as `parse_peer` takes it. Raises OSError, also when the certificate is not that of the role."""
        role, host, port = parse_peer(peer)
        name = role + DOMAIN if tls else None
        context = tls.context(server_side=False) if tls else None
        try:
            with anyio.fail_after(DIAL_TIMEOUT_S):
                streams = await asyncio.open_connection(host, port, ssl=context, server_hostname=name)
        except TimeoutError:
            raise TimeoutError(f"no connection within {DIAL_TIMEOUT_S:g} s") from None
        return cls(peer, AsyncChannel(*streams))

    def _hear(self, message: WorkerMessage) -> None:
        super()._hear(message)
        if isinstance(message, Ready):
            self._ahead_us = time.monotonic_ns() // 1000 - message.now_us
            if message.role != self.role:
                raise ChannelClosed(f"is a {message.role} process")
