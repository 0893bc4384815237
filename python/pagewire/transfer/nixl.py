"""Over NIXL (RDMA, or what UCX finds): P WRITEs a payload from its slot into the same of D's; when that is done, the
CHUNK follows. Frames, addresses and TLS are `tcp`'s; what NIXL moves is not encrypted.
"""

import contextlib
import os
import secrets
import socket
import struct
import time
from collections import deque
from typing import Any

from pagewire.net.channel import ChannelClosed, frame
from pagewire.net.tls import Tls
from pagewire.transfer.frames import Chunk, Frame, Hello
from pagewire.transfer.tcp import TcpListener, TcpTransport
from pagewire.transfer.transport import Staging, Transport

_BASE = struct.Struct("<Q")  # of D's arena, first in HELLO.staging; then how NIXL reaches it
_P_HAS_NOT_CLOSED = (1, 4, 5)  # TCP_ESTABLISHED, FIN_WAIT1, FIN_WAIT2


class NixlError(ChannelClosed, OSError):
    """What NIXL refuses, or says of a peer that is gone."""


class NixlTransport(TcpTransport):
    payload_follows = False  # it is in its slot
    _agent: Any = None

    def __init__(self, sock: socket.socket, name: str, staging: Staging | None) -> None:
        super().__init__(sock, name, staging)
        self._waiting: deque[tuple[Frame, Any]] = deque()  # and the WRITE to be done before it

    @property
    def wants_write(self) -> bool:
        return bool(self._waiting) or super().wants_write

    def register(self) -> None:
        """Its slots, with an agent of its own; they say how to reach them. Raises NixlError."""
        assert self.staging is not None
        self._agent, self._base = new_agent(), self.staging.staging_slot(0).data_ptr()
        region = self._tried(self._agent.register_memory, [(self._base, self.staging.num_bytes, 0, "")], "DRAM")
        self.staging.reach = _BASE.pack(self._base) + self._tried(self._agent.get_partial_agent_metadata, region, True)

    def open_staging(self, hello: Hello) -> None:
        super().open_staging(hello)
        if len(hello.staging) <= _BASE.size:
            raise ValueError(f"HELLO: staging: expected NIXL's metadata, got {len(hello.staging)} bytes")
        self.register()
        (self._target_base,) = _BASE.unpack_from(hello.staging)
        self._target = self._tried(self._agent.add_remote_agent, hello.staging[_BASE.size :])

    def send(self, message: Frame, fds: Any = (), payload: memoryview | None = None) -> None:
        if self._ended:  # D's socket may take what D reads no more
            raise ChannelClosed(f"{self.name}: {self._ended}", self)
        write = None
        if isinstance(message, Chunk):
            slot, agent = self.payload(message), self._agent
            there = slot.data_ptr() - self._base + self._target_base
            sides = (agent.get_xfer_descs([(at, len(slot), 0)], "DRAM") for at in (slot.data_ptr(), there))
            write = self._tried(agent.initialize_xfer, "WRITE", *sides, self._target)
            self._tried(agent.transfer, write)
            self._num_unsent += len(slot)
        self._waiting.append((message, write))
        self.flush()

    def flush(self) -> None:
        while self._waiting:
            message, write = self._waiting[0]
            if isinstance(message, Chunk):
                if self._tried(self._agent.check_xfer_state, write) != "DONE":  # it raises when it never will be
                    break
                self._num_unsent -= message.payload_bytes
            self._waiting.popleft()
            self._queue(frame(self._codec.encode(message)))
        super().flush()

    def drain(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(ChannelClosed):
            while self._waiting and time.monotonic() < deadline:
                self.flush()
        super().drain(timeout_s)

    def close(self) -> None:
        """P disconnects its agent before its socket: once D has no agent and sees that closed, nothing writes into the
        arena. To deregister it stops no WRITE, neither one under way nor P's next.
        """
        self._waiting.clear()
        with contextlib.suppress(AttributeError, NixlError):
            self._tried(self._agent.remove_remote_agent, self._target)
        self._agent = None
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)  # the listener has it, too
        super().close()

    def _tried(self, call: Any, *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:  # NIXL's have no base of their own
            reason = str(error)
        raise NixlError(f"{self.name}: NIXL: {reason}", self)  # out there: NIXL's error would keep the agent


class NixlListener(TcpListener):
    def __init__(self, address: str, hello: Hello, staging: tuple[int, int], name: str, tls: Tls | None) -> None:
        new_agent()  # that there can be one
        self._arenas: list[tuple[socket.socket, Staging | None]] = []
        super().__init__(address, hello, staging, name, tls)
        self.address = f"nixl+{self.address}"

    def serve(self, sock: socket.socket) -> Transport:
        tcp = super().serve(sock)
        transport = NixlTransport(tcp._sock, self.name, tcp.staging)
        transport.register()
        self._arenas.append((socket.socket(fileno=os.dup(tcp.fileno())), tcp.staging))
        return transport

    def forget(self) -> None:
        """Arenas of connections that P has closed: they are D's alone, if it has not closed them, too."""
        for sock, arena in self._arenas[:]:
            if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] not in _P_HAS_NOT_CLOSED:
                sock.close()
                self._arenas.remove((sock, arena))


def new_agent() -> Any:
    try:
        from nixl import nixl_agent, nixl_agent_config

        return nixl_agent(secrets.token_hex(8), nixl_agent_config(backends=["UCX"]))
    except Exception as error:  # NIXL's have no base of their own
        raise NixlError(f"NIXL: {error}; is it installed (pip install pagewire[nixl])?") from error
