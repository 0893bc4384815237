"""Between two processes on one GPU: the staging slots are device memory of D's, which P maps by CUDA IPC and packs
into. HELLO says how; the frames cross a Unix socket as with `shm`. The device is torch's current one.

Order. A CHUNK leaves when P's kernels have written its slot: `Packing.pack` reads the checksum, which the same stream
computed behind them. A CREDIT leaves when D's have read it: `Packing.unpack` reads the checksum of its own copy.

Lifetimes. To free memory that another process has mapped is undefined. P unmaps and then closes its socket; if it is
killed, driver and kernel do both. So D keeps the memory of a closed connection until P's end of it is closed as well,
and looks for that when it accepts or closes one.
"""

import contextlib
import ctypes
import select
import socket
import uuid
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pagewire.net.channel import ChannelClosed
from pagewire.transfer.frames import ChecksumKind, Frame, Hello
from pagewire.transfer.transport import Staging, Transport
from pagewire.transfer.unix import UnixListener, UnixTransport, expect_same_user

LIBRARY = "libcuda.so.1"
GRANULE = 2 << 20  # the driver puts smaller allocations next to each other, and a handle opens all of them
HANDLE_BYTES, UUID_BYTES = 64, 16
_LAZY_PEER_ACCESS = ctypes.c_uint(1)  # the one flag there is; it has to be given


class _Handle(ctypes.Structure):  # passed by value
    _fields_ = [("data", ctypes.c_ubyte * HANDLE_BYTES)]


class DeviceStaging(Staging):
    """Slots in device memory until `close`: allocated here by D, or D's as P sees them."""

    def __init__(self, num_staging_slots: int, staging_slot_bytes: int, reach: bytes | None = None) -> None:
        """reach: HELLO.staging of a D, its IPC handle and its GPU's UUID; None: this is D.

        Raises OSError when the driver refuses, with the driver's reason, and ValueError for another GPU.
        """
        self._of_d, self._pointer = reach, ctypes.c_uint64()
        super().__init__(num_staging_slots, staging_slot_bytes)

    def _map(self, num_bytes: int) -> Tensor:
        device, name = _device()
        if self._of_d is None:
            _call("cuMemAlloc_v2", ctypes.byref(self._pointer), ctypes.c_size_t(-(-num_bytes // GRANULE) * GRANULE))
            handle = ctypes.create_string_buffer(HANDLE_BYTES)
            try:
                _call("cuIpcGetMemHandle", handle, self._pointer)
            except OSError:
                self.close()
                raise
            self.reach = handle.raw + name
        elif len(self._of_d) != HANDLE_BYTES + UUID_BYTES:
            raise ValueError(f"HELLO: staging: expected {HANDLE_BYTES + UUID_BYTES} bytes, got {len(self._of_d)}")
        elif (gpu := self._of_d[HANDLE_BYTES:]) != name:
            here, there = (f"GPU-{uuid.UUID(bytes=of)}" for of in (name, gpu))
            raise ValueError(f"cuda-ipc: expected P and D on one GPU, got {here} here and {there} there")
        else:
            theirs, expected = _Handle.from_buffer_copy(self._of_d), "expected memory of D, another process that lives"
            _call("cuIpcOpenMemHandle_v2", ctypes.byref(self._pointer), theirs, _LAZY_PEER_ACCESS, problem=expected)
        return _view(self._pointer.value, num_bytes, device)

    def close(self) -> None:
        """No slot may be used any more. What a device that has failed does not give back goes with the process."""
        with contextlib.suppress(OSError, RuntimeError):
            _device()
            _call("cuMemFree_v2" if self._of_d is None else "cuIpcCloseMemHandle", self._pointer)


class CudaIpcTransport(UnixTransport):
    checksum_kind: ChecksumKind = "fletcher64"
    listener: "CudaIpcListener | None" = None  # D's

    def open_staging(self, hello: Hello) -> None:
        self.staging = DeviceStaging(hello.num_slots, hello.slot_bytes, hello.staging)

    def send(self, message: Frame, fds: Sequence[int] = (), payload: memoryview | None = None) -> None:
        if self._ended:  # the socket would take it: D still waits for our end of it
            raise ChannelClosed(f"{self.name}: {self._ended}", self)
        super().send(message, fds, payload)

    def close(self) -> None:
        staging, self.staging = self.staging, None
        if isinstance(staging, DeviceStaging):
            if self.listener is None:
                staging.close()
            else:
                sock = socket.socket(fileno=self._sock.detach())
                with contextlib.suppress(OSError):  # P has closed its end
                    sock.shutdown(socket.SHUT_WR)
                self.listener.kept.append((sock, staging))
                self.listener.forget()
        super().close()


class CudaIpcListener(UnixListener):
    def __init__(self, scheme: str, hello: Hello, staging: tuple[int, int], name: str) -> None:
        _device()  # where there is none, no P needs to try
        super().__init__(scheme, hello, staging, name)
        self.kept: list[tuple[socket.socket, DeviceStaging]] = []  # of closed connections

    def forget(self) -> None:
        for sock, staging in self.kept[:]:
            poller = select.poll()
            poller.register(sock, 0)  # for hang-ups only
            if poller.poll(0):
                self.kept.remove((sock, staging))
                staging.close()
                sock.close()

    def serve(self, sock: socket.socket) -> Transport:
        expect_same_user(sock)
        transport = CudaIpcTransport(sock, self.name, DeviceStaging(*self.staging))
        transport.listener = self
        return transport


def _device() -> tuple[torch.device, bytes]:
    """And its UUID. Its context is this thread's then, for the driver to act in, and nothing is in flight."""
    if not torch.cuda.is_available():
        raise OSError("cuda-ipc: expected a GPU, torch sees none")
    torch.cuda.synchronize()
    device, name = ctypes.c_int(), ctypes.create_string_buffer(UUID_BYTES)
    _call("cuCtxGetDevice", ctypes.byref(device))
    _call("cuDeviceGetUuid_v2", name, device)
    return torch.device("cuda", torch.cuda.current_device()), name.raw


def _call(function: str, *args: Any, problem: str = "the driver refused") -> None:
    """Raises OSError with the driver's name for what is wrong."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise OSError(f"cuda-ipc: expected NVIDIA's driver: {error}") from error
    if code := getattr(library, function)(*args):
        name = ctypes.c_char_p()
        library.cuGetErrorName(code, ctypes.byref(name))
        raise OSError(f"cuda-ipc: {problem}: {function}: {(name.value or b'an error without a name').decode()}")


def _view(pointer: int, num_bytes: int, device: torch.device) -> Tensor:
    """Of memory that is not torch's own: that is parts of larger allocations, and a handle would open all of one."""
    memory = SimpleNamespace()
    memory.__cuda_array_interface__ = {"shape": (num_bytes,), "typestr": "|u1", "data": (pointer, False), "version": 2}
    return torch.as_tensor(memory, device=device)
