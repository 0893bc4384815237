"""Counters that a kernel wants to find at zero, without a launch that sets them: int32, two of each for every stream.

A call counts in the one half and leaves zeros in the other one for the call after it. Graphs may replay side by side:
what is captured gets counters of its own, set to zero within the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagewire.kernels.device import is_capturing

_PER_THREAD_STREAM = 2  # cudaStreamPerThread, one handle for many streams
# (device, stream) -> (counters of the next call, of the one after it)
_halves: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def counters(device: torch.device, stream: int, count: int) -> tuple[Tensor, Tensor]:
    """([>= count] of zeros, as many that the call has to leave at zero)"""
    if is_capturing(device) or stream == _PER_THREAD_STREAM:
        return _zeros(device, count)
    halves = _halves.get((device, stream))
    if halves is None or len(halves[0]) < count:
        halves = _zeros(device, count)
    ours, next_ones = halves
    _halves[device, stream] = next_ones, ours
    return ours, next_ones


def _zeros(device: torch.device, count: int) -> tuple[Tensor, Tensor]:
    """Both on a boundary of 16 bytes, for which kernels are compiled."""
    with torch.inference_mode(False):  # kept for calls in any mode
        a, b = torch.zeros(2, -(-count // 4) * 4, dtype=torch.int32, device=device)
    return a, b
