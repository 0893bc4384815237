"""Number formats as bits, written once more: fp8 by enumerating its 256 codes. Shares no code with pagewire."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

TORCH = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8,
}  # fmt: skip
FLOATS = ("fp32", "bf16", "fp16")
QUANTISED = ("e4m3", "e5m2", "int8")
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}  # finite stored value
ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # half an ulp of 1
SMALLEST = {"fp32": 2.0**-126, "fp16": 2.0**-24, "bf16": 2.0**-126}  # subnormal fp32 may be flushed
OVERFLOW = {"fp32": 2.0**128 - 2.0**103, "fp16": 65520.0, "bf16": 2.0**128 - 2.0**119}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "e4m3": 1, "e5m2": 1, "int8": 1}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits(view: Tensor) -> np.ndarray:
    """The tensor's elements as unsigned integers, sharing its memory and strides."""
    size = view.element_size()
    return view.view(_SIGNED[size]).numpy().view(_UNSIGNED[size])


@functools.cache
def codes(dtype: str) -> np.ndarray:
    """[256] fp64: the value of each fp8 code."""
    exponent_bits, mantissa_bits = {"e4m3": (4, 3), "e5m2": (5, 2)}[dtype]
    bias, top = 2 ** (exponent_bits - 1) - 1, 2**exponent_bits - 1
    values = np.empty(256)
    for code in range(256):
        sign = -1.0 if code & 128 else 1.0
        exponent, mantissa = (code & 127) >> mantissa_bits, code & (2**mantissa_bits - 1)
        fraction = mantissa / 2**mantissa_bits
        if exponent:
            value = (1 + fraction) * 2.0 ** (exponent - bias)
        else:
            value = fraction * 2.0 ** (1 - bias)
        if dtype == "e4m3" and code & 127 == 127:  # fn: one NaN, no infinity
            value = np.nan
        if dtype == "e5m2" and exponent == top:
            value = np.nan if mantissa else np.inf
        values[code] = sign * value
    return values


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Unsigned integers -> fp64, exact."""
    stored = np.ascontiguousarray(stored)
    with np.errstate(all="ignore"):  # a signalling NaN is an "invalid value"
        return _decode(stored, dtype)


def _decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in ("e4m3", "e5m2"):
        return codes(dtype)[stored]
    if dtype == "int8":
        return stored.view(np.int8).astype(np.float64)
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.view({"fp32": np.float32, "fp16": np.float16}[dtype]).astype(np.float64)


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 -> unsigned integers: round to nearest even; fp8 and int8 saturate, keep NaN (int8: 0)."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    if dtype == "fp32":
        return x.view(np.uint32)
    if dtype == "fp16":
        with np.errstate(all="ignore"):
            return x.astype(np.float16).view(np.uint16)
    if dtype == "bf16":
        return _bf16(x)
    limit = LARGEST[dtype]
    clipped = np.clip(x.astype(np.float64), -limit, limit)
    if dtype == "int8":
        return np.rint(np.nan_to_num(clipped, nan=0.0)).astype(np.int8).view(np.uint8)
    found = _nearest(np.abs(clipped), dtype) | np.signbit(x) * 128
    return np.where(np.isnan(x), 0x7F, found).astype(np.uint8)


def _bf16(x: np.ndarray) -> np.ndarray:
    wide = x.view(np.uint32).astype(np.uint64)
    rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _nearest(magnitude: np.ndarray, dtype: str) -> np.ndarray:
    """The positive code closest to each magnitude <= LARGEST; of two as close, the even one."""
    values = codes(dtype)[:128]
    values = values[np.isfinite(values)]
    magnitude = np.nan_to_num(magnitude)
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    below = above - 1
    down, up = magnitude - values[below], values[above] - magnitude
    odd = below % 2 == 1
    return np.where((down < up) | ((down == up) & ~odd), below, above)


def same(got: np.ndarray, expected: np.ndarray, dtype: str) -> np.ndarray:
    """Elementwise: equal bits, or both NaN (a conversion does not promise a NaN's sign and payload)."""
    return (got == expected) | (np.isnan(decode(got, dtype)) & np.isnan(decode(expected, dtype)))
