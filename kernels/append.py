"""append_kv: new tokens into their slots, K and V and all heads in one launch, quantised on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels import error_codes as codes
from pagewire.kernels.device import current
from pagewire.kernels.errors import record_error
from pagewire.kernels.quant import as_stored, native_fp8, scale_kind
from pagewire.kernels.rows import (
    Stored,
    alignment,
    copy_chunks,
    load_real,
    row_strides,
    scale_strides,
    slot_bytes,
    store_real,
)

if TYPE_CHECKING:
    from pagewire.moves import Part

_APPEND_SLOT = tl.constexpr(codes.APPEND_SLOT)
_CHUNKS = 512  # per program of 128 threads: 4 independent 16-byte copies a thread
_TILE = 2048  # elements per program when quantising: 16 fp32 values a thread


def append_kv(
    k: Part,  # rows [num_tokens, num_kv_heads, head_dim], free strides
    v: Part,
    slot_mapping: Tensor,  # [<= num_tokens] int32 or int64; negative = skip
    error_word: Tensor,
    *,
    copy: bool,
) -> None:
    if k.rows.shape[1]:
        with current(k.rows.device):
            _launch(k, v, slot_mapping, error_word, copy)


def _launch(k_part: Part, v_part: Part, slot_mapping: Tensor, error_word: Tensor, copy: bool) -> None:
    k, v, k_cache, v_cache = k_part.rows, v_part.rows, k_part.caches[0], v_part.caches[0]
    k_scale, v_scale = (part.cache_scales[0] if part.cache_scales else None for part in (k_part, v_part))
    num_heads = k.shape[1]
    num_rows = slot_mapping.shape[0] * num_heads
    num_pages, page_size = k_cache.shape[:2]
    slots = _Slots(slot_mapping, slot_mapping.stride(0), num_rows, num_heads, num_pages * page_size, error_word)
    strides = [row_strides(x) for x in (k, v, k_cache, v_cache)]
    x_align = alignment(k.data_ptr(), v.data_ptr(), *strides[0], *strides[1])
    cache_align = alignment(k_cache.data_ptr(), v_cache.data_ptr(), *strides[2], *strides[3])
    sides = [
        _Side._make((x, *x_strides, as_stored(cache), *cache_strides, *_scale(scale, error_word)))
        for x, x_strides, cache, cache_strides, scale in (
            (k, strides[0], k_cache, strides[2], k_scale),
            (v, strides[1], v_cache, strides[3], v_scale),
        )
    ]
    if copy:
        k_bytes, v_bytes = (x.shape[-1] * x.element_size() for x in (k, v))
        align = alignment(x_align, cache_align, k_bytes, v_bytes)
        num_chunks = num_rows * max(k_bytes, v_bytes) // align
        _append_copy_kernel[(triton.cdiv(num_chunks, _CHUNKS), 2)](
            *sides, slots, PAGE_SIZE=page_size, K_BYTES=k_bytes, V_BYTES=v_bytes, ALIGN=align, CHUNKS=_CHUNKS
        )
        return
    width = triton.next_power_of_2(max(k.shape[-1], v.shape[-1]))
    rows = max(1, _TILE // width)
    given = Stored.of(k.dtype, "none", x_align)
    k_stored, v_stored = (Stored.of(k_cache.dtype, scale_kind(scale), cache_align) for scale in (k_scale, v_scale))
    _append_quantise_kernel[(triton.cdiv(num_rows, rows), 2)](
        *sides, slots, PAGE_SIZE=page_size, K_DIM=k.shape[-1], V_DIM=v.shape[-1], WIDTH=width, ROWS=rows,
        NATIVE=native_fp8(k.device), given=given, k_stored=k_stored, v_stored=v_stored,
    )  # fmt: skip


class _Side(NamedTuple):
    """New rows of K or V and the cache they go to; strides in bytes."""

    ptr: Any
    stride_token: int
    stride_head: int
    cache: Any
    stride_cache_page: int
    stride_cache_token: int
    stride_cache_head: int
    scale: Any  # the number, or a pointer
    stride_scale_page: int
    stride_scale_token: int
    stride_scale_head: int


class _Slots(NamedTuple):
    ptr: Any  # [num_tokens]
    stride: int  # in elements
    num_rows: int  # tokens times heads
    num_heads: int
    num_slots: int
    error_word: Any


def _scale(scale: Tensor | float | None, nothing: Tensor) -> tuple[Any, ...]:
    """The scale, strides of page, token and head."""
    if isinstance(scale, Tensor):
        return (scale, *scale_strides(scale.stride()))
    return (nothing if scale is None else float(scale), 0, 0, 0)


@triton.jit
def _append_copy_kernel(
    k,  # _Side
    v,
    slots,  # _Slots
    PAGE_SIZE: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """grid: [num_tiles, 2]; a program copies CHUNKS chunks of ALIGN bytes of K (0) or V (1), token-major.
    Bound by memory."""
    if tl.program_id(1) == 0:
        _copy_rows(k, slots, PAGE_SIZE, K_BYTES // ALIGN, ALIGN, CHUNKS)
    else:
        _copy_rows(v, slots, PAGE_SIZE, V_BYTES // ALIGN, ALIGN, CHUNKS)


@triton.jit
def _copy_rows(
    side, slots, PAGE_SIZE: tl.constexpr, ROW_CHUNKS: tl.constexpr, ALIGN: tl.constexpr, CHUNKS: tl.constexpr
):
    # the tile's first chunk in 64 bits, the rest relative to it in 32
    first = tl.program_id(0).to(tl.int64) * CHUNKS
    chunk = (first % ROW_CHUNKS).to(tl.int32) + tl.arange(0, CHUNKS)
    row = (first // ROW_CHUNKS).to(tl.int32) + chunk // ROW_CHUNKS
    column = (chunk % ROW_CHUNKS).to(tl.int64) * ALIGN
    source, target, _, _, fits = _locate(side, slots, row, column == 0, PAGE_SIZE)
    copy_chunks(source + column, target + column, fits, fits, ALIGN)


@triton.jit
def _append_quantise_kernel(
    k,  # _Side
    v,
    slots,  # _Slots
    PAGE_SIZE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    NATIVE: tl.constexpr,
    given: tl.constexpr,  # Stored
    k_stored: tl.constexpr,
    v_stored: tl.constexpr,
):
    """grid: [num_tiles, 2]; a program quantises ROWS (token, head) rows of K (0) or V (1). Bound by memory."""
    if tl.program_id(1) == 0:
        _quantise_rows(k, slots, PAGE_SIZE, K_DIM, WIDTH, ROWS, NATIVE, given, k_stored)
    else:
        _quantise_rows(v, slots, PAGE_SIZE, V_DIM, WIDTH, ROWS, NATIVE, given, v_stored)


@triton.jit
def _quantise_rows(
    side,
    slots,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    NATIVE: tl.constexpr,
    given: tl.constexpr,
    stored: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source, target, slot, head, fits = _locate(side, slots, row, row >= 0, PAGE_SIZE)
    width_ok = (tl.arange(0, WIDTH) < DIM)[None, :]
    x = load_real(source, source, fits, width_ok, WIDTH, NATIVE, given)
    if stored.SCALE == "value":
        store_real(x, target, side.scale, fits, width_ok, NATIVE, stored)
    else:
        address = side.scale.to(tl.int64) + head.to(tl.int64) * side.stride_scale_head
        address += slot_bytes(slot, side.stride_scale_page, side.stride_scale_token, PAGE_SIZE)
        store_real(x, target, address.to(tl.pointer_type(tl.float32)), fits, width_ok, NATIVE, stored)


@triton.jit
def _locate(side, slots, row, reports, PAGE_SIZE: tl.constexpr):
    """Of (token, head) rows [N]: byte addresses of source and target, slot (0 where none), head, whether it fits."""
    token, head = row // slots.num_heads, row % slots.num_heads
    mask = row < slots.num_rows
    slot = tl.load(slots.ptr + token.to(tl.int64) * slots.stride, mask=mask, other=-1).to(tl.int64)  # < 0: skip
    fits = (slot >= 0) & (slot < slots.num_slots)
    if tl.program_id(1) == 0:  # K reports for both
        record_error(slots.error_word, _APPEND_SLOT, 0, token, (slot >= slots.num_slots) & (head == 0) & reports)
    slot = tl.where(fits, slot, 0)
    source = side.ptr.to(tl.int64) + token.to(tl.int64) * side.stride_token + head.to(tl.int64) * side.stride_head
    target = side.cache.to(tl.int64) + slot_bytes(slot, side.stride_cache_page, side.stride_cache_token, PAGE_SIZE)
    return source, target + head.to(tl.int64) * side.stride_cache_head, slot, head, fits
