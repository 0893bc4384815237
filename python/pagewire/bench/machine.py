"""Where a figure was measured: device, clocks, versions, commit. A figure without them is an anecdote."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from pagewire.version import __version__

MIB = 1 << 20
_MIN_COLD = 256 * MIB  # bytes to walk through before a byte is touched again


class Machine(NamedTuple):
    """One machine and one state of the code; every CSV row carries all of it."""

    device: str  # the model, in the maker's words
    arch: str  # sm_90, x86_64
    threads: int
    clocks: str  # MHz at the time of writing
    python: str
    torch: str
    triton: str
    pagewire: str
    commit: str
    date: str


def describe(device: str) -> Machine:
    gpu = device == "cuda"
    return Machine(
        device=torch.cuda.get_device_name() if gpu else _cpu_model(),
        arch="sm_{}{}".format(*torch.cuda.get_device_capability()) if gpu else platform.machine(),
        threads=torch.get_num_threads(),
        clocks=_gpu_clocks() if gpu else _cpu_clocks(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=version("triton"),
        pagewire=__version__,
        commit=_commit(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cold_bytes(device: str) -> int:
    """After this many other bytes the last-level cache holds nothing of what was read before."""
    if device == "cuda":
        return max(_MIN_COLD, 4 * torch.cuda.get_device_properties().L2_cache_size)
    return max(_MIN_COLD, int(2.5 * _last_level_cache()))


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, _group_limit())
    return 4 << 30


def _group_limit() -> int:
    """What the memory control group leaves, where there is one."""
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    return int(limit) - int(used) if limit.isdigit() and used.isdigit() else 1 << 60


def _last_level_cache() -> int:
    sizes = [_read(str(p)) for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * 1024 for s in sizes if s.endswith("K")), default=32 * MIB)


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_clocks() -> str:
    mhz = [float(x.partition(":")[2]) for x in _read("/proc/cpuinfo").splitlines() if x.startswith("cpu MHz")]
    return f"cpu {max(mhz):.0f}" if mhz else "unknown"


def _gpu_clocks() -> str:
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0"]
    found = _output(query).splitlines()
    if not found or found[0].count(",") != 4:
        return "unknown"
    sm, memory, limit, watts, celsius = (part.strip() for part in found[0].split(","))
    return f"sm {sm} of {limit} mem {memory} {watts} W {celsius} C"


def _commit() -> str:
    """PAGEWIRE_COMMIT, else git's, with `+` when the tree has uncommitted changes; a wheel knows only its version."""
    given = os.environ.get("PAGEWIRE_COMMIT")
    if given:
        return given
    here = Path(__file__).resolve().parent
    root = next((p for p in here.parents if (p / ".git").exists()), None)
    if root is None:
        return "unknown"
    commit = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return (commit or "unknown") + ("+" if changed else "")


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
