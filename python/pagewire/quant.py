"""The one quantising formula: `x / scale` in fp32, round to nearest even, saturate; NaN is 0x7F in fp8, 0 in int8."""

from __future__ import annotations

import torch
from torch import Tensor

from pagewire.types import QUANT_MAX


def quantise(x: Tensor, scale: Tensor | float | None, dtype: torch.dtype) -> Tensor:
    """`x` as `dtype`. fp8 and int8 divide by `scale` (broadcast) and saturate; float dtypes are a plain cast."""
    if dtype not in QUANT_MAX:
        return x.to(dtype)
    limit = QUANT_MAX[dtype]
    y = x.float()
    if scale is not None:
        y = y / _divisor(scale, y.device)
    if dtype == torch.int8:
        return y.nan_to_num(nan=0.0, posinf=limit, neginf=-limit).round().clamp(-limit, limit).to(torch.int8)
    # a GPU's division forgets a NaN's sign, a CPU's keeps it
    return y.clamp(-limit, limit).masked_fill(y.isnan(), torch.nan).to(dtype)


def dequantise(x: Tensor, scale: Tensor | float | None) -> Tensor:
    """`stored * scale` in fp32."""
    y = x.float()
    return y if scale is None else y * scale


def token_head_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 scale per row of the last dim: amax over the finite values / largest stored value; 1 where that is 0."""
    magnitude = x.float().abs()
    amax = torch.where(magnitude.isfinite(), magnitude, 0.0).amax(-1)
    scale = amax / _divisor(QUANT_MAX[dtype], amax.device)
    return torch.where(scale == 0, 1.0, scale)


def _divisor(value: Tensor | float, device: torch.device) -> Tensor:
    """On a GPU torch divides by a Python number as `x * (1 / value)`, which is not the IEEE quotient."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float32, device=device)
