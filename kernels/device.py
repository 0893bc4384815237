"""What CUDA asks of the current device is asked of the tensors' own."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one, as Triton's launches want it; free when it already is."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of `device`, which need not be the current device, is being captured into a graph."""
    if device.type != "cuda":
        return False
    with current(device):
        return torch.cuda.is_current_stream_capturing()
