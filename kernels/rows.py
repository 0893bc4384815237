"""Rows of a cache or a packed buffer as int64 byte addresses, and how tiles of them are loaded and stored.

Addresses come out of tables and 64-bit products, so the compiler cannot see how they are aligned: the launcher says so
(ALIGN, bytes, a power of two <= 16), and the hints below turn it into 16-byte accesses.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def slot_bytes(slot, stride_page, stride_token, PAGE_SIZE: tl.constexpr):
    """slot: int64 >= 0 -> int64 byte offset of its row of heads; strides in bytes."""
    return (slot // PAGE_SIZE) * stride_page + (slot % PAGE_SIZE) * stride_token
