"""Rotary position embedding, half-split: element i is paired with element i + head_dim / 2."""

import math

import torch
from torch import Tensor

from pagewire.serve.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair: fp32 [head_dim / 2], scaling applied, on the CPU.

    In fp32 throughout, as models are trained: at position 8000 fp64 would differ by 5e-4 rad.
    """
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "factors":
        return frequencies / torch.tensor(scaling.factors, dtype=torch.float32, device="cpu")
    # llama3: long wavelengths are stretched by factor, short ones kept, those between blended.
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_context / wavelengths
    keep = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), each fp32 [num_tokens, 1, head_dim / 2], of positions [num_tokens], integers."""
    angles = positions.float()[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [num_tokens, num_heads, head_dim] rotated in fp32 and returned in its own dtype."""
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
