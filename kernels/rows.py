"""Rows of a cache or a packed buffer as int64 byte addresses, and how tiles of them are loaded and stored.

Addresses come out of tables and 64-bit products, so the compiler cannot see how they are aligned: the launcher says so
(ALIGN, bytes, a power of two <= 16), and the hints below turn it into 16-byte accesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.quant import ELEMENTS, format_of, from_float32, quantise, to_float32, token_head_scale

VECTOR_BYTES = 16


def alignment(*byte_offsets: int) -> int:
    """The largest power of two <= 16 that divides every offset."""
    bits = VECTOR_BYTES
    for offset in byte_offsets:
        bits |= offset
    return bits & -bits


def row_strides(x: Tensor) -> tuple[int, ...]:
    """Byte strides of all dims but the last."""
    return byte_strides(x.shape[:-1], x.stride()[:-1], x.element_size())


def byte_strides(shape: Sequence[int], stride: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """0 where the extent is 1: such a stride is never used and need not be aligned."""
    return tuple(s * itemsize if n > 1 else 0 for n, s in zip(shape, stride, strict=True))


def scale_strides(stride: Sequence[int]) -> tuple[int, ...]:
    """Byte strides (page, token, head) of an fp32 scale `[]`, `[num_heads]` or `[num_pages, page_size, num_heads]`."""
    return (0,) * (3 - len(stride)) + tuple(4 * s for s in stride)


@triton.jit
def tile_pointers(
    addresses,  # int64 [ROWS], bytes
    ELEMENT: tl.constexpr,
    WIDTH: tl.constexpr,  # elements
    ALIGN: tl.constexpr,
):
    """Pointers [ROWS, WIDTH]; every row starts on an ALIGN-byte boundary."""
    pointers = addresses.to(tl.pointer_type(ELEMENT))[:, None] + tl.arange(0, WIDTH)[None, :]
    return tl.max_contiguous(tl.multiple_of(pointers, [1, ALIGN]), [1, WIDTH])


@triton.jit
def copy_chunks(
    source,  # int64 [N], byte address of a chunk of ALIGN bytes
    target,  # int64 [N]
    readable,  # int1 [N]; elsewhere zeros are copied
    writable,  # int1 [N]
    ALIGN: tl.constexpr,
):
    ELEMENT: tl.constexpr = tl.int32 if ALIGN >= 4 else (tl.int16 if ALIGN == 2 else tl.int8)
    WIDTH: tl.constexpr = ALIGN // 4 if ALIGN >= 4 else 1
    values = tl.load(tile_pointers(source, ELEMENT, WIDTH, ALIGN), mask=readable[:, None], other=0)
    tl.store(tile_pointers(target, ELEMENT, WIDTH, ALIGN), values, mask=writable[:, None])


class Stored(NamedTuple):
    """How a cache, a packed buffer or new rows store their values; for the compiler."""

    ELEMENT: str  # name of a tl.dtype; the dtype itself cannot be told to Triton's jit_cache_hook (3.6, 3.9)
    FORMAT: str
    SCALE: str  # quant.scale_kind
    ALIGN: int  # bytes

    @classmethod
    def of(cls, dtype: torch.dtype, scale: str, align: int) -> Stored:
        return cls(ELEMENTS[dtype].name, format_of(dtype), scale, align)

    @property
    def num_bytes(self) -> int:
        return element(self.ELEMENT).primitive_bitwidth // 8  # type: ignore[no-any-return]


@triton.constexpr_function
def element(name: str) -> tl.dtype:
    return tl.dtype(name)


@triton.jit
def load_real(addresses, scales, rows, width_ok, WIDTH: tl.constexpr, NATIVE: tl.constexpr, stored: tl.constexpr):
    """stored * scale, fp32 [ROWS, WIDTH], 0 where masked. scales: pointers [ROWS]."""
    NAME: tl.constexpr = stored.ELEMENT
    ELEMENT: tl.constexpr = element(NAME)
    FORMAT: tl.constexpr = stored.FORMAT
    ALIGN: tl.constexpr = stored.ALIGN
    x = tl.load(tile_pointers(addresses, ELEMENT, WIDTH, ALIGN), mask=rows[:, None] & width_ok, other=0)
    x = to_float32(x, FORMAT, NATIVE)
    if stored.SCALE != "none":
        x = x * tl.load(scales, mask=rows, other=1.0)[:, None]
    return x


@triton.jit
def store_real(x, addresses, scales, rows, width_ok, NATIVE: tl.constexpr, stored: tl.constexpr):
    """x: fp32 [ROWS, WIDTH]. scales: pointers [ROWS], or the "value"; per token they are written, otherwise read."""
    NAME: tl.constexpr = stored.ELEMENT
    ELEMENT: tl.constexpr = element(NAME)
    FORMAT: tl.constexpr = stored.FORMAT
    ALIGN: tl.constexpr = stored.ALIGN
    WIDTH: tl.constexpr = x.shape[1]
    if stored.SCALE == "none":
        values = from_float32(x, ELEMENT)
    else:
        if stored.SCALE == "value":
            scale = scales + tl.zeros([x.shape[0]], tl.float32)
        elif stored.SCALE == "token":
            scale = token_head_scale(x, FORMAT)
            tl.store(scales, scale, mask=rows)
        else:
            scale = tl.load(scales, mask=rows, other=1.0)
        values = quantise(x, scale[:, None], FORMAT, NATIVE)
    tl.store(tile_pointers(addresses, ELEMENT, WIDTH, ALIGN), values, mask=rows[:, None] & width_ok)


@triton.jit
def slot_bytes(slot, stride_page, stride_token, PAGE_SIZE: tl.constexpr):
    """slot: int64 >= 0 -> int64 byte offset of its row of heads; strides in bytes."""
    return (slot // PAGE_SIZE) * stride_page + (slot % PAGE_SIZE) * stride_token
