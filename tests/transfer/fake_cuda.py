"""CUDA IPC without a GPU: `fake_libcuda.c` in the driver's place, its memory a CPU tensor."""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pagewire.transfer import cuda_ipc

SOURCE = Path(__file__).with_name("fake_libcuda.c")


def build(folder: Path) -> str:
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, SOURCE], check=True)
    return str(library)


def view(pointer: int, num_bytes: int, device: Any) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_ubyte * num_bytes).from_address(pointer), dtype=torch.uint8)


def install(library: str, put: Callable[[object, str, object], None] = setattr) -> None:
    """put: of a monkeypatch, where the process goes on."""
    gpu = SimpleNamespace(is_available=lambda: True, synchronize=lambda: None, current_device=lambda: 0)
    put(cuda_ipc, "LIBRARY", library)
    put(cuda_ipc, "torch", SimpleNamespace(cuda=gpu, device=torch.device))
    put(cuda_ipc, "_view", view)


def num_bytes(library: str) -> tuple[int, int]:
    """Allocated here, mapped here."""
    fake = ctypes.CDLL(library)
    return fake.fake_allocated(), fake.fake_mapped()
