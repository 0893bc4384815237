"""On one machine: the staging slots are a sealed memfd, which D creates and passes with its HELLO; P writes there, D
reads there.
"""

import fcntl
import os
import socket
from collections.abc import Sequence

from pagewire.transfer.frames import Frame, Hello
from pagewire.transfer.transport import STAGING_ALIGN, Staging, Transport
from pagewire.transfer.unix import UnixListener, UnixTransport, expect_same_user

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena(Staging):
    """Memory shared by two processes.

    The size is sealed: neither side can shrink the file under the other and fault it. What P writes
    there means nothing until a chunk names it and its checksum holds; no page of a cache lies here.
    """

    def __init__(self, fd: int, num_staging_slots: int, staging_slot_bytes: int) -> None:
        """Maps `fd`; the mapping needs it no longer. Raises ValueError unless it is a sealed file of that size."""
        expected = num_staging_slots * staging_slot_bytes
        if os.fstat(fd).st_size != expected or staging_slot_bytes % STAGING_ALIGN:
            raise ValueError(
                f"staging arena: expected {num_staging_slots} slots of {staging_slot_bytes} bytes, "
                f"got a file of {os.fstat(fd).st_size} bytes"
            )
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ValueError("staging arena: expected a memfd sealed against shrinking and growing")
        self.fd = fd
        super().__init__(num_staging_slots, staging_slot_bytes)

    @classmethod
    def create(cls, num_staging_slots: int, staging_slot_bytes: int) -> "Arena":
        fd = os.memfd_create("pagewire-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_staging_slots * staging_slot_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, num_staging_slots, staging_slot_bytes)
        except (OSError, ValueError):
            os.close(fd)
            raise


class ShmTransport(UnixTransport):
    def __init__(self, sock: socket.socket, name: str, staging: Staging | None) -> None:
        super().__init__(sock, name, staging)
        self.accept_fds = staging is None

    def greet(self, hello: Hello, fds: Sequence[int] = ()) -> None:
        assert isinstance(self.staging, Arena)
        try:
            super().greet(hello, [self.staging.fd])
        finally:
            os.close(self.staging.fd)  # the mapping stays

    def received(self, message: Frame) -> memoryview | None:
        self.accept_fds = False  # HELLO has brought its own
        return super().received(message)

    def open_staging(self, hello: Hello) -> None:
        try:
            if len(self.fds) != 1:
                raise ValueError(f"HELLO: expected the staging arena's descriptor, got {len(self.fds)}")
            self.staging = Arena(self.fds[0], hello.num_slots, hello.slot_bytes)
        finally:
            self.close_fds()


class ShmListener(UnixListener):
    def serve(self, sock: socket.socket) -> Transport:
        expect_same_user(sock)
        return ShmTransport(sock, self.name, Arena.create(*self.staging))
