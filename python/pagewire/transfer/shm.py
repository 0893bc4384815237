"""The staging arena: a sealed memfd of equal staging slots; D creates it, P writes and D reads."""

import fcntl
import mmap
import os

import torch
from torch import Tensor

STAGING_ALIGN = 64  # bytes; also the alignment of every packed buffer's start
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena:
    """`num_staging_slots` x `staging_slot_bytes` of memory shared by two processes.

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
        self.num_staging_slots = num_staging_slots
        self.staging_slot_bytes = staging_slot_bytes
        self._memory = mmap.mmap(fd, expected)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    @classmethod
    def create(cls, num_staging_slots: int, staging_slot_bytes: int) -> "Arena":
        fd = os.memfd_create("pagewire-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, num_staging_slots * staging_slot_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return cls(fd, num_staging_slots, staging_slot_bytes)

    def staging_slot(self, index: int) -> Tensor:
        """uint8 [staging_slot_bytes], a view."""
        return self._bytes[index * self.staging_slot_bytes : (index + 1) * self.staging_slot_bytes]
