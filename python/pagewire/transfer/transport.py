"""What carries frames and payloads between P and D: the interface of `shm`, `cuda_ipc` and `tcp`, and addresses that
name one.

D listens and P connects. D's HELLO goes first, with its staging slots; P's Transport has slots once that is opened. On
either side slot i means the same: P packs into its own and sends the CHUNK; when D has the CHUNK, the payload lies in
D's, until the CREDIT for it.
"""

import contextlib
import mmap
import socket
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from pagewire.net.channel import Channel, ChannelClosed, Codec
from pagewire.net.tls import Tls
from pagewire.transfer.codec import ConnectionLost, FrameCodec
from pagewire.transfer.frames import ChecksumKind, Chunk, Frame, Hello

STAGING_ALIGN = 64  # bytes; also the alignment of every packed buffer's start
BACKLOG = 4  # connections that wait to be accepted
MAX_STAGING_BYTES = 1 << 34  # that a peer may make us map


class Staging:
    """`num_staging_slots` x `staging_slot_bytes` of memory; here, of this process's own."""

    fd = -1  # of the file that is mapped; -1: none
    reach = b""  # HELLO.staging: how P reaches D's, where that takes words

    def __init__(self, num_staging_slots: int, staging_slot_bytes: int) -> None:
        """Raises ValueError on an impossible size, OSError when there is no memory."""
        self.num_bytes = num_bytes = num_staging_slots * staging_slot_bytes
        if not 0 < num_bytes <= MAX_STAGING_BYTES or staging_slot_bytes % STAGING_ALIGN:
            raise ValueError(
                f"staging: expected 1 to {MAX_STAGING_BYTES} bytes in slots of a multiple of {STAGING_ALIGN}, "
                f"got {num_staging_slots} slots of {staging_slot_bytes} bytes"
            )
        self.num_staging_slots = num_staging_slots
        self.staging_slot_bytes = staging_slot_bytes
        self._bytes = self._map(num_bytes)
        self._slots = self._bytes.view(num_staging_slots, staging_slot_bytes).unbind()

    def _map(self, num_bytes: int) -> Tensor:
        return torch.frombuffer(mmap.mmap(self.fd, num_bytes), dtype=torch.uint8)  # it keeps the mapping

    def staging_slot(self, index: int) -> Tensor:
        """uint8 [staging_slot_bytes], always the same view."""
        return self._slots[index]

    def pin(self) -> str | None:
        """Lets GPUs write host memory by themselves for as long as it is here; or why not: it is then slower."""
        if self._bytes.is_cuda:
            return None
        cudart, address = torch.cuda.cudart(), self._bytes.data_ptr()
        try:
            torch.cuda.check_error(cudart.cudaHostRegister(address, self._bytes.nbytes, 0))
        except RuntimeError as error:
            with contextlib.suppress(RuntimeError):  # the next launch would raise it again
                torch.ones(1, device="cuda")
            return str(error)
        weakref.finalize(self, cudart.cudaHostUnregister, address)
        return None


class Transport(Channel):
    """One connection: frames both ways, payloads from P to D. A CHUNK that is sent takes the payload in its slot along;
    one that `poll` returns has it there. Raises ChannelClosed or ConnectionLost once it is over.
    """

    payload_follows = False  # its CHUNK, on the stream; otherwise P can write D's slots at any time
    checksum_kind: ChecksumKind = "crc32c"  # of payloads: one that is cheap where the staging slots are

    def __init__(self, sock: socket.socket, name: str, staging: Staging | None) -> None:
        """staging: of D; None: this is P's."""
        codec = FrameCodec()
        super().__init__(sock, Codec(codec.encode, codec.decode), name=name)
        self.staging = staging
        self._pushes = staging is None

    def open_staging(self, hello: Hello) -> None:
        """P: as D's HELLO says. Raises ValueError or OSError when it is not so."""
        self.staging = Staging(hello.num_slots, hello.slot_bytes)

    def greet(self, hello: Hello, fds: Sequence[int] = ()) -> None:
        """D: its HELLO, with its staging slots."""
        assert self.staging is not None
        num_slots, slot_bytes = self.staging.num_staging_slots, self.staging.staging_slot_bytes
        reach = self.staging.reach
        self.send(msgspec.structs.replace(hello, num_slots=num_slots, slot_bytes=slot_bytes, staging=reach), fds)

    def received(self, message: Frame) -> memoryview | None:
        if not isinstance(message, Chunk):
            return None
        if self._pushes:
            raise ConnectionLost("CHUNK: D sent one, only P does")
        payload = self.payload(message)
        return payload.numpy().data if self.payload_follows else None

    def payload(self, chunk: Chunk) -> Tensor:
        """uint8 [payload_bytes], at the head of its slot. Raises ConnectionLost when there is no such place."""
        number = self.staging.num_staging_slots if self.staging else 0
        if self.staging is None or chunk.slot >= number:
            raise ConnectionLost(f"CHUNK: slot: expected one of {number}, got {chunk.slot}")
        most = self.staging.staging_slot_bytes
        if chunk.payload_bytes > most:
            raise ConnectionLost(f"CHUNK: payload_bytes: expected at most {most}, got {chunk.payload_bytes}")
        return self.staging.staging_slot(chunk.slot)[: chunk.payload_bytes]


class Listener(ABC):
    """D's: who connects is sent its HELLO."""

    def __init__(self, sock: socket.socket, address: str, hello: Hello, staging: tuple[int, int], name: str) -> None:
        """staging: (num_staging_slots, staging_slot_bytes) for each connection; address: for `connect`."""
        sock.setblocking(False)
        self.address, self.hello, self.staging, self.name = address, hello, staging, name
        self.problem = ""  # why the last one that was not served was not
        self._sock = sock

    def accept(self) -> Transport | None:
        """Of one that waits, if any does. One that cannot be served is closed."""
        self.forget()
        try:
            sock, _ = self._sock.accept()
        except OSError:  # none is waiting, or we have no descriptor for it: it waits on
            return None
        transport = None
        try:
            transport = self.serve(sock)
            transport.greet(self.hello)
            return transport
        except (OSError, ChannelClosed) as error:  # no memory or descriptor, not one of ours, gone
            self.problem = str(error)
            (transport or sock).close()
            return None

    @abstractmethod
    def serve(self, sock: socket.socket) -> Transport:
        """Raises OSError."""

    def forget(self) -> None:
        """Lets go of what closed connections have used, where that outlives them."""
        return None

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()
        self.forget()


def listen(
    address: str, hello: Hello, staging: tuple[int, int], *, name: str = "P", tls: Tls | None = None
) -> Listener:
    """address: "unix:", "cuda-ipc:", "tcp://host:port" with port 0 for any, or "nixl+tcp://…". Raises ValueError or
    OSError.
    """
    from pagewire.transfer import cuda_ipc, nixl, shm, tcp

    if address == "unix:":
        return shm.ShmListener("unix", hello, staging, name)
    if address == "cuda-ipc:":
        return cuda_ipc.CudaIpcListener("cuda-ipc", hello, staging, name)
    if address.startswith("nixl+"):
        return nixl.NixlListener(address.removeprefix("nixl+"), hello, staging, name, tls)
    return tcp.TcpListener(address, hello, staging, name, tls)


def connect(address: str, *, name: str = "D", tls: Tls | None = None) -> Transport:
    """P's, to a Listener's `address`; it may still be under way. Raises ValueError or OSError."""
    from pagewire.transfer import cuda_ipc, nixl, shm, tcp

    if address.startswith("unix:"):
        return shm.ShmTransport.connect(address, name)
    if address.startswith("cuda-ipc:"):
        return cuda_ipc.CudaIpcTransport.connect(address, name)
    if address.startswith("nixl+"):
        return nixl.NixlTransport.connect(address.removeprefix("nixl+"), name, tls)
    return tcp.TcpTransport.connect(address, name, tls)
