"""The roof of this machine, measured in the same run: how fast it copies, reads and multiplies matrices."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.bench.timing import Clock

_GPU_BYTES, _CPU_BYTES, _SMOKE_BYTES = 1 << 30, 256 << 20, 1 << 20
_SECONDS = 1.0  # of each measurement, at most


@dataclass(frozen=True)
class Roof:
    copy_gbps: float  # bytes read plus bytes written
    read_gbps: float
    tflops: dict[torch.dtype, float]  # of a square matrix product with inputs of that dtype

    def memory(self, kind: str, device: str) -> float:
        """GB/s that a case of kind "read" or "copy" is held against.

        A GPU reads as fast as it copies, and the copy is the truer measurement of the two; a CPU does not.
        """
        if kind == "read" and device == "cpu":
            return self.read_gbps
        return max(self.copy_gbps, self.read_gbps) if kind == "read" else self.copy_gbps

    def compute(self, dtype: torch.dtype) -> float:
        """TFLOP/s; values may be widened to fp32, so the fp32 product is a roof of the narrow dtypes too."""
        return max(self.tflops.get(dtype, 0.0), self.tflops[torch.float32])

    def time_us(self, num_bytes: int, flops: int, kind: str, dtype: torch.dtype, device: str) -> float:
        """The time below which no version goes: the slower of moving the bytes and computing."""
        moving = num_bytes / self.memory(kind, device) / 1e3
        return max(moving, flops / self.compute(dtype) / 1e6)

    def __str__(self) -> str:
        products = ", ".join(f"{str(d).removeprefix('torch.')} {t:.3g}" for d, t in self.tflops.items())
        return f"copy {self.copy_gbps:.1f} GB/s, read {self.read_gbps:.1f} GB/s, matmul TFLOP/s: {products}"


def measure(clock: Clock, *, smoke: bool = False) -> Roof:
    """A few seconds on a CPU, less on a GPU. Random data: zeros run faster than any real input."""
    device = clock.device
    size = _SMOKE_BYTES if smoke else _GPU_BYTES if device == "cuda" else _CPU_BYTES
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copied = _best(clock, lambda: target.copy_(source))
    # several ways to read everything once: the fastest is nearest to the machine
    read = min(_best(clock, reader) for reader in _readers(source))
    side = 128 if smoke else 8192 if device == "cuda" else 1536
    tflops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(side, side, device=device).to(dtype)
        tflops[dtype] = 2 * side**3 / _best(clock, functools.partial(torch.matmul, a, a)) / 1e6
    return Roof(2 * size / copied / 1e3, size / read / 1e3, tflops)


def _readers(source: Tensor) -> tuple[Callable[[], object], ...]:
    rows = source.view(-1, 1024)
    ones = torch.ones(1024, device=source.device)
    return lambda: source.sum(), lambda: torch.dot(source, source), lambda: torch.mv(rows, ones)


def _best(clock: Clock, call: Callable[[], object]) -> float:
    """Median µs."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + _SECONDS
    while len(times) < 3 or (len(times) < 15 and time.perf_counter() < stop):
        times.append(clock.time(call)[0])
    return sorted(times)[len(times) // 2]
