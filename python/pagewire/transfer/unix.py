"""Frames over a Unix socket with an abstract name, between processes of one user: no file is left behind, and it ends
with the process. `shm` and `cuda_ipc` say what the staging slots are.
"""

import errno
import os
import secrets
import socket
import struct

from pagewire.transfer.frames import Hello
from pagewire.transfer.transport import BACKLOG, Listener, Transport


class UnixTransport(Transport):
    @classmethod
    def connect(cls, address: str, name: str) -> "UnixTransport":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(_abstract(address))
            expect_same_user(sock)
            return cls(sock, name, None)
        except OSError:
            sock.close()
            raise


class UnixListener(Listener):
    def __init__(self, scheme: str, hello: Hello, staging: tuple[int, int], name: str) -> None:
        address = f"{scheme}:{secrets.token_hex(16)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(_abstract(address))
        sock.listen(BACKLOG)
        super().__init__(sock, address, hello, staging, name)


def _abstract(address: str) -> str:
    return f"\0pagewire-{address.partition(':')[2]}"


def expect_same_user(sock: socket.socket) -> None:
    """Raises PermissionError."""
    _pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.getuid():
        raise PermissionError(errno.EPERM, "its address belongs to another user")
