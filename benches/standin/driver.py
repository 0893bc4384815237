"""Triton's own CUDA driver and C launcher over a stand-in libcuda: all of a launch but the kernel, without a GPU."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

NAME = "libcuda.so.1"


def build(folder: Path) -> None:
    """The library, from libcuda.c beside this file, into `folder`. Needs gcc and an installed Triton, whose cuda.h it
    includes."""
    import triton.backends.nvidia

    include = Path(triton.backends.nvidia.__path__[0]) / "include"
    source = Path(__file__).with_name("libcuda.c")
    command = ["gcc", "-O1", "-shared", "-fPIC", f"-I{include}", f"-Wl,-soname,{NAME}", str(source)]
    subprocess.run([*command, "-o", str(folder / NAME)], check=True)


def environment(folder: Path) -> dict[str, str]:
    """What a process needs so that Triton links to the library in `folder`, and finds it."""
    path = os.pathsep.join(p for p in (str(folder), os.environ.get("LD_LIBRARY_PATH", "")) if p)
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": path}


def library() -> ctypes.CDLL:
    """In a process with `environment()`."""
    return ctypes.CDLL(str(Path(os.environ["TRITON_LIBCUDA_PATH"]) / NAME))


def activate() -> Callable[[], int]:
    """Makes the stand-in Triton's device in this process, which has `environment()`; returns the count of launches."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.driver import driver

    count = ctypes.c_long.in_dll(library(), "standin_launches")

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:  # torch, which the base class asks, sees no device
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher

        def get_device_capability(self, device: int) -> tuple[int, int]:
            return 9, 0

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Driver())
    return lambda: count.value
