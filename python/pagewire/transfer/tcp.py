"""Between machines: staging slots of each side's own; a CHUNK's payload follows its frame on the stream, from a slot
of the one into the same of the other. In clear only to this machine itself, over TLS to any.
"""

import errno
import os
import socket
from typing import Any

from pagewire.net.tls import Tls, at, prepare, resolve, secure
from pagewire.transfer.frames import Chunk, Frame, Hello
from pagewire.transfer.transport import BACKLOG, Listener, Staging, Transport


class TcpTransport(Transport):
    payload_follows = True

    @classmethod
    def connect(cls, address: str, name: str, tls: Tls | None) -> "TcpTransport":
        """address: of an IP, since a name's look-up may block."""
        family, where = resolve(address, tls, socket.AI_NUMERICHOST)
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if tls:
                sock = secure(tls.context(server_side=False), sock, "decode", server_side=False)
            prepare(sock)
            code = sock.connect_ex(where)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
            return cls(sock, name, None)
        except (OSError, ValueError):
            sock.close()
            raise

    def send(self, message: Frame, fds: Any = (), payload: memoryview | None = None) -> None:
        if isinstance(message, Chunk):
            payload = self.payload(message).numpy().data
        super().send(message, payload=payload)


class TcpListener(Listener):
    def __init__(self, address: str, hello: Hello, staging: tuple[int, int], name: str, tls: Tls | None) -> None:
        family, where = resolve(address, tls)
        self._context = tls.context(server_side=True) if tls else None
        sock = socket.create_server(where, family=family, backlog=BACKLOG)
        super().__init__(sock, f"tcp://{at(*sock.getsockname()[:2])}", hello, staging, name)

    def serve(self, sock: socket.socket) -> Transport:
        prepare(sock)
        if self._context:
            sock = secure(self._context, sock, "prefill", server_side=True)
        return TcpTransport(sock, self.name, Staging(*self.staging))
