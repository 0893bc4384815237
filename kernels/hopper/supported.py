"""What the kernels here have in common: a GPU, dtypes and versions of Triton that they are for."""

from __future__ import annotations

import torch
import triton

from pagewire.kernels.launch import Device, Tensors
from pagewire.kernels.quant import FORMATS

_OLDEST, _NEWEST = (3, 6), (3, 9)


def unfit(t: Tensors, device: Device) -> str | None:
    """Why no kernel here takes an attention call."""
    if device.arch != 90:
        return f"sm_{device.arch} is not sm_90"
    if t.q.dtype not in (torch.float16, torch.bfloat16) or t.k_cache.dtype not in (t.q.dtype, *FORMATS):
        return f"{t.q.dtype} over {t.k_cache.dtype}: fp16 or bf16, over the same or 8 bits"
    found = tuple(map(int, triton.__version__.split(".")[:2]))
    if _OLDEST <= found <= _NEWEST:
        return None
    return f"Gluon kernels are tested with Triton 3.6 to 3.9, this is {triton.__version__}"
